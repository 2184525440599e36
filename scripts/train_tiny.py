"""Train a model of the shapes world: tokenizer, then transformer and text encoder, then export.

    python scripts/train_tiny.py tokenizer --seconds 900      # gate: detector on reconstructions >= 0.98
    python scripts/train_tiny.py decoder --seconds 300        # clean pictures from codes with mistakes
    python scripts/train_tiny.py transformer --seconds 6000   # resumes from <out>/transformer.pt
    python scripts/train_tiny.py export                       # writes heatkv_cli/assets/<model>.safetensors (fp16)
    python scripts/train_tiny.py restore                      # the way back: checkpoints from an exported model

`--model tiny-160` makes the model of 160 x 160 pixels. It begins with the networks of tiny, which fit any map:

    python scripts/train_tiny.py restore --model tiny-160     # from heatkv_cli/assets/tiny.safetensors

Every stage can be killed and started again: it goes on from its last checkpoint under --out (default runs/<model>) and
appends to <out>/tokenizer.csv or <out>/transformer.csv. Two CPU cores are enough; times are wall-clock seconds.
"""

from __future__ import annotations

import argparse
import csv
import math
import random
import time
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import heatkv_cli
from heatkv_cli.benchmarks.base import items_of
from heatkv_cli.metrics.base import Sample
from heatkv_cli.metrics.objects.shapes import ShapesScore
from heatkv_cli.models.infinity.load import save_bundle
from heatkv_cli.models.infinity.tokenizer import Tokenizer, resize
from heatkv_cli.models.infinity.transformer import Block
from shapes_world import MAX_WORDS, WORDS, Scene, metadata
from shapes_world import TASKS as TASK_WEIGHTS
from shapes_world import batch as world_batch
from shapes_world import sample as world_sample
from tiny_net import (
    MODELS,
    TOKENIZER,
    FullAttention,
    Shape,
    Tiny,
    TrainingAttention,
    noisy_codes,
    noisy_inputs,
    noun_labels,
)

ASSETS = Path(heatkv_cli.__file__).parent / "assets"


def log_row(path: Path, row: dict[str, object]) -> None:
    """Append one row of the loss log; the header is written once."""
    new = not path.exists()
    with path.open("a", newline="") as f:
        writer = csv.DictWriter(f, fieldnames=list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)
    print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)


def save(path: Path, **state: object) -> None:
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


# ---------------------------------------------------------------------------------------------------- tokenizer


