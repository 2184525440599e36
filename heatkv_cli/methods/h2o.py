"""H2O (arXiv 2306.14048) on next-scale models: heavy hitters and the most recent tokens."""

from __future__ import annotations

from dataclasses import dataclass

from heatkv_cli.core.policy import Policy
from heatkv_cli.methods.base import Setting
from heatkv_cli.methods.toolkit.heavy_hitters import STATE_BYTES, HeavyHitters, HeavyMethod


@dataclass(frozen=True)
class H2O(HeavyMethod):
    """Keep the tokens that have received the most attention so far, and the most recent ones.

    Rule: every head keeps a running sum, for each stored token, of the attention that all queries have paid to it since
    it exists. Of cap tokens one half are the most recent ones, the other half the highest sums among the rest.

    Args:
        timing, recent, n_obs, per_scale_mean, share_cfg: see `HeavyMethod`.

    Source: arXiv 2306.14048, section 4 (equation 2 and algorithm 1; half heavy hitters, half recent).
    Differs: a step adds a whole scale of queries, which see each other (no causal mask), not one token. The sums cost
    4 bytes a token, head and row, paid for with slots; no sums where nothing can ever be evicted.
    """

    def policy(self, setting: Setting) -> Policy:
        """Needs room for one token and its sum."""
        if not setting.evicts(self.timing):
            return Policy(capacity=setting.geometry.full_tokens)
        setting.require_cap(1, STATE_BYTES)
        return HeavyHitters(setting, self)
