"""A small VAR with random weights, its attention going through the cache: every method runs, none is told of VAR.

Independent references: attention that concatenates everything it has seen, and one forward of the whole sequence
under a block-causal mask.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from heatkv_cli.calibration.calibration import Calibration
from heatkv_cli.calibration.statistics import AttentionStatistics, concatenate
from heatkv_cli.config import choices, compose
from heatkv_cli.core.budget import Budget
from heatkv_cli.core.cache import KVCache
from heatkv_cli.core.policy import Policy
from heatkv_cli.core.scales import Geometry, ScaleSchedule
from heatkv_cli.methods.base import Method, Setting
from heatkv_cli.models.base import Trace
from heatkv_cli.models.var.model import VarModel
from heatkv_cli.models.var.sampling import Sampling
from heatkv_cli.models.var.tokenizer import Tokenizer, TokenizerConfig
from heatkv_cli.models.var.transformer import Var, VarConfig
from tiny_net import FullAttention

SIZES = tuple((p, p) for p in (1, 2, 3, 4, 5, 6))
GEOMETRY = Geometry("small-var", 4, 4, 8, ScaleSchedule(SIZES), 1)
CLASSES = torch.tensor([0, 6, 3])
GUIDED, PLAIN = Sampling(2.0, True, 20, 0.9), Sampling(0.0, True, 20, 0.9)
VARIANTS = {"usual": (False, True), "shared": (True, True), "no unit queries": (False, False)}


@cache
def model(variant: str = "usual") -> VarModel:
    """Random weights, large enough that attention and codes matter."""
    torch.manual_seed(0)
    shared, l2_norm = VARIANTS[variant]
    pixels = TokenizerConfig(32, 6, 8, (1, 2), 1, 4)
    net = Var(VarConfig(4, 32, 4, SIZES, 7, 32, 6, l2_norm=l2_norm, shared=shared))
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.add_(torch.randn_like(p) * (0.3 if p.ndim < 2 or "ada" in name else 0.1))
    tokenizer = Tokenizer(pixels)
    for part in (net, tokenizer):
        part.eval().requires_grad_(False)
    return VarModel(GEOMETRY, net, tokenizer)


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(100 + i) for i in range(len(CLASSES))]


def plain(sampling: Sampling = GUIDED, variant: str = "usual") -> Trace:
    return model(variant).generate(CLASSES, sampling, FullAttention(), generators())


@cache
def calibration() -> Calibration:
    statistics = AttentionStatistics(GEOMETRY, len(CLASSES))
    rows = model().rows(len(CLASSES), GUIDED)
    kv = KVCache(GEOMETRY, Policy(GEOMETRY.full_tokens), rows, len(CLASSES), observers=(statistics,))
    model().generate(CLASSES, GUIDED, kv, generators())
    return Calibration(GEOMETRY, "classes", (7,) * len(CLASSES), **concatenate([statistics]))


def kv_cache(method: Method, text: str, rows: int) -> KVCache:
    budget, found = Budget.parse(text), calibration() if method.calibrated else None
    policy = method.policy(Setting(GEOMETRY, budget, rows, calibration=found))
    return KVCache(GEOMETRY, policy, rows, len(CLASSES), budget=budget)


def method(name: str) -> Method:
    made: Method = compose([f"method={name}"]).first.method.object
    return made


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("sampling", [GUIDED, PLAIN], ids=["guided", "plain"])
def test_the_full_cache_changes_nothing(variant: str, sampling: Sampling) -> None:
    net = model(variant)
    kv = kv_cache(method("full"), "1", net.rows(len(CLASSES), sampling))
    trace, wanted = net.generate(CLASSES, sampling, kv, generators()), plain(sampling, variant)
    assert all(torch.equal(a, b) for a, b in zip(trace.codes, wanted.codes, strict=True))
    for ours, theirs in zip(trace.logits, wanted.logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert kv.ledger.ratios()["beta_live"] == 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_scale_by_scale_is_the_whole_sequence_under_a_mask(variant: str) -> None:
    made, trace = model(variant), plain(PLAIN, variant)
    net = made.transformer
    level = torch.cat([torch.full((h * w,), s) for s, (h, w) in enumerate(SIZES)])

    class Masked:
        def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
            logits = q @ k.transpose(-1, -2) * softmax_scale
            return logits.masked_fill(level[:, None] < level, -torch.inf).softmax(-1) @ v

    cond, places = net.condition(CLASSES), net.positions()
    inputs = made.tokenizer.quantize.inputs(trace.codes, SIZES)
    x = torch.cat((net.start(cond, places[:, :1]), net.embed(inputs, places[:, 1:])), 1)
    logits = net.logits(net.run(x, cond, Masked()), cond)
    torch.testing.assert_close(torch.cat(trace.logits, 1), logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", choices("method"))
def test_every_method_runs_within_its_budget(name: str) -> None:
    """And the smaller cache is felt: the forced logits differ from those of the full cache."""
    made, text = method(name), "1" if name == "full" else "0.3"
    net, wanted = model(), plain()
    kv = kv_cache(made, text, net.rows(len(CLASSES), GUIDED))
    trace = net.generate(CLASSES, GUIDED, kv, None, wanted.codes)
    ratios = kv.ledger.ratios()
    assert ratios["beta_live"] <= ratios["beta_alloc"] <= 1.005 * float(text)
    gap = max((a - b).abs().max().item() for a, b in zip(trace.logits, wanted.logits, strict=True))
    assert gap < 1e-4 if name == "full" else gap > 1e-3
    assert torch.equal(trace.latent, wanted.latent)


def test_one_softmax_scale_a_model() -> None:
    """1 with unit queries and their temperatures; else a quarter of the usual."""
    seen = set()

    class Noting(FullAttention):
        def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
            seen.add((layer, softmax_scale))
            return super().attend(layer, q, k, v, softmax_scale)

    for variant, scale in (("usual", 1.0), ("no unit queries", 0.25 / 8**0.5)):
        seen.clear()
        model(variant).generate(CLASSES, PLAIN, Noting(), generators())
        assert seen == {(layer, scale) for layer in range(4)}
