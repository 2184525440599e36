"""A cache of plain Python lists: attention matrices by explicit loops, one rule per method, no tensors inside.

A rule restates a paper's formula for one row and one head; the oracle feeds it full attention matrices and keeps what
it says. `check` runs the real method beside it and compares the stored tokens of all layers after every visit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from heatkv_cli.core.budget import Budget
from heatkv_cli.core.cache import KVCache
from heatkv_cli.core.scales import Geometry, ScaleSchedule
from heatkv_cli.methods.base import Method, Setting

ROWS, COND = 4, 2  # two images, each with a conditional and a guidance row
GEOMETRY = Geometry("oracle", 3, 2, 4, ScaleSchedule(((1, 1), (2, 2), (3, 3), (3, 4), (5, 5), (6, 5))), 2)
SOFTMAX_SCALE = 0.9

Matrix = list[list[float]]  # [query][token]


@dataclass
class Place:
    """What a rule sees: one row and head of a visit, tokens of [cache, current] in order."""

    layer: int
    scale: int
    row: int
    head: int
    positions: list[int]
    attention: Matrix
    size: tuple[int, int]
    cap: int

    @property
    def current(self) -> int:
        """Index of the first token of the current scale."""
        return len(self.positions) - self.size[0] * self.size[1]

    def source(self, index: int) -> int:
        """Scale of a token."""
        return next(s for s, end in enumerate(GEOMETRY.schedule.offsets[1:]) if self.positions[index] < end)


@dataclass
class Oracle:
    """Stored tokens by (layer, row, head): (position, key) in order."""

    geometry: Geometry
    stored: dict[tuple[int, int, int], list[tuple[int, list[float]]]] = field(default_factory=dict)

    def tokens(self, layer: int, row: int, head: int) -> list[tuple[int, list[float]]]:
        return self.stored.setdefault((layer, row, head), [])

    def candidates(self, layer: int, scale: int, row: int, head: int, k: Tensor) -> list[tuple[int, list[float]]]:
        start = self.geometry.schedule.offsets[scale]
        return self.tokens(layer, row, head) + [(start + i, key) for i, key in enumerate(k[row, head].tolist())]


def attention(queries: Sequence[Sequence[float]], keys: Sequence[Sequence[float]]) -> Matrix:
    """softmax(q k^T scale), entry by entry."""
    out = []
    for q in queries:
        logits = [SOFTMAX_SCALE * sum(a * b for a, b in zip(q, k, strict=True)) for k in keys]
        top = max(logits)
        weights = [math.exp(x - top) for x in logits]
        out.append([w / sum(weights) for w in weights])
    return out


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
    """Indices of `always` and of the highest other scores, lower index first among equals, ascending."""
    rest = sorted((i for i in range(len(scores)) if i not in always), key=lambda i: (-scores[i], i))
    return sorted(always | set(rest[: count - len(always)]))


def pooled(place: Place, scores: Sequence[float], window: set[int], kernel: int, mode: str) -> list[float]:
    """Every score over its neighbours: `kernel` places around it, same scale, not of the window."""
    out = []
    for i in range(len(scores)):
        near = [
            scores[j]
            for j in range(i - kernel // 2, i + kernel // 2 + 1)
            if 0 <= j < len(scores) and place.source(j) == place.source(i) and j not in window
        ]
        out.append((max(near) if mode == "max" else sum(near) / len(near)) if near else 0.0)
    return out


Score = Callable[[Place], list[float]]
"""Scores of one row and head."""
Pick = Callable[[Place, list[float]], list[int]]
"""Kept indices, given the scores (shared between rows or not)."""


def visits(geometry: Geometry, seed: int) -> list[tuple[int, int, Tensor, Tensor, Tensor]]:
    """(scale, layer, q, k, v); layers look at their keys more or less sharply."""
    generator, out = torch.Generator().manual_seed(seed), []
    for scale, tokens in enumerate(geometry.schedule.lengths):
        for layer in range(geometry.num_layers):
            q, k, v = torch.randn(3, ROWS, geometry.num_heads, tokens, geometry.head_dim, generator=generator)
            out.append((scale, layer, q * (0.4 + layer), k, v))
    return out


def places(oracle: Oracle, scale: int, layer: int, q: Tensor, k: Tensor, cap: int) -> dict[tuple[int, int], Place]:
    """All rows and heads of a visit."""
    found = {}
    for row in range(ROWS):
        for head in range(oracle.geometry.num_heads):
            tokens = oracle.candidates(layer, scale, row, head, k)
            matrix = attention(q[row, head].tolist(), [key for _, key in tokens])
            size = oracle.geometry.schedule.sizes[scale]
            found[row, head] = Place(layer, scale, row, head, [p for p, _ in tokens], matrix, size, cap)
    return found


def shared(scores: dict[tuple[int, int], list[float]]) -> dict[tuple[int, int], list[float]]:
    """Scores summed over an image's conditional row i and guidance row COND + i."""
    return {
        (row, head): [a + b for a, b in zip(scores[row % COND, head], scores[row % COND + COND, head], strict=True)]
        for row, head in scores
    }


def check(
    method: Method,
    text: str,
    caps: Callable[[int, int], int],
    score: Score,
    pick: Pick,
    before: bool = False,
    share_cfg: bool = False,
    rho: bool = False,
    seed: int = 0,
) -> int:
    """Run a method beside the oracle; returns at how many visits it had to choose.

    Args:
        method, text: at the budget (or HACK's rho) `text`.
        caps: (scale, layer) -> tokens a head may keep.
        score, pick: the rule.
        before: it chooses before attention, at the last scale too.
        share_cfg: scores are summed over the pair before `pick`.
        rho: `text` is on HACK's axis.
        seed: of the inputs.
    """
    budget = Budget.from_rho(text, GEOMETRY.schedule) if rho else Budget.parse(text)
    cache = KVCache(GEOMETRY, method.policy(Setting(GEOMETRY, budget, ROWS)), ROWS, COND, budget=budget)
    oracle, chosen, last = Oracle(GEOMETRY), 0, GEOMETRY.num_scales - 1
    for scale, layer, q, k, v in visits(GEOMETRY, seed):
        attended = cache.ledger.attended_tokens
        cache.attend(layer, q, k, v, SOFTMAX_SCALE)
        attended = cache.ledger.attended_tokens - attended
        if layer == GEOMETRY.num_layers - 1:
            cache.end_step()
        cap = caps(scale, layer)
        found = places(oracle, scale, layer, q, k, cap)
        length = len(found[0, 0].positions)
        scores = {where: score(place) for where, place in found.items()}
        scores = shared(scores) if share_cfg else scores
        chosen += length > cap and (before or scale < last)
        assert attended == GEOMETRY.num_heads * (min(cap, length) if before else length), (scale, layer)
        for (row, head), place in found.items():
            tokens = oracle.candidates(layer, scale, row, head, k)
            kept = pick(place, scores[row, head]) if length > cap else range(length)
            oracle.stored[layer, row, head] = [] if scale == last else [tokens[i] for i in kept]
        compare(cache, oracle, scale, layer)
    return chosen


def compare(cache: KVCache, oracle: Oracle, scale: int, layer: int) -> None:
    """All layers hold the oracle's tokens."""
    for other, table in enumerate(cache.tables):
        positions = table.positions.expand(ROWS, -1)
        for row in range(ROWS):
            heads = positions[row].split(list(table.lengths))
            for head, held in enumerate(heads):
                expected = [p for p, _ in oracle.tokens(other, row, head)]
                assert held.tolist() == expected, f"scale {scale}, layer {layer}: stored of {other, row, head}"
