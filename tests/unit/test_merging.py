"""Merging of dropped tokens against the four formulas, one token at a time in plain Python."""

from __future__ import annotations

import pytest
import torch
from literal_cache import Token, merge
from torch import Tensor

from heatkv_cli.methods.toolkit import merging
from heatkv_cli.methods.toolkit.merging import RULES, merge_dropped

B, H, N, D = 2, 3, 17, 4


def inputs(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """k, v and masks in which heads are of different length and keep different numbers, rows different tokens."""
    g = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, B, H, N, D, generator=g)
    valid = torch.arange(N) < torch.tensor([N, N - 4, N - 6])[:, None]
    kept = torch.zeros(B, H, N, dtype=torch.bool)
    for b in range(B):
        for h, (length, count) in enumerate(((N, 5), (N - 4, 9), (N - 6, 1))):
            kept[b, h, torch.randperm(length, generator=g)[:count]] = True
    return k, v, kept, valid[None]


def own(x: Tensor, kept: Tensor) -> Tensor:
    """The kept tokens of x, head after head."""
    return torch.stack([x[b][kept[b]] for b in range(B)])


def packed(x: Tensor, kept: Tensor) -> list[tuple[Tensor, ...]]:
    """What belongs to each row and head of kept tokens, head after head."""
    return [x[b].split(kept[b].sum(-1).tolist()) for b in range(B)]


@pytest.mark.parametrize("chunk", [1, 40, 1 << 22])
@pytest.mark.parametrize("rule", RULES)
def test_each_rule_is_its_formula(rule: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "CHUNK_ELEMENTS", chunk)
    k, v, kept, valid = inputs(3)
    new_k, new_v = merge_dropped(k, v, kept, valid, rule)
    for b in range(B):
        for h in range(H):
            length, stay = int(valid[0, h].sum()), kept[b, h].nonzero().flatten().tolist()
            tokens = [Token(i, k[b, h, i].tolist(), v[b, h, i].tolist()) for i in range(length)]
            expected = merge(tokens, stay, rule)
            for mine, theirs in ((new_k, [token.k for token in expected]), (new_v, [token.v for token in expected])):
                torch.testing.assert_close(packed(mine, kept)[b][h], torch.tensor(theirs), atol=1e-5, rtol=1e-5)
    assert not torch.equal(new_k, own(k, kept))


@pytest.mark.parametrize("rule", RULES)
def test_nothing_dropped_nothing_changes(rule: str) -> None:
    k, v, _, valid = inputs(4)
    for kept in (valid.expand(B, -1, -1), torch.zeros(B, H, N, dtype=torch.bool)):
        assert all(map(torch.equal, merge_dropped(k, v, kept, valid, rule), (own(k, kept), own(v, kept))))


def test_heads_that_keep_nothing_leave_the_others_alone() -> None:
    k, v, kept, valid = inputs(5)
    first = int(kept[0, 0].sum())
    alone = [x[:, :first] for x in merge_dropped(k, v, kept, valid, "average")]
    kept[:, 1:] = False
    assert all(map(torch.equal, merge_dropped(k, v, kept, valid, "average"), alone))


def test_the_dtype_stays() -> None:
    k, v, kept, valid = inputs(6)
    new_k, new_v = merge_dropped(k.bfloat16(), v.bfloat16(), kept, valid, "similarity")
    assert new_k.dtype == new_v.dtype == torch.bfloat16
    exact = merge_dropped(k.bfloat16().float(), v.bfloat16().float(), kept, valid, "similarity")[0]
    torch.testing.assert_close(new_k.float(), exact, atol=2e-2, rtol=1e-2)


def test_an_unknown_rule_is_refused() -> None:
    k, v, kept, valid = inputs(7)
    with pytest.raises(ValueError, match="expected one of"):
        merge_dropped(k, v, kept, valid, "nearest")
