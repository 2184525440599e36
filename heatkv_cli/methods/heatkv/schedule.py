"""HeatKV's schedule: when each atom is attended for the last time, as tensors and as a file.

A schedule is the plan for one model, resolution and budget; it is the same for every prompt and batch row.

Source: arXiv 2605.14877; canonical hashes as in tests/golden/data/heatkv_schedules.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from heatkv_cli.calibration.artifact_file import (
    content_sha256,
    damaged,
    expect_tensor,
    geometry_from,
    geometry_header,
    library_versions,
    make_hint,
    mismatch,
    read_artifact,
    scales_header,
    write_artifact,
)
from heatkv_cli.core.budget import Budget
from heatkv_cli.core.scales import Geometry, ScaleSchedule
from heatkv_cli.errors import ArtifactError, HeatKVError
from heatkv_cli.methods.heatkv.orders import canonical_sha256


@dataclass(frozen=True, eq=False)
class Schedule:
    """When each atom (source scale, layer, head) is attended for the last time.

    Args:
        geometry: shape of the cache it was built for.
        budget: the fraction of the full cache that it keeps.
        first_absent: int16 (K, L, H), indexed [source, layer, head]: the first target scale at which the atom is no
            longer attended; K where it never goes (sinks, the last scale, kept atoms).
        early: long (E, 5), early activations (target, trigger layer, layer, source, head) in firing order: the
            scheduler drops the atom of `layer` right after the earlier `trigger layer` wrote scale `target`.
        counts: x_t, (K,): heads pruned per source scale so that the cache entering scale t fits.
        method: the method that follows the plan.
        order: name of the removal orders; order_sha256: their canonical hash.
        calibrated_on: scales at which the orders were calibrated, `geometry.schedule` unless they were borrowed.
        calibration_sha256: digest of the calibration or order file behind it; empty for a seeded order.
        versions: versions of the libraries that built it.

    Raises:
        ArtifactError: tensors that do not fit the geometry or contradict each other.
    """

    geometry: Geometry
    budget: Budget
    first_absent: Tensor = field(repr=False)
    early: Tensor = field(repr=False)
    counts: tuple[int, ...]
    order: str
    order_sha256: str
    calibrated_on: ScaleSchedule
    calibration_sha256: str = ""
    method: str = "heatkv"
    versions: Mapping[str, str] = field(default_factory=library_versions)

    def __post_init__(self) -> None:
        K, L, H = self.geometry.num_scales, self.geometry.num_layers, self.geometry.num_heads
        expect_tensor("first_absent", self.first_absent, (K, L, H), torch.int16)
        expect_tensor("early", self.early, (len(self.early), 5), torch.int64)
        if len(self.counts) != K:
            raise ArtifactError(f"schedule has {len(self.counts)} counts, expected {K}", make_hint("schedule"))
        source = torch.arange(K).view(K, 1, 1)
        removed = self.first_absent < K
        prunable = (source >= self.geometry.sink_scales) & (source < K - 1)
        if bool((removed & ~prunable).any() | (removed & (self.first_absent <= source)).any()):
            raise ArtifactError(
                "schedule removes an atom of a sink or the last scale, or before it was ever used",
                make_hint("schedule"),
            )
        target, trigger, layer, origin, head = self.early.unbind(1)
        inside = ((self.early >= 0) & (self.early < torch.tensor([K, L, L, K, H]))).all()
        if not inside or bool((self.first_absent[origin, layer, head] != target).any() | (trigger >= layer).any()):
            raise ArtifactError("schedule has early activations that contradict first_absent", make_hint("schedule"))

    def kept(self, target: int, layer: int) -> Tensor:
        """Return which atoms of `layer` are attended at scale `target` or later, bool (H, K).

        Columns of sources not yet written at `target` are True: nothing goes before its scale is done.
        """
        return (self.first_absent[:, layer] > target).T

    @cached_property
    def held_tokens(self) -> Tensor:
        """Tokens that each layer holds (and attends to) entering scale t, long (K, L), all heads, one batch row."""
        lengths = torch.tensor(self.geometry.schedule.lengths)
        held = [
            ((self.first_absent[:target] > target).sum(2) * lengths[:target, None]).sum(0)
            for target in range(self.geometry.num_scales)
        ]
        return torch.stack(held)

    @cached_property
    def removed_from(self) -> Tensor:
        """First scale t after which the atom is finally removed (in Rem(t)), int16 (K, L, H); K where never.

        One scale before `first_absent`, except for early activations, which leave during scale t itself.
        """
        removed = torch.where(self.first_absent < self.geometry.num_scales, self.first_absent - 1, self.first_absent)
        _, _, layer, source, head = self.early.unbind(1)
        removed[source, layer, head] = self.first_absent[source, layer, head]
        return removed

    def scheduler_trace(self, exact: bool = True) -> Tensor:
        """Return the scheduler's checkpoints, long (K-1, L): tokens right after layer l appended scale t.

        All layers and heads, one batch row. Layers up to l have dropped what is due after scale t, later layers only
        what was activated early.

        Args:
            exact: False leaves out the tokens of scale t itself while t < S, as the official scheduler does; that is
                never its peak.
        """
        geometry, offsets = self.geometry, self.geometry.schedule.offsets
        lengths = torch.tensor(geometry.schedule.lengths)
        target, trigger, layer, source, _ = self.early.unbind(1)
        totals = []
        for t in range(geometry.num_scales - 1):
            gone = int(((self.removed_from < t).sum((1, 2)) * lengths).sum())
            due = ((self.removed_from == t).sum(2) * lengths[:, None]).sum(0)  # (L,)
            ahead = torch.zeros(geometry.num_layers, dtype=torch.long)
            now = target == t
            ahead.index_add_(0, trigger[now], lengths[source[now]])
            ahead.index_add_(0, layer[now], -lengths[source[now]])  # from its own layer on it is among the due
            written = geometry.num_heads * lengths[t] * (exact or t >= geometry.sink_scales)
            totals.append(geometry.heads * offsets[t] - gone + (written - due - ahead).cumsum(0))
        return torch.stack(totals)

    def physical_trace(self) -> Tensor:
        """Return what a runtime holds, long (K-1, L): tokens right after the visit of layer l at scale t.

        All layers and heads, one batch row. After its attention at scale t a layer drops everything that is not
        attended at t + 1 and stores the current scale for the heads that keep it; early activations thus leave one
        visit before the scheduler counts them out.
        """
        before, after = self.held_tokens[:-1], self.held_tokens[1:]
        return before.sum(1, keepdim=True) + (after - before).cumsum(1)

    @cached_property
    def scheduled_peak_tokens(self) -> int:
        """Peak of the scheduler's model, all layers and heads, one batch row."""
        return int(self.scheduler_trace().max())

    @cached_property
    def physical_peak_tokens(self) -> int:
        """Peak of what a runtime holds; never above the scheduled peak. The size of the pool."""
        return int(self.physical_trace().max())

    def attention_removals(self) -> list[list[int]]:
        """Return [target, layer, source, head] of every atom not attended at each target scale, sorted."""
        return self._removals(self.first_absent)

    def final_removals(self) -> list[list[int]]:
        """Return [target, layer, source, head] of every atom removed once each target scale is finished, sorted."""
        return self._removals(self.removed_from)

    def _removals(self, first: Tensor) -> list[list[int]]:
        by_layer = first.permute(1, 0, 2)  # (L, K, H): nonzero() then sorts by layer, source, head
        rows: list[list[int]] = []
        for target in range(self.geometry.num_scales):
            rows += [[target, *row] for row in (by_layer <= target).nonzero().tolist()]
        return rows

    def attention_removals_sha256(self) -> str:
        """Canonical hash of `attention_removals`."""
        return canonical_sha256(self.attention_removals())

    def final_removals_sha256(self) -> str:
        """Canonical hash of `final_removals`."""
        return canonical_sha256(self.final_removals())

    def early_activations_sha256(self) -> str:
        """Canonical hash of the sorted [target, trigger layer, layer, source, head] rows."""
        return canonical_sha256(sorted(self.early.tolist()))

    def first_absent_sha256(self) -> str:
        """Canonical hash of the sorted [source, layer, head, first absent target] rows of all removed atoms."""
        atoms = (self.first_absent < self.geometry.num_scales).nonzero()
        target = self.first_absent[tuple(atoms.T)].long()
        return canonical_sha256(torch.cat([atoms, target[:, None]], 1).tolist())

    @property
    def sha256(self) -> str:
        """Hash of what can change an image: the geometry and `first_absent`. Enters the run hash."""
        header = geometry_header(replace(self.geometry, dtype_bytes=1))  # the plan is the same in every number format
        return content_sha256({"geometry": header}, {"first_absent": self.first_absent})

    def table(self) -> list[dict[str, int | float]]:
        """Return one row per scale, for printing.

        Keys: scale; tokens (N_t); full_tokens (C_t, full cache of one head entering the scale); count (x_t);
        removed_atoms (not attended at the scale) and early (those of them activated early); held_tokens (entering the
        scale, all layers and heads, one batch row); fraction (of L*H*P: comparable with the budget).
        """
        geometry = self.geometry
        rows: list[dict[str, int | float]] = []
        for scale, tokens in enumerate(geometry.schedule.lengths):
            held = int(self.held_tokens[scale].sum())
            rows.append(
                {
                    "scale": scale,
                    "tokens": tokens,
                    "full_tokens": geometry.schedule.offsets[scale],
                    "count": self.counts[scale],
                    "removed_atoms": int((self.first_absent <= scale).sum()),
                    "early": int((self.early[:, 0] == scale).sum()),
                    "held_tokens": held,
                    "fraction": held / geometry.full_tokens,
                }
            )
        return rows

    @property
    def about(self) -> str:
        """Origin of the plan in words."""
        return f"order {self.order}"

    def report(self) -> dict[str, Any]:
        """Return what is worth knowing about the schedule, as plain values."""
        full = self.geometry.full_tokens
        return {
            "method": self.method,
            "budget": self.budget.text,
            "order": self.order,
            "counts": list(self.counts),
            "early_activations": len(self.early),
            "scheduled_peak_tokens": self.scheduled_peak_tokens,
            "scheduled_peak_ratio": self.scheduled_peak_tokens / full,
            "physical_peak_tokens": self.physical_peak_tokens,
            "physical_peak_ratio": self.physical_peak_tokens / full,
            "full_tokens": full,
            "attention_removals_sha256": self.attention_removals_sha256(),
            "final_removals_sha256": self.final_removals_sha256(),
            "sha256": self.sha256,
        }

    def check(self, geometry: Geometry, where: str = "") -> None:
        """Check that the schedule was made for this model and resolution.

        Raises:
            ArtifactError: it was not; names both. `where` names the file.
        """
        if self.geometry.differences(geometry):
            raise mismatch("schedule", self.geometry, geometry, where)

    def save(self, path: Path | str) -> None:
        """Write the schedule atomically. Raises ArtifactError when the file cannot be written."""
        header = {
            "geometry": geometry_header(self.geometry),
            "budget": {"ratio": str(self.budget.ratio), "text": self.budget.text, "rho": _text(self.budget.rho)},
            "counts": self.counts,
            "scheduled_peak_tokens": self.scheduled_peak_tokens,
            "physical_peak_tokens": self.physical_peak_tokens,
            "order": self.order,
            "order_sha256": self.order_sha256,
            "calibrated_on": scales_header(self.calibrated_on),
            "calibration_sha256": self.calibration_sha256,
            "method": self.method,
            "versions": dict(self.versions),
        }
        write_artifact(path, "schedule", header, {"first_absent": self.first_absent, "early": self.early})

    @classmethod
    def load(cls, path: Path | str, geometry: Geometry | None = None) -> Schedule:
        """Read a schedule, and check it against `geometry` if given.

        Raises:
            ArtifactError: missing, damaged, of another version, or made for another model.
        """
        header, tensors = read_artifact(path, "schedule")
        try:
            budget = header["budget"]
            rho = None if budget["rho"] is None else Fraction(str(budget["rho"]))
            if not 0 < Fraction(str(budget["ratio"])) <= 1 or not isinstance(budget["text"], str):
                raise ValueError(f"its budget is {budget}")
            names = ("order", "order_sha256", "calibration_sha256", "method", "versions")
            schedule = cls(
                geometry=geometry_from(header["geometry"]),
                budget=Budget(Fraction(str(budget["ratio"])), budget["text"], rho),
                first_absent=tensors["first_absent"],
                early=tensors["early"],
                counts=tuple(header["counts"]),
                calibrated_on=ScaleSchedule(header["calibrated_on"]),
                **{name: header[name] for name in names},
            )
        except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError, HeatKVError) as error:
            raise damaged(path, "schedule", error) from error
        if geometry is not None:
            schedule.check(geometry, str(path))
        return schedule


def _text(value: Fraction | None) -> str | None:
    return None if value is None else str(value)
