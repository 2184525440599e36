"""scripts/own_keys.py: which keys stay, and what attention and KL are without the others."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Bernoulli, kl_divergence

from heatkv_cli.models.base import Trace
from own_keys import Thinned, divergences, kept_tokens


def test_a_checkerboard_and_a_lattice() -> None:
    assert kept_tokens(3, "half").tolist() == [0, 2, 4, 6, 8]
    assert kept_tokens(4, "half").tolist() == [0, 2, 5, 7, 8, 10, 13, 15]
    assert kept_tokens(4, "quarter").tolist() == [0, 2, 8, 10]
    assert [len(kept_tokens(side, "quarter")) for side in (5, 10, 13, 20)] == [9, 25, 49, 100]


@pytest.mark.parametrize("share", ["half", "quarter"])
def test_only_the_own_keys_of_one_scale_are_thinned(share: str) -> None:
    torch.manual_seed(0)
    scales = [[torch.randn(2, 3, side * side, 4, dtype=torch.float64) for _ in "qkv"] for side in (2, 3, 4)]
    kept = kept_tokens(3, share)
    seam, past_k, past_v = Thinned(1, kept), [], []
    for number, (q, k, v) in enumerate(scales):
        y = seam.attend(0, q, k, v, 0.5)
        seam.end_step()
        weight = torch.ones(sum(x.shape[2] for x in past_k) + k.shape[2], dtype=torch.float64)
        if number == 1:
            weight[4:] = 0
            weight[4 + kept] = 9 / len(kept)
        past_k.append(k)
        past_v.append(v)
        mass = (0.5 * q @ torch.cat(past_k, 2).mT).exp() * weight
        torch.testing.assert_close(y, mass @ torch.cat(past_v, 2) / mass.sum(-1, keepdim=True), atol=1e-6, rtol=1e-6)


def test_divergences_are_those_of_one_scale_image_by_image() -> None:
    torch.manual_seed(1)
    traces = [Trace((), tuple(torch.randn(3, side * side, 4) * 6 for side in (1, 2, 3)), torch.zeros(3)) for _ in "ab"]
    for scale in (1, 2):
        full, other = (Bernoulli(logits=trace.logits[scale].double()) for trace in traces)
        assert divergences(*traces, scale) == pytest.approx(kl_divergence(full, other).mean((1, 2)).tolist(), rel=1e-9)
