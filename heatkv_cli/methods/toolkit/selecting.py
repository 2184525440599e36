"""Parts of methods that choose single tokens: queries to look through, scores, top-k, and the visits' caps.

Scores are float32 (B, H, N) over the columns of a visit, [cache, current]; masks are bool of the same shape, in the
form of `Keep.mask`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from heatkv_cli.core.policy import Keep, Policy, Visit
from heatkv_cli.core.scales import ScaleSchedule
from heatkv_cli.methods.base import Method, Setting, Timing, at_least, refused

Observed = Literal["grid", "recent"]
Recent = Literal["raster", "grid"]
Pooling = Literal["avg", "max"]


# ------------------------------------------------------------------------------------- which of the current queries


def grid_queries(size: tuple[int, int], count: int) -> Tensor:
    """Return `count` tokens of a map, spread evenly over both directions, ascending; all where it has no more.

    The rows are bands of equal height, and each row's tokens the centres of equal pieces, so that 16 of a square map
    are the centres of 4 x 4 patches (the upper left one of four).

    >>> grid_queries((8, 8), 4).tolist()
    [9, 13, 41, 45]
    """
    height, width = size
    count = min(count, height * width)
    rows = min(height, count, max(math.ceil(count / width), round(math.sqrt(count * height / width))))
    ends = [i * count // rows for i in range(rows + 1)]
    picked = []
    for i in range(rows):
        here = ends[i + 1] - ends[i]
        picked += [_centre(i, rows, height) * width + _centre(j, here, width) for j in range(here)]
    return torch.tensor(picked, dtype=torch.int64)


def _centre(index: int, pieces: int, length: int) -> int:
    """Return the middle of one of `pieces` equal pieces of 0..length-1; the lower one of two."""
    return (index * length // pieces + (index + 1) * length // pieces - 1) // 2


def recent_queries(tokens: int, count: int) -> Tensor:
    """Return the last `count` tokens in raster order, or all: the window of language models."""
    return torch.arange(max(0, tokens - count), tokens)


def uniform_queries(tokens: int, count: int) -> Tensor:
    """Return tokens floor((j + 1/2) N / count) in raster order (HACK), or all where there are no more."""
    if tokens <= count:
        return torch.arange(tokens)
    return torch.tensor([(2 * j + 1) * tokens // (2 * count) for j in range(count)])


def observed_queries(size: tuple[int, int], count: int, obs: Observed) -> Tensor:
    """`grid_queries` or `recent_queries` of a map."""
    return grid_queries(size, count) if obs == "grid" else recent_queries(size[0] * size[1], count)


# ------------------------------------------------------------------------------------------------- scores and masks


def current_mask(queries: Tensor, columns: int, tokens: int) -> Tensor:
    """Return bool (1, 1, columns): the columns of some of the current scale's `tokens`, the last ones."""
    mask = torch.zeros(1, 1, columns, dtype=torch.bool)
    mask[..., columns - tokens + queries] = True
    return mask


def pool_segments(
    scores: Tensor,
    positions: Tensor,
    schedule: ScaleSchedule,
    kernel: int,
    mode: Pooling = "avg",
    without: Tensor | None = None,
) -> Tensor:
    """Pool scores over neighbouring tokens of the same scale, never across two scales.

    Args:
        scores: (B, H, N).
        positions: int (B or 1, H, N), ascending; -1 where there is no token.
        schedule: token maps of all scales.
        kernel: odd; 1 leaves the scores as they are.
        mode: average of the tokens there are (a scale's border has fewer), or their maximum.
        without: bool, broadcast to the scores: tokens that are no one's neighbours, like padding; theirs is 0 / -inf.

    Returns:
        (B, H, N).
    """
    if kernel == 1:
        return scores
    half, device = kernel // 2, scores.device
    absent = positions < 0 if without is None else (positions < 0) | without.cpu()
    # tokens are laid out with `half` empty places between two scales, then pooled as one line
    place, empty = torch.arange(positions.shape[2]).expand(positions.shape), half * schedule.num_scales
    place = place + half * schedule.scale_table()[positions.long()]  # padding, -1, lies behind all scales
    place, absent = place.to(device), absent.to(device)
    join, lowest = (torch.maximum, -torch.inf) if mode == "max" else (torch.add, 0.0)
    line = scores.new_full((*scores.shape[:2], scores.shape[2] + empty), lowest)
    line.scatter_(2, place.expand(scores.shape), scores.masked_fill(absent, lowest))
    pooled = _slid(line, half, join, lowest).gather(2, place.expand(scores.shape))
    if mode == "avg":
        line = scores.new_zeros(*absent.shape[:2], line.shape[2])
        line.scatter_(2, place.expand(absent.shape), (~absent).to(scores.dtype))
        pooled /= _slid(line, half, join, lowest).gather(2, place.expand(absent.shape))
    return pooled.masked_fill_(absent, -torch.inf)


