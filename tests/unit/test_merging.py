"""Merging of dropped tokens against the four formulas, one token at a time in plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from heatkv_cli.core import merging
from heatkv_cli.core.merging import RULES, merge_dropped

B, H, N, D = 2, 3, 17, 4


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / (math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b)))


def mean(vectors: list[list[float]], weights: list[float], total: float) -> list[float]:
    return [sum(w * x[d] for w, x in zip(weights, vectors, strict=True)) / total for d in range(len(vectors[0]))]


def literal(k: Tensor, v: Tensor, kept: list[int], dropped: list[int], rule: str) -> tuple[list[list[float]], ...]:
    """One head: k, v (N, D) -> the merged kept tokens, in the order of `kept`."""
    keys, values = k.double().tolist(), v.double().tolist()
    assigned: dict[int, list[tuple[int, float]]] = {j: [] for j in kept}
    best = {}
    for i in dropped:
        best[i] = max((cosine(keys[i], keys[j]), -j) for j in kept)
        assigned[-best[i][1]].append((i, best[i][0]))
    average = sum(c for c, _ in best.values()) / len(best)
    out: tuple[list[list[float]], list[list[float]]] = ([], [])
    for side, x in zip(out, (keys, values), strict=True):
        for j in kept:
            members = assigned[j]
            if rule == "pivot":
                middles = [mean([x[i], x[j]], [1, 1], 2) for i, _ in members]
                side.append(mean([x[j], *middles], [1] * (1 + len(members)), 1 + len(members)))
            elif rule == "average":
                side.append(mean([x[j], *(x[i] for i, _ in members)], [1] * (1 + len(members)), 1 + len(members)))
            elif rule == "weighted":
                near = [(i, c) for i, c in members if c >= average]
                side.append(mean([x[j], *(x[i] for i, _ in near)], [1, *(c for _, c in near)], 1 + len(near)))
            else:
                weights = [max(c, 0) for _, c in members]
                side.append(mean([x[j], *(x[i] for i, _ in members)], [1, *weights], 1 + sum(weights)))
    return out


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


@pytest.mark.parametrize("chunk", [1, 40, 1 << 22])
@pytest.mark.parametrize("rule", RULES)
def test_each_rule_is_its_formula(rule: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "CHUNK_ELEMENTS", chunk)
    k, v, kept, valid = inputs(3)
    new_k, new_v = merge_dropped(k, v, kept, valid, rule)
    for b in range(B):
        for h in range(H):
            stay = kept[b, h].nonzero().flatten().tolist()
            gone = (valid[0, h] & ~kept[b, h]).nonzero().flatten().tolist()
            expected = literal(k[b, h], v[b, h], stay, gone, rule)
            for mine, theirs in zip((new_k, new_v), expected, strict=True):
                torch.testing.assert_close(
                    mine[b, h, stay].double(), torch.tensor(theirs).double(), atol=1e-6, rtol=1e-5
                )
    untouched = ~kept
    assert torch.equal(new_k[untouched], k[untouched]) and torch.equal(new_v[untouched], v[untouched])
    assert not torch.equal(new_k, k)


@pytest.mark.parametrize("rule", RULES)
def test_nothing_dropped_nothing_changes(rule: str) -> None:
    k, v, _, valid = inputs(4)
    for kept in (valid, torch.zeros_like(valid)):
        assert all(map(torch.equal, merge_dropped(k, v, kept, valid, rule), (k, v)))


def test_heads_that_keep_nothing_leave_the_others_alone() -> None:
    k, v, kept, valid = inputs(5)
    alone = [x[:, :1] for x in merge_dropped(k, v, kept, valid, "average")]
    kept[:, 1:] = False
    new_k, new_v = merge_dropped(k, v, kept, valid, "average")
    assert torch.equal(new_k[:, :1], alone[0]) and torch.equal(new_v[:, :1], alone[1])
    assert torch.equal(new_k[:, 1:], k[:, 1:]) and bool(new_k.isfinite().all())


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
