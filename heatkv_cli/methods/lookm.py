"""LOOK-M (arXiv 2406.18139) on next-scale models: heavy hitters, text first, and nothing is lost but merged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from heatkv_cli.core.policy import Policy
from heatkv_cli.methods.base import Setting, at_least
from heatkv_cli.methods.toolkit.heavy_hitters import STATE_BYTES, HeavyHitters, HeavyMethod


@dataclass(frozen=True)
class LookM(HeavyMethod):
    """Keep heavy hitters, the first tokens before all others, and recent tokens; fold the rest into them.

    Rule: H2O's running sums and halves, but text tokens are heavier than any image token. Every dropped token is
    merged into the kept token of its head with the nearest key (cosine); its value goes the same way.

    Args:
        timing, recent, n_obs, per_scale_mean, share_cfg: see `HeavyMethod`.
        merge: `pivot`, `average` or `weighted`, see `toolkit.merging`; `none` drops.
        text: number of first tokens that count as text; `scales` stands for the model's sink scales.

    Source: arXiv 2406.18139, sections 3.2 and 3.3; variants checked against SUSTechBruce/LOOK-M @ 0b9c09d.
    Differs: these models have no text in the self-attention cache, so the sink scales are protected in its place.
    Upstream evicts once after the prompt; here after every scale, so merged tokens are merged again. Keys are merged
    after rotation, like upstream's. The sums cost 4 bytes a token, head and row, paid for with slots.
    """

    merge: Literal["pivot", "average", "weighted", "none"] = "pivot"
    text: int | Literal["scales"] = "scales"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, text=0)

    def policy(self, setting: Setting) -> Policy:
        """Needs room for one token and its sum."""
        if not setting.evicts(self.timing):
            return Policy(capacity=setting.geometry.full_tokens)
        setting.require_cap(1, STATE_BYTES)
        text = setting.geometry.sink_tokens if self.text == "scales" else self.text
        return HeavyHitters(setting, self, text, None if self.merge == "none" else self.merge)
