"""Attention statistics of a full-cache run, in one pass over the visits: the content of a `Calibration`.

They are exact over all queries. No attention matrix is ever whole: probabilities come in chunks of queries.
Sources: S-CAS arXiv 2605.14877; column variance arXiv 2504.09261; ASI arXiv 2505.19602; row entropy arXiv
2502.17599. Formulas: docs/methods.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from heatkv_cli.core.attention import probability_chunks
from heatkv_cli.core.policy import Visit
from heatkv_cli.core.scales import Geometry


class AttentionStatistics:
    """Observer: statistics of the conditional rows, one row a prompt.

    Args:
        geometry: shape of the model's cache.
        prompts: conditional rows of the batch (R).
        asi_top: K', number of the strongest history keys that enter the attention selectivity index.

    Attributes:
        scas: float64 (R, L, H, K, K), [.., source, target]; NaN where the source is not before the target.
        variance: float64 (R, L, H): sum over the final scale's key columns of the variance over its queries.
        asi: float64 (R, L, K); entropy, history_mass: float64 (R, L, H, K).

    Differs: ASI averages over all queries and heads; the paper samples queries uniformly and does not say how many.
    """

    def __init__(self, geometry: Geometry, prompts: int, asi_top: int = 32):
        shape = (prompts, geometry.num_layers, geometry.num_heads)
        K = geometry.num_scales
        self._top, self._last = asi_top, K - 1
        self._source, self._offsets = geometry.schedule.scale_table(), geometry.schedule.offsets
        self.scas = torch.full((*shape, K, K), torch.nan, dtype=torch.float64)
        self.variance = torch.zeros(shape, dtype=torch.float64)
        self.asi = torch.full((prompts, geometry.num_layers, K), torch.nan, dtype=torch.float64)
        self.entropy = torch.zeros(*shape, K, dtype=torch.float64)
        self.history_mass = torch.zeros(*shape, K, dtype=torch.float64)

    def observe(self, visit: Visit) -> None:
        """Add one visit.

        Raises:
            ValueError: a head does not hold its whole history; statistics of a compressed cache are others.
        """
        view, t, layer = visit.view(), visit.scale, visit.layer
        past = self._offsets[t]
        if view.k.shape[2] != self._offsets[t + 1] or not bool(view.valid.all()):
            raise ValueError(f"attention statistics need the full cache; layer {layer} has lost tokens at scale {t}")
        q, k = visit.q[visit.cond], view.k[visit.cond]
        rows, heads, queries, _ = q.shape
        mass = torch.zeros(rows, heads, k.shape[2], dtype=torch.float64)
        squares = torch.zeros_like(mass)
        entropy = torch.zeros(rows, heads, dtype=torch.float64)
        strongest = torch.zeros(rows, dtype=torch.float64)
        for _, p in probability_chunks(q, k, visit.softmax_scale):
            mass += p.sum(2, dtype=torch.float64).cpu()
            entropy += torch.special.entr(p).sum((2, 3), dtype=torch.float64).cpu()
            if past:
                top = p[..., :past].topk(min(self._top, past), -1).values
                strongest += top.sum(-1, dtype=torch.float64).mean(1).sum(-1).cpu()
            if t == self._last:
                squares += p.double().square().sum(2).cpu()
        mass /= queries
        if t == self._last:
            # population variance over queries, summed over columns; clamped where rounding makes it negative
            self.variance[:, layer] = (squares / queries - mass.square()).clamp(min=0).sum(-1)
        self.entropy[:, layer, :, t] = entropy / queries
        self.history_mass[:, layer, :, t] = mass[..., :past].sum(-1)
        if past:
            current = mass[..., past:].sum(-1).mean(1)
            self.asi[:, layer, t] = current * strongest / queries
            per_source = torch.zeros(rows, heads, t, dtype=torch.float64)
            self.scas[:, layer, :, :t, t] = per_source.index_add_(2, self._source[:past], mass[..., :past])


def concatenate(parts: list[AttentionStatistics]) -> dict[str, Tensor]:
    """Return the statistics of several batches, prompts one after the other, by the names of `Calibration`'s fields."""
    names = ("scas", "variance", "asi", "entropy", "history_mass")
    return {name: torch.cat([getattr(part, name) for part in parts]) for name in names}


def elbow(variance: Tensor, low: float = 0.2, high: float = 0.8) -> float:
    """Return the share of heads up to the knee of their sorted variances: the point farthest below the chord, clipped.

    Args:
        variance: any shape, one number a head.
        low, high: bounds of the answer.
    """
    values = variance.flatten().double().sort().values
    rise = values - values[0]
    chord = torch.linspace(0, 1, len(values), dtype=torch.float64) * rise[-1]
    knee = int((chord - rise).argmax())
    return min(max((knee + 1) / len(values), low), high)
