"""Control: nothing but the sink scales."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch

from heatkv_cli.core.policy import Keep, Policy, Visit
from heatkv_cli.core.scales import Geometry
from heatkv_cli.methods.base import Granularity, Method, Setting


@dataclass(frozen=True)
class Sinks(Method):
    """Keep the sink scales in every head and drop every other scale right after its own attention.

    Rule: the floor every schedule is built on; whatever a method gains, it gains over this row.
    Source: control of ours; the sink scales are those of HeatKV (arXiv 2605.14877).
    """

    granularity: ClassVar[Granularity] = "atom"

    def policy(self, setting: Setting) -> Policy:
        """Uses C_S / P of the cache, whatever the budget allows above that."""
        geometry = setting.geometry
        setting.require(Fraction(geometry.sink_tokens, geometry.schedule.peak_tokens))
        return _Sinks(geometry)


class _Sinks(Policy):
    def __init__(self, geometry: Geometry):
        super().__init__(capacity=geometry.heads * geometry.sink_tokens)
        scales = torch.arange(geometry.num_scales) < geometry.sink_scales
        self._atoms = scales.expand(geometry.num_heads, -1)

    def after_attend(self, visit: Visit) -> Iterable[Keep]:
        return (Keep(visit.layer, atoms=self._atoms),)
