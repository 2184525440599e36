"""Score the shipped tiny-var beside what it must beat, and lay 10 x 10 of its pictures side by side.

    python scripts/check_tiny_var.py     # gates.csv and contact-sheet.png in results/tiny-var

It needs Fashion-MNIST, see --data. Gates: class accuracy of the model's pictures at least 0.85, and that of shuffled
labels near 0.1; their Frechet distance far below that of noise and of real pictures whose pixels are permuted. The
floor is the distance of as many real training pictures to the real test set.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from fashion_net import (
    DATA,
    GEOMETRY,
    SAMPLING,
    SIZES,
    TOKENIZER,
    TRANSFORMER,
    pixels,
    read_fashion,
)
from fashion_score import grey, sample, score
from heatkv_cli.metrics.fashion.network import CLASSES, Classifier
from heatkv_cli.models.var.load import load
from heatkv_cli.models.var.model import VarModel
from train_tiny_var import ASSETS


def shipped(folder: Path) -> tuple[VarModel, Classifier, tuple[Tensor, Tensor]]:
    """The model, the classifier, and mean and covariance of the test set's features."""
    c, files = TRANSFORMER, {"model": folder / "tiny-var.safetensors"}
    model = load(GEOMETRY, files, "cpu", c.width, TOKENIZER, c.classes, c.shared, c.l2_norm)
    tensors, judging = load_file(folder / "fashion.safetensors"), Classifier()
    prefix = "classifier."
    weights = {name.removeprefix(prefix): t.float() for name, t in tensors.items() if name.startswith(prefix)}
    judging.load_state_dict(weights, strict=False)  # the number of training steps of the norms is not shipped
    return model, judging.eval(), (tensors["test.mean"], tensors["test.covariance"])


def check(a: argparse.Namespace) -> None:
    """One row for the model's pictures and for each thing to compare them with, and the sheet."""
    model, judging, statistics = shipped(a.to)
    pictures, classes = sample(model, a.per_class, SAMPLING)
    torch.manual_seed(a.seed)
    images, labels = read_fashion(a.data, "train")
    index = torch.cat([(labels == c).nonzero()[: a.per_class, 0] for c in range(len(CLASSES))])
    real, real_classes = images[index], labels[index]
    again, _ = model.tokenizer.encode(pixels(real), SIZES)
    order = torch.randperm(32 * 32)
    compared = {
        "tiny-var": (pictures, classes),
        "tiny-var, labels shuffled": (pictures, classes[torch.randperm(len(classes))]),
        "real (training set)": (real, real_classes),
        "real, through the tokenizer": (grey(model.decode(again)), real_classes),
        "real, pixels permuted": (real.flatten(2)[..., order].view_as(real), real_classes),
        "noise": (torch.randint(0, 256, real.shape, dtype=torch.uint8), real_classes),
    }
    rows = [
        {"pictures": name, "n": len(some)} | score(judging, some, theirs, statistics)
        for name, (some, theirs) in compared.items()
    ]
    with (a.out / "gates.csv").open("w", newline="") as f:
        writer = csv.DictWriter(f, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print("  ".join(f"{k} {v}" for k, v in row.items()))
    sheet = pictures[:100].view(10, 10, 32, 32).permute(1, 2, 0, 3).reshape(320, 320)  # a row a class
    Image.fromarray(sheet.numpy()).resize((640, 640), Image.Resampling.NEAREST).save(a.out / "contact-sheet.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=ASSETS, help="where the shipped files are")
    parser.add_argument("--out", type=Path, default=Path("results/tiny-var"))
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--per-class", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of noise, permutation and shuffled labels")
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    check(a)


if __name__ == "__main__":
    main()
