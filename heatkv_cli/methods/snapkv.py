"""SnapKV (arXiv 2404.14469) on next-scale models: what a window of the current queries looks at."""

from __future__ import annotations

from dataclasses import dataclass

from heatkv_cli.core.policy import Keep, Policy, Visit
from heatkv_cli.methods.base import Setting
from heatkv_cli.methods.toolkit.selecting import ObservationWindow, Selecting, WindowMethod


@dataclass(frozen=True)
class SnapKV(WindowMethod):
    """Keep a window of the current tokens and the tokens that they look at most.

    Rule: the attention of w current queries, summed over them and averaged over 5 neighbours, scores all tokens; each
    head keeps the w tokens of the window and the cap - w highest scores of the rest.

    Source: arXiv 2404.14469, section 4 and listing 1 (window 32; the kernel and its pooling differ between the paper's
    experiments and public re-implementations).
    Differs: the window is spread over the map (`obs=recent` is the literal port), its queries see each other (no causal
    mask), and neighbours are those of the same scale; an average counts the neighbours there are. It acts after every
    scale, not once after a prompt. See `WindowMethod` for the parameters.
    """

    def policy(self, setting: Setting) -> Policy:
        """Needs room for its window and one more token."""
        return _SnapKV(setting, self, self.window_at(setting))


class _SnapKV(Selecting):
    def __init__(self, setting: Setting, method: SnapKV, window: ObservationWindow):
        super().__init__(setting, method.timing)
        self._window, self.chosen = window, {"window": window.tokens}

    def choose(self, visit: Visit, cap: int) -> Keep:
        return self._window.keep(visit, cap)
