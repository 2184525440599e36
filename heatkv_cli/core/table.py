"""Which slots hold which tokens of one layer. Host-side index arithmetic; no keys or values here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def by_length(lengths: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Heads of equal length together: (length, ascending heads), shortest first."""
    return [(n, [head for head, each in enumerate(lengths) if each == n]) for n in sorted(set(lengths))]


@dataclass(frozen=True)
class LayerTable:
    """Stored tokens of a layer, head after head, without padding.

    Args:
        lengths: tokens of each head, (H,).
        slots: int32 (sum of lengths,), shared by all rows.
        positions: int32 (1 or rows, sum of lengths), index of each token in the whole sequence; one row where all
            batch rows hold the same tokens.
    """

    lengths: tuple[int, ...]
    slots: Tensor
    positions: Tensor

    @classmethod
    def empty(cls, heads: int) -> LayerTable:
        """A table of `heads` heads without tokens."""
        return cls((0,) * heads, torch.empty(0, dtype=torch.int32), torch.empty(1, 0, dtype=torch.int32))

    @property
    def index_bytes(self) -> int:
        """Bytes of the index tables: metadata, reported beside the budget."""
        return 4 * (self.slots.numel() + self.positions.numel())

    def groups(self) -> Iterator[tuple[list[int], Tensor]]:
        """Heads of equal length and their slots (G * n,), head-major; shortest first."""
        parts = self.slots.split(list(self.lengths))
        for _, heads in by_length(self.lengths):
            slots = self.slots if len(heads) == len(parts) else torch.cat([parts[h] for h in heads])
            yield heads, slots

    def of(self, heads: Sequence[int]) -> LayerTable:
        """The table of some heads."""
        slots, positions = self.slots.split(list(self.lengths)), self.positions.split(list(self.lengths), 1)
        return LayerTable(
            tuple(self.lengths[h] for h in heads),
            torch.cat([slots[h] for h in heads]),
            torch.cat([positions[h] for h in heads], 1),
        )

    def padded_positions(self) -> Tensor:
        """int32 (1 or rows, H, longest), -1 behind the end of shorter heads."""
        width = max(self.lengths)
        if min(self.lengths) == width:
            return self.positions.view(len(self.positions), len(self.lengths), width)
        padded = torch.full((len(self.positions), len(self.lengths), width), -1, dtype=torch.int32)
        padded[:, self.occupied(width)] = self.positions
        return padded

    def padded_slots(self, width: int) -> Tensor:
        """int32 (H, width), slot 0 where there is no token."""
        padded = torch.zeros(len(self.lengths), width, dtype=torch.int32)
        padded[self.occupied(width)] = self.slots
        return padded

    def occupied(self, width: int) -> Tensor:
        """bool (H, width): which columns hold tokens when the heads are padded to `width`."""
        return torch.arange(width) < torch.tensor(self.lengths)[:, None]

    def filtered(self, keep: Tensor) -> tuple[LayerTable, Tensor]:
        """Drop tokens. keep: bool (H, longest), padding ignored. Returns the new table and the slots given up."""
        flat = keep[self.occupied(keep.shape[1])]
        if bool(flat.all()):
            return self, self.slots[:0]
        lengths = tuple((keep & self.occupied(keep.shape[1])).sum(1).tolist())
        return LayerTable(lengths, self.slots[flat], self.positions[:, flat]), self.slots[~flat]

    def appended(self, slots: Tensor, positions: Tensor, chosen: Tensor) -> LayerTable:
        """Add tokens of the current scale behind each head.

        Args:
            slots: int32 (number chosen,), head-major.
            positions: int32 (N,) of the current scale.
            chosen: bool (H, N), which of them each head stores.
        """
        counts: Sequence[int] = chosen.sum(1).tolist()
        fresh = positions.expand(len(chosen), -1)[chosen].expand(len(self.positions), -1)
        return LayerTable(
            tuple(n + c for n, c in zip(self.lengths, counts, strict=True)),
            _interleave(self.slots, self.lengths, slots, counts),
            _interleave(self.positions, self.lengths, fresh, counts),
        )


def _interleave(a: Tensor, a_counts: Sequence[int], b: Tensor, b_counts: Sequence[int]) -> Tensor:
    """Head-major merge along the last dimension: head 0 of a, head 0 of b, head 1 of a, ..."""
    pairs = zip(a.split(list(a_counts), -1), b.split(list(b_counts), -1), strict=True)
    return torch.cat([part for pair in pairs for part in pair], -1)
