"""Attention and its statistics against one softmax at a time, in float64."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from heatkv_cli.core import attention
from heatkv_cli.core.attention import (
    Group,
    column_mass,
    grouped_attention,
    kernel_keys,
    masked_attention,
    probability_chunks,
    varlen_attention,
)
from heatkv_cli.core.cache import KVCache
from heatkv_cli.core.policy import Keep, Policy, Visit
from heatkv_cli.core.scales import Geometry, ScaleSchedule

B, H, Q, D, SCALE = 2, 5, 6, 8, 0.4


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights(q: Tensor, keys: Tensor) -> Tensor:
    """Softmax of one query (D,) over keys (n, D), float64."""
    logits = [float((q.double() * key.double()).sum()) * SCALE for key in keys]
    top = max(logits)
    powers = [math.exp(logit - top) for logit in logits]
    return torch.tensor([power / sum(powers) for power in powers], dtype=torch.float64)


def literal(q: Tensor, keys: list[list[Tensor]], values: list[list[Tensor]]) -> Tensor:
    """Attention row by row, head by head, query by query; keys[b][h] (n, D)."""
    out = torch.empty(q.shape, dtype=torch.float64)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                out[b, h, i] = weights(q[b, h, i], keys[b][h]) @ values[b][h].double()
    return out


def one_by_one(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, softmax_scale: float
) -> Tensor:
    """What the variable-length kernel computes, sequence after sequence; it has no CPU form."""
    starts, ends = cu_q.tolist(), cu_k.tolist()
    assert cu_q.dtype == cu_k.dtype == torch.int32 and len(starts) == len(ends)
    assert starts[-1] == len(q) and ends[-1] == len(k) == len(v) and q.shape[1] == k.shape[1] == 1
    assert max_q == max(b - a for a, b in pairwise(starts)) and max_k == max(b - a for a, b in pairwise(ends))
    out = torch.empty_like(q)
    for (a, b), (c, d) in zip(pairwise(starts), pairwise(ends), strict=True):
        out[a:b, 0] = (q[a:b, 0] @ k[c:d, 0].T * softmax_scale).softmax(-1) @ v[c:d, 0]
    return out


@pytest.mark.parametrize("lengths", [(0, 0, 0, 0, 0), (3, 3, 3, 3, 3), (0, 4, 0, 2, 4), (1, 2, 3, 4, 5)])
def test_heads_with_histories_of_different_length(lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (randn(B, H, Q, D, seed=seed) for seed in (1, 2, 3))
    old_k, old_v = (randn(B, H, max(lengths), D, seed=seed) for seed in (4, 5))
    groups = []
    for n in sorted(set(lengths)):
        heads = [h for h in range(H) if lengths[h] == n]
        groups.append(Group(heads, old_k[:, heads, :n], old_v[:, heads, :n]))
    keys = [[torch.cat((old_k[b, h, : lengths[h]], k[b, h])) for h in range(H)] for b in range(B)]
    values = [[torch.cat((old_v[b, h, : lengths[h]], v[b, h])) for h in range(H)] for b in range(B)]
    expected = literal(q, keys, values)
    torch.testing.assert_close(grouped_attention(q, k, v, iter(groups), SCALE).double(), expected, atol=1e-5, rtol=1e-5)
    monkeypatch.setattr(attention, "_varlen_kernel", one_by_one)
    stored = [torch.cat([old[:, h, : lengths[h]] for h in range(H)], 1) for old in (old_k, old_v)]
    varlen = varlen_attention(q, k, v, lengths, (stored[0], stored[1]), SCALE)
    torch.testing.assert_close(varlen.double(), expected, atol=1e-5, rtol=1e-5)
    valid = torch.cat((torch.arange(max(lengths)) < torch.tensor(lengths)[:, None], torch.ones(H, Q).bool()), 1)[None]
    dense = masked_attention(q, torch.cat((old_k, k), 2), torch.cat((old_v, v), 2), valid, SCALE)
    torch.testing.assert_close(dense.double(), expected, atol=1e-5, rtol=1e-5)


def test_current_keys_may_be_part_of_the_groups() -> None:
    q, k, v = (randn(B, H, Q, D, seed=seed) for seed in (1, 2, 3))
    whole = grouped_attention(q, k, v, [Group(range(H), k[:, :, :0], v[:, :, :0])], SCALE)
    split = grouped_attention(
        q,
        k[:, :, :0],
        v[:, :, :0],
        [Group([0, 2], k[:, [0, 2]], v[:, [0, 2]]), Group([1, 3, 4], k[:, [1, 3, 4]], v[:, [1, 3, 4]])],
        SCALE,
    )
    torch.testing.assert_close(split, whole, atol=1e-5, rtol=1e-5)  # as each of them and the oracle


def test_the_dtype_stays() -> None:
    q, k, v = (randn(B, H, Q, D, seed=seed).bfloat16() for seed in (1, 2, 3))
    none = k[:, :, :0]
    grouped = grouped_attention(q, k, v, [Group(range(H), none, none)], SCALE)
    dense = masked_attention(q, k, v, torch.ones(1, H, Q).bool(), SCALE)
    assert grouped.dtype == dense.dtype == torch.bfloat16
    torch.testing.assert_close(grouped, dense, atol=2e-2, rtol=0)


@pytest.mark.parametrize(("old", "new"), [((0, 0), 85), ((21, 21), 64), ((0, 21), 64), ((5, 21), 63), ((3, 7), 1020)])
def test_half_precision_hands_the_kernel_zeros_that_nobody_attends_to(
    old: tuple[int, int], new: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = (randn(B, 2, new, 32, seed=seed).bfloat16() for seed in (1, 2, 3))
    past = [[randn(B, 1, n, 32, seed=4 + n).bfloat16() for n in old] for _ in "kv"]
    if old[0] == old[1]:
        groups = [Group([0, 1], *(torch.cat(x, 1) for x in past))]
    else:
        groups = [Group([h], past[0][h], past[1][h]) for h in range(2)]
    kernel, seen = F.scaled_dot_product_attention, []

    def watched(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, scale: float) -> Tensor:
        seen.append(k.shape[2])
        return kernel(q, k, v, mask, scale=scale)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    got = grouped_attention(q, k, v, groups, SCALE)
    counts = sorted({n + new for n in old})
    assert seen == [-(-n // 16) * 16 if n < 1024 else n for n in counts]
    for h, n in enumerate(old):
        keys, values = (torch.cat((x[h], y[:, h : h + 1]), 2) for x, y in zip(past, (k, v), strict=True))
        dense = masked_attention(q[:, h : h + 1], keys, values, torch.ones(1, 1, n + new).bool(), SCALE)
        torch.testing.assert_close(got[:, h : h + 1], dense, atol=1e-2, rtol=1e-2)


def test_only_half_precision_on_the_host_is_given_more_keys() -> None:
    host, other = (
        torch.empty(1, 1, 1, 1, dtype=torch.bfloat16),
        torch.empty(1, 1, 1, 1, dtype=torch.bfloat16, device="meta"),
    )
    assert [kernel_keys(host, n) for n in (63, 64, 65, 277, 1023, 1024, 1025)] == [63, 64, 80, 288, 1024, 1024, 1025]
    assert kernel_keys(other, 277) == kernel_keys(host.float(), 277) == 277


def test_no_groups_are_a_mistake() -> None:
    q = randn(B, H, Q, D, seed=1)
    with pytest.raises(ValueError, match="in no group"):
        grouped_attention(q, q, q, [], SCALE)


KEPT = ([0, 1, 2], [0, 3, 4, 5, 6])  # of a history of 3 and 4 current tokens


class Selects(Policy):
    """Chooses before attention, at the last scale."""

    def before_attend(self, visit: Visit) -> Keep | None:
        mask = torch.zeros(2, 7, dtype=torch.bool)
        for head, kept in enumerate(KEPT):
            mask[head, kept] = True
        return Keep(visit.layer, mask=mask) if visit.scale == 2 else None


@pytest.mark.parametrize("backend", ["grouped", "masked"])
def test_the_last_scale_may_be_selected_but_is_not_stored(backend: str) -> None:
    """A Keep before the attention of the last scale governs attention alone."""
    geometry = Geometry("toy", 1, 2, D, ScaleSchedule(((1, 2), (1, 1), (2, 2))), 1)
    cache, x = KVCache(geometry, Selects(geometry.full_tokens), 1, 1, backend=backend), randn(1, 2, 7, D, seed=1)
    for start, stop in [(0, 2), (2, 3), (3, 7)]:
        assert cache.pool.used == 2 * start
        now = x[:, :, start:stop]
        y = cache.attend(0, now, now, now, SCALE)
        cache.end_step()
    assert cache.pool.used == 0
    chosen = [[x[0, head, kept] for head, kept in enumerate(KEPT)]]
    torch.testing.assert_close(y.double(), literal(x[:, :, 3:], chosen, chosen), atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("chunk", [1, B * H * 9, 2 * B * H * 9 + 1, 1 << 22])
@pytest.mark.parametrize("seed", range(3))
def test_probabilities_in_chunks(seed: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers whatever fits in memory at once, down to a single query."""
    monkeypatch.setattr(attention, "CHUNK_ELEMENTS", chunk)
    q, k = randn(B, H, Q, D, seed=seed), randn(B, H, 9, D, seed=seed + 1)
    expected = torch.zeros(B, H, Q, 9, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            for i in range(Q):
                expected[b, h, i] = weights(q[b, h, i], k[b, h])
    parts = list(probability_chunks(q, k, SCALE))
    assert [part.start for part, _ in parts[1:]] == [part.stop for part, _ in parts[:-1]]
    assert (parts[0][0].start, parts[-1][0].stop) == (0, Q)
    step = max(1, chunk // (B * H * 9))
    assert all(p.shape[2] <= step and p.dtype == torch.float32 for _, p in parts)
    torch.testing.assert_close(torch.cat([p for _, p in parts], 2).double(), expected, atol=1e-5, rtol=1e-5)
    mass = column_mass(q, k, SCALE)
    torch.testing.assert_close(mass.double(), expected.sum(2), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mass.sum(-1), torch.full((B, H), float(Q)), atol=1e-5, rtol=1e-5)
