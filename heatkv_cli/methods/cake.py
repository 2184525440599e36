"""CAKE (arXiv 2503.12491) on next-scale models: layers share the budget by how widely and unsteadily they look."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from heatkv_cli.core.policy import Keep, Policy, Visit
from heatkv_cli.errors import ConfigError
from heatkv_cli.methods.base import Setting
from heatkv_cli.methods.toolkit.caps import shares
from heatkv_cli.methods.toolkit.selecting import (
    ObservationWindow,
    Selecting,
    WindowMethod,
    kept_state,
    top_mask,
)

STATE_BYTES = 4  # the score a token was kept with, float32: what the cascade takes next


@dataclass(frozen=True)
class CAKE(WindowMethod):
    """Keep what a window of queries looks at, and share the tokens between layers by their attention's dispersion.

    Rule: beside the window, layers share the tokens in proportion to entropy^(1 / tau1) * variance^(1 / tau2): the
    entropy of the window's attention over the other tokens, and its variance over the window's queries, summed over
    tokens and heads. Tokens are scored by mean + gamma * variance over the window's queries, averaged over 5
    neighbours. Shares are recomputed at every layer of every scale, and layers that now get less give tokens up.

    Args:
        gamma: weight of the variance in a token's score.
        tau1, tau2: temperatures of entropy and variance in a layer's preference.

    Source: arXiv 2503.12491, sections 4.1 to 4.3 (preference, eviction indicator, cascade).
    Differs: a pass over the layers repeats at every scale, so layers still to come count with their preference of the
    scale before. What a layer may have is granted from what is free; where that is too little, other layers are cut to
    their new shares, those already visited first, and only as far as needed. Variances are population variances.
    The tokens' scores are stored for that, 4 bytes a token, head and row, paid for with slots. Preferences are averaged
    over the rows of a batch, which share their slots. The window as in SnapKV; see `WindowMethod` for its parameters.
    """

    gamma: float = 200.0
    tau1: float = 1.0
    tau2: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gamma < 0 or self.tau1 <= 0 or self.tau2 <= 0:
            raise ConfigError(
                f"method cake: gamma is {self.gamma}, tau1 {self.tau1}, tau2 {self.tau2}", "gamma >= 0, tau1, tau2 > 0"
            )

    def policy(self, setting: Setting) -> Policy:
        """Needs room for its window and one more token a layer on average, and their scores."""
        if not setting.evicts(self.timing):
            return Policy(capacity=setting.geometry.full_tokens)
        return _CAKE(setting, self, self.window_at(setting, STATE_BYTES))


class _CAKE(Selecting):
    def __init__(self, setting: Setting, method: CAKE, window: ObservationWindow):
        geometry = setting.geometry
        # tokens of one head, summed over layers
        total = setting.budget.slots(geometry, setting.rows, STATE_BYTES) // geometry.num_heads
        super().__init__(setting, method.timing, STATE_BYTES, capacity=total * geometry.num_heads)
        self._method, self._window, self.chosen = method, window, {"window": window.tokens}
        self._offsets = geometry.schedule.offsets
        self._total, self._attended_total = total, setting.cap * geometry.num_layers
        self._held = [0] * geometry.num_layers
        self._preference: list[float | None] = [None] * geometry.num_layers
        self._scores: list[Tensor | None] = [None] * geometry.num_layers  # float32 (B, H, stored tokens)
        self._trims: list[Keep] = []

    def after_attend(self, visit: Visit) -> Iterable[Keep]:
        own = super().after_attend(visit)
        trims, self._trims = self._trims, []
        return (*trims, *own)

    def decide(self, visit: Visit) -> Keep | None:
        layer, length = visit.layer, self._held[visit.layer] + visit.k.shape[2]
        ahead = self._offsets[min(visit.scale + 2, len(self._offsets) - 1)]
        if len(self._held) * ahead <= self._total:  # all fits at the next scale too: nobody will ask for scores
            self._held[layer] = length
            return None
        scores = self._observe(visit)
        caps = self._caps(visit)
        if visit.scale < self._last:
            self._make_room(layer, caps)
        else:  # what was attended cannot be taken back: later layers get what is left, a window at least
            reserved = self._window.tokens * (len(caps) - 1 - layer)
            caps[layer] = min(caps[layer], self._attended_total - sum(self._held[:layer]) - reserved)
        self._held[layer] = caps[layer]
        if length == caps[layer]:
            self._scores[layer] = scores
            return None
        mask = top_mask(scores, caps[layer])
        self._scores[layer] = kept_state(scores, mask)
        return Keep(layer, mask=mask)

    def _observe(self, visit: Visit) -> Tensor:
        """Return the scores of the visit's tokens, infinite for the window's own; notes the layer's preference."""
        queries = self._window.queries(visit)
        own = self._window.columns(visit, queries)
        weights = visit.attention(queries)
        mean = weights.mean(2)
        spread = (weights - mean.unsqueeze(2)).square_().mean(2)
        # p log p by a clamped logarithm: several times as fast as torch.special.entr
        entropy = weights.clamp(min=torch.finfo(weights.dtype).tiny).log_().mul_(weights).sum(2).neg_()
        del weights  # the largest buffer goes before scores are pooled
        there = own.to(spread.device)
        entropy, variance = (x.masked_fill(there, 0).sum((1, 2), dtype=torch.float64) for x in (entropy, spread))
        preference = entropy ** (1 / self._method.tau1) * variance ** (1 / self._method.tau2)
        self._preference[visit.layer] = preference.mean().item()
        scores = self._window.pooled(visit, mean + self._method.gamma * spread, own)
        return scores.masked_fill_(there, torch.inf)

    def _caps(self, visit: Visit) -> list[int]:
        """Return each layer's tokens, by fresh preferences up to this layer and the last scale's behind it."""
        tokens, layer = visit.k.shape[2], visit.layer
        available = [held + tokens * (i >= layer) for i, held in enumerate(self._held)]
        windows = [min(self._window.tokens, length) for length in available]
        known = [p for p in self._preference if p is not None]
        weights = [sum(known) / len(known) if p is None else p for p in self._preference]
        total = (self._total if visit.scale < self._last else self._attended_total) - sum(windows)
        bodies = [length - window for length, window in zip(available, windows, strict=True)]
        return [w + b for w, b in zip(windows, shares(weights, total, bodies), strict=True)]

    def _make_room(self, layer: int, caps: Sequence[int]) -> None:
        """Cut other layers to their new caps until this one has its own: visited layers first, then the last ones."""
        missing = caps[layer] + sum(self._held) - self._held[layer] - self._total
        for other in (*range(layer), *range(len(caps) - 1, layer, -1)):
            given = min(missing, self._held[other] - caps[other])
            if given > 0:
                missing -= given
                self._held[other] -= given
                scores = self._scores[other]
                assert scores is not None  # observed since the scale before anything was cut
                mask = top_mask(scores, self._held[other])
                self._scores[other] = kept_state(scores, mask)
                self._trims.append(Keep(other, mask=mask))
