"""PyramidKV (arXiv 2406.02069) on next-scale models: SnapKV's rule, with more tokens in the first layers."""

from __future__ import annotations

from dataclasses import dataclass

from heatkv_cli.core.policy import Keep, Policy, Visit
from heatkv_cli.methods.base import Setting, at_least
from heatkv_cli.methods.toolkit.caps import early_caps
from heatkv_cli.methods.toolkit.selecting import ObservationWindow, Selecting, WindowMethod


@dataclass(frozen=True)
class PyramidKV(WindowMethod):
    """Keep what a window of the current queries looks at, more of it in the first layers than in the last.

    Rule: tokens are scored and kept as in SnapKV. Beside the window of w tokens a head has b = cap - w of them on
    average over the layers: the last layer has min = b / 20, the first max = 2 b - min, or all there are and the last
    layer 2 b - max; in between the number falls linearly. Recomputed at every scale with the actual length.

    Args:
        steepness: b / min, the paper's beta.

    Source: arXiv 2406.02069, section 4 (equations for the layer budgets, beta = 20).
    Differs: the paper's rounded step makes the layers' sum exceed the budget; what rounding added is taken back, from
    the last layer on. Caps grow in some layers and shrink in others from scale to scale; where all layers' tokens would
    be too many in the middle of a pass, the last ones shrink one visit early (`early_caps`). The window is
    SnapKV's; see `WindowMethod` for its parameters.
    """

    steepness: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, steepness=1)  # a flat pyramid

    def policy(self, setting: Setting) -> Policy:
        """Needs room for its window and one more token a layer on average."""
        geometry, window, mean = setting.geometry, self.window_at(setting), setting.stored_cap()
        caps: list[list[int]] = []
        longest = 0
        for tokens in geometry.schedule.lengths[:-1]:
            longest += tokens
            caps.append(pyramid(geometry.num_layers, mean, window.tokens, longest, self.steepness))
            longest = caps[-1][0]
        caps = early_caps(caps, geometry.num_layers * mean)
        longest += geometry.schedule.lengths[-1]
        caps.append(pyramid(geometry.num_layers, setting.cap, window.tokens, longest, self.steepness))
        return _PyramidKV(setting, self, window, caps)


def pyramid(layers: int, mean: int, window: int, length: int, steepness: int = 20) -> list[int]:
    """Return the tokens of a head in each layer, first layer first; they sum to layers * mean unless everything fits.

    Args:
        layers: L.
        mean: tokens of a head, mean over layers.
        window: tokens of them that are always there.
        length: tokens there are in the first layer, the longest.
        steepness: mean over smallest, the window left aside.
    """
    if length <= mean or layers == 1:
        return [min(length, mean)] * layers
    body, gaps = mean - window, layers - 1
    smallest = body // steepness
    largest = min(2 * body - smallest, length - window)
    smallest = 2 * body - largest
    step, rest = divmod(largest - smallest, gaps)
    caps = [largest - layer * step for layer in range(layers)]
    excess = sum(caps) - layers * body
    for layer in reversed(range(layers)):
        rounded = min(excess, -(-layer * rest // gaps))  # what rounding the step down left here
        caps[layer] -= rounded
        excess -= rounded
    return [cap + window for cap in caps]


class _PyramidKV(Selecting):
    def __init__(self, setting: Setting, method: PyramidKV, window: ObservationWindow, caps: list[list[int]]):
        super().__init__(setting, method.timing)
        self._window, self._caps, self.chosen = window, caps, {"window": window.tokens}

    def cap(self, visit: Visit) -> int:
        return self._caps[visit.scale][visit.layer]

    def choose(self, visit: Visit, cap: int) -> Keep:
        return self._window.keep(visit, cap)
