"""ScaleKV (NeurIPS 2025, arXiv 2505.19602): layers that look widely keep nearly all, the others what they look at."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal

from torch import Tensor

from heatkv_cli.core.policy import Keep, Policy, Visit
from heatkv_cli.errors import ConfigError
from heatkv_cli.methods.base import Setting, at_least
from heatkv_cli.methods.toolkit.caps import early_caps, shares
from heatkv_cli.methods.toolkit.selecting import (
    ObservationWindow,
    Selecting,
    WindowMethod,
)

FIRST, DECAY = 600 / 650, 70 / 650  # of the mean: a refiner's tokens at the first scale that is cut, and the step down
PUBLISHED_MEAN, PUBLISHED_PEAK = 650, 6425
# entering scale -> drafter layers, tokens of a drafter, tokens of a refiner (the 10 % files)
PUBLISHED: Mapping[str, Mapping[int, tuple[frozenset[int], int, int]]] = {
    "infinity-2b": {
        8: (frozenset({0, 23}), 920, 632),
        9: (frozenset({0, 23}), 1490, 594),
        10: (frozenset({0, 23}), 2510, 526),
        11: (frozenset({0, 23}), 4100, 420),
        12: (frozenset({0}), 6385, 465),
    },
    "infinity-8b": {
        8: (frozenset({0, 1, 2}), 909, 629),
        9: (frozenset({0, 1, 2}), 1464, 584),
        10: (frozenset({0, 1, 2}), 2463, 503),
        11: (frozenset({0, 1, 2}), 4054, 374),
        12: (frozenset({0, 1, 2}), 6200, 200),
    },
}


@dataclass(frozen=True)
class ScaleKV(WindowMethod):
    """Keep nearly the whole cache in the few drafter layers of a scale, and what a window looks at in the refiners.

    Rule: the attention selectivity index of a layer at a scale is its mean attention mass on the current map times that
    on its 32 strongest history tokens; as z-scores over layers, the lowest are drafters. The cache entering a scale
    has the budget's tokens a layer on average: drafters get as many as there are, refiners share the rest. Inside a
    layer stay the centres of 4 x 4 patches of the current map and the tokens these look at most, pooled.

    Args:
        timing, window, obs, kernel, pooling, share_cfg: see `WindowMethod`; the paper's window is 16.
        drafters: layers per scale; `auto` is one for every 16 layers begun (2 of 32, 3 of 40 as published).
        rank: drafters are the lowest z-scores of each `scale`, or of `all` scales together.
        allocation: `mean`, the rule above; `decay`, refiners lose a fixed step per scale (paper) and drafters get what
            is left; `published`, the 10 % files for infinity-2b and infinity-8b (650 tokens, no calibration).
        floor: tokens left to a refiner; never more than half of the mean.

    Source: arXiv 2505.19602, sections 3.2 and 3.3; files as read from StargazerX0/ScaleKV. Budgets away from 10 % are
    not published.
    Differs: ASI averages over all queries and heads, of which the paper samples some. The files leave out single
    tokens that the mean allows; here the sum is exact. Where a layer grows while later ones still hold more than they
    will, those are cut one scale early: upstream exceeds its budget there. After the last scale nothing is compressed.
    """

    drafters: int | Literal["auto"] = "auto"
    rank: Literal["scale", "all"] = "scale"
    allocation: Literal["mean", "decay", "published"] = "mean"
    floor: int = 64
    paper_window: ClassVar[int] = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, drafters=1, floor=0)

    @property
    def calibrated(self) -> bool:
        """The published files name the layers themselves."""
        return self.allocation != "published"

    def policy(self, setting: Setting) -> Policy:
        """Needs room for its window and one more token a layer on average."""
        window = self.window_at(setting)
        if self.allocation == "published":
            return _ScaleKV(setting, self, window, published_caps(setting))
        return _ScaleKV(setting, self, window, self._caps(setting, setting.need_calibration().asi.mean(0)))

    def _caps(self, setting: Setting, asi: Tensor) -> list[list[int]]:
        """Return the tokens of each layer after each scale, [scale][layer]; the last scale's are attended only."""
        geometry, mean = setting.geometry, setting.stored_cap()
        L, offsets = geometry.num_layers, geometry.schedule.offsets
        means = [mean] * (geometry.num_scales - 1) + [setting.cap]
        cut = [scale for scale, most in enumerate(means) if offsets[scale + 1] > most]
        entering = [min(scale + 1, geometry.num_scales - 1) for scale in cut]  # whose attention the cache serves
        chosen = draft(asi, entering, self._drafters(L), self.rank)
        held, caps = [0] * L, []
        for scale, tokens in enumerate(geometry.schedule.lengths):
            held = [n + tokens for n in held]
            if scale in cut:
                step = cut.index(scale)
                held = split(means[scale], held, chosen[step], self._refiner(means[scale], step))
            caps.append(held)
        return early_caps(caps[:-1], L * mean) + caps[-1:]

    def _drafters(self, layers: int) -> int:
        if self.drafters == "auto":
            return math.ceil(layers / 16)
        if self.drafters > layers:
            raise ConfigError(f"method scalekv: {self.drafters} drafters of {layers} layers", "lower method.drafters")
        return self.drafters

    def _refiner(self, mean: int, step: int) -> int:
        """Return the tokens that a refiner has before drafters take what they can use."""
        least = min(self.floor, mean // 2)
        if self.allocation == "mean":
            return least
        return max(least, math.floor(mean * (FIRST - DECAY * step)))


def draft(asi: Tensor, scales: Sequence[int], count: int, rank: str = "scale") -> list[set[int]]:
    """Drafter layers of some scales: the lowest z-scores of the attention selectivity index.

    Args:
        asi: (L, K).
        scales: scales to classify, S of them.
        count: drafters per scale.
        rank: `scale`: that many in each; `all`: that many times S over all of them together.

    Returns:
        S sets of layers.
    """
    if not scales:
        return []
    index = asi[:, list(scales)]
    z = (index - index.mean(0)) / (index.std(0, correction=0) + 1e-12)
    if rank == "scale":
        return [set(column.argsort(stable=True)[:count].tolist()) for column in z.T]
    lowest = z.flatten().argsort(stable=True)[: count * len(scales)].tolist()
    return [{place // len(scales) for place in lowest if place % len(scales) == s} for s in range(len(scales))]


def split(mean: int, available: Sequence[int], drafters: set[int], refiner: int) -> list[int]:
    """Return the tokens of the layers at one scale: drafters take all they can use, refiners share the rest equally.

    Args:
        mean: tokens of a layer on average.
        available: tokens each layer has.
        drafters: layers.
        refiner: tokens of a refiner that drafters leave alone.

    Returns:
        Tokens of each layer; they sum to min(mean * L, sum of available).
    """
    wide = sorted(drafters)
    narrow = [layer for layer in range(len(available)) if layer not in drafters]
    total = mean * len(available)
    most = shares([1] * len(wide), total - refiner * len(narrow), [available[layer] for layer in wide])
    rest = shares([1] * len(narrow), total - sum(most), [available[layer] for layer in narrow]) if narrow else []
    caps = dict(zip((*wide, *narrow), (*most, *rest), strict=True))
    return [caps[layer] for layer in range(len(available))]


def published_caps(setting: Setting) -> list[list[int]]:
    """Return the 10 % files' tokens of each layer after each scale; at the last scale those of the scale before.

    Raises:
        ConfigError: another model, or another resolution than 1M 1:1.
        BudgetError: less than 650 tokens a head.
    """
    geometry = setting.geometry
    table, L, offsets = PUBLISHED.get(geometry.model), geometry.num_layers, geometry.schedule.offsets
    if table is None or geometry.schedule.peak_tokens != PUBLISHED_PEAK:
        raise ConfigError(
            f"method scalekv: there are no published budgets for {geometry}",
            f"method.allocation=mean, or a model of: {', '.join(PUBLISHED)} at its 1:1 resolution of 1M",
        )
    setting.require(Fraction(PUBLISHED_MEAN, PUBLISHED_PEAK))
    caps = []
    for entering in range(1, geometry.num_scales):
        drafters, most, least = table.get(entering, (frozenset(), 0, offsets[entering]))
        caps.append([most if layer in drafters else least for layer in range(L)])
    return early_caps(caps, L * PUBLISHED_MEAN) + caps[-1:]


class _ScaleKV(Selecting):
    def __init__(self, setting: Setting, method: ScaleKV, window: ObservationWindow, caps: list[list[int]]):
        super().__init__(setting, method.timing)
        self._window, self._caps = window, caps
        self.chosen = {"window": window.tokens}

    def cap(self, visit: Visit) -> int:
        return self._caps[visit.scale][visit.layer]

    def choose(self, visit: Visit, cap: int) -> Keep:
        return self._window.keep(visit, cap)
