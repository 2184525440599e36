"""The full cache: everything but the last scale, which nobody reads."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from heatkv_cli.core.artifacts import Schedule
from heatkv_cli.core.budget import Budget
from heatkv_cli.core.calibration import Calibration
from heatkv_cli.core.policy import Granularity, Method, Policy
from heatkv_cli.core.scales import Geometry


@dataclass(frozen=True)
class Full(Method):
    """Keep all tokens.

    Rule: nothing is evicted; the reference of every comparison.
    Source: Infinity (arXiv 2412.04431), `autoregressive_infer_cfg`.
    Differs: upstream also stores the last scale, and keys in float32; neither changes a result.
    """

    granularity: ClassVar[Granularity] = "-"

    def policy(
        self,
        geometry: Geometry,
        budget: Budget,
        schedule: Schedule | None,
        rows: int,
        calibration: Calibration | None = None,
    ) -> Policy:
        """Needs the whole cache, so its smallest budget is 1."""
        budget.require(Fraction(1), geometry, "full")
        return Policy(capacity=geometry.full_tokens)