def _slid(line: Tensor, half: int, join: Callable[[Tensor, Tensor], Tensor], outside: float) -> Tensor:
    """Join every entry with `half` neighbours on each side, in their order: equal neighbours give equal results."""
    padded, tokens = F.pad(line, (half, half), value=outside), line.shape[2]
    joined = padded[..., :tokens]
    for shift in range(1, 2 * half + 1):
        joined = join(joined, padded[..., shift : shift + tokens])
    return joined


def top_mask(scores: Tensor, counts: int | Tensor, always: Tensor | None = None) -> Tensor:
    """Return the tokens to keep: `always` and, up to `counts`, the highest scores of the rest.

    Args:
        scores: (B, H, N); -inf where there is no token. Of equal scores the one with the lower column wins.
        counts: tokens of each head, `always` included; int or long (H,). Where more are to be kept always, the
            first `counts` of them are.
        always: bool, broadcast to the scores.

    Returns:
        bool (B, H, N), equally many in every row.
    """
    if always is not None:
        scores = scores.masked_fill(always.to(scores.device), torch.inf)
    counts = torch.as_tensor(counts).expand(scores.shape[1])
    last, following = _at(scores, counts.clamp(1, scores.shape[2]))
    if bool((following < last).all()) and int(counts.min()):
        return scores >= last
    above, level = scores > last, scores == last  # equal scores, of which the first ones win
    return above | (level & (level.cumsum(2) <= counts.to(scores.device)[:, None] - above.sum(2, keepdim=True)))


