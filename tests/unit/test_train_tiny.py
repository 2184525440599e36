"""What the training script computes is what the package computes: attention, inputs, logits, and a resumed training."""

from __future__ import annotations

import csv
import random
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import tiny_net
import train_tiny
from heatkv_cli.benchmarks.base import items_of
from heatkv_cli.models.infinity.load import load_bundled
from heatkv_cli.models.infinity.sampling import Sampling
from heatkv_cli.models.infinity.tokenizer import Tokenizer, TokenizerParams, quantise, resize
from shapes_world import batch as world_batch
from tiny_net import MODELS, TINY, TINY_160, TRANSFORMER, FullAttention, Shape, Tiny, TrainingAttention, noisy_inputs

CONF = Path(__file__).parents[2] / "conf" / "model"
SIDES, SIZES = TINY.sides, TINY.sizes
PLAIN = Sampling((1.0,) * len(SIDES), (1.0,) * len(SIDES))


def conf(shape: Shape) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((CONF / f"{shape.name}.yaml").read_text(encoding="utf-8"))
    return content


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@cache
def networks() -> tuple[Tiny, Tokenizer]:
    """Random networks in which every parameter matters."""
    torch.manual_seed(7)
    model, tokenizer = Tiny(TINY), Tokenizer(tiny_net.TOKENIZER)
    for name, p in model.transformer.named_parameters():
        p.data.add_(torch.randn_like(p) * (0.5 if name.endswith(("ada_gss", "scale_mul_1H11")) else 0.05))
    return model.eval().requires_grad_(False), tokenizer.eval().requires_grad_(False)


# --------------------------------------------------------------------------------------------------------- attention


