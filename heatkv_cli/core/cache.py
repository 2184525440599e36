"""The KV cache: what a model calls, where policies are applied, and where bytes are counted.

`attend` runs a visit in a fixed order: policy before attention, attention over [history ragged per head, current scale
dense], observers, policy after attention, pool, ledger. The last scale stores nothing, for every method.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from heatkv_cli.core.attention import (
    Group,
    as_heads,
    concat_current,
    group_packed,
    grouped_attention,
    masked_attention,
    pack,
    pad_heads,
    unpack,
    varlen_attention,
)
from heatkv_cli.core.budget import Budget
from heatkv_cli.core.ledger import Ledger
from heatkv_cli.core.policy import Keep, Observer, Policy, View, Visit
from heatkv_cli.core.pool import KVPool
from heatkv_cli.core.scales import Geometry
from heatkv_cli.core.table import LayerTable
from heatkv_cli.core.timeline import stage, staged
from heatkv_cli.errors import BudgetError, ConfigError

BACKENDS = ("grouped", "varlen", "masked")
FULL_BUDGET = Budget.parse(1)


class KVCache:
    """KV cache of one generation.

    Args:
        geometry: of the model; its `dtype_bytes` must be those of `dtype`.
        policy: decides what is kept; its `capacity` is the size of the pool.
        budget: what the pool may take; checked before anything is allocated.
        rows: batch rows, guidance rows included.
        cond_rows: how many of them, the first ones, are conditional.
        dtype, device: of stored keys and values.
        backend: `grouped`; `varlen` (one launch; CUDA and half precision); or `masked` (the oracle: same storage,
            padded and masked attention).
        observers: see every visit.

    Raises:
        BudgetError: the policy plans with more than the budget.
        ConfigError: unknown back end, or a dtype that the budget was not counted in.

    Attributes:
        ledger: bytes, attended tokens and FLOPs.
        pool: where the tokens are.
    """

    def __init__(
        self,
        geometry: Geometry,
        policy: Policy,
        rows: int,
        cond_rows: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        backend: str = "grouped",
        observers: Sequence[Observer] = (),
        budget: Budget = FULL_BUDGET,
    ):
        if backend not in BACKENDS:
            raise ConfigError(f"attention backend {backend!r} is unknown", f"one of: {', '.join(BACKENDS)}")
        if backend == "varlen" and (torch.device(device).type != "cuda" or dtype.itemsize != 2):
            raise ConfigError(
                f"attention backend varlen runs on CUDA in bfloat16 or float16, not on {device} in {dtype}",
                "runtime.attention=grouped",
            )
        if dtype.itemsize != geometry.dtype_bytes:
            raise ConfigError(
                f"the cache stores {dtype} but the budget is counted in {geometry.dtype_bytes}-byte numbers",
                "give the geometry the model's dtype",
            )
        allowed = budget.slots(geometry, rows, policy.state_bytes)
        if policy.capacity > allowed:
            raise BudgetError(
                f"the plan takes {policy.capacity} token slots, a budget of {budget} allows {allowed}",
                "the method's plan is wrong for this budget; raise the budget",
            )
        self.geometry, self.policy, self.observers = geometry, policy, tuple(observers)
        self.rows, self.cond, self.backend = rows, slice(0, cond_rows), backend
        self.pool = KVPool(policy.capacity, rows, geometry.head_dim, dtype, device)
        self.tables = [LayerTable.empty(geometry.num_heads) for _ in range(geometry.num_layers)]
        self.ledger = Ledger(geometry, rows, self.pool.allocated_bytes, policy.state_bytes)
        self.scale = 0
        self._visit: Visit | None = None
        self._placed: tuple[LayerTable, int, Tensor] | None = None  # a visit's positions, asked for again and again
        self._attended: _Selection | None = None  # what a visit has chosen before attention, to be stored after it

    # ------------------------------------------------------------------------------------------------ the seam

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        softmax_scale: float,
    ) -> Tensor:
        """Attention of one layer at the current scale, and everything that follows from it.

        Args:
            layer: 0..L-1, in order within a scale.
            q, k, v: (B, H, N, D), exactly what attention multiplies.
            softmax_scale: factor of q k^T.

        Returns:
            (B, H, N, D).

        Raises:
            BudgetError: the policy keeps more than its pool holds.
            ValueError: tensors of another shape than the geometry says, or a policy's answer that makes no sense.
        """
        self._check(layer, q, k, v)
        visit = Visit(layer, self.scale, q, k, v, softmax_scale, self.cond, self.geometry, self)
        self._visit = visit
        with stage("policy"):
            before = self.policy.before_attend(visit)
        y = self._attend(visit, before)
        with stage("observers"):
            for observer in self.observers:
                observer.observe(visit)
        if self.scale == self.geometry.num_scales - 1:
            self._release(layer)
        else:
            with stage("policy"):
                keeps = list(self.policy.after_attend(visit))
            self._store(visit, before, keeps)
        with stage("pool"):
            self.ledger.visited(self.pool.used, self.pool.index_bytes + sum(t.index_bytes for t in self.tables))
        self._visit = self._attended = None
        return y

    def _check(self, layer: int, *tensors: Tensor) -> None:
        geometry = self.geometry
        if self.scale >= geometry.num_scales:
            raise ValueError(f"all {geometry.num_scales} scales are done: a cache serves one generation")
        expected = (self.rows, geometry.num_heads, geometry.schedule.lengths[self.scale], geometry.head_dim)
        for x in tensors:
            if tuple(x.shape) != expected:
                raise ValueError(f"layer {layer} at scale {self.scale}: got {tuple(x.shape)}, expected {expected}")

    def end_step(self) -> None:
        """All layers have processed the current scale."""
        self.scale += 1

    # ------------------------------------------------------------------------------------------ for visits to see

    def positions(self, layer: int) -> Tensor:
        """Positions of [cache, current] (the cache alone for other layers), int32 (B or 1, H, N), -1 = padding."""
        table = self.tables[layer]
        if self._visiting(layer) is None:
            return table.padded_positions()
        if self._placed is None or self._placed[0] is not table or self._placed[1] != self.scale:
            padded = table.padded_positions()
            current = self._current_positions().expand(*padded.shape[:2], -1)
            self._placed = table, self.scale, torch.cat((padded, current), 2)
        return self._placed[2]

    def keys(self, layer: int, heads: Sequence[int]) -> Iterator[tuple[list[int], Tensor]]:
        """Keys of [cache, current] of some heads, those with equally many together; not to be written to.

        Yields:
            Indices into `heads`, and keys (B, G, n, D).
        """
        for group, slots in self.tables[layer].of(heads).groups():
            yield group, self._keys(layer, slots, [heads[i] for i in group])  # holds on to none of them

    def _keys(self, layer: int, slots: Tensor, heads: Sequence[int]) -> Tensor:
        """Keys of equally long heads, (B, G, n, D); `slots` of their history."""
        visit = self._visiting(layer)
        assert visit is not None  # other layers have no queries to look with
        stored = self.pool.k.index_select(1, slots.to(self.pool.k.device, non_blocking=True))
        return concat_current(as_heads(stored, len(heads)), visit.k, heads)

    def view(self, layer: int, heads: Tensor | None = None) -> View:
        """Keys and values of [cache, current], heads padded to equal length; not to be written to."""
        visit, table, positions = self._visiting(layer), self.tables[layer], self.positions(layer)
        chosen, width = range(self.geometry.num_heads) if heads is None else heads.tolist(), max(table.lengths)
        if heads is not None:
            table, positions = table.of(chosen), positions[:, heads]
        nothing = self.pool.k[:, None, :0].expand(-1, self.geometry.num_heads, -1, -1)
        current = (nothing, nothing) if visit is None else (visit.k, visit.v)
        slots = table.slots.to(self.pool.k.device, non_blocking=True)
        sources = zip((self.pool.k, self.pool.v), current, strict=True)
        k, v = (pad_heads(x.index_select(1, slots), y, chosen, table, width) for x, y in sources)
        return View(k, v, positions)

    def _visiting(self, layer: int) -> Visit | None:
        """The visit in progress, where it is this layer's."""
        return self._visit if self._visit is not None and self._visit.layer == layer else None

    def _current_positions(self) -> Tensor:
        offsets = self.geometry.schedule.offsets
        return torch.arange(offsets[self.scale], offsets[self.scale + 1], dtype=torch.int32)

    # --------------------------------------------------------------------------------------------------- attention

    @staged("attention")
    def _attend(self, visit: Visit, before: Keep | None) -> Tensor:
        table, count = self.tables[visit.layer], visit.k.shape[2]
        if before is not None:
            return self._attend_selection(visit, before)
        self.ledger.attending(visit.scale, [n + count for n in table.lengths])
        if self.backend == "masked":
            view = self.view(visit.layer)
            return masked_attention(visit.q, view.k, view.v, view.valid, visit.softmax_scale)
        if self.backend == "varlen":
            history = self.pool.read(table.slots)
            return varlen_attention(visit.q, visit.k, visit.v, table.lengths, history, visit.softmax_scale)
        return grouped_attention(visit.q, visit.k, visit.v, self._history(table), visit.softmax_scale)

    def _attend_selection(self, visit: Visit, keep: Keep) -> Tensor:
        """Attention of the current queries over a choice among [cache, current]; the current keys are ragged too."""
        where = f"before_attend of layer {visit.layer} at scale {visit.scale}"
        if keep.layer != visit.layer:
            raise ValueError(f"{where} answered for layer {keep.layer}")
        mask = self._mask_of(keep)
        counts = mask[0].sum(-1).tolist()
        if min(counts) == 0:
            raise ValueError(f"{where} leaves a head nothing to attend to")
        self.ledger.attending(visit.scale, counts)
        k, v = self._kept(keep, mask)
        if len(mask) > 1 or keep.merged is not None:
            self._attended = _Selection(keep, mask, k, v)
        if self.backend == "masked":
            return masked_attention(visit.q, unpack(k, mask), unpack(v, mask), mask, visit.softmax_scale)
        none = visit.k[:, :, :0]
        if self.backend == "varlen":
            return varlen_attention(visit.q, none, none, counts, (k, v), visit.softmax_scale)
        return grouped_attention(visit.q, none, none, group_packed(k, v, counts), visit.softmax_scale)

    def _history(self, table: LayerTable) -> Iterator[Group]:
        """Copies of a layer's stored tokens, group by group; holds on to none of them."""
        for heads, slots in table.groups():
            yield Group(heads, *(as_heads(stored, len(heads)) for stored in self.pool.read(slots)))

    # ----------------------------------------------------------------------------------------------------- storage

    @staged("pool")
    def _release(self, layer: int) -> None:
        self.pool.give(self.tables[layer].slots)
        self.tables[layer] = LayerTable.empty(self.geometry.num_heads)

    @staged("pool")
    def _store(self, visit: Visit, before: Keep | None, keeps: Iterable[Keep]) -> None:
        """Apply the decisions: other layers first, so that what they give back can be used here."""
        decided = {} if before is None else {visit.layer: before}
        for keep in keeps:
            if keep.layer in decided:
                raise ValueError(f"layer {keep.layer} at scale {visit.scale}: more than one Keep for the same tokens")
            decided[keep.layer] = keep
        own = decided.pop(visit.layer, None)
        for keep in decided.values():
            self._apply(keep)
        if own is not None:
            self._apply(own)
        else:
            columns = max(self.tables[visit.layer].lengths) + visit.k.shape[2]
            self._drop_and_append(visit.layer, torch.ones(self.geometry.num_heads, columns, dtype=torch.bool))

    def _mask_of(self, keep: Keep) -> Tensor:
        """The decision as a bool mask (1 or B, H, N) without padding, checked."""
        positions = self.positions(keep.layer)
        if keep.atoms is not None:
            source = self.geometry.schedule.scale_of(positions.clamp(min=0))
            mask = keep.atoms.expand(len(positions), -1, -1).gather(2, source)
        elif keep.mask is not None:
            mask = (keep.mask if keep.mask.ndim == 3 else keep.mask.unsqueeze(0)).cpu()
        else:
            raise ValueError("Keep needs a mask or atoms")
        if mask.shape[1:] != positions.shape[1:]:
            raise ValueError(
                f"Keep of layer {keep.layer}: mask {tuple(mask.shape)} for tokens {tuple(positions.shape)}"
            )
        mask = mask & (positions[:1] >= 0)  # rows are equally long
        counts = mask.sum(-1)
        if not bool((counts == counts[:1]).all()):
            raise ValueError(f"Keep of layer {keep.layer}: rows keep different numbers of tokens in a head")
        return mask

    def _apply(self, keep: Keep) -> None:
        if self._attended is not None and self._attended.keep is keep:
            self._rewrite(self._attended)
            return
        mask = self._mask_of(keep)
        if len(mask) == 1 and keep.merged is None:
            self._drop_and_append(keep.layer, mask[0])
        else:
            self._rewrite(_Selection(keep, mask, *self._kept(keep, mask)))

    def _drop_and_append(self, layer: int, mask: Tensor) -> None:
        """The same columns leave in every row: their slots are given back, nothing moves."""
        width = max(self.tables[layer].lengths)
        table, dropped = self.tables[layer].filtered(mask[:, :width])
        self.pool.give(dropped)
        current = mask[:, width:]
        if current.any():
            slots = self.pool.take(int(current.sum()))
            visit = self._visit
            assert visit is not None  # only the visiting layer has a current scale
            self.pool.write(slots, pack(visit.k, current), pack(visit.v, current))
            table = table.appended(slots, self._current_positions(), current)
        self.tables[layer] = table

    def _rewrite(self, chosen: _Selection) -> None:
        """Rows keep different tokens, or tokens were merged: what is kept is compacted into the head's own slots."""
        layer, mask = chosen.keep.layer, chosen.mask
        table, positions = self.tables[layer], self.positions(layer)
        rows = max(len(mask), len(positions))
        mask, positions = mask.expand(rows, -1, -1), positions.expand(rows, -1, -1)
        self.pool.give(table.slots)
        slots = self.pool.take(chosen.k.shape[1])
        self.pool.write(slots, chosen.k, chosen.v)
        counts = tuple(mask[0].sum(-1).tolist())
        self.tables[layer] = LayerTable(counts, slots, positions[mask].view(rows, -1))

    def _kept(self, keep: Keep, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of the keys and values that a checked mask keeps, merged ones in their place; (B, number kept, D)."""
        counts, merged = mask[0].sum(-1).tolist(), keep.merged
        if merged is None:
            return self._copied(keep.layer, mask.expand(self.rows, -1, -1))
        expected = (self.rows, sum(counts[h] for h in merged.heads), self.geometry.head_dim)
        for x in (merged.k, merged.v):
            if tuple(x.shape) != expected:
                raise ValueError(f"Keep of layer {keep.layer}: merged {tuple(x.shape)}, expected {expected}")
        if len(merged.heads) == len(counts):
            return merged.k, merged.v
        k, v = self._copied(keep.layer, mask.expand(self.rows, -1, -1))
        places = torch.arange(sum(counts)).split(counts)
        index = torch.cat([places[h] for h in merged.heads]).to(k.device)
        return k.index_copy_(1, index, merged.k), v.index_copy_(1, index, merged.v)

    def _copied(self, layer: int, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of keys and values chosen by a mask (B, H, N) over [cache, current], each (B, number chosen, D)."""
        table, visit, device = self.tables[layer], self._visiting(layer), self.pool.k.device
        row, head, column = mask.nonzero().unbind(1)
        width, shape = max(table.lengths), (self.rows, int(mask[0].sum()), self.geometry.head_dim)
        places = table.padded_slots(mask.shape[2])[head, column].long() + row * self.pool.capacity
        k, v = (x.flatten(0, 1).index_select(0, places.to(device)) for x in (self.pool.k, self.pool.v))
        fresh = (column >= width).nonzero().squeeze(1)
        if visit is not None and len(fresh):
            current = tuple(x[fresh].to(device) for x in (row, head, column - width))
            fresh = fresh.to(device)
            k.index_copy_(0, fresh, visit.k[current])
            v.index_copy_(0, fresh, visit.v[current])
        return k.view(shape), v.view(shape)


@dataclass(frozen=True)
class _Selection:
    """A decision at work: its mask without padding, and the keys and values that it keeps, (B, number kept, D)."""

    keep: Keep
    mask: Tensor
    k: Tensor
    v: Tensor