def quantise_ste(latent: Tensor, sides: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """The tokenizer's residual quantisation with straight-through gradients.

    Returns the summed codes, minus the entropy of the mean bit (to be maximised) and the commitment loss.
    """
    size = (latent.shape[-2], latent.shape[-1])
    total, entropy, commit = torch.zeros_like(latent), latent.new_zeros(()), latent.new_zeros(())
    for side in sides:
        unit = F.normalize(F.interpolate(latent - total, side, mode="area"), dim=1)
        code = torch.where(unit > 0, 1.0, -1.0) / math.sqrt(TOKENIZER.bits)
        p = torch.sigmoid(unit * math.sqrt(TOKENIZER.bits) * 4).mean((0, 2, 3)).clamp(1e-5, 1 - 1e-5)
        entropy = entropy + (p * p.log() + (1 - p) * (1 - p).log()).mean() / len(sides)
        commit = commit + (unit - code).square().sum(1).mean() / len(sides)
        total = total + resize(unit + (code - unit).detach(), size)
    return total, entropy, commit


def score_scenes(images: Tensor, scenes: list[Scene]) -> dict[str, float]:
    """Share of correct pictures per task and their mean, by the benchmark's own detector; images in [0, 1]."""
    pixels = images.clamp(0, 1).permute(0, 2, 3, 1).mul(255).round().byte().numpy()
    judge, marks = ShapesScore(), defaultdict(list)
    for image, scene in zip(pixels, scenes, strict=True):
        marks[scene.task].append(judge.score(Sample("", meta=metadata(scene), image=image)).value)
    tasks = {task: sum(m) / len(m) for task, m in sorted(marks.items())}
    return {k: round(v, 3) for k, v in tasks.items()} | {"mean": round(sum(tasks.values()) / len(tasks), 4)}


@torch.no_grad()
def check_tokenizer(tokenizer: Tokenizer, shape: Shape, count: int = 300) -> dict[str, float]:
    """PSNR and detector score on reconstructions of unseen scenes."""
    images, _, scenes = world_batch(count, random.Random(99), side=shape.pixels)
    parts = [tokenizer.decode(tokenizer.encode(part * 2 - 1, shape.sizes)[0]) for part in images.split(50)]
    out = torch.cat(parts) / 2 + 0.5
    psnr = -10 * math.log10((out - images).square().mean().item())
    return {"psnr": round(psnr, 2), "reconstructed": round(score_scenes(out, scenes)["mean"], 4)}


def draw_pool(count: int, rng: random.Random, side: int) -> Tensor:
    """Pictures to train on, uint8 (count, 3, side, side)."""
    return torch.cat([world_batch(512, rng, side=side)[0].mul(255).round().byte() for _ in range(count // 512)])


def train_tokenizer(a: argparse.Namespace) -> None:
    torch.manual_seed(a.seed)
    path, log = a.out / "tokenizer.pt", a.out / "tokenizer.csv"
    model = Tokenizer(TOKENIZER)
    opt = torch.optim.AdamW(model.parameters(), lr=a.lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    step, spent = 0, 0.0
    if path.exists():
        state = torch.load(path)
        model.load_state_dict(state["model"])
        if state["opt"] is not None:
            opt.load_state_dict(state["opt"])
        step, spent = state["step"], state["spent"]
    rng = random.Random(1 + step)
    pool = draw_pool(a.pool, rng, a.shape.pixels)
    last, due = time.time(), spent + a.every
    while spent < a.seconds:
        rate = a.lr * min(1, (step + 1) / 50) * max(0.02, math.cos(spent / a.seconds * math.pi / 2))
        for g in opt.param_groups:
            g["lr"] = rate
        x = pool[torch.randint(0, len(pool), (a.batch,))].float().div(255)
        with torch.autocast("cpu", torch.bfloat16):
            latent = model.encoder(x * 2 - 1)
        total, entropy, commit = quantise_ste(latent.float(), a.shape.sides)
        with torch.autocast("cpu", torch.bfloat16):
            out = model.decoder(total)
        error = out.float() / 2 + 0.5 - x
        gap = (latent.float() - total).square().mean()
        loss = error.abs().mean() + 4 * error.square().mean() + 0.02 * commit + 0.02 * gap + 0.03 * entropy
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        step, now = step + 1, time.time()
        spent, last = spent + now - last, now
        if spent > due or spent >= a.seconds:
            due += a.every
            model.eval()
            row = {"step": step, "seconds": round(spent), "images": step * a.batch, "loss": round(loss.item(), 4)}
            save(path, model=model.state_dict(), opt=opt.state_dict(), step=step, spent=spent)
            log_row(log, row | check_tokenizer(model, a.shape))
            model.train()
            last = time.time()


def train_decoder(a: argparse.Namespace) -> None:
    """Teach the decoder to draw clean pictures from codes with mistakes; encoder and bits stay as they are.

    A sampled bit is wrong now and then; a decoder that has only met true codes draws a blur from it.
    """
    torch.manual_seed(a.seed)
    path, log, begin, step = a.out / "tokenizer.pt", a.out / "decoder.csv", time.time(), 0
    state, model = torch.load(path), load_tokenizer(a)
    model.decoder.requires_grad_(True)
    opt = torch.optim.AdamW(model.decoder.parameters(), lr=a.lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    rng = random.Random(2)
    pool = draw_pool(a.pool, rng, a.shape.pixels)
    while (spent := time.time() - begin) < a.seconds:
        opt.param_groups[0]["lr"] = (
            a.lr * min(1, (step + 1) / 50) * max(0.02, math.cos(spent / a.seconds * math.pi / 2))
        )
        x = pool[torch.randint(0, len(pool), (a.batch,))].float().div(255)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            latents = model.encoder(x * 2 - 1)
        _, totals = noisy_codes(latents.float(), a.shape.sides, a.flip)
        with torch.autocast("cpu", torch.bfloat16):
            out = model.decoder(totals[-1])
        error = out.float() / 2 + 0.5 - x
        opt.zero_grad()
        (error.abs().mean() + 4 * error.square().mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.decoder.parameters(), 1.0)
        opt.step()
        step += 1
        if step % 200 == 0:
            psnr = -10 * math.log10(error.square().mean().item())
            log_row(
                log,
                {"step": step, "seconds": round(spent), "noisy_psnr": round(psnr, 2)} | check_tokenizer(model, a.shape),
            )
    save(path, **{**state, "model": model.state_dict(), "opt": None})


def load_tokenizer(a: argparse.Namespace) -> Tokenizer:
    model = Tokenizer(TOKENIZER)
    model.load_state_dict(torch.load(a.out / "tokenizer.pt")["model"])
    return model.eval().requires_grad_(False)


# -------------------------------------------------------------------------------------------------- transformer


def load_latents(a: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """Latents fp16 (n, d, H, W), word ids (n, M), noun labels (n, 2, 4) of `a.images` scenes; made once."""
    trained = torch.load(a.out / "tokenizer.pt")["step"]
    path = a.out / f"latents-{a.images}-{trained}.pt"  # of this tokenizer, not of an earlier one
    if path.exists():
        return torch.load(path)
    tokenizer, rng, parts, begin = load_tokenizer(a), random.Random(1000), [], time.time()
    for _ in range(math.ceil(a.images / 512)):
        images, ids, scenes = world_batch(512, rng, side=a.shape.pixels)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            latents = tokenizer.encoder(images * 2 - 1)
        parts.append((latents.half(), ids, torch.tensor([noun_labels(s) for s in scenes])))
    print(f"{a.images} images encoded in {time.time() - begin:.0f} s", flush=True)
    data = tuple(torch.cat(p) for p in zip(*parts, strict=True))
    torch.save(data, path)
    return data  # type: ignore[return-value]


@torch.no_grad()
def check_transformer(model: Tiny, tokenizer: Tokenizer, shape: Shape, per_task: int) -> dict[str, float]:
    """Score of ordinary samples on fixed scenes, and the order of positions among pictures with the right objects."""
    rng = random.Random(4321)
    scenes = [world_sample(rng, task, "a") for task in sorted(TASK_WEIGHTS) for _ in range(per_task)]
    net = shape.model(model.transformer, tokenizer, model.text)
    images = []
    for i in range(0, len(scenes), 30):
        part = scenes[i : i + 30]
        generators = [torch.Generator().manual_seed(i + j) for j in range(len(part))]
        text = net.encode(items_of(s.caption for s in part))
        trace = net.generate(text, shape.sampling, FullAttention(), generators)
        images.append(net.decode(trace.latent).permute(0, 3, 1, 2).float() / 255)
    return score_scenes(torch.cat(images), scenes)


def optimisers(model: Tiny, lr: float) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """AdamW for all but the blocks' matrices, which get Muon at twice the rate."""
    hidden = [p for b in model.transformer.layers() for p in b.parameters() if p.ndim == 2]
    chosen = {id(p) for p in hidden}
    other = [p for p in model.parameters() if id(p) not in chosen]
    adam = torch.optim.AdamW(other, lr=lr, betas=(0.9, 0.97), weight_decay=0.01, fused=True)
    return adam, torch.optim.Muon(hidden, lr=2 * lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")


def losses(
    model: Tiny,
    latents: Tensor,
    words: Tensor,
    nouns: Tensor,
    flip: float,
    attention: TrainingAttention,
    sides: tuple[int, ...],
) -> tuple[Tensor, Tensor]:
    """BCE per bit over the scales in `sides`, a bit of scale p weighted by p^-1.5, and the loss of the probe."""
    bits, inputs = noisy_inputs(latents.float(), sides, flip)
    # the fused kernel's backward takes half of a step at this head size
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        logits, features = model(words, torch.rand(len(words)) < 0.1, inputs, attention)
    each = F.binary_cross_entropy_with_logits(logits.float(), bits, reduction="none").mean((0, 2))
    weight = torch.cat([torch.full((p * p,), p**-1.5) for p in sides])
    return (each * weight).sum() / weight.sum(), model.probe_loss(features.float(), nouns)


def train_transformer(a: argparse.Namespace) -> None:
    torch.manual_seed(a.seed)
    path, log = a.out / "transformer.pt", a.out / "transformer.csv"
    data = load_latents(a)
    held, (latents, words, nouns) = [t[: a.held] for t in data[:2]], [t[a.held :] for t in data]
    shape, model, tokenizer = a.shape, Tiny(a.shape), load_tokenizer(a)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(latents)} images", flush=True)
    adam, muon = optimisers(model, a.lr)
    average = {k: v.clone() for k, v in model.state_dict().items()}
    step, spent = 0, 0.0
    if path.exists():
        state = torch.load(path)
        model.load_state_dict(state["model"])
        for opt, name in ((adam, "adam"), (muon, "muon")):
            if state[name] is not None:
                opt.load_state_dict(state[name])
        average, step, spent = state["average"], state["step"], state["spent"]
    torch.manual_seed(a.seed + 1 + step)
    attention = {n: TrainingAttention(shape, n, torch.bfloat16) for n in (shape.short, len(shape.sides))}
    plain = Block.before, Block.after
    fast = tuple(torch.compile(f, dynamic=False) for f in plain) if a.compile else plain
    Block.before, Block.after = fast
    last, due, recent = time.time(), spent + a.every, []
    while spent < a.seconds:
        r = spent / a.seconds
        decay = 1.0 if r < a.flat else max(0.01, 0.5 * (1 + math.cos((r - a.flat) / (1 - a.flat) * math.pi)))
        for opt, lr in ((adam, a.lr), (muon, 2 * a.lr)):
            opt.param_groups[0]["lr"] = lr * min(1, (step + 1) / 100) * decay
        # coarse scales decide the layout: more steps for them
        scales = shape.short if r < a.short or step % 2 else len(shape.sides)
        index = torch.randint(0, len(latents), (a.batch,))
        chosen = latents[index], words[index], nouns[index]
        loss, probe = losses(model, *chosen, a.flip, attention[scales], shape.sides[:scales])
        (loss + 0.05 * probe).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in (adam, muon):
            opt.step()
            opt.zero_grad()
        step, now = step + 1, time.time()
        spent, last = spent + now - last, now
        recent.append((loss.item(), probe.item()))
        if step % 5 == 0:
            keep = min(0.998, 1 - 1 / (1 + step / 5)) ** 5
            for k, v in model.state_dict().items():
                average[k].lerp_(v, 1 - keep)
        if step % 50 == 0:
            mean = torch.tensor(recent[-50:]).mean(0).tolist()
            print(f"{step} {spent:.0f} s loss {mean[0]:.4f} probe {mean[1]:.3f} rate {decay:.2f}", flush=True)
        if spent > due or spent >= a.seconds:
            due += a.every
            states = {"model": model.state_dict(), "adam": adam.state_dict(), "muon": muon.state_dict()}
            save(path, **states, average=average, step=step, spent=spent)
            Block.before, Block.after = plain  # its many shapes would be compiled one by one
            row = validate(average, held, tokenizer, shape, a.per_task)
            Block.before, Block.after = fast
            head = {"step": step, "seconds": round(spent), "images": step * a.batch}
            mean = torch.tensor(recent).mean(0).tolist()
            log_row(log, head | {"train_loss": round(mean[0], 4), "probe": round(mean[1], 4)} | row)
            recent, last = [], time.time()
    Block.before, Block.after = plain


def validate(
    average: dict[str, Tensor], held: list[Tensor], tokenizer: Tokenizer, shape: Shape, per_task: int
) -> dict[str, float]:
    """Held-out loss per scale (BCE per bit, clean inputs) and the score of samples, with the averaged weights."""
    model, attention, parts = Tiny(shape).eval(), TrainingAttention(shape, len(shape.sides), torch.float32), []
    model.load_state_dict(average)
    for latents, words in zip(*(t.split(16) for t in held), strict=True):
        bits, inputs = noisy_inputs(latents.float(), shape.sides, 0.0)
        with torch.no_grad():
            logits, _ = model(words, torch.zeros(len(bits), dtype=torch.bool), inputs, attention)
        parts.append(F.binary_cross_entropy_with_logits(logits, bits, reduction="none").mean(2))
    loss = torch.cat(parts).mean(0)
    scales = zip(shape.sides, loss.split([p * p for p in shape.sides]), strict=True)
    each = {f"s{p}": round(part.mean().item(), 4) for p, part in scales}
    return {"val": round(loss.mean().item(), 4)} | each | check_transformer(model, tokenizer, shape, per_task)


def export(a: argparse.Namespace) -> None:
    """Write the averaged weights and the tokenizer where the package looks for them."""
    a.to = a.to or ASSETS / f"{a.shape.name}.safetensors"
    state, model = torch.load(a.out / "transformer.pt"), Tiny(a.shape)
    model.load_state_dict(state["average"])
    parts = {"transformer": model.transformer, "tokenizer": load_tokenizer(a), "text": model.text}
    save_bundle(a.to, parts, WORDS, MAX_WORDS)
    print(f"{a.to}: {a.to.stat().st_size / 1e6:.2f} MB, step {state['step']}, {state['spent']:.0f} s of training")


def restore(a: argparse.Namespace) -> None:
    """Make checkpoints of an exported model, so that training can go on from it with a fresh schedule.

    A scale takes the level embedding of the exported model's scale with the nearest side.
    """
    with safe_open(a.source or ASSETS / f"{a.source_model}.safetensors", "pt") as f:
        tensors = {name: f.get_tensor(name).float() for name in f.keys()}  # noqa: SIM118
    model, tokenizer = Tiny(a.shape), Tokenizer(TOKENIZER)
    for module, part in ((tokenizer, "tokenizer."), (model.transformer, "transformer."), (model.text, "text.")):
        own = {name.removeprefix(part): x for name, x in tensors.items() if name.startswith(part)}
        module.load_state_dict(own, strict=False)  # all but the constant zero biases
    known = MODELS[a.source_model].sides
    nearest = [min(range(len(known)), key=lambda i: abs(known[i] - side)) for side in a.shape.sides]
    levels = model.transformer.lvl_embed.weight.data
    levels[: len(nearest)] = levels[nearest]
    save(a.out / "tokenizer.pt", model=tokenizer.state_dict(), opt=None, step=0, spent=0.0)
    state = model.state_dict()
    save(a.out / "transformer.pt", model=state, adam=None, muon=None, average=state, step=0, spent=0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = parser.add_subparsers(dest="stage", required=True)
    p = sub.add_parser("tokenizer")
    p.set_defaults(run=train_tokenizer)
    p.add_argument("--seconds", type=float, default=900)
    p.add_argument("--pool", type=int, default=12288)
    p.add_argument("--batch", type=int, default=24)
    p.add_argument("--lr", type=float, default=2e-3)
    p = sub.add_parser("decoder")
    p.set_defaults(run=train_decoder)
    p.add_argument("--seconds", type=float, default=300)
    p.add_argument("--pool", type=int, default=12288)
    p.add_argument("--batch", type=int, default=24)
    p.add_argument("--lr", type=float, default=1e-3)
    p.add_argument("--flip", type=float, default=0.2)
    p = sub.add_parser("transformer")
    p.set_defaults(run=train_transformer)
    p.add_argument("--seconds", type=float, default=6000)
    p.add_argument("--images", type=int, default=49152)
    p.add_argument("--batch", type=int, default=24)
    p.add_argument("--lr", type=float, default=1.5e-3, help="of AdamW; Muon gets twice as much")
    p.add_argument("--flip", type=float, default=0.2)
    p.add_argument("--flat", type=float, default=0.4, help="share of the time before the cosine decay")
    p.add_argument("--short", type=float, default=0.25, help="share of the time with short steps only")
    p.add_argument("--held", type=int, default=256, help="scenes that the loss is validated on")
    p.add_argument("--per-task", type=int, default=20, help="pictures a task that are drawn and scored with it")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    p = sub.add_parser("export")
    p.set_defaults(run=export)
    p.add_argument("--to", type=Path, help="default: heatkv_cli/assets/<model>.safetensors")
    p = sub.add_parser("restore")
    p.set_defaults(run=restore)
    p.add_argument("--source", type=Path, help="an exported model; default: the asset of --source-model")
    p.add_argument("--source-model", choices=MODELS, default="tiny")
    for p in sub.choices.values():
        p.add_argument("--model", choices=MODELS, default="tiny")
        p.add_argument("--out", type=Path, help="default: runs/<model>")
        p.add_argument("--threads", type=int, default=2)
        p.add_argument("--seed", type=int, default=0)
        p.add_argument("--every", type=float, default=120, help="seconds between checkpoints")
    a = parser.parse_args()
    a.shape, a.out = MODELS[a.model], a.out or Path("runs") / a.model
    a.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(a.threads)
    a.run(a)


if __name__ == "__main__":
    main()
