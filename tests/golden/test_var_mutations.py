"""The golden tolerances tell right from wrong: each of these mistakes is put in, and the official runs must notice."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import var_golden as golden
from recorder import Recorder
from torch import Tensor
from var_golden import ABSENT, HERE, RUNS, Run

from heatkv_cli.models import parts as parts_module
from heatkv_cli.models.var import model as model_module
from heatkv_cli.models.var import sampling as sampling_module
from heatkv_cli.models.var import tokenizer as tokenizer_module
from heatkv_cli.models.var import transformer as transformer_module
from heatkv_cli.models.var.sampling import Sampling
from heatkv_cli.models.var.tokenizer import Quantiser, Size, _Phi
from heatkv_cli.models.var.transformer import Block, FeedForward, SelfAttention, Var, VarConfig, linear

pytestmark = [pytest.mark.golden, pytest.mark.skipif(not HERE, reason=ABSENT)]

Patch = pytest.MonkeyPatch


def no_clamp(patch: Patch) -> None:
    patch.setattr(transformer_module, "MAX_LOG_SCALE", math.inf)


def usual_softmax_scale(patch: Patch) -> None:
    patch.setattr(VarConfig, "softmax_scale", property(lambda config: config.head_dim**-0.5))


def gates_last(patch: Patch) -> None:
    """Shift, scale, gate triplets, as in other diffusion transformers."""
    own = Block.modulation

    def turned(self: Block, sos: Tensor, shared: Tensor | None) -> Tensor:
        return own(self, sos, shared)[:, :, [2, 5, 1, 4, 0, 3]]

    patch.setattr(Block, "modulation", turned)


def exact_gelu(patch: Patch) -> None:
    def forward(self: FeedForward, x: Tensor) -> Tensor:
        return linear(F.gelu(linear(x, self.fc1.weight, self.fc1.bias)), self.fc2.weight, self.fc2.bias)

    patch.setattr(FeedForward, "forward", forward)


def larger_eps(patch: Patch) -> None:
    patch.setattr(parts_module, "NORM_EPS", 1e-4)


def values_before_keys(patch: Patch) -> None:
    own = SelfAttention.project

    def swapped(self: SelfAttention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = own(self, x)
        return q, v, k

    patch.setattr(SelfAttention, "project", swapped)


def start_without_its_position(patch: Patch) -> None:
    patch.setattr(Var, "start", lambda net, cond, positions: cond.sos + net.pos_start)


def head_swaps_scale_and_shift(patch: Patch) -> None:
    own = Var.logits

    def swapped(self: Var, hidden: Tensor, cond: Any) -> Tensor:
        return own(self, hidden, transformer_module.Conditioning(cond.sos, cond.ada, cond.head.flip(2)))

    patch.setattr(Var, "logits", swapped)


def guidance_of_weight_t(patch: Patch) -> None:
    def guide(logits: Tensor, t: float) -> Tensor:
        yes, no = logits.chunk(2)
        return t * yes + (1 - t) * no

    patch.setattr(model_module, "guide", guide)


def guidance_without_ramp(patch: Patch) -> None:
    patch.setattr(Sampling, "guidance", lambda self, scale, scales: self.cfg)


def ramp_over_one_scale_more(patch: Patch) -> None:
    patch.setattr(Sampling, "guidance", lambda self, scale, scales: self.cfg * scale / scales)


def bilinear_codes(patch: Patch) -> None:
    def grow(x: Tensor, size: Size) -> Tensor:
        return x if x.shape[-2:] == torch.Size(size) else F.interpolate(x, size, mode="bilinear")

    patch.setattr(tokenizer_module, "grow", grow)


def bilinear_inputs(patch: Patch) -> None:
    def shrink(x: Tensor, size: Size) -> Tensor:
        return x if x.shape[-2:] == torch.Size(size) else F.interpolate(x, size, mode="bilinear")

    patch.setattr(model_module, "shrink", shrink)


def next_phi(patch: Patch) -> None:
    own = tokenizer_module.phi_table
    patch.setattr(tokenizer_module, "phi_table", lambda k, n=4: tuple(min(i + 1, n - 1) for i in own(k, n)))


def no_phi_at_the_last_scale(patch: Patch) -> None:
    own = Quantiser.contribution

    def contribution(self: Quantiser, codes: Tensor, scale: int, scales: int, size: Size) -> Tensor:
        return codes if scale == scales - 1 else own(self, codes, scale, scales, size)

    patch.setattr(Quantiser, "contribution", contribution)


def phi_is_the_convolution(patch: Patch) -> None:
    patch.setattr(tokenizer_module, "RESIDUAL", 1.0)
    assert _Phi.forward.__globals__["RESIDUAL"] == 1.0


def columns_first(patch: Patch) -> None:
    patch.setattr(model_module, "tokens", lambda latent: latent.transpose(2, 3).flatten(2).transpose(1, 2))


MISTAKES = [
    no_clamp,
    usual_softmax_scale,
    gates_last,
    exact_gelu,
    larger_eps,
    values_before_keys,
    start_without_its_position,
    head_swaps_scale_and_shift,
    guidance_of_weight_t,
    guidance_without_ramp,
    ramp_over_one_scale_more,
    bilinear_codes,
    bilinear_inputs,
    next_phi,
    no_phi_at_the_last_scale,
    phi_is_the_convolution,
    columns_first,
]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_noticed(mistake: Callable[[Patch], None]) -> None:
    run = Run("A_greedy", RUNS["A_greedy"])
    with pytest.MonkeyPatch.context() as patch:
        mistake(patch)
        model = run.build()
        found = golden.errors(run, model, golden.generate(run, Recorder(), forced=True, model=model))
    assert golden.beyond(found)


@pytest.mark.parametrize(("top_k", "top_p"), [(20, 0.0), (0, 0.96), (10, 0.96), (20, 0.9)])
def test_other_filters_are_noticed(top_k: int, top_p: float, monkeypatch: Patch) -> None:
    """What the recorded draws tell of the filters: one of them away, or different."""
    run = Run("C_topk_topp", RUNS["C_topk_topp"])
    own = sampling_module.filter_logits
    monkeypatch.setattr(model_module, "filter_logits", lambda logits, k, p: own(logits, top_k, top_p))
    trace = golden.generate(run, Recorder(), forced=False).trace
    assert any(not torch.equal(a, b) for a, b in zip(trace.codes, run.codes, strict=True))