def _at(scores: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return the counts[h]-th highest score of each row and head and the next one, -inf behind the last; (B, H, 1).

    Args:
        scores: (B, H, N).
        counts: long (H,), 1 to N.
    """
    rows, _, columns = scores.shape
    if scores.device.type == "cpu":  # vectorised: a tenth of PyTorch's sort, less than a partition at two places
        ranked, places = torch.from_numpy(np.sort(scores.numpy(), axis=-1)), columns - counts
    else:
        ranked = scores.topk(min(columns, int(counts.max()) + 1)).values.flip(-1)
        places = ranked.shape[2] - counts
    where = places.to(scores.device)[:, None].expand(rows, -1, 1)
    following = ranked.gather(2, (where - 1).clamp(min=0))
    return ranked.gather(2, where), following.masked_fill_(where == 0, -torch.inf)


def share_rows(scores: Tensor, cond: slice) -> Tensor:
    """Return scores (B, H, N) summed over the two guidance rows of each image, so that both choose the same tokens.

    Rows are [conditional, guidance]; without guidance nothing changes.
    """
    images = cond.stop - cond.start
    both: Tensor = scores.view(-1, images, *scores.shape[1:]).sum(0)
    return both.repeat(len(scores) // images, 1, 1)


def recent_mask(visit: Visit, count: int, recent: Recent = "raster") -> Tensor:
    """Return bool (1, 1, N): the `count` most recent tokens of [cache, current].

    `raster`: the last ones. `grid`: where the newest scale has more, `count` of it spread evenly over the map.
    """
    columns, tokens = visit.positions().shape[2], visit.k.shape[2]
    if recent == "grid" and count < tokens:
        return current_mask(grid_queries(visit.geometry.schedule.sizes[visit.scale], count), columns, tokens)
    return (torch.arange(columns) >= columns - count).view(1, 1, -1)


def kept_state(state: Tensor, mask: Tensor) -> Tensor:
    """Return a per-token state (B, H, N) after a keep of equally many tokens in all heads: (B, H, n), same order."""
    return state.masked_select(mask).view(*state.shape[:2], -1)


# ------------------------------------------------------------------------------------------------- windows and caps


@dataclass(frozen=True)
class ObservationWindow:
    """Score tokens by the attention of a few current queries, and keep the highest (SnapKV's rule).

    Args:
        tokens: number of observed queries; they are kept themselves.
        obs: their places on the map, `grid` or `recent`.
        kernel, pooling: width and kind of the scores' pooling inside each scale.
        share_cfg: conditional and guidance row choose together.
    """

    tokens: int
    obs: Observed = "grid"
    kernel: int = 5
    pooling: Pooling = "avg"
    share_cfg: bool = False

    def queries(self, visit: Visit) -> Tensor:
        """Return the indices of the observed queries, long (n,)."""
        return observed_queries(visit.geometry.schedule.sizes[visit.scale], self.tokens, self.obs)

    def columns(self, visit: Visit, queries: Tensor) -> Tensor:
        """Return bool (1, 1, N): the observed queries' own tokens."""
        return current_mask(queries, visit.positions().shape[2], visit.k.shape[2])

    def pooled(self, visit: Visit, scores: Tensor, own: Tensor) -> Tensor:
        """Return the scores, shared and pooled as asked; `own` tokens are nobody's neighbours."""
        scores = share_rows(scores, visit.cond) if self.share_cfg else scores
        schedule = visit.geometry.schedule
        return pool_segments(scores, visit.positions(), schedule, self.kernel, self.pooling, without=own)

    def keep(self, visit: Visit, cap: int) -> Keep:
        """Return the observed queries' tokens, and the cap - n tokens that they look at most."""
        queries = self.queries(visit)
        own = self.columns(visit, queries)
        scores = self.pooled(visit, visit.column_mass(queries), own)
        return Keep(visit.layer, mask=top_mask(scores, cap, always=own))


def window_tokens(window: int | Literal["auto"], default: int, cap: int) -> int:
    """Return the number of observed queries: as given, or for `auto` min(the paper's, a quarter of the cap)."""
    return min(default, max(1, cap // 4)) if window == "auto" else window


@dataclass(frozen=True)
class WindowMethod(Method):
    """Base of methods that look through a window of the current queries.

    Args:
        timing: choose `after` the attention of a scale, or `before` it (then the current scale is cut down too).
        window: observed queries, kept themselves; `auto` is min(the paper's, a quarter of a head's tokens).
        obs: `grid`, the window is spread over the map; `recent`, its last tokens, as in a language model.
        kernel, pooling: `avg` or `max` of so many neighbouring scores of one scale; kernel 1 is none.
        share_cfg: conditional and guidance row choose by the sum of their scores, and so the same tokens.
    """

    timing: Timing = "after"
    window: int | Literal["auto"] = "auto"
    obs: Observed = "grid"
    kernel: int = 5
    pooling: Pooling = "avg"
    share_cfg: bool = False
    paper_window: ClassVar[int] = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, window=1, kernel=1)
        if self.kernel % 2 == 0:
            raise refused(self, "kernel", "an odd number; 1 is no pooling")

    def window_at(self, setting: Setting, state_bytes: int = 0) -> ObservationWindow:
        """Return the window at this budget.

        Raises:
            BudgetError: no room for the window and one more token; `auto` needs four.
        """
        setting.require_cap(4 if self.window == "auto" else self.window + 1, state_bytes)
        tokens = window_tokens(self.window, self.paper_window, setting.stored_cap(state_bytes))
        return ObservationWindow(tokens, self.obs, self.kernel, self.pooling, self.share_cfg)


class Selecting(Policy):
    """Base of policies that keep at most `cap` tokens of a visit, equally many in every row.

    Subclasses say `choose`, and `cap` where layers or scales differ. Nothing is asked while all tokens fit.

    Args:
        setting: the default cap is floor(beta P), or on HACK's axis floor((1 - rho) T); stored are at most as many as
            the pool holds for a head.
        timing: `after` attention to [cache, all current], or `before` it: then only what is kept is attended, at the
            last scale too.
        state_bytes: see `Policy`; state is paid for with slots.
        capacity: slots of the pool; None is the sum of the default caps.
    """

    def __init__(self, setting: Setting, timing: Timing = "after", state_bytes: int = 0, capacity: int | None = None):
        self._stored, self._attended = setting.stored_cap(state_bytes), setting.cap
        super().__init__(setting.geometry.heads * self._stored if capacity is None else capacity, state_bytes)
        self.timing, self._last = timing, setting.geometry.num_scales - 1

    def cap(self, visit: Visit) -> int:
        """Return the tokens that each head may keep; at the last scale they are attended and not stored."""
        return self._attended if visit.scale == self._last else self._stored

    def choose(self, visit: Visit, cap: int) -> Keep:
        """Choose at most `cap` of the visit's tokens."""
        raise NotImplementedError

    def decide(self, visit: Visit) -> Keep | None:
        """Return the visit's Keep; None while everything fits."""
        cap, positions = self.cap(visit), visit.positions()
        if positions.shape[2] <= cap:
            return None
        return self.choose(visit, cap)

    def before_attend(self, visit: Visit) -> Keep | None:
        """Decides here when the timing says so."""
        return self.decide(visit) if self.timing == "before" else None

    def after_attend(self, visit: Visit) -> Iterable[Keep]:
        """Decides here when the timing says so."""
        keep = self.decide(visit) if self.timing == "after" else None
        return () if keep is None else (keep,)
