"""Calibration statistics of a full-cache run against sums over whole attention matrices, written out in loops."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from heatkv_cli.calibration.calibration import Calibration
from heatkv_cli.calibration.statistics import AttentionStatistics, concatenate
from heatkv_cli.core import attention
from heatkv_cli.core.cache import KVCache
from heatkv_cli.core.policy import Keep, Policy, Visit
from heatkv_cli.core.scales import Geometry, ScaleSchedule

GEOMETRY = Geometry("toy", 2, 3, 4, ScaleSchedule(((1, 1), (2, 1), (1, 3), (2, 2))), 1)
K, LENGTHS, OFFSETS = GEOMETRY.num_scales, GEOMETRY.schedule.lengths, GEOMETRY.schedule.offsets
PROMPTS, TOP, SCALE = 4, 2, 0.9
NAMES = ("scas", "variance", "asi", "entropy", "history_mass")


@dataclass
class Prompts:
    """q, k, v of all tokens of some rows: (R, L, H, T, D)."""

    q: Tensor
    k: Tensor
    v: Tensor

    @classmethod
    def random(cls, rows: int, seed: int) -> Prompts:
        shape = (rows, GEOMETRY.num_layers, GEOMETRY.num_heads, GEOMETRY.schedule.num_tokens, GEOMETRY.head_dim)
        g = torch.Generator().manual_seed(seed)
        return cls(*(2 * torch.randn(shape, generator=g) for _ in range(3)))

    def part(self, rows: slice) -> Prompts:
        return Prompts(self.q[rows], self.k[rows], self.v[rows])

    def matrix(self, row: int, layer: int, head: int, scale: int) -> list[list[float]]:
        """The attention matrix of one visit: a list of rows over all keys up to this scale."""
        q = self.q[row, layer, head, OFFSETS[scale] : OFFSETS[scale + 1]].double()
        k = self.k[row, layer, head, : OFFSETS[scale + 1]].double()
        rows: list[list[float]] = (q @ k.T * SCALE).softmax(-1).tolist()
        return rows


CONDITIONAL, GUIDANCE = Prompts.random(PROMPTS, 1), Prompts.random(PROMPTS, 2)


def measure(rows: slice, policy: Policy | None = None) -> AttentionStatistics:
    """Statistics of some prompts, guidance rows behind the conditional ones."""
    cond, other = CONDITIONAL.part(rows), GUIDANCE.part(rows)
    count = len(cond.q)
    statistics = AttentionStatistics(GEOMETRY, count, asi_top=TOP)
    policy = policy or Policy(GEOMETRY.full_tokens)
    cache = KVCache(GEOMETRY, policy, 2 * count, count, observers=(statistics,))
    for scale in range(K):
        now = slice(OFFSETS[scale], OFFSETS[scale + 1])
        for layer in range(GEOMETRY.num_layers):
            q, k, v = (
                torch.cat((a[:, layer, :, now], b[:, layer, :, now]))
                for a, b in zip((cond.q, cond.k, cond.v), (other.q, other.k, other.v), strict=True)
            )
            cache.attend(layer, q, k, v, SCALE)
        cache.end_step()
    return statistics


WHOLE = measure(slice(0, PROMPTS))
HEADS = [(r, m, h) for r in range(PROMPTS) for m in range(GEOMETRY.num_layers) for h in range(GEOMETRY.num_heads)]


TOLERANCE = 1e-5
"""Of attention's probabilities in float32, and so of their sums over queries."""


def close(actual: float, expected: float) -> None:
    assert actual == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE)


@pytest.mark.parametrize("scale", range(K))
def test_scas_mass_and_history_mass(scale: int) -> None:
    """Sum over the source's tokens, mean over the queries."""
    for row, layer, head in HEADS:
        matrix = CONDITIONAL.matrix(row, layer, head, scale)
        history = 0.0
        for source in range(K):
            measured = float(WHOLE.scas[row, layer, head, source, scale])
            if source >= scale:
                assert math.isnan(measured)
                continue
            mass = 0.0
            for weights in matrix:
                for key in range(OFFSETS[source], OFFSETS[source + 1]):
                    mass += weights[key] / LENGTHS[scale]
            close(measured, mass)
            history += mass
        close(float(WHOLE.history_mass[row, layer, head, scale]), history)


