"""StreamingLLM (arXiv 2309.17453) on next-scale models: sinks and the most recent tokens."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from heatkv_cli.core.artifacts import Schedule
from heatkv_cli.core.budget import Budget
from heatkv_cli.core.calibration import Calibration
from heatkv_cli.core.policy import Keep, Method, Policy, Visit
from heatkv_cli.core.scales import Geometry
from heatkv_cli.core.selection import Recent, Selecting, Timing, one_of, recent_mask
from heatkv_cli.errors import BudgetError, ConfigError


@dataclass(frozen=True)
class Streaming(Method):
    """Keep the first `sink` tokens and the last tokens in raster order, in every head.

    Rule: each head may hold cap = floor(beta * P) tokens; after the attention of a scale it keeps the sink tokens and
    the cap - sink most recent ones.

    Args:
        sink: number of protected first tokens; `scales` stands for the model's sink scales.
        timing: choose `after` the attention of a scale, or `before` it (then the current scale is cut down too).
        recent: `raster`, the last tokens; `grid`, a uniform grid of the newest scale where that alone is too much.

    Source: arXiv 2309.17453, section 3.2 (attention sinks and a rolling window).
    Differs: the paper's sink is 4 tokens of text; here the tokens of the sink scales (specs/methods.md 4), since a
    scale is the unit of a next-scale model. "Recent" in raster order means the bottom rows of the newest map. All
    heads are equally long, so up to one token a head of the budget stays unused.
    """

    sink: int | str = "scales"
    timing: Timing = "after"
    recent: Recent = "raster"

    def __post_init__(self) -> None:
        one_of("streaming", timing=(self.timing, ("after", "before")), recent=(self.recent, ("raster", "grid")))
        if self.sink != "scales" and (not isinstance(self.sink, int) or isinstance(self.sink, bool) or self.sink < 0):
            raise ConfigError(
                f"method streaming: sink is {self.sink!r}", "give a number of tokens >= 0, or method.sink=scales"
            )

    def policy(
        self,
        geometry: Geometry,
        budget: Budget,
        schedule: Schedule | None,
        rows: int,
        calibration: Calibration | None = None,
    ) -> Policy:
        """Needs room for its sinks and one recent token."""
        sink = geometry.sink_tokens if self.sink == "scales" else int(self.sink)
        cap = min(budget.cap(geometry.schedule), geometry.schedule.peak_tokens)
        if cap < geometry.schedule.peak_tokens <= sink:
            raise BudgetError(
                f"method streaming: {sink} sink tokens are the whole cache of {geometry.model}", "lower method.sink"
            )
        budget.require(
            Fraction(min(sink + 1, geometry.schedule.peak_tokens), geometry.schedule.peak_tokens), geometry, "streaming"
        )
        return _Streaming(geometry, budget, self, sink)


class _Streaming(Selecting):
    def __init__(self, geometry: Geometry, budget: Budget, method: Streaming, sink: int):
        super().__init__(geometry, budget, method.timing)
        self._sink, self._recent = sink, method.recent

    def choose(self, visit: Visit, cap: int) -> Keep:
        recent = recent_mask(visit, cap - self._sink, self._recent)[0]
        return Keep(visit.layer, mask=recent | (visit.positions()[0] < self._sink))
