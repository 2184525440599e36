"""Loading takes the memory of the tensors it keeps, and little more: measured in a fresh process.

Checkpoints of official names and shapes are written here tensor by tensor, in every container that can be mapped.
The full size (2.2 B parameters, up to 9 GB on disk, a minute or two each) runs with `-m slow`:

    pytest -m slow -s tests/unit/test_loading_memory.py
"""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from heatkv_cli.config import compose
from heatkv_cli.models.infinity.tokenizer import Codes, Tokenizer, TokenizerConfig
from heatkv_cli.models.infinity.transformer import Infinity, InfinityConfig

LIMIT = 1.15
ROOT = Path(__file__).parents[2]
SMALL = [
    "model.num_layers=2",
    "model.num_heads=8",
    "model.params.width=1024",
    "model.params.block_chunks=2",
    "model.params.tokenizer.base_channels=32",
    "resolution=0.06M",
    "force_resolution=true",
]
Shapes = dict[str, tuple[int, ...]]
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}

CHILD = """
import json, sys, threading, time, torch
from heatkv_cli.config import compose
from heatkv_cli.models.infinity import load
from heatkv_cli.planning.job import load_model

def memory():
    fields = (line.split() for line in open("/proc/self/status"))
    return {f[0]: 1024 * int(f[1]) for f in fields if f[0] in ("RssAnon:", "RssFile:")}

with torch.device("meta"):
    torch.nn.Embedding(1, 1)  # torch imports 80 MB of Python for the first random number on meta: imports, too
run = compose(sys.argv[1:]).first
roles = {"transformer", "tokenizer"}
folder = run.weights
files = {f.role: folder / f.name for f in run.model.weights.files if f.role in roles}
before, seen, stop = memory()["RssAnon:"], [], threading.Event()

def watch():
    while not stop.is_set():
        seen.append(memory())
        time.sleep(0.001)

watcher = threading.Thread(target=watch)
watcher.start()
clock = time.perf_counter()
model = load_model(run, files)
seconds = time.perf_counter() - clock
stop.set(); watcher.join()
tensors = {n: t for part in (model.transformer, model.tokenizer) for n, t in part.state_dict().items()}
print(json.dumps({
    "seconds": seconds, "samples": len(seen), "parameters": sum(t.numel() for t in tensors.values()),
    "kept": sum(t.nbytes for t in tensors.values()) + model.rope.nbytes,
    "peak": max(m["RssAnon:"] for m in seen) - before, "mapped": max(m["RssFile:"] for m in seen),
    "sums": {n: t.double().sum().item() for n, t in tensors.items() if t.numel() < 100_000},
}))
"""


def shapes(net: nn.Module) -> Shapes:
    return {name: tuple(t.shape) for name, t in net.state_dict().items()}


def fill(name: str, tensor: torch.Tensor) -> None:
    """Numbers that differ from tensor to tensor."""
    tensor.uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(len(name)))


def write_flat(path: Path, tensors: Shapes, dtype: torch.dtype, under: str = "") -> None:
    """`torch.save` of a state dict that is never in memory: space first, then each tensor through the mapped file."""
    with FakeTensorMode():
        empty = {name: torch.empty(shape, dtype=dtype) for name, shape in tensors.items()}
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save({under: empty} if under else empty, path)
    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
        mapped = torch.load(path, mmap=True, weights_only=True)
    for name, tensor in (mapped[under] if under else mapped).items():
        fill(name, tensor)


def write_safetensors(path: Path, tensors: Shapes, dtype: torch.dtype) -> None:
    """The format by hand: header length, header, numbers."""
    header, at = {}, 0
    for name, shape in tensors.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name, shape in tensors.items():
            tensor = torch.empty(shape, dtype=dtype)
            fill(name, tensor)
            f.write(tensor.view(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")


def write_shards(path: Path, tensors: Shapes, dtype: torch.dtype) -> None:
    path.mkdir()
    names, where = list(tensors), {}
    for i in range(4):
        shard = f"model-{i + 1:05d}-of-00004.safetensors"
        part = names[i * len(names) // 4 : (i + 1) * len(names) // 4]
        write_safetensors(path / shard, {name: tensors[name] for name in part}, dtype)
        where |= dict.fromkeys(part, shard)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}), encoding="utf-8")


def load_measured(
    folder: Path, overrides: Sequence[str], write: Callable[[Path, Shapes, torch.dtype], None], dtype: torch.dtype
) -> dict[str, float]:
    """Write a checkpoint for the config, load it in a fresh process, and return what that process saw."""
    options = ["model=infinity-2b", f"weights={folder}", "model.weights.verify=false", *overrides]
    model = compose(options).first.model
    params = dict(model.params)
    pixels = dict(params["tokenizer"])
    codes = Codes(pixels["bits"], pixels.pop("patch"))
    shape = InfinityConfig(
        model.num_layers,
        params["width"],
        model.num_heads,
        params["block_chunks"],
        codes,
        params["text_channels"],
        params["text_length"],
    )
    with torch.device("meta"):
        net, vae = Infinity(shape), Tokenizer(TokenizerConfig(**pixels | {"multipliers": tuple(pixels["multipliers"])}))
    files = {f.role: folder / f.name for f in model.weights.files}
    write(files["transformer"], shapes(net), dtype)
    write_flat(files["tokenizer"], shapes(vae), torch.float32, "vae")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *options], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    seen: dict[str, float] = json.loads(done.stdout)
    for name, total in seen.pop("sums").items():  # type: ignore[attr-defined]
        from_file = torch.float32 if name.startswith(("encoder.", "decoder.")) else dtype
        tensor = torch.empty(shapes(net).get(name) or shapes(vae)[name], dtype=from_file)
        fill(name, tensor)
        kept = tensor.to(torch.bfloat16) if name.startswith("block_chunks.") else tensor
        assert total == pytest.approx(kept.double().sum().item(), abs=1e-6), name
    print(
        f"\n{write.__name__} {dtype}: {seen['parameters'] / 1e9:.3f} B numbers, kept {seen['kept'] / 2**20:.0f} MiB, "
        f"peak {seen['peak'] / 2**20:.0f} MiB = {seen['peak'] / seen['kept']:.4f} x, {seen['seconds']:.0f} s"
    )
    return seen


WAYS = [
    (write_flat, torch.bfloat16),
    (write_flat, torch.float32),
    (write_shards, torch.bfloat16),
    (write_shards, torch.float32),
]
linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")


@linux
@pytest.mark.parametrize(("write", "dtype"), WAYS[1:3])
def test_loading_takes_what_it_keeps(tmp_path: Path, write, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    seen = load_measured(tmp_path, SMALL, write, dtype)
    assert 100e6 < seen["kept"] < 400e6 and seen["samples"] > 20
    assert seen["peak"] > 0.9 * seen["kept"]  # or it was not measured
    assert seen["peak"] <= LIMIT * seen["kept"]


@linux
@pytest.mark.slow
@pytest.mark.parametrize(("write", "dtype"), WAYS)
def test_so_it_is_at_the_size_of_2b(tmp_path: Path, write, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    try:
        seen = load_measured(tmp_path, [], write, dtype)
    finally:
        for path in tmp_path.rglob("*.*"):
            if path.is_file():
                path.unlink()
    assert seen["parameters"] > 2.3e9  # with the tokenizer
    assert 0.9 * seen["kept"] < seen["peak"] <= LIMIT * seen["kept"]
