"""MEDA (arXiv 2502.17599) on next-scale models: LOOK-M, and layers that look widely get more of the budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from heatkv_cli.core.policy import Policy, Visit
from heatkv_cli.methods.base import Setting, at_least
from heatkv_cli.methods.toolkit.heavy_hitters import STATE_BYTES, HeavyHitters, HeavyMethod
from heatkv_cli.methods.toolkit.selecting import Observed, observed_queries, window_tokens

WINDOW = 32  # observed queries
FLOOR = 0.01  # the least share of its tokens that a layer keeps


@dataclass(frozen=True)
class MEDA(HeavyMethod):
    """Share the budget between layers by the entropy of their attention; inside a layer do as LOOK-M does.

    Rule: a layer's entropy is the mean over heads and observed queries of the entropy of their attention over the
    history. The layers' shares of the budget are the softmax of the entropies, within bounds. Half of a layer's tokens
    are the most recent ones, half heavy hitters with the first tokens before all others; dropped tokens are merged.

    Args:
        timing, recent, n_obs, per_scale_mean, share_cfg: see `HeavyMethod`.
        merge: `pivot`, `average` or `weighted`, see `toolkit.merging`; `none` drops.
        text: number of first tokens that count as text; `scales` stands for the model's sink scales.
        window: observed queries; `auto` is min(32, a quarter of a head's mean tokens).
        obs: `grid`, they are spread over the map; `recent`, its last tokens.

    Source: arXiv 2502.17599, section 3.
    Differs: the paper's entropy is that between text and image tokens, of which there are none; here over the history,
    renormalised, mean over batch rows. A layer keeps at least 1 % of its tokens and the text and window tokens, where
    the mean cap allows; the shares are then rescaled to the exact total (the paper's are not). Layers behind the
    current one count with their entropy at the scale before, and a layer gets what the others do not hold.
    """

    merge: Literal["pivot", "average", "weighted", "none"] = "pivot"
    text: int | Literal["scales"] = "scales"
    window: int | Literal["auto"] = "auto"
    obs: Observed = "grid"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, text=0, window=1)

    def policy(self, setting: Setting) -> Policy:
        """Needs room for text and window in every head, and their sums."""
        geometry = setting.geometry
        if not setting.evicts(self.timing):
            return Policy(capacity=geometry.full_tokens)
        text = geometry.sink_tokens if self.text == "scales" else self.text
        caps = range(1, geometry.schedule.num_tokens + text + WINDOW)
        least = next(cap for cap in caps if text + window_tokens(self.window, WINDOW, cap) <= cap)
        setting.require_cap(least, STATE_BYTES)
        return _MEDA(setting, self, text)


class _MEDA(HeavyHitters):
    def __init__(self, setting: Setting, method: MEDA, text: int):
        geometry = setting.geometry
        # tokens of one head, summed over layers
        total = setting.budget.slots(geometry, setting.rows, STATE_BYTES) // geometry.num_heads
        merge = None if method.merge == "none" else method.merge
        super().__init__(setting, method, text, merge, total * geometry.num_heads)
        self._total, self._attended_total = total, setting.cap * geometry.num_layers
        self._obs, self._window = method.obs, window_tokens(method.window, WINDOW, self._stored)
        self._least, self._offsets = text + self._window, geometry.schedule.offsets
        self._held = [0] * geometry.num_layers
        self._entropy: list[float | None] = [None] * geometry.num_layers
        self.chosen = {"window": self._window}

    def cap(self, visit: Visit) -> int:
        layer, tokens, last = visit.layer, visit.k.shape[2], visit.scale == self._last
        ahead = self._offsets[min(visit.scale + 2, len(self._offsets) - 1)]
        if len(self._held) * ahead <= self._total:  # all fits at the next scale too: nobody will ask for entropies
            self._held[layer] += tokens
            return self._held[layer]
        self._entropy[layer] = self._observe(visit)
        total = self._attended_total if last else self._total
        mean, held = total // len(self._held), self._held
        available = [n + tokens * (i >= layer) for i, n in enumerate(held)]
        floors = [min(n, max(self._least, min(math.ceil(FLOOR * n), mean))) for n in available]
        if last:  # nothing is stored: what earlier layers have attended is gone from the total
            held[layer] = clamped_shares(
                self._weights()[layer:], total - sum(held[:layer]), floors[layer:], available[layer:]
            )[0]
        else:
            cap = clamped_shares(self._weights(), total, floors, available)[layer]
            others = sum(held[:layer]) + sum(map(max, held[layer + 1 :], floors[layer + 1 :]))
            held[layer] = min(cap, total - others)
        return held[layer]

    def _weights(self) -> list[float]:
        """Return the softmax of the known entropies; a layer that was never seen counts as the mean."""
        known = [entropy for entropy in self._entropy if entropy is not None]
        filled = [sum(known) / len(known) if entropy is None else entropy for entropy in self._entropy]
        return [math.exp(entropy - max(filled)) for entropy in filled]

    def _observe(self, visit: Visit) -> float:
        """Return the mean entropy, in nats, of the observed queries' attention over the history."""
        queries = observed_queries(visit.geometry.schedule.sizes[visit.scale], self._window, self._obs)
        history = visit.positions().shape[2] - visit.k.shape[2]
        if not history:
            return 0.0
        weights = visit.attention(queries)[..., :history]
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
        return float(torch.special.entr(weights).sum(-1).mean(dtype=torch.float64))


def clamped_shares(weights: Sequence[float], total: int, floors: Sequence[int], ceilings: Sequence[int]) -> list[int]:
    """Whole numbers proportional to positive weights, within bounds, that sum to min(total, sum of ceilings) exactly.

    x_i = clamp(lambda w_i, floor_i, ceiling_i) for the one lambda that gives the sum; fractions go to the largest
    remainders, of equal ones to the lower index. The floors must sum to no more than the total.
    """
    if sum(ceilings) <= total:
        return list(ceilings)
    low, high = 0.0, max(c / w for c, w in zip(ceilings, weights, strict=True))

    def clamped(factor: float) -> list[float]:
        pairs = zip(weights, floors, ceilings, strict=True)
        return [min(max(factor * weight, floor), ceiling) for weight, floor, ceiling in pairs]

    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if sum(clamped(middle)) > total else (middle, high)
    wanted = clamped(low)
    split = [math.floor(share) for share in wanted]
    by_remainder = sorted(range(len(split)), key=lambda i: (split[i] - wanted[i], i))
    for i in [i for i in by_remainder if split[i] < ceilings[i]][: total - sum(split)]:
        split[i] += 1
    return split
