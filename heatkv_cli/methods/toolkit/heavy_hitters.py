"""Choice of tokens by the attention they have received so far, for H2O, LOOK-M and MEDA."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from heatkv_cli.core.policy import Keep, Visit
from heatkv_cli.methods.base import Method, Setting, Timing, at_least
from heatkv_cli.methods.toolkit.merging import keep_and_merge
from heatkv_cli.methods.toolkit.selecting import (
    Recent,
    Selecting,
    grid_queries,
    kept_state,
    recent_mask,
    share_rows,
    top_mask,
)

STATE_BYTES = 4  # the running sum, float32


@dataclass(frozen=True)
class HeavyMethod(Method):
    """Base of methods that keep a running sum of the attention each stored token has received.

    Args:
        timing: choose `after` the attention of a scale, or `before` it (then the current scale is cut down too).
        recent: `raster`, the last tokens; `grid`, a uniform grid of the newest scale where that alone is too much.
        n_obs: sum over so many queries of a uniform grid, scaled up to all of them; 0 is all, exactly.
        per_scale_mean: add the mean over a scale's queries in place of the sum, so that late scales do not dominate.
        share_cfg: conditional and guidance row choose by the sum of their scores, and so the same tokens.
    """

    timing: Timing = "after"
    recent: Recent = "raster"
    n_obs: int = 0
    per_scale_mean: bool = False
    share_cfg: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, n_obs=0)


class HeavyHitters(Selecting):
    """Keep cap tokens: half of them the most recent, half the highest sums among the rest.

    Args:
        setting, capacity: see `Selecting`.
        method: parameters that say what is summed, and when is chosen.
        text: so many first tokens go before all other heavy hitters.
        merge: rule of `merge_dropped` by which dropped tokens go into kept ones; None drops them.
    """

    def __init__(
        self,
        setting: Setting,
        method: HeavyMethod,
        text: int = 0,
        merge: str | None = None,
        capacity: int | None = None,
    ):
        super().__init__(setting, method.timing, STATE_BYTES, capacity)
        self._method, self._text, self._merge = method, text, merge
        self._sums: list[Tensor | None] = [None] * setting.geometry.num_layers  # float32 (B, H, stored tokens)

    def decide(self, visit: Visit) -> Keep | None:
        """Brings the sums up to date, then chooses if need be."""
        received, before = self._received(visit), self._sums[visit.layer]
        self._sums[visit.layer] = received if before is None else received + F.pad(before, (0, visit.k.shape[2]))
        return super().decide(visit)

    def choose(self, visit: Visit, cap: int) -> Keep:
        """Both halves; what is dropped is merged if asked."""
        sums = self._sums[visit.layer]
        assert sums is not None  # `decide` has just made them
        scores = share_rows(sums, visit.cond) if self._method.share_cfg else sums
        if self._text:
            text = (visit.positions() < self._text).to(scores.device)
            scores = scores.masked_fill(text, torch.finfo(scores.dtype).max)
        mask = top_mask(scores, cap, always=recent_mask(visit, cap // 2, self._method.recent))
        self._sums[visit.layer] = kept_state(sums, mask)
        if self._merge is None:
            return Keep(visit.layer, mask=mask)
        return keep_and_merge(visit, mask, self._merge)

    def _received(self, visit: Visit) -> Tensor:
        """Return the attention that each token gets at this visit, (B, H, N)."""
        method, tokens, queries = self._method, visit.q.shape[2], None
        if 0 < method.n_obs < tokens:
            queries = grid_queries(visit.geometry.schedule.sizes[visit.scale], method.n_obs)
        seen = tokens if queries is None else len(queries)
        return visit.column_mass(queries) * ((1 if method.per_scale_mean else tokens) / seen)
