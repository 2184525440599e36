"""The byte plan of a run: weights, text encoder, cache at full and at the budget, transient; by batch size.

No weights are touched: bytes come from `footprint`. What the process holds besides (Python, PyTorch, kernels' own
scratch) is not in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache

from heatkv_cli.config import ModelConfig, RunConfig, config_hash
from heatkv_cli.core.scales import Geometry
from heatkv_cli.models.base import Sketch
from heatkv_cli.planning.footprint import CacheBytes, Footprint, LooksAtKeysError, footprint, rehearse
from heatkv_cli.planning.job import geometry_of, sketch_of
from heatkv_cli.planning.preflight import setting_before
from heatkv_cli.planning.resolver import Resolver

BATCHES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class BytePlan:
    """Bytes of one run at any batch size.

    Args:
        model: weights and activations.
        cache: bytes of the run's method at its budget, one row.
        full: bytes of the full cache, one row, without a transient.
        rows: batch rows of one image, guidance rows included.
        exact: whether `cache` is what the ledger will show; else its pool is the most the budget allows, and its
            transient that of heads with equally many tokens.
    """

    model: Footprint
    cache: CacheBytes
    full: int
    rows: int
    exact: bool

    @property
    def weights(self) -> int:
        """Bytes of all networks that stay in memory."""
        return sum(self.model.weights.values())

    def kv(self, batch: int) -> int:
        """Return the pool, by the ledger's `alloc_bytes`."""
        return batch * self.rows * self.cache.alloc

    def kv_work(self, batch: int) -> int:
        """Return the pool and what a visit holds beside it: `work_peak` without a CPU's index tables."""
        return batch * self.rows * self.cache.work

    def transient(self, batch: int) -> int:
        """Return the most beside weights and pool while codes are drawn: FFN or attention, whichever holds more."""
        inside = self.model.attending.of(batch) + batch * self.rows * self.cache.beside
        return max(self.model.blocks.of(batch), inside)

    def phases(self, batch: int) -> dict[str, int]:
        """Peak of each phase: the text encoder beside the weights, then scale by scale, then pixels without a cache."""
        return {
            "text": self.weights + self.model.encoder,
            "generate": self.weights + self.kv(batch) + self.cache.index + self.transient(batch),
            "decode": self.weights + self.model.decode.of(batch),
        }

    def total(self, batch: int) -> int:
        """Peak of the whole run."""
        return max(self.phases(batch).values())

    def largest_batch(self, memory: int) -> int:
        """Return the largest batch whose peak is at most `memory` bytes; 0 where not even one image fits."""
        if self.total(1) > memory:
            return 0
        low, high = 1, 2
        while self.total(high) <= memory:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.total(middle) <= memory else (low, middle)
        return low

    def lines(self, batches: tuple[int, ...]) -> Iterator[dict[str, int]]:
        """One record a batch size, bytes."""
        for batch in batches:
            yield {
                "batch": batch,
                "weights": self.weights,
                "text_encoder": self.model.encoder,
                "kv_full": batch * self.rows * self.full,
                "kv": self.kv(batch),
                "kv_work": self.kv_work(batch),
                "index": self.cache.index,
                "transient": self.transient(batch),
                "decode": self.model.decode.of(batch),
                "total": self.total(batch),
            }


def byte_plan(cfg: RunConfig, resolver: Resolver) -> BytePlan | None:
    """Return the plan of a run; None where the model's family has no sketch.

    Raises:
        BudgetError: the method cannot meet the budget, in the words of the run itself.
    """
    geometry = geometry_of(cfg.model)
    guided = cfg.model.sampling.guided
    cache, exact = _cache(cfg, geometry, resolver)
    if not cfg.model.sketch:
        return None
    model = _footprint(_Shape(cfg.model, cfg.runtime.device == "cpu"))
    if cfg.random_weights:  # text features are drawn too
        model = replace(model, encoder=0)
    return BytePlan(model, cache, geometry.full_bytes(1), 2 if guided else 1, exact)


@dataclass(frozen=True)
class _Shape:
    """A model as the key of what was computed for it: runs of a sweep share it."""

    model: ModelConfig
    on_host: bool

    def __hash__(self) -> int:
        return hash((config_hash(self.model.identity()), self.on_host))


@lru_cache(maxsize=8)
def _footprint(shape: _Shape) -> Footprint:
    model = shape.model

    def make(geometry: Geometry) -> Sketch:
        return sketch_of(model, geometry)

    return footprint(make, geometry_of(model), model.sampling, shape.on_host)


def _cache(cfg: RunConfig, geometry: Geometry, resolver: Resolver) -> tuple[CacheBytes, bool]:
    """Return the bytes of the cache, and whether they are exact.

    The number of atoms that HeatKV removes, or of tokens that a method has, follows from the budget; their choice
    decides little about bytes. Without a calibration at hand a stand-in serves.
    """
    setting, known = setting_before(cfg, resolver)
    policy = cfg.method.object.policy(setting)
    with suppress(LooksAtKeysError):
        return rehearse(geometry, policy), known
    slots = policy.capacity
    alloc = slots * (geometry.bytes_per_token + policy.state_bytes)
    stored, current = -(-slots // geometry.num_layers), geometry.num_heads * geometry.schedule.lengths[-1]
    beside = (2 * stored + 3 * current) * geometry.bytes_per_token  # a layer's share, read and joined; the output
    index = 4 * 3 * slots
    return CacheBytes(alloc, alloc + beside, index), False
