"""HeatKV (arXiv 2605.14877): each head forgets the scales it does not look at, by a static schedule."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

from heatkv_cli.core.artifacts import Orders, Schedule
from heatkv_cli.core.budget import Budget
from heatkv_cli.core.calibration import Calibration
from heatkv_cli.core.orders import random_orders
from heatkv_cli.core.policy import Granularity, Keep, Method, Policy, Visit
from heatkv_cli.core.scales import Geometry
from heatkv_cli.core.schedule import removal_schedule
from heatkv_cli.errors import ConfigError


@dataclass(frozen=True)
class HeatKV(Method):
    """Drop whole source scales from the heads with the least attention on them.

    Rule: S-CAS ranks the heads of every source scale by the attention they pay to it, averaged over all later scales
    and about ten prompts. For each scale t a count x_t says how many heads must have forgotten every prunable scale
    so that the cache entering t fits the budget; the first x_t heads of each scale's ranking do. The order in time is
    fixed so that the budget holds after every single layer; where it would not, later layers give up theirs early.
    All of it is decided before the first image; at run time layer l drops at scale t what is due for t + 1.

    Args:
        order: `scas`, or `random`: the same schedule with a seeded random ranking (a control).
        order_seed: of the random ranking.

    Source: arXiv 2605.14877, sections 3 and 4; counts, schedule and timing checked against arm-research/heatkv
    @ 96dc288 by the hashes in tests/golden (specs/methods.md 1).
    Differs: one pool for all layers in place of per-layer slabs, so the bytes reserved are the schedule's peak (17.6 %
    upstream at a nominal 10 %); keys are stored in the model's dtype after rotation (float32 upstream).
    """

    order: Literal["scas", "random"] = "scas"
    order_seed: int = 0
    scheduled: ClassVar[bool] = True
    granularity: ClassVar[Granularity] = "atom"

    def __post_init__(self) -> None:
        if self.order not in ("scas", "random"):
            raise ConfigError(f"method heatkv: order is {self.order!r}", "one of: scas, random")

    @property
    def calibrated(self) -> bool:
        """The random control needs no calibration."""
        return self.order == "scas"

    def build_schedule(self, geometry: Geometry, budget: Budget, orders: Orders | None) -> Schedule:
        """Plan all removals; see `core.schedule`."""
        if not self.calibrated:
            orders = random_orders(geometry, self.order_seed)
        if orders is None:
            raise ConfigError("method heatkv needs removal orders", "heatkv calibrate, or --orders FILE")
        return removal_schedule(geometry, budget, orders, "heatkv" if self.calibrated else "random")

    def policy(
        self,
        geometry: Geometry,
        budget: Budget,
        schedule: Schedule | None,
        rows: int,
        calibration: Calibration | None = None,
    ) -> Policy:
        """The schedule at work."""
        if schedule is None:
            raise ConfigError("method heatkv needs a schedule", "heatkv build-schedule method=heatkv")
        schedule.check(geometry)
        return _Scheduled(schedule)


class _Scheduled(Policy):
    def __init__(self, schedule: Schedule):
        super().__init__(capacity=schedule.physical_peak_tokens)
        self._schedule = schedule

    def after_attend(self, visit: Visit) -> Iterable[Keep]:
        return (Keep(visit.layer, segments=self._schedule.kept(visit.scale + 1, visit.layer)),)