def test_column_variance_of_the_last_scale() -> None:
    """Population variance over the queries of each key's column, summed over all keys."""
    for row, layer, head in HEADS:
        matrix, total = CONDITIONAL.matrix(row, layer, head, K - 1), 0.0
        for key in range(OFFSETS[K]):
            column = [weights[key] for weights in matrix]
            mean = sum(column) / len(column)
            total += sum((weight - mean) ** 2 for weight in column) / len(column)
        close(float(WHOLE.variance[row, layer, head]), total)


@pytest.mark.parametrize("scale", range(K))
def test_row_entropy(scale: int) -> None:
    """Nats, over all keys, mean over the queries."""
    for row, layer, head in HEADS:
        matrix = CONDITIONAL.matrix(row, layer, head, scale)
        entropy = -sum(weight * math.log(weight) for weights in matrix for weight in weights) / len(matrix)
        close(float(WHOLE.entropy[row, layer, head, scale]), entropy)


@pytest.mark.parametrize("scale", range(K))
def test_attention_selectivity(scale: int) -> None:
    """E[mass on the current scale] * E[mass of the K' strongest history keys], over queries and heads."""
    for row in range(PROMPTS):
        for layer in range(GEOMETRY.num_layers):
            measured = float(WHOLE.asi[row, layer, scale])
            if scale == 0:
                assert math.isnan(measured)
                continue
            current, strongest, rows = 0.0, 0.0, 0
            for head in range(GEOMETRY.num_heads):
                for weights in CONDITIONAL.matrix(row, layer, head, scale):
                    current += sum(weights[OFFSETS[scale] :])
                    strongest += sum(sorted(weights[: OFFSETS[scale]], reverse=True)[:TOP])
                    rows += 1
            close(measured, (current / rows) * (strongest / rows))


def test_a_calibration_takes_them_as_they_are() -> None:
    made = Calibration(GEOMETRY, "prompts", tuple(range(PROMPTS)), **concatenate([WHOLE]))
    source, layer, head = 1, 1, 2
    targets = range(source + 1, K)
    literal = 0.0
    for prompt in range(PROMPTS):
        for target in targets:
            for weights in CONDITIONAL.matrix(prompt, layer, head, target):
                literal += sum(weights[OFFSETS[source] : OFFSETS[source + 1]]) / LENGTHS[target]
    close(float(made.scores()[source - GEOMETRY.sink_scales, layer, head]), literal / (PROMPTS * len(targets)))


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (3, 1), (1, 3), (2, 2)])
def test_batches_do_not_matter(sizes: tuple[int, ...]) -> None:
    parts, start = [], 0
    for size in sizes:
        parts.append(measure(slice(start, start + size)))
        start += size
    joined = concatenate(parts)
    for name in NAMES:
        torch.testing.assert_close(joined[name], getattr(WHOLE, name), atol=TOLERANCE, rtol=TOLERANCE, equal_nan=True)
        assert joined[name].dtype == torch.float64


@pytest.mark.parametrize("chunk", [1, 50, 1 << 22])
def test_chunks_do_not_matter(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "CHUNK_ELEMENTS", chunk)
    again = measure(slice(0, PROMPTS))
    for name in NAMES:
        torch.testing.assert_close(
            getattr(again, name), getattr(WHOLE, name), atol=TOLERANCE, rtol=TOLERANCE, equal_nan=True
        )


class Forgets(Policy):
    """Drops the newest scale from some heads."""

    def __init__(self, heads: slice):
        super().__init__(GEOMETRY.full_tokens)
        self.heads = heads

    def after_attend(self, visit: Visit) -> Iterable[Keep]:
        segments = torch.ones(GEOMETRY.num_heads, K, dtype=torch.bool)
        segments[self.heads, visit.scale] = False
        return (Keep(visit.layer, atoms=segments),)


@pytest.mark.parametrize("heads", [slice(0, 1), slice(None)])
def test_a_compressed_cache_is_refused(heads: slice) -> None:
    with pytest.raises(ValueError, match="layer 0 has lost tokens at scale 1"):
        measure(slice(0, 1), Forgets(heads))
