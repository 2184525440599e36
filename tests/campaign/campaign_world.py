"""What every case of the campaign meets: a user's files, and a folder in which every stage has been before.

All of it is small and sound. `CLEAN` are commands over it that work; a case is one of them with something put wrong.
"""

from __future__ import annotations

import csv
import json
import random
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from sandbox import Sandbox

SIDE = 32
PROMPTS = ("a red square", "a blue circle", "a green triangle")
LAYERS, HEADS, SOURCES = 8, 8, 6
"""The bundled model's, as its page in conf/model has them: 8 scales, the first a sink, the last never stored."""

STREAMING = ("method=streaming", "budget=0.2", "--limit", "2", "runtime.batch_size=2")
LITE0 = ("metric=fd_efficientnet_lite0", "metric.fd_efficientnet_lite0.min_images=2")
OUT = ("--out", "@out@")

CLEAN: dict[str, tuple[str, ...]] = {
    "calibrate": ("calibrate", *OUT),
    "schedule": ("build-schedule", "budget=0.1", *OUT),
    "eval": ("eval", *STREAMING, "metric=kl,psnr,psnr_layout,shapes", "contact_sheet=2", *OUT),
    "generate": ("generate", "budget=0.1", "--limit", "1", *OUT),
    "bench": ("bench", "method=streaming", "budget=0.2", "repeats=1", "warmup=0", *OUT),
    "score": ("score", "--images", "@files@/pictures", "--reference", "@files@/reference", "metric=psnr,ssim", *OUT),
    "fd": ("score", "--images", "@files@/pictures", "--reference", "@files@/reference", *LITE0, *OUT),
    "formats": (
        "score",
        "--images",
        "@files@/formats",
        "--reference",
        "@files@/formats-reference",
        "metric=psnr",
        *OUT,
    ),
}
"""Commands that the world was made with, by a name of their own."""


def picture(seed: int) -> Image.Image:
    """A picture that no two seeds share."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))


def make_world(sandbox: Sandbox) -> None:
    """Lay out files, run every stage once, and keep what that leaves."""
    sandbox.lay_out()
    files, out = sandbox.place / "files", sandbox.place / "out"
    _pictures(files)
    _lists(files)
    _weights(files / "weights")
    for name, argv in CLEAN.items():
        if name == "calibrate":
            continue  # it also makes calibrations to compare with; the schedule's is the only one then
        ended = sandbox.run(argv, timeout=120)
        assert ended.code == 0, f"{name}: {ended.stderr}"
    for kind in ("calibration", "schedule"):
        shutil.copy2(sorted(out.glob(f"{kind}*/*/{kind}.safetensors"))[0], files)
    sandbox.keep()


def _pictures(files: Path) -> None:
    for folder, first in (("pictures", 0), ("reference", 100)):
        (files / folder).mkdir()
        for i in range(4):
            picture(first + i).save(files / folder / f"{i:05}.png")
    for folder, first in (("formats", 200), ("formats-reference", 300)):
        (files / folder).mkdir()
        for i, ending in enumerate(("png", "jpg", "webp", "bmp")):
            picture(first + i).save(files / folder / f"{ending}.{ending}", quality=95)
    dimension = 1280  # of the features of efficientnet-lite0
    np.savez_compressed(
        files / "statistics.npz", mu=np.zeros(dimension, np.float32), sigma=np.eye(dimension, dtype=np.float32)
    )


def _lists(files: Path) -> None:
    rows = [{"id": f"p{i}", "prompt": prompt} for i, prompt in enumerate(PROMPTS)]
    (files / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    (files / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (files / "prompts.csv").open("w", newline="") as handle:
        writer = csv.DictWriter(handle, ("id", "prompt"))
        writer.writeheader()
        writer.writerows(rows)
    (files / "rewrites.json").write_text(json.dumps({prompt: f"{prompt}, large" for prompt in PROMPTS}))
    order = [[head, layer] for head in range(HEADS) for layer in range(LAYERS)]
    draw = random.Random(0)
    orders = [draw.sample(order, len(order)) for _ in range(SOURCES)]
    (files / "orders.json").write_text(json.dumps(orders))
    official = {
        "coco-captions": {
            "images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(3)],
            "annotations": [{"image_id": i, "caption": prompt} for i, prompt in enumerate(PROMPTS)],
        },
        "image-reward": rows,
        "mjhq": {f"m{i}": {"prompt": prompt, "category": "animals"} for i, prompt in enumerate(PROMPTS)},
    }
    for name, content in official.items():
        (files / f"{name}.json").write_text(json.dumps(content))
    (files / "hpdv2").mkdir()
    for style in ("anime", "concept-art", "paintings", "photo"):
        (files / "hpdv2" / f"{style}.json").write_text(json.dumps(list(PROMPTS)))
    (files / "dpg").mkdir()
    for i, prompt in enumerate(PROMPTS):
        (files / "dpg" / f"{i}.txt").write_text(prompt)


def _weights(folder: Path) -> None:
    """Files under the names of published weights, with tensors of no network."""
    folder.mkdir()
    tensors = {"a": torch.zeros(4, 4), "b": torch.ones(3)}
    for name in ("infinity_2b_reg.pth", "infinity_vae_d32reg.pth", "plain.pth"):
        torch.save(tensors, folder / name)
    save_file(tensors, folder / "plain.safetensors")
    (folder / "flan-t5-xl").mkdir()
    for name in ("config.json", "tokenizer.json"):
        (folder / "flan-t5-xl" / name).write_text("{}")
