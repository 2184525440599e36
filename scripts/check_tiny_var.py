"""Score the shipped tiny-var beside what it must beat, and lay 10 x 10 of its pictures side by side.

    python scripts/check_tiny_var.py     # gates.csv and sheet.png in runs/tiny-var; needs Fashion-MNIST, see --data

Gates: class accuracy of its pictures at least 0.85; their Frechet distance well below that of noise and of real
pictures whose pixels are permuted. The floor is the distance of real training pictures to the real test set, at the
same number of pictures.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from fashion_net import (
    CLASSES,
    DATA,
    GEOMETRY,
    SAMPLING,
    SIZES,
    TOKENIZER,
    TRANSFORMER,
    Classifier,
    pixels,
    read_fashion,
)
from fashion_score import sample, score
from heatkv_cli.models.var.load import load
from heatkv_cli.models.var.model import VarModel
from train_tiny import log_row
from train_tiny_var import ASSETS


def shipped(folder: Path) -> tuple[VarModel, Classifier, tuple[Tensor, Tensor]]:
    """The model, the classifier, and mean and covariance of the test set's features."""
    fields = dataclasses.asdict(TOKENIZER)
    files = {"model": folder / "tiny-var.safetensors"}
    model = load(
        GEOMETRY, files, "cpu", TRANSFORMER.width, fields, TRANSFORMER.classes, TRANSFORMER.shared, TRANSFORMER.l2_norm
    )
    tensors, judging = load_file(folder / "fashion.safetensors"), Classifier()
    weights = {name.removeprefix("classifier."): t.float() for name, t in tensors.items() if name.startswith("class")}
    judging.load_state_dict(weights, strict=False)
    return model, judging.eval(), (tensors["test.mean"], tensors["test.covariance"])


def check(a: argparse.Namespace) -> None:
    """One row for the model's pictures and for each thing to compare them with, and the sheet."""
    model, judging, statistics = shipped(a.to)
    pictures, classes = sample(model.transformer, model.tokenizer, a.per_class, SAMPLING)
    torch.manual_seed(a.seed)
    images, labels = read_fashion(a.data, "train")
    index = torch.cat([(labels == c).nonzero()[: a.per_class, 0] for c in range(len(CLASSES))])
    real, real_classes = images[index], labels[index]
    again, _ = model.tokenizer.encode(pixels(real), SIZES)
    order = torch.randperm(32 * 32)
    rows = {
        "tiny-var": (pictures, classes),
        "tiny-var, labels shuffled": (pictures, classes[torch.randperm(len(classes))]),
        "real": (real, real_classes),
        "real, through the tokenizer": (model.decode(again).float().mean(-1).round().byte()[:, None], real_classes),
        "real, pixels permuted": (real.flatten(2)[..., order].view_as(real), real_classes),
        "noise": (torch.randint(0, 256, real.shape, dtype=torch.uint8), real_classes),
    }
    for name, (some, their) in rows.items():
        log_row(a.out / "gates.csv", {"pictures": name, "n": len(some)} | score(judging, some, their, statistics))
    sheet = pictures[:100].view(10, 10, 32, 32).permute(1, 2, 0, 3).reshape(320, 320)
    Image.fromarray(sheet.numpy()).save(a.out / "sheet.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=ASSETS, help="where the shipped files are")
    parser.add_argument("--out", type=Path, default=Path("runs/tiny-var"))
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--per-class", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    check(a)


if __name__ == "__main__":
    main()
