"""What a generation cost: bytes by the definitions of design.md 5, attended tokens, and FLOPs of attention."""

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
        live_peak, work_peak, meta_peak: bytes.
        attended_tokens: keys seen by the heads of one row, summed over all visits and heads.
        attention_flops: per scale, 4 D N_t multiplications and additions for every key a head attends to, all rows.
    """

    geometry: Geometry
    rows: int
    pool_bytes: int
    state_bytes: int = 0
    live_peak: int = 0
    work_peak: int = 0
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

    def working(self, tokens: int, scores: int = 0) -> None:
        """What is alive beside the pool right now.

        Args:
            tokens: heads x tokens whose keys and values are: the current scale and copies.
            scores: further bytes: keys without values, attention statistics, other tensors of a policy.
        """
        transient = tokens * self.rows * self.geometry.bytes_per_token + scores
        self.work_peak = max(self.work_peak, self.alloc_bytes + transient)

    def visited(self, used_slots: int, index_bytes: int) -> None:
        """A visit is over: `used_slots` are taken, tables of `index_bytes` describe them."""
        self.used_slots = used_slots
        self.live_peak = max(self.live_peak, used_slots * self.token_bytes)
        self.meta_peak = max(self.meta_peak, index_bytes)

    def ratios(self) -> dict[str, float]:
        """beta_live, beta_alloc, beta_work, beta_meta, and attended tokens as a number and a share of full's."""
        full = self.geometry.full_bytes(self.rows)
        schedule = self.geometry.schedule
        everything = self.geometry.heads * sum(schedule.offsets[1:])
        return {
            "beta_live": self.live_peak / full,
            "beta_alloc": self.alloc_bytes / full,
            "beta_work": self.work_peak / full,
            "beta_meta": self.meta_peak / full,
            "attended_tokens": self.attended_tokens,
            "attended_ratio": self.attended_tokens / everything,
        }
