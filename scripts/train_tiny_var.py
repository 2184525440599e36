"""Train the bundled tiny-var on Fashion-MNIST: classifier, tokenizer, transformer, then export.

    apt-get install dataset-fashion-mnist                        # 70,000 pictures, MIT; see --data
    python scripts/train_tiny_var.py classifier     # gate: accuracy on the test set >= 0.91
    python scripts/train_tiny_var.py tokenizer
    python scripts/train_tiny_var.py transformer    # gate: accuracy of samples >= 0.85
    python scripts/train_tiny_var.py export         # tiny-var.safetensors and fashion.safetensors in heatkv_cli/assets
    python scripts/check_tiny_var.py                # the gates again, on what was exported

Every stage can be killed and started again: it goes on from its last checkpoint under --out (default runs/tiny-var) and
appends to <out>/<stage>.csv. One CPU core is enough; --seconds are seconds of the processor, all runs of a stage
together. A larger number makes a finished stage go on, with the learning rate of the longer training.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import heatkv_cli
from fashion_net import (
    DATA,
    SAMPLING,
    SIDES,
    SIZES,
    TOKENIZER,
    TrainingAttention,
    forward,
    new_transformer,
    noisy_inputs,
    pixels,
    read_fashion,
    tiny_var,
)
from fashion_score import judge, sample, score
from heatkv_cli.metrics.fashion.network import CLASSES, Classifier
from heatkv_cli.models.var.load import save_bundle
from heatkv_cli.models.var.tokenizer import Tokenizer, shrink
from heatkv_cli.models.var.transformer import Block, Var
from train_tiny import log_row, save

ASSETS = Path(heatkv_cli.__file__).parent / "assets"


class Training:
    """A stage that can be stopped: seconds of the processor, steps, and what else must survive, in one checkpoint.

    Args:
        a: the command line: out, seconds, lr, every, seed.
        stage: name of checkpoint and log.
        keep: what is saved and restored, by name; all of it has `state_dict`.
    """

    def __init__(self, a: argparse.Namespace, stage: str, keep: dict[str, Any]):
        self.a, self.path, self.log, self.keep = a, a.out / f"{stage}.pt", a.out / f"{stage}.csv", keep
        self.step, self.spent = 0, 0.0
        if self.path.exists():
            state = torch.load(self.path)
            for name, part in keep.items():
                part.load_state_dict(state[name])
            self.step, self.spent = state["step"], state["spent"]
        torch.manual_seed(a.seed + 1 + self.step)

    def run(self, one: Callable[[int], dict[str, float]], check: Callable[[], dict[str, float]]) -> None:
        """Steps until the time is spent; every so often a checkpoint, and a row of mean losses and of `check`."""
        last, due, sums, count = time.process_time(), self.spent + self.a.every, dict[str, float](), 0
        while self.spent < self.a.seconds:
            for name, value in one(self.step).items():
                sums[name] = sums.get(name, 0.0) + value
            self.step, count, now = self.step + 1, count + 1, time.process_time()
            self.spent, last = self.spent + now - last, now
            if self.spent > due or self.spent >= self.a.seconds:
                due += self.a.every
                states = {name: part.state_dict() for name, part in self.keep.items()}
                save(self.path, **states, step=self.step, spent=self.spent)
                head = {"step": self.step, "seconds": round(self.spent), "images": self.step * self.a.batch}
                log_row(self.log, head | {k: round(v / count, 4) for k, v in sums.items()} | check())
                last, sums, count = time.process_time(), {}, 0

    def rate(self, warm: int = 50, floor: float = 0.02) -> float:
        """Share of the learning rate: a short rise, then half a cosine over the time."""
        return min(1, (self.step + 1) / warm) * max(floor, math.cos(self.spent / self.a.seconds * math.pi / 2))


def shifted(images: Tensor, by: int = 2) -> Tensor:
    """Half of the pictures mirrored, all moved by up to `by` pixels."""
    if torch.rand(()) < 0.5:
        images = images.flip(-1)
    x, y = torch.randint(0, 2 * by + 1, (2,)).tolist()
    return F.pad(images, (by, by, by, by))[..., y : y + images.shape[-2], x : x + images.shape[-1]]


# ------------------------------------------------------------------------------------------------------- classifier


def train_classifier(a: argparse.Namespace) -> None:
    torch.manual_seed(a.seed)
    model = Classifier().to(memory_format=torch.channels_last)
    opt = torch.optim.AdamW(model.parameters(), lr=a.lr, weight_decay=0.05, fused=True)
    images, labels = read_fashion(a.data, "train")
    held, wanted = read_fashion(a.data, "t10k")
    training = Training(a, "classifier", {"model": model, "opt": opt})

    def one(step: int) -> dict[str, float]:
        opt.param_groups[0]["lr"] = a.lr * training.rate()
        index = torch.randint(0, len(images), (a.batch,))
        x = torch.cat([shifted(part) for part in images[index].float().div(255).split(16)])
        with torch.autocast("cpu", torch.bfloat16):
            _, logits = model(x.contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits.float(), labels[index])
        opt.zero_grad()
        loss.backward()
        opt.step()
        return {"loss": loss.item()}

    def check() -> dict[str, float]:
        model.eval()
        logits = judge(model, held)[1]
        model.train()
        right = (logits.argmax(-1) == wanted).float().mean().item()
        return {"test_loss": round(F.cross_entropy(logits, wanted).item(), 4), "accuracy": round(right, 4)}

    training.run(one, check)


def load_classifier(a: argparse.Namespace) -> Classifier:
    model = Classifier()
    model.load_state_dict(torch.load(a.out / "classifier.pt")["model"])
    return model.eval().requires_grad_(False)


# -------------------------------------------------------------------------------------------------------- tokenizer


class Usage(nn.Module):
    """How often each code was met lately; the ones that died, and at first all, are put where the latents are."""

    def __init__(self, codes: int):
        super().__init__()
        self.register_buffer("hits", torch.zeros(codes))

    @torch.no_grad()
    def update(self, hits: Tensor, embedding: Tensor, seen: Tensor) -> None:
        """hits (V,) of a step, codebook (V, Z) and residuals (n, Z) that were quantised in it."""
        self.hits.lerp_(hits / hits.mean(), 0.02)
        dead = (self.hits < 0.05).nonzero()[:, 0]
        if len(dead):
            embedding[dead] = seen[torch.randint(0, len(seen), (len(dead),))]
            self.hits[dead] = 1.0


def quantise_with_gradient(
    model: Tokenizer, latent: Tensor, beta: float = 0.25
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The official training of the quantiser, straight-through.

    Returns the latent that is decoded, the loss (commitment and codebook, mean over scales), hits of the codes, and the
    residuals that were quantised.
    """
    quantiser, residual, total = model.quantize, latent.detach(), torch.zeros_like(latent)
    loss, hits, seen = latent.new_zeros(()), torch.zeros(TOKENIZER.vocabulary), []
    for k, size in enumerate(SIZES):
        small = shrink(residual, size)
        index = quantiser.nearest(small)
        hits += torch.bincount(index.flatten(), minlength=TOKENIZER.vocabulary)
        seen.append(small.flatten(2).transpose(1, 2).flatten(0, 1))
        added = quantiser.contribution(quantiser.lookup(index, size), k, len(SIZES), SIZES[-1])
        residual, total = residual - added.detach(), total + added
        loss = loss + beta * F.mse_loss(total.detach(), latent) + F.mse_loss(total, latent.detach())
    return latent + (total - latent).detach(), loss / len(SIZES), hits, torch.cat(seen)


