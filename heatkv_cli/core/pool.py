"""The token-slot pool: the budget, physically.

One slot holds the key and the value of one token of one head for all batch rows. All layers and heads draw from the
same pool; its capacity is fixed before the run. Appending takes slots, evicting gives them back, and a method that
wants more than there is fails instead of quietly using more memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from heatkv_cli.core.timeline import staged
from heatkv_cli.errors import BudgetError


class KVPool:
    """K and V of `capacity` slots, and a free list.

    Args:
        capacity: number of slots; 0 is allowed (nothing can be stored).
        rows: batch rows, guidance rows included.
        head_dim: D.
        dtype, device: of the stored numbers.

    Attributes:
        k, v: (rows, capacity, D), allocated once.
        peak: the most slots that were ever in use.
    """

    def __init__(self, capacity: int, rows: int, head_dim: int, dtype: torch.dtype, device: torch.device | str = "cpu"):
        self.k = torch.empty(rows, capacity, head_dim, dtype=dtype, device=device)
        self.v = torch.empty_like(self.k)
        # the free list lives on the host: allocation never waits for the device
        self._free = torch.arange(capacity - 1, -1, -1, dtype=torch.int32)
        self._available = capacity
        self.peak = 0

    @property
    def capacity(self) -> int:
        """Slots there are, free or not."""
        return self.k.shape[1]

    @property
    def used(self) -> int:
        """Slots in use now."""
        return self.capacity - self._available

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot: K and V of all rows."""
        return 2 * self.k.shape[0] * self.k.shape[2] * self.k.element_size()

    @property
    def allocated_bytes(self) -> int:
        """Bytes of `k` and `v`."""
        return self.capacity * self.slot_bytes

    @property
    def index_bytes(self) -> int:
        """Bytes of the free list: metadata."""
        return 4 * self.capacity

    def take(self, count: int) -> Tensor:
        """Slots for `count` tokens, int32 on the host.

        Raises:
            BudgetError: fewer than `count` slots are free.
        """
        if count > self._available:
            raise BudgetError(
                f"the method asked for {count} more token slots, {self._available} of {self.capacity} are free: "
                "it keeps more than its budget",
                "raise the budget; if the method computes its own caps, they exceed what it promised",
            )
        self._available -= count
        self.peak = max(self.peak, self.used)
        return self._free[self._available : self._available + count].flip(0)

    def give(self, slots: Tensor) -> None:
        """Return slots (n,) that nothing refers to any more."""
        self._free[self._available : self._available + len(slots)] = slots
        self._available += len(slots)

    def write(self, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Store k, v (rows, n, D) in slots (n,)."""
        index = slots.to(self.k.device, torch.int64, non_blocking=True)
        self.k.index_copy_(1, index, k)
        self.v.index_copy_(1, index, v)

    @staged("/read")
    def read(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of k, v (rows, n, D) from slots (n,)."""
        index = slots.to(self.k.device, non_blocking=True)
        return self.k.index_select(1, index), self.v.index_select(1, index)
