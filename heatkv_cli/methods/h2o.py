"""H2O (arXiv 2306.14048) on next-scale models: heavy hitters and the most recent tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from heatkv_cli.core.artifacts import Schedule
from heatkv_cli.core.budget import Budget
from heatkv_cli.core.calibration import Calibration
from heatkv_cli.core.policy import Keep, Method, Policy, Visit
from heatkv_cli.core.scales import Geometry
from heatkv_cli.core.selection import (
    Recent,
    Selecting,
    Timing,
    evicts,
    grid_queries,
    kept_state,
    one_of,
    recent_mask,
    require_cap,
    share_rows,
    top_mask,
)
from heatkv_cli.errors import ConfigError

STATE_BYTES = 4  # the running sum, float32


@dataclass(frozen=True)
class H2O(Method):
    """Keep the tokens that have received the most attention so far, and the most recent ones.

    Rule: every head keeps a running sum, for each stored token, of the attention that all queries have paid to it since
    it exists. Of cap tokens one half are the most recent ones, the other half the highest sums among the rest.

    Args:
        timing: choose `after` the attention of a scale, or `before` it (then the current scale is cut down too).
        recent: `raster`, the last tokens; `grid`, a uniform grid of the newest scale where that alone is too much.
        n_obs: sum over so many queries of a uniform grid, scaled up to all of them; 0 is all, exactly.
        per_scale_mean: add the mean over a scale's queries in place of the sum, so that late scales do not dominate.
        share_cfg: conditional and guidance row choose by the sum of their scores, and so the same tokens.

    Source: arXiv 2306.14048, section 4 (equation 2 and algorithm 1; half heavy hitters, half recent).
    Differs: a step adds a whole scale of queries, which see each other (no causal mask), not one token. The sums cost
    4 bytes a token, head and row, paid for with slots; no sums where nothing can ever be evicted.
    """

    timing: Timing = "after"
    recent: Recent = "raster"
    n_obs: int = 0
    per_scale_mean: bool = False
    share_cfg: bool = False

    def __post_init__(self) -> None:
        one_of("h2o", timing=(self.timing, ("after", "before")), recent=(self.recent, ("raster", "grid")))
        if self.n_obs < 0:
            raise ConfigError(f"method h2o: n_obs is {self.n_obs}", "a number of queries; 0 is all of them")

    def policy(
        self,
        geometry: Geometry,
        budget: Budget,
        schedule: Schedule | None,
        rows: int,
        calibration: Calibration | None = None,
    ) -> Policy:
        """Needs room for one token and its sum."""
        if not evicts(geometry, budget, self.timing):
            return Policy(capacity=geometry.full_tokens)
        require_cap(geometry, budget, "h2o", 1, STATE_BYTES)
        return _H2O(geometry, budget, rows, self)


class _H2O(Selecting):
    def __init__(self, geometry: Geometry, budget: Budget, rows: int, method: H2O):
        super().__init__(geometry, budget, method.timing, rows, STATE_BYTES)
        self._method = method
        self._sums: list[Tensor | None] = [None] * geometry.num_layers  # float32 (B, H, stored tokens)

    def decide(self, visit: Visit) -> Keep | None:
        received, before = self._received(visit), self._sums[visit.layer]
        self._sums[visit.layer] = received if before is None else received + F.pad(before, (0, visit.k.shape[2]))
        return super().decide(visit)

    def choose(self, visit: Visit, cap: int) -> Keep:
        sums = self._sums[visit.layer]
        assert sums is not None  # `decide` has just made them
        scores = share_rows(sums, visit.cond) if self._method.share_cfg else sums
        mask = top_mask(scores, cap, always=recent_mask(visit, cap // 2, self._method.recent))
        self._sums[visit.layer] = kept_state(sums, mask)
        return Keep(visit.layer, mask=mask)

    def _received(self, visit: Visit) -> Tensor:
        """Attention that each token gets at this visit, (B, H, N)."""
        method, tokens, queries = self._method, visit.q.shape[2], None
        if 0 < method.n_obs < tokens:
            queries = grid_queries(visit.geometry.schedule.sizes[visit.scale], method.n_obs)
        seen = tokens if queries is None else len(queries)
        return visit.column_mass(queries) * ((1 if method.per_scale_mean else tokens) / seen)
