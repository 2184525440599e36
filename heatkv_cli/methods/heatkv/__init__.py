"""HeatKV (arXiv 2605.14877): each head forgets the scales it does not look at, by a static schedule."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

from heatkv_cli.core.policy import Keep, Policy, Visit
from heatkv_cli.methods.base import Granularity, Method, Setting, at_least
from heatkv_cli.methods.heatkv.orders import calibrated_orders, load_orders, random_orders
from heatkv_cli.methods.heatkv.schedule import Schedule
from heatkv_cli.methods.heatkv.scheduler import removal_schedule


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
        order_seed: seed of the random ranking.

    Source: arXiv 2605.14877, sections 3 and 4; counts, schedule and timing checked against arm-research/heatkv
    @ 96dc288 by the hashes in tests/golden.
    Differs: one pool for all layers in place of per-layer slabs, so the bytes reserved are the schedule's peak (17.6 %
    upstream at a nominal 10 %); keys are stored in the model's dtype after rotation (float32 upstream).
    """

    order: Literal["scas", "random"] = "scas"
    order_seed: int = 0
    granularity: ClassVar[Granularity] = "atom"
    plan_type: ClassVar[type[Schedule]] = Schedule

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, order_seed=0)

    @property
    def calibrated(self) -> bool:
        """The random control needs no calibration."""
        return self.order == "scas"

    def plan(self, setting: Setting) -> Schedule:
        """Plan all removals; see `scheduler`."""
        if not self.calibrated:
            orders = random_orders(setting.geometry, self.order_seed)
        elif setting.orders is not None:
            orders = load_orders(setting.orders, setting.geometry, setting.orders_at)
        else:
            orders = calibrated_orders(setting.need_calibration())
        return removal_schedule(setting.geometry, setting.budget, orders, setting.name)

    def policy(self, setting: Setting) -> Policy:
        """Return the schedule at work."""
        schedule = self.plan(setting) if setting.plan is None else setting.plan
        schedule.check(setting.geometry)
        return _Scheduled(schedule)


class _Scheduled(Policy):
    def __init__(self, schedule: Schedule):
        super().__init__(capacity=schedule.physical_peak_tokens)
        self._schedule = schedule

    def after_attend(self, visit: Visit) -> Iterable[Keep]:
        return (Keep(visit.layer, atoms=self._schedule.kept(visit.scale + 1, visit.layer)),)
