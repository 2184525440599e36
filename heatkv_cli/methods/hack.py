"""HACK (AAAI 2026, arXiv 2504.09261): semantic and spatial heads, each with its own budget and its own rule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from heatkv_cli.calibration.statistics import elbow
from heatkv_cli.core.policy import Keep, Policy, Visit
from heatkv_cli.core.scales import Geometry, ScaleSchedule
from heatkv_cli.errors import BudgetError
from heatkv_cli.methods.base import Method, Setting, Timing, at_least, refused
from heatkv_cli.methods.toolkit.merging import keep_and_merge
from heatkv_cli.methods.toolkit.selecting import (
    Selecting,
    grid_queries,
    recent_queries,
    share_rows,
    top_mask,
    uniform_queries,
    window_tokens,
)

ALPHA = 0.5
PAPER_QUERIES = 32


@dataclass(frozen=True)
class Hack(Method):
    """Keep what is looked at most in contextual heads; in structural ones the first and the newest scale too.

    Rule: heads whose attention columns vary least over the queries of the final scale (vertical stripes) are
    contextual, the others (diagonals) structural; contextual ones get a fifth of the budget. Before its attention, a
    head with more tokens in [cache, current] than its budget scores them by the attention of a few current queries.
    A contextual head keeps the top ones, and at the final scale merges the rest into them; a structural head keeps
    the initial tokens, the current scale, and the top ones in between. What was kept is attended, then stored.

    Args:
        alpha: share of contextual heads, or `elbow`: up to the knee of the sorted variances, within 0.2 and 0.8.
        ratio: budget of a contextual head over that of a structural one.
        queries: current queries that score: `uniform` in raster order, `grid`, `random`, `init`, `recent`, `full`.
        num_queries: their number; `auto` is min(the paper's 32, a quarter of a head's mean tokens).
        query_seed: seed of the random queries.
        init_scales: scales whose tokens are the initial ones; never more than a quarter of the head's budget.
        asymmetric: two budgets; else one for all heads.
        patterns: two rules; else every head keeps the top columns, and nothing is merged.
        merge: fold dropped tokens into kept ones at the final scale.
        keep_initial, keep_recent: whether structural heads protect the first tokens, the current scale.
        swapped: contextual heads follow the structural rule and the other way round; budgets stay.
        share_cfg: conditional and guidance row choose together.
        timing: `before` attention as in the paper, or `after` it.

    Source: arXiv 2504.09261, sections 3 and 4. A re-implementation: there is no public code.
    Differs: defaults of our own where the paper is silent: alpha, ratio, init_scales, the queries' places, one choice
    per batch row. Where the current scale does not fit a structural budget (undefined in the paper), initial tokens
    give way first; then the budget goes to the current tokens looked at most, the best of every patch first. Merging
    uses max(cosine, 0) as weight. Budgets are whole tokens; what rounding leaves goes to structural heads.
    """

    alpha: float | Literal["elbow"] = ALPHA
    ratio: float = 0.2
    queries: Literal["uniform", "grid", "random", "init", "recent", "full"] = "uniform"
    num_queries: int | Literal["auto"] = "auto"
    query_seed: int = 0
    init_scales: int = 2
    asymmetric: bool = True
    patterns: bool = True
    merge: bool = True
    keep_initial: bool = True
    keep_recent: bool = True
    swapped: bool = False
    share_cfg: bool = False
    timing: Timing = "before"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha != "elbow" and not 0 <= self.alpha <= 1:
            raise refused(self, "alpha", "a share of heads in [0, 1], or elbow")
        if not 0 < self.ratio <= 1:
            raise refused(self, "ratio", "B_C / B_S, in (0, 1]")
        at_least(self, num_queries=1, query_seed=0, init_scales=0)

    @property
    def calibrated(self) -> bool:
        """Head types matter unless budgets and rules are the same for all."""
        return self.asymmetric or self.patterns

    def policy(self, setting: Setting) -> Policy:
        """Needs one token a head."""
        geometry = setting.geometry
        contextual = torch.zeros(geometry.num_layers, geometry.num_heads, dtype=torch.bool)
        if self.calibrated:
            contextual = contextual_heads(setting.need_calibration().variance.mean(0), self.alpha)
        caps = self._caps(geometry, setting.cap, contextual)
        if int(caps.min()) < 1:
            self._refuse(setting, contextual)
        return _Hack(setting, self, caps, contextual)

    def _caps(self, geometry: Geometry, cap: int, contextual: Tensor) -> Tensor:
        ratio = Fraction(str(self.ratio)) if self.asymmetric else Fraction(1)
        schedule = geometry.schedule
        most = schedule.num_tokens if self.timing == "before" else schedule.peak_tokens
        return head_caps(cap, contextual, ratio, most)

    def _refuse(self, setting: Setting, contextual: Tensor) -> None:
        geometry = setting.geometry
        caps = range(1, geometry.schedule.peak_tokens + 1)
        enough = next((cap for cap in caps if int(self._caps(geometry, cap, contextual).min()) > 0), None)
        if enough is None:
            raise BudgetError(f"method hack: no budget gives every head of {geometry.model} a token", "raise the ratio")
        setting.require(Fraction(enough, caps[-1]))


def contextual_heads(variance: Tensor, alpha: float | str) -> Tensor:
    """Return the alpha * L * H heads of lowest variance over all layers, bool (L, H); ties: lower layer, then head."""
    share = elbow(variance) if isinstance(alpha, str) else alpha
    order = variance.flatten().argsort(stable=True)
    contextual = torch.zeros(variance.numel(), dtype=torch.bool)
    contextual[order[: round(share * variance.numel())]] = True
    return contextual.view(variance.shape)


def head_caps(cap: int, contextual: Tensor, ratio: Fraction, tokens: int) -> Tensor:
    """Budgets B_C and B_S of the heads, whole tokens whose sum is exactly cap * L * H where heads can take it.

    B_S = B / (alpha r + 1 - alpha), B_C = r B_S; where B_S exceeds all tokens T, B_S = T and contextual heads get what
    is left. Tokens lost to rounding go to structural heads (to contextual ones where those are full), first layers
    first, so that a type's heads differ by one token at most.

    Args:
        cap: B, mean tokens of a head.
        contextual: bool (L, H).
        ratio: r = B_C / B_S.
        tokens: T.

    Returns:
        long (L, H).
    """
    heads, few = contextual.numel(), int(contextual.sum())
    total = min(cap, tokens) * heads
    structural = Fraction(total) / (few * ratio + heads - few)
    low = ratio * structural
    if structural > tokens:
        structural, low = Fraction(tokens), Fraction(total - (heads - few) * tokens, max(few, 1))
    caps = torch.where(contextual, math.floor(low), math.floor(structural))
    for group in (~contextual, contextual):
        open_heads = (group & (caps < tokens)).nonzero()[: total - int(caps.sum())]
        caps[open_heads[:, 0], open_heads[:, 1]] += 1
    return caps


class _Hack(Selecting):
    def __init__(self, setting: Setting, method: Hack, caps: Tensor, contextual: Tensor):
        geometry, peak = setting.geometry, setting.geometry.schedule.peak_tokens
        super().__init__(setting, method.timing, capacity=int(caps.clamp(max=peak).sum()))
        self._method, self._caps = method, caps
        self._spatial = (contextual if method.swapped else ~contextual) & method.patterns
        first = geometry.schedule.offsets[min(method.init_scales, geometry.num_scales)]
        self._initial = (caps // 4).clamp(max=first) if method.keep_initial else torch.zeros_like(caps)
        self._count = window_tokens(method.num_queries, PAPER_QUERIES, setting.cap)
        self.chosen = {"queries": self._count, "contextual_heads": int(contextual.sum())}
        self.chosen |= {"contextual_cap": int(caps.min()), "structural_cap": int(caps.max())}

    def decide(self, visit: Visit) -> Keep | None:
        """Heads that hold more than their budget choose; the others keep all."""
        positions, caps = visit.positions(), self._caps[visit.layer]
        heads = ((positions[0] >= 0).sum(-1) > caps).nonzero().flatten()
        if not len(heads):
            return None
        scores = visit.column_mass(self._queries(visit), heads=heads)
        scores = share_rows(scores, visit.cond) if self._method.share_cfg else scores
        self._protect(visit, scores, positions, heads)
        mask = top_mask(scores, caps[heads])
        if len(heads) < len(caps):
            everything = (positions >= 0).expand(len(mask), -1, -1).to(mask.device)
            mask = everything.index_copy(1, heads.to(mask.device), mask)
        merged = heads[~self._spatial[visit.layer, heads]]
        if visit.scale == self._last and self._method.merge and self._method.patterns and len(merged):
            return keep_and_merge(visit, mask, "similarity", merged)
        return Keep(visit.layer, mask=mask)

    def _queries(self, visit: Visit) -> Tensor | None:
        tokens, count, kind = visit.q.shape[2], self._count, self._method.queries
        if kind == "full":
            return None
        if kind == "uniform":
            return uniform_queries(tokens, count)
        if kind == "grid":
            return grid_queries(visit.geometry.schedule.sizes[visit.scale], count)
        if kind == "init":
            return torch.arange(min(tokens, count))
        if kind == "recent":
            return recent_queries(tokens, count)
        seed = (self._method.query_seed * visit.geometry.num_scales + visit.scale) * visit.geometry.num_layers
        draw = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed + visit.layer))
        return draw[:count].sort().values

    def _protect(self, visit: Visit, scores: Tensor, positions: Tensor, heads: Tensor) -> None:
        """Raise the scores (B, n, N) of first and newest tokens to infinity in the spatial ones among `heads`.

        A spatial head whose budget does not hold the current scale has no use for older tokens: theirs sink to
        -infinity, and the best current token of every patch is protected instead of all.
        """
        spatial, caps, device = self._spatial[visit.layer, heads], self._caps[visit.layer, heads], scores.device
        if not bool(spatial.any()):
            return
        columns, tokens, recent = scores.shape[2], visit.k.shape[2], self._method.keep_recent
        crowded = spatial & (caps < tokens) & recent
        room = torch.where(crowded | (not recent), caps, caps - tokens).clamp(min=0)
        initial = torch.minimum(self._initial[visit.layer, heads], room) * spatial
        current = torch.arange(columns) >= columns - tokens
        first = (positions[:, heads] >= 0) & (positions[:, heads] < initial[:, None])
        scores.masked_fill_((first | (current & (spatial & ~crowded)[:, None] & recent)).to(device), torch.inf)
        some = crowded.nonzero().flatten()
        if not len(some):
            return
        own, first = scores[:, some.to(device)], first[:, some]
        own.masked_fill_(~(first | current).to(device), -torch.inf)
        sides = torch.tensor([math.isqrt(n) for n in (caps[some] - first[0].sum(-1)).tolist()])
        newest = own[:, :, columns - tokens :]
        newest.masked_fill_(best_of_patches(newest, visit.geometry.schedule, visit.scale, sides), torch.inf)
        scores.index_copy_(1, some.to(device), own)


def best_of_patches(scores: Tensor, schedule: ScaleSchedule, scale: int, sides: Tensor) -> Tensor:
    """Return the token with the highest score in every patch of the map; ties go to the first in raster order.

    Args:
        scores: (B, H, N) of the scale's tokens.
        schedule, scale: the map's size.
        sides: long (H,), patches along each side of the map; a head with 0 has none.

    Returns:
        bool (B, H, N).
    """
    height, width = schedule.sizes[scale]
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    side = sides[:, None, None].clamp(min=1)
    cells = ((rows * side // height) * side + columns * side // width).flatten(1)
    cells = cells.to(scores.device).expand(scores.shape)
    place, patches = torch.arange(scores.shape[-1], device=scores.device), int(side.max()) ** 2
    best = scores.new_full((*scores.shape[:2], patches), -torch.inf).scatter_reduce_(-1, cells, scores, "amax")
    leads = place.where(scores == best.gather(-1, cells), len(place))
    first = leads.new_full(best.shape, len(place)).scatter_reduce_(-1, cells, leads, "amin")
    return (place == first.gather(-1, cells)) & (sides > 0)[:, None].to(scores.device)
