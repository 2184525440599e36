"""Sliding window: the most recent tokens, nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from heatkv_cli.core.artifacts import Schedule
from heatkv_cli.core.budget import Budget
from heatkv_cli.core.calibration import Calibration
from heatkv_cli.core.policy import Keep, Method, Policy, Visit
from heatkv_cli.core.scales import Geometry
from heatkv_cli.core.selection import Recent, Selecting, Timing, one_of, recent_mask


@dataclass(frozen=True)
class Window(Method):
    """Keep the last tokens in raster order, in every head.

    Rule: each head keeps its floor(beta * P) most recent tokens.

    Args:
        timing: choose `after` the attention of a scale, or `before` it (then the current scale is cut down too).
        recent: `raster`, the last tokens; `grid`, a uniform grid of the newest scale where that alone is too much.

    Source: baseline of arXiv 2505.19602, section 4 (sliding window attention), which says no more than its name.
    Differs: `recent=raster` is the literal port; it means the bottom rows of the newest map.
    """

    timing: Timing = "after"
    recent: Recent = "raster"

    def __post_init__(self) -> None:
        one_of("window", timing=(self.timing, ("after", "before")), recent=(self.recent, ("raster", "grid")))

    def policy(
        self,
        geometry: Geometry,
        budget: Budget,
        schedule: Schedule | None,
        rows: int,
        calibration: Calibration | None = None,
    ) -> Policy:
        """Needs room for one token."""
        budget.require(Fraction(1, geometry.schedule.peak_tokens), geometry, "window")
        return _Window(geometry, budget, self)


class _Window(Selecting):
    def __init__(self, geometry: Geometry, budget: Budget, method: Window):
        super().__init__(geometry, budget, method.timing)
        self._recent = method.recent

    def choose(self, visit: Visit, cap: int) -> Keep:
        return Keep(visit.layer, mask=recent_mask(visit, cap, self._recent)[0].expand(visit.k.shape[1], -1))
