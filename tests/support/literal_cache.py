"""A slow KV cache of single tokens in Python lists, beside which the real one is run visit by visit.

`LiteralCache` holds a list of tokens for each layer, row and head. Tests of methods re-state a paper's rule on one
`LiteralVisit` at a time, with loops over attention weights; `compare` runs that and the method on the same q, k, v and
holds outputs, attended tokens, and the positions, keys and values that every layer stores together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from heatkv_cli.core.budget import Budget
from heatkv_cli.core.cache import FULL_BUDGET, KVCache
from heatkv_cli.core.policy import Policy
from heatkv_cli.core.scales import Geometry, ScaleSchedule

GEOMETRY = Geometry("literal", 3, 2, 4, ScaleSchedule(((1, 1), (2, 2), (3, 3), (3, 4), (5, 5), (6, 5))), 2)
ROWS, COND = 4, 2  # two images, each with a conditional and a guidance row
SHARPNESS = (0.72, 2.52, 4.32)  # a layer of GEOMETRY looks at its keys more or less sharply

Where = tuple[int, int]
"""(row, head)."""


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
    _keys: Tensor = field(init=False, repr=False)  # float64 (tokens, D)

    def __post_init__(self) -> None:
        self._keys = torch.tensor([token.k for token in self.tokens], dtype=torch.float64)

    @property
    def start(self) -> int:
        """Column of the first token of the current scale."""
        return len(self.tokens) - self.current

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

    def products(self, tokens: list[Token]) -> Tensor:
        """q k^T of all queries and a choice of tokens, before scaling."""
        return self.queries.double() @ torch.tensor([token.k for token in tokens], dtype=torch.float64).T

    def attend(self, tokens: list[Token], queries: int = 1 << 20) -> Tensor:
        """Output of the first queries over a choice of tokens."""
        values = torch.tensor([token.v for token in tokens], dtype=torch.float64)
        few = self if queries >= len(self.queries) else replace(self, queries=self.queries[:queries])
        return (few.products(tokens) * self.softmax_scale).softmax(-1) @ values


@dataclass
class LiteralCache:
    """What every (layer, row, head) stores, in the order of positions."""

    geometry: Geometry
    rows: int
    stored: dict[tuple[int, int, int], list[Token]] = field(default_factory=dict)

    def tokens(self, layer: int, row: int, head: int) -> list[Token]:
        return self.stored.setdefault((layer, row, head), [])

    def length(self, layer: int, head: int) -> int:
        """Tokens that a head holds, the same in every row."""
        (length,) = {len(self.tokens(layer, row, head)) for row in range(self.rows)}
        return length

    @property
    def used(self) -> int:
        """Tokens of one row in all heads of all layers."""
        heads = range(self.geometry.num_heads)
        return sum(self.length(layer, head) for layer in range(self.geometry.num_layers) for head in heads)

    def heads(self, layer: int, scale: int, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> dict[Where, Head]:
        """Every row and head of a visit, with what it stores and the current tokens."""
        start, found = self.geometry.schedule.offsets[scale], {}
        for row in range(self.rows):
            for head in range(self.geometry.num_heads):
                pairs = zip(k[row, head].tolist(), v[row, head].tolist(), strict=True)
                fresh = [Token(start + i, *pair) for i, pair in enumerate(pairs)]
                tokens = [*self.tokens(layer, row, head), *fresh]
                found[row, head] = Head(tokens, len(fresh), q[row, head], softmax_scale)
        return found

    def check(self, cache: KVCache, tolerance: float = 0.0) -> None:
        """Hold what all layers of a cache store beside it; keys and values within a tolerance."""
        for layer in range(self.geometry.num_layers):
            view = cache.view(layer)
            assert torch.equal(view.positions, cache.positions(layer))
            positions = view.positions.expand(self.rows, -1, -1)
            for row in range(self.rows):
                for head in range(self.geometry.num_heads):
                    mine = self.tokens(layer, row, head)
                    padding = [-1] * (positions.shape[2] - len(mine))
                    held = positions[row, head].tolist()
                    assert held == [x.position for x in mine] + padding, (cache.scale, layer, row, head)
                    if mine:
                        assert_near(view.k[row, head, : len(mine)], [x.k for x in mine], tolerance)
                        assert_near(view.v[row, head, : len(mine)], [x.v for x in mine], tolerance)


def assert_near(found: Tensor, expected: list[list[float]], tolerance: float) -> None:
    right = torch.tensor(expected, dtype=torch.float64)
    difference = (found.double() - right).abs()
    assert bool((difference <= tolerance * (1 + right.abs())).all()), float(difference.max())


@dataclass
class LiteralVisit:
    """Layer `layer` at scale `scale`: every (row, head), and the cache before it."""

    cache: LiteralCache
    layer: int
    scale: int
    heads: dict[Where, Head]

    @property
    def geometry(self) -> Geometry:
        return self.cache.geometry

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the current map."""
        return self.geometry.schedule.sizes[self.scale]

    @property
    def last(self) -> bool:
        return self.scale == self.geometry.num_scales - 1

    @property
    def length(self) -> int:
        """Tokens of the longest head in [cache, current]."""
        return max(len(head.tokens) for head in self.heads.values())


