"""Sliding window: the most recent tokens, nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from heatkv_cli.core.policy import Keep, Policy, Visit
from heatkv_cli.methods.base import Method, Setting, Timing
from heatkv_cli.methods.toolkit.selecting import Recent, Selecting, recent_mask


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

    def policy(self, setting: Setting) -> Policy:
        """Needs room for one token."""
        setting.require(Fraction(1, setting.geometry.schedule.peak_tokens))
        return _Window(setting, self)


class _Window(Selecting):
    def __init__(self, setting: Setting, method: Window):
        super().__init__(setting, method.timing)
        self._recent = method.recent

    def choose(self, visit: Visit, cap: int) -> Keep:
        return Keep(visit.layer, mask=recent_mask(visit, cap, self._recent)[0].expand(visit.k.shape[1], -1))
