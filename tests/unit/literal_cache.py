"""A slow KV cache of single tokens in Python lists, beside which a policy is run visit by visit.

Tests of methods re-state a paper's rule on one `LiteralVisit` at a time, with loops over attention weights; `compare`
runs that and the method on the same q, k, v and holds kept positions, stored keys and values, and outputs together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from heatkv_cli.core.cache import KVCache
from heatkv_cli.core.policy import Policy
from heatkv_cli.core.scales import Geometry


@dataclass
class Token:
    """One stored token: its place in the sequence, key and value, and whatever a rule notes on it."""

    position: int
    k: list[float]
    v: list[float]
    score: float = 0.0


@dataclass
class Head:
    """One head of one row at a visit: [cache, current] and the current queries."""

    tokens: list[Token]
    current: int
    queries: Tensor
    softmax_scale: float
    _keys: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._keys = torch.tensor([token.k for token in self.tokens], dtype=torch.float64)

    def logits(self, query: int) -> list[float]:
        return (self._keys @ self.queries[query].double() * self.softmax_scale).tolist()

    def weights(self, query: int) -> list[float]:
        """Softmax attention of one query over all tokens."""
        return torch.tensor(self.logits(query), dtype=torch.float64).softmax(0).tolist()

    def sums(self, queries: Iterable[int]) -> list[float]:
        """What each token receives from some queries."""
        total = [0.0] * len(self.tokens)
        for query in queries:
            for column, weight in enumerate(self.weights(query)):
                total[column] += weight
        return total

    def attend(self, tokens: list[Token], queries: int) -> Tensor:
        """Output of the first queries over a choice of tokens."""
        keys = torch.tensor([token.k for token in tokens], dtype=torch.float64)
        values = torch.tensor([token.v for token in tokens], dtype=torch.float64)
        return (self.queries[:queries].double() @ keys.T * self.softmax_scale).softmax(-1) @ values


@dataclass
class LiteralVisit:
    """Layer `layer` at scale `scale`: every (row, head), and what all layers have stored so far."""

    geometry: Geometry
    layer: int
    scale: int
    heads: dict[tuple[int, int], Head]
    stored: dict[tuple[int, int, int], list[Token]]

    @property
    def last(self) -> bool:
        return self.scale == self.geometry.num_scales - 1

    @property
    def length(self) -> int:
        """Tokens of the longest head in [cache, current]."""
        return max(len(head.tokens) for head in self.heads.values())


Rule = Callable[[LiteralVisit], dict[tuple[int, int], list[Token]]]
"""What each (row, head) keeps, in the order of positions; tokens may be new ones (merging)."""


def top(scores: list[float], count: int, among: Iterable[int]) -> list[int]:
    """Columns of the highest scores, ties to the lower column."""
    return sorted(among, key=lambda column: (-scores[column], column))[:count]


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))


def mean(vectors: Sequence[Sequence[float]], weights: Sequence[float], total: float) -> list[float]:
    return [sum(w * x[d] for w, x in zip(weights, vectors, strict=True)) / total for d in range(len(vectors[0]))]


def merge(tokens: list[Token], kept: list[int], rule: str) -> list[Token]:
    """The kept tokens after all others went into the one of nearest key, each rule as its paper writes it."""
    assigned: dict[int, list[tuple[int, float]]] = {j: [] for j in kept}
    gone = [i for i in range(len(tokens)) if i not in assigned]
    for i in gone:
        near, minus = max((cosine(tokens[i].k, tokens[j].k), -j) for j in kept)
        assigned[-minus].append((i, near))
    average = sum(near for members in assigned.values() for _, near in members) / max(1, len(gone))

    def folded(j: int, side: str) -> list[float]:
        own, members = getattr(tokens[j], side), assigned[j]
        theirs = [getattr(tokens[i], side) for i, _ in members]
        if rule == "pivot":
            middles = [mean([x, own], [1, 1], 2) for x in theirs]
            return mean([own, *middles], [1] * (1 + len(members)), 1 + len(members))
        if rule == "average":
            return mean([own, *theirs], [1] * (1 + len(members)), 1 + len(members))
        if rule == "weighted":
            near = [(x, c) for x, (_, c) in zip(theirs, members, strict=True) if c >= average]
            return mean([own, *(x for x, _ in near)], [1, *(c for _, c in near)], 1 + len(near))
        weights = [max(c, 0) for _, c in members]
        return mean([own, *theirs], [1, *weights], 1 + sum(weights))

    return [replace(tokens[j], k=folded(j, "k"), v=folded(j, "v")) for j in kept]


def compare(
    geometry: Geometry,
    policy: Policy,
    rule: Rule,
    timing: str,
    rows: int = 2,
    cond_rows: int = 1,
    seed: int = 0,
    sharpness: float = 2.0,
    outputs: int = 1 << 20,
) -> int:
    """Run policy and rule side by side; returns how many visits of the literal rule dropped tokens.

    Args:
        outputs: queries per visit whose attention output is compared.
    """
    g = torch.Generator().manual_seed(seed)
    cache = KVCache(geometry, policy, rows, cond_rows)
    H, scale, dropped = geometry.num_heads, geometry.head_dim**-0.5, 0
    stored: dict[tuple[int, int, int], list[Token]] = {}
    for t, tokens in enumerate(geometry.schedule.lengths):
        offset = geometry.schedule.offsets[t]
        for layer in range(geometry.num_layers):
            q, k, v = torch.randn(3, rows, H, tokens, geometry.head_dim, generator=g)
            q = q * sharpness
            y = cache.attend(layer, q, k, v, scale)
            heads = {}
            for b in range(rows):
                for h in range(H):
                    fresh = [Token(offset + i, k[b, h, i].tolist(), v[b, h, i].tolist()) for i in range(tokens)]
                    history = stored.get((b, layer, h), [])
                    heads[b, h] = Head([*history, *fresh], tokens, q[b, h], scale)
            visit = LiteralVisit(geometry, layer, t, heads, stored)
            kept = rule(visit) if timing == "before" or not visit.last else {}
            for (b, h), head in heads.items():
                mine = kept.get((b, h), head.tokens)
                dropped += len(mine) < len(head.tokens)
                expected = head.attend(mine if timing == "before" else head.tokens, outputs)
                torch.testing.assert_close(y[b, h, :outputs].double(), expected, atol=2e-5, rtol=2e-5)
                stored[b, layer, h] = [] if visit.last else mine
            _check_storage(cache, layer, rows, stored)
        cache.end_step()
    return dropped


def _check_storage(cache: KVCache, layer: int, rows: int, stored: dict[tuple[int, int, int], list[Token]]) -> None:
    view = cache.view(layer)
    positions = view.positions.expand(rows, -1, -1)
    for b in range(rows):
        for h in range(positions.shape[1]):
            real, mine = positions[b, h] >= 0, stored[b, layer, h]
            assert positions[b, h][real].tolist() == [token.position for token in mine], (cache.scale, layer, b, h)
            for side, numbers in ((view.k, [x.k for x in mine]), (view.v, [x.v for x in mine])):
                if mine:
                    torch.testing.assert_close(side[b, h][real], torch.tensor(numbers), atol=1e-5, rtol=1e-5)
