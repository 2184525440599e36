"""The full cache: everything but the last scale, which nobody reads."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from heatkv_cli.core.policy import Policy
from heatkv_cli.methods.base import Granularity, Method, Setting


@dataclass(frozen=True)
class Full(Method):
    """Keep all tokens.

    Rule: nothing is evicted; the reference of every comparison.
    Source: Infinity (arXiv 2412.04431), `autoregressive_infer_cfg`.
    Differs: upstream also stores the last scale, and keys in float32; neither changes a result.
    """

    granularity: ClassVar[Granularity] = "-"

    def policy(self, setting: Setting) -> Policy:
        """Needs the whole cache, so its smallest budget is 1."""
        setting.require(Fraction(1))
        return Policy(capacity=setting.geometry.full_tokens)