Rule = Callable[[LiteralVisit], dict[Where, list[Token]]]
"""What each (row, head) keeps, in the order of positions; tokens may be new ones (merging).

It may take tokens from what other layers store, in place.
"""


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


# ------------------------------------------------------------------------------------------- what several rules share


def grid(size: tuple[int, int], count: int) -> list[int]:
    """Windows the tests use, by hand: pieces of a map and their (lower) middles."""
    height, width = size
    count = min(count, height * width)
    rows = min(height, max(-(-count // width), round((count * height / width) ** 0.5)))
    picked = []
    for i in range(rows):
        here = (i + 1) * count // rows - i * count // rows
        row = [y for y in range(height) if i * height // rows <= y < (i + 1) * height // rows]
        for j in range(here):
            column = [x for x in range(width) if j * width // here <= x < (j + 1) * width // here]
            picked.append(row[(len(row) - 1) // 2] * width + column[(len(column) - 1) // 2])
    return picked


def best(scores: Sequence[float], count: int, always: set[int]) -> list[int]:
    """Columns of `always` and of the highest other scores, lower column first among equals, ascending."""
    rest = [column for column in range(len(scores)) if column not in always]
    return sorted([*always, *top(list(scores), count - len(always), rest)])


def pooled(
    geometry: Geometry, tokens: list[Token], scores: Sequence[float], window: set[int], kernel: int, mode: str
) -> list[float]:
    """Every score over its neighbours: `kernel` columns around it, same scale, not of the window."""
    ends = geometry.schedule.offsets[1:]
    source = [next(s for s, end in enumerate(ends) if token.position < end) for token in tokens]
    out = []
    for i in range(len(scores)):
        near = [
            scores[j]
            for j in range(i - kernel // 2, i + kernel // 2 + 1)
            if 0 <= j < len(scores) and source[j] == source[i] and j not in window
        ]
        out.append((max(near) if mode == "max" else sum(near) / len(near)) if near else 0.0)
    return out


def shared(scores: Mapping[Where, Sequence[float]]) -> dict[Where, list[float]]:
    """Scores summed over an image's conditional row i and guidance row COND + i."""
    return {
        (row, head): [a + b for a, b in zip(scores[row % COND, head], scores[row % COND + COND, head], strict=True)]
        for row, head in scores
    }


# ------------------------------------------------------------------------------------------------------- side by side


def visits(
    geometry: Geometry, rows: int, seed: int, sharpness: float | Sequence[float]
) -> Iterator[tuple[int, int, Tensor, Tensor, Tensor]]:
    """(scale, layer, q, k, v) of a generation; queries are multiplied by a sharpness, one in all or one a layer."""
    generator = torch.Generator().manual_seed(seed)
    for scale, tokens in enumerate(geometry.schedule.lengths):
        for layer in range(geometry.num_layers):
            q, k, v = torch.randn(3, rows, geometry.num_heads, tokens, geometry.head_dim, generator=generator)
            yield scale, layer, q * (sharpness if isinstance(sharpness, float) else sharpness[layer]), k, v


def compare(
    geometry: Geometry,
    policy: Policy,
    rule: Rule,
    timing: str,
    rows: int = 2,
    cond_rows: int = 1,
    seed: int = 0,
    sharpness: float | Sequence[float] = 2.0,
    outputs: int = 1 << 20,
    budget: Budget = FULL_BUDGET,
) -> int:
    """Run policy and rule side by side; return at how many visits the rule dropped tokens.

    Args:
        geometry, policy, rows, cond_rows, budget: of the real cache.
        rule, timing: what it is compared with, and whether it chooses before or after attention.
        seed, sharpness: of the inputs.
        outputs: queries per visit whose attention output is compared.
    """
    cache, literal = KVCache(geometry, policy, rows, cond_rows, budget=budget), LiteralCache(geometry, rows)
    softmax_scale, dropped, attended = geometry.head_dim**-0.5, 0, 0
    for scale, layer, q, k, v in visits(geometry, rows, seed, sharpness):
        y = cache.attend(layer, q, k, v, softmax_scale)
        visit = LiteralVisit(literal, layer, scale, literal.heads(layer, scale, q, k, v, softmax_scale))
        kept = rule(visit) if timing == "before" or not visit.last else {}
        dropped += any(len(tokens) < len(visit.heads[at].tokens) for at, tokens in kept.items())
        for (row, h), head in visit.heads.items():
            mine = kept.get((row, h), head.tokens)
            seen = mine if timing == "before" else head.tokens
            attended += len(seen) if row == 0 else 0
            torch.testing.assert_close(y[row, h, :outputs].double(), head.attend(seen, outputs), atol=2e-5, rtol=2e-5)
            literal.stored[layer, row, h] = [] if visit.last else mine
        assert cache.ledger.attended_tokens == attended, (scale, layer)
        literal.check(cache, tolerance=1e-5)
        if layer == geometry.num_layers - 1:
            cache.end_step()
    return dropped
