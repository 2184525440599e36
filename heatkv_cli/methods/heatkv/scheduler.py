"""HeatKV's head-scale removal schedule: how many atoms go, which, and when.

An atom is all tokens of one source scale in one head of one layer. *How many* is fixed by the budget alone
(`prune_counts`), *which* by the removal orders, and *when* by a simulation of one pass over all visits
(`removal_schedule`): at every checkpoint "layer l has just appended scale t" the tokens of all layers together must
fit, so some removals that are due after scale t are activated early, in layers that come later. Pure: no files, no
model, a fraction of a second for the largest model.

Source: arXiv 2605.14877; behaviour checked against arm-research/heatkv @ 96dc288, tools/utils.py.
Differs: feasibility is decided in exact rationals, there in doubles with a slack of 1e-12; and where rounding alone
would make a feasible budget fail, the exact threshold decides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from heatkv_cli.core.budget import Budget
from heatkv_cli.core.scales import Geometry
from heatkv_cli.errors import BudgetError, ConfigError
from heatkv_cli.methods.heatkv.orders import Orders, check_orders, order_ranks
from heatkv_cli.methods.heatkv.schedule import Schedule

__all__ = ["EarlyActivation", "Schedule", "prune_counts", "removal_schedule", "smallest_budget"]

_Ints = npt.NDArray[np.int64]


class EarlyActivation(NamedTuple):
    """An atom of `layer` that the scheduler drops right after the earlier `trigger` layer wrote scale `target`."""

    target: int
    trigger: int
    layer: int
    source: int
    head: int


def smallest_budget(geometry: Geometry) -> Fraction:
    """Return the smallest feasible budget, C_S / P: nothing but the sink scales is left entering the last scale."""
    return Fraction(geometry.sink_tokens, geometry.schedule.peak_tokens)


def prune_counts(geometry: Geometry, budget: Budget, method: str = "heatkv") -> tuple[int, ...]:
    """Return x_t, (K,): how many heads must be down to the sink tokens so that the cache entering scale t fits.

    x_t = ceil(L*H * (C_t - beta*P) / (C_t - C_S)), 0 where C_t fits anyway; the same count holds for every source
    scale. Computed in doubles and in this order, as the official scheduler does: on a fine grid of budgets exact
    rationals give a count one lower here and there.

    Raises:
        BudgetError: below the smallest feasible budget, decided in exact rationals.
    """
    budget.require(smallest_budget(geometry), geometry, method)
    allowed = budget.as_float * geometry.schedule.peak_tokens
    counts = []
    for full in geometry.schedule.offsets[: geometry.num_scales]:
        # Up to the sinks nothing can go; a feasible budget covers them, whatever the double says.
        if full <= allowed or full <= geometry.sink_tokens:
            counts.append(0)
            continue
        needed = math.ceil(geometry.heads * (full - allowed) / (full - geometry.sink_tokens))
        counts.append(min(geometry.heads, needed))  # at the smallest budget rounding may ask for one head too many
    return tuple(counts)


def removal_schedule(
    geometry: Geometry,
    budget: Budget,
    orders: Orders | Tensor,
    method: str = "heatkv",
    counts: Sequence[int] | None = None,
) -> Schedule:
    """Build the strict schedule: which atom is attended up to which target scale.

    Args:
        geometry: shape of the model's cache.
        budget: fraction of the full cache that may be held at any checkpoint.
        orders: removal orders, or a bare long (num_sources, L*H, 2) of [head, layer] for sources S..K-2. Orders of
            another resolution are cut to the sources that exist.
        method: the method's name, for the record and for errors.
        counts: x_t, (K,), where they should not be the official ones; non-decreasing, 0 up to the sinks.

    Raises:
        BudgetError: below the smallest feasible budget, or (with own counts) removals run out at some checkpoint;
            names the scale and the layer.
        ArtifactError: orders that do not fit the geometry.
        ConfigError: own counts that are not a non-decreasing list of K values in 0..L*H.
    """
    if isinstance(orders, Tensor):
        check_orders(orders, geometry, "given as a tensor")
        orders = Orders(orders, "custom", geometry.schedule)
    else:
        orders = orders.at(geometry)
    x = prune_counts(geometry, budget, method) if counts is None else _own_counts(geometry, counts)
    ranks = order_ranks(orders.order, geometry).numpy()
    removed_from = _removed_from(geometry, x, ranks)
    early = _early_activations(geometry, budget, removed_from, ranks)

    never = geometry.num_scales
    first_absent = np.full((never, geometry.num_layers, geometry.num_heads), never, dtype=np.int16)
    first_absent[geometry.sink_scales : never - 1] = np.where(removed_from < never, removed_from + 1, never)
    for event in early:
        first_absent[event.source, event.layer, event.head] = event.target
    return Schedule(
        geometry=geometry,
        budget=budget,
        first_absent=torch.from_numpy(first_absent),
        early=torch.tensor(early, dtype=torch.int64).reshape(-1, 5),
        counts=x,
        order=orders.name,
        order_sha256=orders.sha256,
        calibrated_on=orders.calibrated_on,
        calibration_sha256=orders.source_sha256,
        method=method,
    )


def _own_counts(geometry: Geometry, counts: Sequence[int]) -> tuple[int, ...]:
    """Check counts that do not come from `prune_counts`."""
    x = tuple(counts)
    free = x[: geometry.sink_scales + 1]
    if len(x) != geometry.num_scales or any(free) or min(x) < 0 or max(x) > geometry.heads or list(x) != sorted(x):
        raise ConfigError(
            f"counts {list(x)} do not fit {geometry}",
            f"{geometry.num_scales} counts in 0..{geometry.heads}, none decreasing, the first {len(free)} zero",
        )
    return x


def _removed_from(geometry: Geometry, counts: Sequence[int], ranks: _Ints) -> _Ints:
    """Return the first scale after which each atom is finally removed, (num_sources, L, H); K where never.

    Rem(t) = atoms of the sources <= t whose rank is below x_{t+1}. As x does not decrease, an atom enters at the first
    such t, or with its own source scale if that is later.
    """
    last = geometry.num_scales - 1
    entered = np.searchsorted(np.asarray(counts[1:]), ranks, side="right")  # last where no count is high enough
    own = np.asarray(geometry.sources).reshape(-1, 1, 1)
    return np.where(entered < last, np.maximum(entered, own), geometry.num_scales)


def _early_activations(geometry: Geometry, budget: Budget, removed_from: _Ints, ranks: _Ints) -> list[EarlyActivation]:
    """Walk all checkpoints and return the early activations in firing order.

    Candidates at scale t are the atoms due after t whose source is older (a later layer has not written scale t yet),
    later layers first, then larger sources, then lower ranks. They are used up strictly in that order and only layers
    after the current one qualify, so one pointer per scale suffices.

    Raises:
        BudgetError: over the budget at some checkpoint with no candidate left.
    """
    threshold = budget.as_float * geometry.num_layers * geometry.num_heads * geometry.schedule.peak_tokens
    lengths = np.asarray(geometry.schedule.lengths)
    source_tokens = lengths[geometry.sink_scales : -1].reshape(-1, 1, 1)
    total = geometry.heads * geometry.sink_tokens  # entering scale S; before it nothing can be removed
    events: list[EarlyActivation] = []
    for t in geometry.sources:
        due = removed_from == t
        leaving = (due * source_tokens).sum(axis=(0, 2))  # (L,) tokens, without those activated early
        source, layer, head = np.nonzero(due)
        older = source + geometry.sink_scales < t
        source, layer, head = source[older], layer[older], head[older]
        order = np.lexsort((ranks[source, layer, head], -source, -layer))
        queue = np.stack([layer, source + geometry.sink_scales, head], axis=1)[order].tolist()
        used = 0
        for trigger in range(geometry.num_layers):
            total += int(geometry.num_heads * lengths[t] - leaving[trigger])
            while total > threshold and used < len(queue) and queue[used][0] > trigger:
                atom_layer, atom_source, atom_head = queue[used]
                events.append(EarlyActivation(t, trigger, atom_layer, atom_source, atom_head))
                leaving[atom_layer] -= lengths[atom_source]
                total -= int(lengths[atom_source])
                used += 1
            if total > threshold and total > budget.ratio * geometry.full_tokens:
                raise _too_small(geometry, budget, t, trigger, total)
    return events


def _too_small(geometry: Geometry, budget: Budget, scale: int, layer: int, total: int) -> BudgetError:
    return BudgetError(
        f"budget {budget} cannot be met on {geometry.model}: after layer {layer} wrote scale {scale} the cache holds "
        f"{total} tokens, the budget is {float(budget.ratio * geometry.full_tokens):.1f}, and nothing more is due to "
        "leave",
        "raise the budget, or remove more heads per source scale (counts)",
    )
