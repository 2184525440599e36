"""Filters, guidance and divergence of VAR's categorical sampling, against plain Python and properties."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heatkv_cli.errors import ConfigError, ConfigErrors
from heatkv_cli.models.var.sampling import Sampling, draw, filter_logits, guide, smooth, token_kl

sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))

import var_literal as literal


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**20), st.integers(0, 12), st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]), st.booleans())
def test_what_filters_keep(seed: int, top_k: int, top_p: float, ties: bool) -> None:
    logits = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2
    if ties:
        logits = logits.round()
    kept = filter_logits(logits, top_k, top_p).isfinite()
    for b in range(2):
        for n in range(3):
            wanted = literal.kept(logits[b, n], top_k, top_p)
            found = set(kept[b, n].nonzero()[:, 0].tolist())
            if ties and top_p:  # which of two equal ones goes is the sort's business, their logits are not
                assert sorted(logits[b, n, list(found)]) == sorted(logits[b, n, list(wanted)])
            else:
                assert found == wanted


def test_filters_leave_their_input_alone() -> None:
    logits = torch.randn(1, 4, 8)
    before = logits.clone()
    filter_logits(logits, 2, 0.5)
    assert torch.equal(logits, before)


def test_guidance_ramps_with_the_index_of_the_scale() -> None:
    assert [Sampling(1.5).guidance(s, 4) for s in range(4)] == [0.0, 0.5, 1.0, 1.5]
    assert [Sampling(1.5, ramp=False).guidance(s, 4) for s in range(4)] == [1.5] * 4
    yes, no = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[3.0, 1.0]]])
    assert torch.equal(guide(torch.cat((yes, no)), 0.5), torch.tensor([[[0.0, 2.5]]]))
    assert not Sampling(0.0).guided and Sampling(0.1).guided


@pytest.mark.parametrize(
    "wrong",
    [
        {"cfg": -1.0},
        {"cfg": 1001.0},
        {"cfg": (1.0, 2.0), "ramp": False},
        {"cfg": (1.0, 2.0, 3.0), "ramp": True},
        {"top_k": -1},
        {"top_p": 1.5},
        {"top_p": -0.1},
    ],
)
def test_knobs_outside_their_range(wrong: dict[str, Any]) -> None:
    key = "ramp" if wrong.get("ramp") else next(iter(wrong))
    with pytest.raises(ConfigError, match=rf"^model\.sampling\.{key} is ") as caught:
        Sampling(**wrong).spelled(3, 2)
    assert caught.value.hint


def test_all_that_is_wrong_is_told_at_once() -> None:
    with pytest.raises(ConfigErrors) as caught:
        Sampling(cfg=-1.0, top_k=-1).spelled(3, 2)
    assert [error.message.split()[0] for error in caught.value.errors] == ["model.sampling.cfg", "model.sampling.top_k"]


def test_spelled_is_one_strength_a_scale() -> None:
    """A ramp becomes its values, twice is once, and what a scale gets stays the same."""
    for sampling in (Sampling(1.5), Sampling(1.5, ramp=False), Sampling((0.0, 2.0, 1.0, 3.0), ramp=False)):
        spelled = sampling.spelled(4, 2)
        assert spelled.cfg == tuple(sampling.guidance(s, 4) for s in range(4)) and not spelled.ramp
        assert spelled.spelled(4, 2) == spelled
        assert spelled.guided and spelled.at([0, 2]).cfg == (spelled.guidance(0, 4), spelled.guidance(2, 4))
    assert not Sampling(0.0).spelled(4, 2).guided
    assert Sampling((2.0,), ramp=False).spelled(3, 2).cfg == (2.0, 2.0, 2.0)


def test_draws_follow_the_probabilities() -> None:
    """20,000 draws of four indices; chi-square of three degrees of freedom, and nothing that was removed."""
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = torch.cat((p.log(), torch.tensor([-torch.inf]))).expand(1, 20_000, 5)
    counts = torch.bincount(draw(logits, [torch.Generator().manual_seed(1)])[0], minlength=5)
    assert counts[4] == 0
    expected = 20_000 * p
    assert ((counts[:4] - expected).square() / expected).sum() < 16.3  # 0.1 %


def test_smooth_codes_are_mixtures_of_what_is_left() -> None:
    """Weights are a distribution over the codes that filters left: with one left it is that code."""
    logits, codebook = torch.randn(1, 6, 4), torch.eye(4)
    weights = smooth(filter_logits(logits, 2, 0), codebook, 0, 5, [torch.Generator().manual_seed(2)])
    assert torch.allclose(weights.sum(-1), torch.ones(1, 6)) and ((weights > 0).sum(-1) <= 2).all()
    one = smooth(filter_logits(logits, 1, 0), codebook, 4, 5, [torch.Generator().manual_seed(2)])
    assert torch.equal(one[0].argmax(-1), logits[0].argmax(-1)) and torch.allclose(one.max(-1).values, torch.ones(1, 6))


def test_the_divergence_is_that_of_categories() -> None:
    """A mean over tokens, not over scales; the first scale does not count; a constant changes no distribution."""
    torch.manual_seed(0)
    full, other = ([torch.randn(1, tokens, 5) for tokens in (1, 4, 9)] for _ in range(2))
    found = token_kl(full, [logits + 7 for logits in other])
    each = []
    for a, b in zip(full[1:], other[1:], strict=True):
        pairs = [(x.softmax(-1).tolist(), y.softmax(-1).tolist()) for x, y in zip(a[0], b[0], strict=True)]
        each.append([sum(p * math.log(p / q) for p, q in zip(*pair, strict=True)) for pair in pairs])
    wanted = {"kl": sum(map(sum, each)) / 13, "kl_s1": sum(each[0]) / 4, "kl_s2": sum(each[1]) / 9}
    assert found == pytest.approx(wanted, abs=1e-6)
    assert token_kl(full, full) == {"kl": 0, "kl_s1": 0, "kl_s2": 0}