def masked(q: Tensor, k: Tensor, v: Tensor, sides: tuple[int, ...]) -> Tensor:
    level = torch.cat([torch.full((p * p,), i) for i, p in enumerate(sides)])
    logits = q @ k.transpose(-1, -2)
    return logits.masked_fill(level[:, None] < level[None], -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize(
    ("shape", "scales"),
    [(TINY, n) for n in (1, 3, tiny_net.MERGED_SCALES, TINY.short, len(SIDES))] + [(TINY_160, TINY_160.short)],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_the_training_attention_and_its_gradients(
    shape: Shape, scales: int, dtype: torch.dtype, tolerance: float
) -> None:
    count = sum(p * p for p in shape.sides[:scales])
    leaves = [normal(2, 3, count, 8, seed=i, dtype=dtype).requires_grad_() for i in range(3)]
    weight = normal(2, 3, count, 8, seed=3, dtype=dtype)
    ours = TrainingAttention(shape, scales, dtype).attend(0, *leaves, 1.0)
    wanted = masked(*leaves, shape.sides[:scales])
    torch.testing.assert_close(ours, wanted, atol=tolerance, rtol=tolerance)
    gradients = torch.autograd.grad((ours * weight).sum(), leaves)
    for mine, theirs in zip(gradients, torch.autograd.grad((wanted * weight).sum(), leaves), strict=True):
        torch.testing.assert_close(mine, theirs, atol=tolerance, rtol=tolerance)


# ------------------------------------------------------------------------------------------------------------ inputs


def latents(count: int, shape: Shape = TINY) -> Tensor:
    return normal(count, tiny_net.TOKENIZER.bits, *shape.sizes[-1], seed=11)


@pytest.mark.parametrize(
    ("shape", "scales"), [(TINY, 2), (TINY, TINY.short), (TINY, len(SIDES)), (TINY_160, len(TINY_160.sides))]
)
def test_inputs_without_noise_are_the_tokenizer_s(shape: Shape, scales: int) -> None:
    found, sizes = latents(3, shape), shape.sizes
    bits, inputs = noisy_inputs(found, shape.sides[:scales], 0.0)
    _, wanted = quantise(found, sizes, tiny_net.CODES)
    tokens = [tiny_net.CODES.to_tokens(part.permute(0, 3, 1, 2).float()) for part in wanted]
    assert torch.equal(bits, torch.cat(tokens[:scales], 1))
    total, following = torch.zeros_like(found), []
    for part, size in zip(wanted[: scales - 1], sizes[1:], strict=False):
        total = total + resize(tiny_net.CODES.embed(part), sizes[-1])
        following.append(tiny_net.CODES.to_tokens(resize(total, size)))
    assert torch.equal(inputs, torch.cat(following, 1))


def test_noise_is_in_the_inputs_and_not_in_the_first_target() -> None:
    """The input of scale 1 is the code of scale 0, so its signs tell which bits were turned."""
    torch.manual_seed(0)
    found, shares = latents(400), []
    clean, _ = noisy_inputs(found, SIDES[:3], 0.0)
    for flip in (0.2, 0.6):
        bits, inputs = noisy_inputs(found, SIDES[:3], flip)
        assert torch.equal(bits[:, 0], clean[:, 0])
        assert not torch.equal(bits, clean)  # later targets repair what was turned
        shares.append(((inputs[:, 0] > 0) != (bits[:, 0] > 0)).float().mean().item())
    assert shares == pytest.approx([0.1, 0.3], abs=0.03)  # uniform between 0 and flip


# ------------------------------------------------------------------------------------------------------------ logits


def test_the_whole_sequence_gives_the_logits_of_the_cache_path() -> None:
    """Prompts of different lengths, with and without their text, guided and not."""
    model, tokenizer = networks()
    _, ids, scenes = world_batch(4, random.Random(5))
    assert len({len(scene.caption.split()) for scene in scenes}) > 1
    found = latents(4)
    _, forced = quantise(found, SIZES, tiny_net.CODES)
    _, inputs = noisy_inputs(found, SIDES, 0.0)
    attention = TrainingAttention(TINY, len(SIDES), torch.float32)
    rows = [model(ids, torch.full((4,), dropped), inputs, attention)[0] for dropped in (False, True)]
    assert (rows[0] - rows[1]).abs().max() > 0.1
    net = TINY.model(model.transformer, tokenizer, model.text)
    text = net.encode(items_of(scene.caption for scene in scenes))
    for cfg in (1.0, 2.5):
        sampling = Sampling((cfg,) * len(SIDES), PLAIN.tau)
        trace = net.generate(text, sampling, FullAttention(), None, forced)
        wanted = cfg * rows[0] + (1 - cfg) * rows[1]
        torch.testing.assert_close(torch.cat(trace.logits, 1), wanted, atol=1e-4, rtol=1e-4)


def test_a_short_step_is_the_beginning_of_a_whole_one() -> None:
    model, _ = networks()
    _, ids, _ = world_batch(2, random.Random(6))
    kept = torch.zeros(2, dtype=torch.bool)
    outs = []
    for scales in (TINY.short, len(SIDES)):
        _, inputs = noisy_inputs(latents(2), SIDES[:scales], 0.0)
        outs.append(model(ids, kept, inputs, TrainingAttention(TINY, scales, torch.float32))[0])
    torch.testing.assert_close(outs[0], outs[1][:, : outs[0].shape[1]], atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------------------- the model in conf/model


@pytest.mark.parametrize("trained", MODELS.values(), ids=list(MODELS))
def test_what_is_trained_is_what_the_yaml_loads(trained: Shape) -> None:
    content = conf(trained)
    params, sampling = content["params"], content["sampling"]
    assert [tuple(size) for size in content["resolutions"][content["resolution"]]] == trained.sizes
    assert content["resolution"] == f"{trained.pixels}px"
    assert (content["num_layers"], content["num_heads"]) == (TRANSFORMER.depth, TRANSFORMER.heads)
    assert content["head_dim"] == TRANSFORMER.head_dim
    assert (params["width"], params["block_chunks"]) == (TRANSFORMER.width, TRANSFORMER.block_chunks)
    assert (params["text_channels"], params["text_layers"]) == (TRANSFORMER.text_channels, tiny_net.TEXT_LAYERS)
    assert (tuple(params["rope_base"]), params["rope_mode"]) == (trained.sizes[-1], 2)
    shape = tiny_net.TOKENIZER
    for key, value in params["tokenizer"].items():
        assert getattr(shape, key) == (tuple(value) if isinstance(value, list) else value), key
    assert trained.sampling.cfg == (sampling["cfg"],) * len(trained.sides)
    assert list(trained.sampling.tau) == sampling["tau"]
    assert (trained.sampling.top_k, trained.sampling.top_p) == (sampling["top_k"], sampling["top_p"])


# ---------------------------------------------------------------------------------------------------------- training


def train(out: Path, stage: str, *options: object) -> None:
    """The script's command line; only the validation is shortened, from 256 pictures to 4."""
    validate = train_tiny.validate

    def short(average: dict[str, Tensor], held: list[Tensor], *more: Any) -> dict[str, float]:
        return validate(average, [t[:4] for t in held], *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_tiny, "validate", short)
        patch.setattr(sys, "argv", [str(o) for o in ("train_tiny.py", stage, "--out", out, "--threads", 1, *options)])
        train_tiny.main()


def checkpoint(out: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(out / "transformer.pt")
    return state


def test_training_goes_on_from_its_checkpoint_and_is_exported(tmp_path: Path) -> None:
    _, tokenizer = networks()
    torch.save({"model": tokenizer.state_dict(), "step": 0}, tmp_path / "tokenizer.pt")
    few = ("--no-compile", "--batch", 2, "--per-task", 1, "--images", 512, "--every", 1e9)
    train(tmp_path, "transformer", "--seconds", 0.5, *few)
    first = checkpoint(tmp_path)
    assert first["step"] >= 1
    # at rate 0 nothing moves: what is saved next is what was loaded, although steps are made
    train(tmp_path, "transformer", "--seconds", first["spent"] + 0.5, "--lr", 0, *few)
    second = checkpoint(tmp_path)
    assert second["step"] > first["step"]
    assert second["spent"] > first["spent"]
    assert all(torch.equal(second["model"][name], value) for name, value in first["model"].items())
    for name in ("adam", "muon"):
        assert first[name]["state"].keys() == second[name]["state"].keys()
    assert {float(s["step"]) for s in second["adam"]["state"].values() if "step" in s} == {float(second["step"])}
    train(tmp_path, "transformer", "--seconds", second["spent"] + 0.2, *few)
    third = checkpoint(tmp_path)
    assert third["step"] > second["step"]
    assert not torch.equal(third["model"]["transformer.head.weight"], second["model"]["transformer.head.weight"])
    with (tmp_path / "transformer.csv").open(newline="") as f:
        rows = list(csv.DictReader(f))
    assert [int(row["step"]) for row in rows] == [first["step"], second["step"], third["step"]]
    assert all(0.3 < float(row["val"]) < 3 and 0 <= float(row["mean"]) <= 1 for row in rows)
    check_export(tmp_path, third["average"])


def params(shape: Shape) -> dict[str, Any]:
    content = conf(shape)["params"]
    tokenizer = {**content["tokenizer"], "multipliers": tuple(content["tokenizer"]["multipliers"])}
    return {**content, "tokenizer": TokenizerParams(**tokenizer)}


def check_export(out: Path, average: dict[str, Tensor]) -> None:
    """The bundle is the averaged weights in float16, and the package loads it."""
    train(out, "export", "--to", out / "bundle.safetensors")
    model, tokenizer = networks()
    geometry = TINY.model(model.transformer, tokenizer, model.text).geometry
    loaded = load_bundled(geometry, {"model": out / "bundle.safetensors"}, "cpu", **params(TINY))
    for part in ("transformer", "text"):
        for name, value in getattr(loaded, part).state_dict().items():
            assert torch.equal(value, average[f"{part}.{name}"].half().float()), name
    text = loaded.encode(items_of(["two red circles"]))
    trace = loaded.generate(text, TINY.sampling, FullAttention(), [torch.Generator().manual_seed(0)])
    assert loaded.decode(trace.latent).shape == (1, 80, 80, 3)
    again = out / "again"
    train(again, "restore", "--source", out / "bundle.safetensors")
    for name, value in checkpoint(again)["average"].items():
        if not name.startswith("probe"):  # is not shipped
            assert torch.equal(value, average[name].half().float()), name
    larger = out / "larger"
    train(larger, "restore", "--source", out / "bundle.safetensors", "--model", "tiny-160")
    levels = "transformer.lvl_embed.weight"
    nearest = [0, 1, 2, 3, 5, 6, 7, 7, 7, 7]  # tiny's scale of the same side, then its last
    assert torch.equal(checkpoint(larger)["average"][levels][:10], average[levels][nearest].half().float())
