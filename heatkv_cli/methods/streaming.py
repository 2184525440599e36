"""StreamingLLM (arXiv 2309.17453) on next-scale models: sinks and the most recent tokens."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from heatkv_cli.core.policy import Keep, Policy, Visit
from heatkv_cli.errors import BudgetError
from heatkv_cli.methods.base import Method, Setting, Timing, at_least
from heatkv_cli.methods.toolkit.selecting import Recent, Selecting, recent_mask


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
    Differs: the paper's sink is 4 tokens of text; here the tokens of the sink scales, since a
    scale is the unit of a next-scale model. "Recent" in raster order means the bottom rows of the newest map. All
    heads are equally long, so up to one token a head of the budget stays unused.
    """

    sink: int | Literal["scales"] = "scales"
    timing: Timing = "after"
    recent: Recent = "raster"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, sink=0)

    def policy(self, setting: Setting) -> Policy:
        """Needs room for its sinks and one recent token."""
        geometry, peak = setting.geometry, setting.geometry.schedule.peak_tokens
        sink = geometry.sink_tokens if self.sink == "scales" else self.sink
        if setting.cap < peak <= sink:
            raise BudgetError(
                f"method streaming: {sink} sink tokens are the whole cache of {geometry.model}", "lower method.sink"
            )
        setting.require(Fraction(min(sink + 1, peak), peak))
        return _Streaming(setting, self, sink)


class _Streaming(Selecting):
    def __init__(self, setting: Setting, method: Streaming, sink: int):
        super().__init__(setting, method.timing)
        self._sink, self._recent = sink, method.recent

    def choose(self, visit: Visit, cap: int) -> Keep:
        recent = recent_mask(visit, cap - self._sink, self._recent)[0]
        return Keep(visit.layer, mask=recent | (visit.positions()[0] < self._sink))
