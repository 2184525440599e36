"""LOOK-M (arXiv 2406.18139) on next-scale models: heavy hitters, text first, and nothing is lost but merged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from heatkv_cli.core.artifacts import Schedule
from heatkv_cli.core.budget import Budget
from heatkv_cli.core.calibration import Calibration
from heatkv_cli.core.heavy_hitters import STATE_BYTES, HeavyHitters, HeavyMethod
from heatkv_cli.core.policy import Policy
from heatkv_cli.core.scales import Geometry
from heatkv_cli.core.selection import evicts, one_of, require_cap
from heatkv_cli.errors import ConfigError


@dataclass(frozen=True)
class LookM(HeavyMethod):
    """Keep heavy hitters, the first tokens before all others, and recent tokens; fold the rest into them.

    Rule: H2O's running sums and halves, but text tokens are heavier than any image token. Every dropped token is
    merged into the kept token of its head with the nearest key (cosine); its value goes the same way.

    Args:
        timing, recent, n_obs, per_scale_mean, share_cfg: see `HeavyMethod`.
        merge: `pivot`, `average` or `weighted`, see `core.merging`; `none` drops.
        text: how many first tokens count as text; `scales` stands for the model's sink scales.

    Source: arXiv 2406.18139, sections 3.2 and 3.3; variants checked against SUSTechBruce/LOOK-M @ 0b9c09d.
    Differs: these models have no text in the self-attention cache, so the sink scales are protected in its place.
    Upstream evicts once after the prompt; here after every scale, so merged tokens are merged again. Keys are merged
    after rotation, like upstream's. The sums cost 4 bytes a token, head and row, paid for with slots.
    """

    merge: Literal["pivot", "average", "weighted", "none"] = "pivot"
    text: int | str = "scales"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("lookm", merge=(self.merge, ("pivot", "average", "weighted", "none")))
        if self.text != "scales" and (type(self.text) is not int or self.text < 0):
            raise ConfigError(f"method lookm: text is {self.text!r}", "a number of tokens >= 0, or scales")

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
        require_cap(geometry, budget, "lookm", 1, STATE_BYTES)
        text = geometry.sink_tokens if self.text == "scales" else int(self.text)
        return HeavyHitters(geometry, budget, rows, self, text, None if self.merge == "none" else self.merge)