def train_tokenizer(a: argparse.Namespace) -> None:
    torch.manual_seed(a.seed)
    model, usage = Tokenizer(TOKENIZER), Usage(TOKENIZER.vocabulary)
    for phi in model.quantize.quant_resi.qresi_ls:
        nn.init.dirac_(phi.weight)
        nn.init.zeros_(phi.bias)
    opt = torch.optim.AdamW(model.parameters(), lr=a.lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    images, _ = read_fashion(a.data, "train")
    held, labels = read_fashion(a.data, "t10k")
    training = Training(a, "tokenizer", {"model": model, "usage": usage, "opt": opt})

    def one(step: int) -> dict[str, float]:
        opt.param_groups[0]["lr"] = a.lr * training.rate()
        x = pixels(images[torch.randint(0, len(images), (a.batch,))])
        if step % 2:
            x = x.flip(-1)
        # the fused attention is four times slower on a map of 8 x 8
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            latent = model.features(x)
        decoded, vq, hits, seen = quantise_with_gradient(model, latent.float())
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            out = model.decoder(model.post_quant_conv(decoded))
        error = (out.float() - x) / 2
        loss = error.abs().mean() + 4 * error.square().mean() + a.vq * vq
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        usage.update(hits, model.quantize.embedding.weight.data, seen)
        return {"l1": error.abs().mean().item(), "mse": error.square().mean().item(), "vq": vq.item()}

    def check() -> dict[str, float]:
        model.eval()
        row = check_tokenizer(model, load_classifier(a), held[:2000], labels[:2000])
        model.train()
        return row

    training.run(one, check)


@torch.no_grad()
def check_tokenizer(model: Tokenizer, judging: Classifier, images: Tensor, labels: Tensor) -> dict[str, float]:
    """PSNR, accuracy of the classifier on reconstructions, and perplexity of the codes."""
    latents, hits = [], torch.zeros(TOKENIZER.vocabulary)
    for part in images.split(250):
        total, indices = model.encode(pixels(part), SIZES)
        latents.append(total)
        hits += torch.bincount(torch.cat([i.flatten() for i in indices]), minlength=TOKENIZER.vocabulary)
    out = torch.cat([model.decode(latent) for latent in latents]).mean(1, keepdim=True) / 2 + 0.5
    mse = (out - images.float() / 255).square().mean((1, 2, 3))
    right = (judge(judging, out.mul(255).round())[1].argmax(-1) == labels).float().mean().item()
    p = hits / hits.sum()
    perplexity = math.exp(-(p * p.clamp(min=1e-12).log()).sum())
    psnr = -10 * mse.log10().mean().item()
    return {"psnr": round(psnr, 2), "accuracy": round(right, 4), "perplexity": round(perplexity, 1)}


def load_tokenizer(a: argparse.Namespace) -> Tokenizer:
    model = Tokenizer(TOKENIZER)
    model.load_state_dict(torch.load(a.out / "tokenizer.pt")["model"])
    return model.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------------ transformer


def load_latents(a: argparse.Namespace, tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """Latents fp16 (n, Z, 8, 8) of the training pictures and their mirror images, classes (n,); made once."""
    trained = torch.load(a.out / "tokenizer.pt")["step"]
    path = a.out / f"latents-{trained}.pt"  # of this tokenizer, not of an earlier one
    if path.exists():
        return torch.load(path)
    images, labels = read_fashion(a.data, "train")
    parts = []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        for part in torch.cat((images, images.flip(-1))).split(500):
            parts.append(tokenizer.features(pixels(part)).half())
    data = torch.cat(parts), labels.repeat(2)
    torch.save(data, path)
    return data


class Average(nn.Module):
    """Running mean of a network's weights."""

    def __init__(self, net: Var):
        super().__init__()
        self.net, self.source = new_transformer().requires_grad_(False), [net]
        self.net.load_state_dict(net.state_dict())

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Every fifth step: a mean over the last 500 or so, of less at first."""
        if step % 5 == 0:
            keep = min(0.998, 1 - 1 / (1 + step / 5)) ** 5
            for mine, other in zip(self.net.parameters(), self.source[0].parameters(), strict=True):
                mine.lerp_(other, 1 - keep)


def train_transformer(a: argparse.Namespace) -> None:
    torch.manual_seed(a.seed)
    tokenizer, judging, net = load_tokenizer(a), load_classifier(a), new_transformer()
    latents, labels = load_latents(a, tokenizer)
    images, wanted = read_fashion(a.data, "t10k")
    held = tokenizer.features(pixels(images[:1000])), wanted[:1000]
    real = judge(judging, images)[0]
    statistics = real.mean(0), real.double().T.cov()
    hidden = [p for b in net.layers() for p in b.parameters() if p.ndim == 2]
    chosen = {id(p) for p in hidden}
    adam = torch.optim.AdamW(
        [p for p in net.parameters() if id(p) not in chosen], lr=a.lr, betas=(0.9, 0.97), weight_decay=0.01, fused=True
    )
    muon = torch.optim.Muon(hidden, lr=2 * a.lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    average, attention = Average(net), TrainingAttention(torch.bfloat16)
    training = Training(a, "transformer", {"model": net, "average": average, "adam": adam, "muon": muon})
    weight = torch.cat([torch.full((p * p,), p**-a.coarse) for p in SIDES])
    plain = Block.before, Block.after
    fast = tuple(torch.compile(f, dynamic=False) for f in plain) if a.compile else plain
    Block.before, Block.after = fast

    def one(step: int) -> dict[str, float]:
        for opt, lr in ((adam, a.lr), (muon, 2 * a.lr)):
            opt.param_groups[0]["lr"] = lr * training.rate(warm=100, floor=0.01)
        index = torch.randint(0, len(latents), (a.batch,))
        codes, inputs = noisy_inputs(tokenizer.quantize, latents[index].float(), a.flip)
        classes = torch.where(torch.rand(a.batch) < 0.1, len(CLASSES), labels[index])
        # the fused kernel's backward takes half of a step at this head size
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            logits = forward(net, classes, inputs, attention)
        each = F.cross_entropy(logits.float().transpose(1, 2), codes, reduction="none").mean(0)
        loss = (each * weight).sum() / weight.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        for opt in (adam, muon):
            opt.step()
            opt.zero_grad()
        average.update(step + 1)
        return {"loss": each.mean().item()}

    def check() -> dict[str, float]:
        Block.before, Block.after = plain  # its many shapes would be compiled one by one
        row = held_out(average.net, tokenizer, *held)
        pictures, classes = sample(tiny_var(average.net, tokenizer), a.per_class, SAMPLING)
        row |= score(judging, pictures, classes, statistics)
        Block.before, Block.after = fast
        return row

    training.run(one, check)
    Block.before, Block.after = plain


@torch.no_grad()
def held_out(net: Var, tokenizer: Tokenizer, latents: Tensor, labels: Tensor) -> dict[str, float]:
    """Nats per token of unseen pictures, all and per scale, with clean inputs."""
    parts = []
    for latent, classes in zip(latents.split(250), labels.split(250), strict=True):
        codes, inputs = noisy_inputs(tokenizer.quantize, latent, 0.0)
        logits = forward(net, classes, inputs, TrainingAttention(torch.float32))
        parts.append(F.cross_entropy(logits.transpose(1, 2), codes, reduction="none"))
    each = torch.cat(parts).mean(0)
    scales = zip(SIDES, each.split([p * p for p in SIDES]), strict=True)
    return {"val": round(each.mean().item(), 4)} | {f"s{p}": round(part.mean().item(), 3) for p, part in scales}


# ----------------------------------------------------------------------------------------------- what is shipped


def export(a: argparse.Namespace) -> None:
    """Write the averaged transformer with the tokenizer, and the classifier with what it sees in the test set."""
    net = new_transformer()
    average = Average(net)
    average.load_state_dict(torch.load(a.out / "transformer.pt")["average"])
    save_bundle(a.to / "tiny-var.safetensors", average.net, load_tokenizer(a))
    judging = load_classifier(a)
    tensors = {
        f"classifier.{name}": tensor.half()
        for name, tensor in judging.state_dict().items()
        if tensor.is_floating_point()  # all but the number of training steps of the norms
    }
    judging.load_state_dict({name.removeprefix("classifier."): t.float() for name, t in tensors.items()}, strict=False)
    images, labels = read_fashion(a.data, "t10k")
    features, logits = judge(judging, images)
    some = torch.cat([(labels == c).nonzero()[: a.reference, 0] for c in range(len(CLASSES))])
    tensors |= {
        "test.mean": features.double().mean(0).float(),
        "test.covariance": features.double().T.cov().float(),
        "test.histogram": torch.bincount(labels, minlength=len(CLASSES)),
        "test.features": features[some].half(),
    }
    accuracy = (logits.argmax(-1) == labels).double().mean().item()
    header = {"format": 1, "classes": CLASSES, "pictures": len(images), "accuracy": round(accuracy, 4)}
    path = a.to / "fashion.safetensors"
    save_file({name: t.contiguous() for name, t in tensors.items()}, path, {"heatkv": json.dumps(header)})
    for file in (a.to / "tiny-var.safetensors", path):
        print(f"{file}: {file.stat().st_size / 1e6:.2f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = parser.add_subparsers(dest="stage", required=True)
    p = sub.add_parser("classifier")
    p.set_defaults(run=train_classifier)
    p.add_argument("--seconds", type=float, default=720)
    p.add_argument("--batch", type=int, default=128)
    p.add_argument("--lr", type=float, default=3e-3)
    p = sub.add_parser("tokenizer")
    p.set_defaults(run=train_tokenizer)
    p.add_argument("--seconds", type=float, default=1800)
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--lr", type=float, default=2e-3)
    p.add_argument("--vq", type=float, default=0.25, help="weight of the quantiser's loss")
    p = sub.add_parser("transformer")
    p.set_defaults(run=train_transformer)
    p.add_argument("--seconds", type=float, default=5000)
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--lr", type=float, default=1.5e-3, help="of AdamW; Muon gets twice as much")
    p.add_argument("--flip", type=float, default=0.1, help="largest share of mistakes in the inputs")
    p.add_argument("--coarse", type=float, default=1.0, help="a token of a map of side p weighs p to minus this")
    p.add_argument("--per-class", type=int, default=50)
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    p = sub.add_parser("export")
    p.set_defaults(run=export)
    p.add_argument("--reference", type=int, default=100, help="test pictures of a class whose features are shipped")
    p.add_argument("--to", type=Path, default=ASSETS)
    for p in sub.choices.values():
        p.add_argument("--data", type=Path, default=DATA)
        p.add_argument("--out", type=Path, default=Path("runs/tiny-var"))
        p.add_argument("--threads", type=int, default=1)
        p.add_argument("--seed", type=int, default=0)
        p.add_argument("--every", type=float, default=120, help="seconds between checkpoints")
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(a.threads)
    a.run(a)


if __name__ == "__main__":
    main()
