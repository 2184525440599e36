"""What a generation cost: bytes of the cache, attended tokens, and FLOPs of attention.

All bytes are set against those of the full cache, K and V of every stored scale (`Geometry.full_bytes`):

* live: of the tokens that are stored, the most after any visit;
* alloc: of the pool that is allocated for them, the method's state included; the budget bounds it;
* work: of the pool and of everything that a visit holds beside it, measured on one batch (`live_bytes.Watched`);
* meta: of the tables that say which slot holds which token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from heatkv_cli.core.scales import Geometry


@dataclass
class Ledger:
    """Peaks of one generation, updated after every visit.

    Args:
        geometry: of the model, for the denominator.
        rows: batch rows.
        pool_bytes: allocated bytes of the pool.
        state_bytes: per stored token of one head and one row, beside K and V.

    Attributes:
        live_peak, meta_peak: bytes.
        work_peak: bytes; None where the visits were not watched.
        attended_tokens: keys seen by the heads of one row, summed over all visits and heads.
        attention_flops: per scale, 4 D N_t multiplications and additions for every key a head attends to, all rows.
    """

    geometry: Geometry
    rows: int
    pool_bytes: int
    state_bytes: int = 0
    live_peak: int = 0
    work_peak: int | None = None
    meta_peak: int = 0
    attended_tokens: int = 0
    attention_flops: list[int] = field(init=False)
    used_slots: int = 0

    def __post_init__(self) -> None:
        self.attention_flops = [0] * self.geometry.num_scales

    @property
    def token_bytes(self) -> int:
        """Persistent bytes of one slot: K, V and the method's state, all rows."""
        return self.rows * (self.geometry.bytes_per_token + self.state_bytes)

    @property
    def alloc_bytes(self) -> int:
        """Allocated persistent bytes: the pool, and the method's state for as many tokens."""
        capacity = self.pool_bytes // (self.rows * self.geometry.bytes_per_token)
        return self.pool_bytes + capacity * self.rows * self.state_bytes

    def attending(self, scale: int, keys: Sequence[int]) -> None:
        """A visit's attention is about to run at `scale`; `keys` that each head attends to."""
        self.attended_tokens += sum(keys)
        queries = self.geometry.schedule.lengths[scale]
        self.attention_flops[scale] += 4 * self.geometry.head_dim * self.rows * queries * sum(keys)

    def worked(self, transient: int) -> None:
        """A watched visit held `transient` bytes beside the pool at its peak."""
        self.work_peak = max(self.work_peak or 0, self.alloc_bytes + transient)

    def visited(self, used_slots: int, index_bytes: int) -> None:
        """A visit is over: `used_slots` are taken, tables of `index_bytes` describe them."""
        self.used_slots = used_slots
        self.live_peak = max(self.live_peak, used_slots * self.token_bytes)
        self.meta_peak = max(self.meta_peak, index_bytes)

    def ratios(self) -> dict[str, float]:
        """The betas, beta_work where it was measured; attended tokens and their share of full's."""
        full = self.geometry.full_bytes(self.rows)
        schedule = self.geometry.schedule
        everything = self.geometry.heads * sum(schedule.offsets[1:])
        return {
            "beta_live": self.live_peak / full,
            "beta_alloc": self.alloc_bytes / full,
            **({} if self.work_peak is None else {"beta_work": self.work_peak / full}),
            "beta_meta": self.meta_peak / full,
            "attended_tokens": self.attended_tokens,
            "attended_ratio": self.attended_tokens / everything,
        }
