"""Dropped tokens are folded into the kept token of the same head whose key is nearest, instead of being lost.

One formula holds for all variants: with n dropped tokens assigned to a kept one x,

    x <- ((1 + sum own_i) x + sum pull_i x_i) / (1 + sum mass_i)

where `pull`, `own` and `mass` depend on the cosine between the dropped key and the kept one. Values follow the
assignment and the weights of their keys.

Source: LOOK-M (arXiv 2406.18139), section 3.3; variants checked against SUSTechBruce/LOOK-M @ 0b9c09d,
`kv_token_merge/modify_llama.py`. HACK (arXiv 2504.09261) names "similarity-weighted averaging" without a formula.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from heatkv_cli.core.attention import CHUNK_ELEMENTS
from heatkv_cli.core.policy import Keep, Merged, Visit

_LEAST = 1e-12  # length of a key; a zero key is as near to all
RULES = ("pivot", "average", "weighted", "similarity")


def keep_and_merge(visit: Visit, mask: Tensor, rule: str, heads: Tensor | None = None) -> Keep:
    """Return a keep whose dropped tokens are merged into kept ones.

    Args:
        visit: the layer's visit.
        mask: tokens that stay, bool (B, H, N), as in `Keep.mask`.
        rule: see `merge_dropped`.
        heads: long, in which of them tokens are merged; None is all.
    """
    view = visit.view(heads)
    chosen = mask if heads is None else mask[:, heads.to(mask.device)]
    k, v = merge_dropped(view.k, view.v, chosen, view.valid, rule)
    names = range(mask.shape[1]) if heads is None else heads.tolist()
    return Keep(visit.layer, mask=mask, merged=Merged(names, k, v))


def merge_dropped(k: Tensor, v: Tensor, kept: Tensor, valid: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    """Return keys and values of the kept tokens after every dropped one went into its nearest.

    Args:
        k, v: (B, H, N, D).
        kept: bool (B or 1, H, N), the tokens that stay.
        valid: bool (B or 1, H, N), real tokens; padding is neither kept nor dropped.
        rule: `pivot`: mean of the kept token and of the midpoints between it and each dropped one; `average`: mean of
            the kept token and all dropped ones; `weighted`: dropped ones times their cosine, summed and divided by
            their number plus one, only those with at least the head's mean cosine; `similarity`: mean weighted by
            max(cosine, 0), the kept token with 1.

    Returns:
        k, v (B, number kept, D), head after head, in the dtypes given; computed in float32. Every row must keep
        equally many tokens of a head.

    Differs: upstream's `weighted` compares means over the heads by rank of the dropped token; here each token's own.
    """
    if rule not in RULES:
        raise ValueError(f"merge rule {rule!r}, expected one of {RULES}")
    shape = k.shape[:3]
    kept = (kept & valid).to(k.device).expand(shape)
    dropped = valid.to(k.device).expand(shape) & ~kept & kept.any(-1, keepdim=True)
    pivots, is_pivot = _packed(kept)
    sources, is_source = _packed(dropped)
    pivots, count, even = _rows_of(pivots, shape), is_pivot.numel(), bool(is_pivot.all())

    def real(x: Tensor) -> Tensor:
        return x.flatten(1, 2) if even else x[is_pivot].view(len(x), int(is_pivot[0].sum()), x.shape[-1])

    if not sources.shape[-1]:
        return real(_take(k, pivots)), real(_take(v, pivots))
    sources = _rows_of(sources, shape)
    cosine, nearest = _nearest(k, sources, pivots, None if even else ~is_pivot)
    pull, own, mass = _weights(cosine, is_source, rule)
    places = _rows_of(nearest, is_pivot.shape).flatten()
    own, mass = (cosine.new_zeros(count).index_add_(0, places, x.flatten()) for x in (own, mass))

    def folded(x: Tensor) -> Tensor:
        total = _take(x, pivots).float().flatten(0, 2) * (1 + own).unsqueeze(-1)
        total.index_add_(0, places, (_take(x, sources).float() * pull.unsqueeze(-1)).flatten(0, 2))
        return real((total / (1 + mass).unsqueeze(-1)).to(x.dtype).view(*is_pivot.shape, -1))

    return folded(k), folded(v)


def _packed(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the columns of the chosen tokens, ascending (B, H, most), and which are real: short heads are padded."""
    counts, chosen = mask.sum(-1, keepdim=True), mask.nonzero()[:, 2]
    real = torch.arange(int(counts.max()), device=mask.device) < counts
    return torch.zeros(real.shape, dtype=torch.int64, device=mask.device).masked_scatter_(real, chosen), real


def _rows_of(columns: Tensor, shape: torch.Size) -> Tensor:
    """Return the columns (B, H, n) of a (B, H, N) as rows of the flattened (B * H * N)."""
    B, H, N = shape
    return columns + torch.arange(0, B * H * N, N, device=columns.device).view(B, H, 1)


def _take(x: Tensor, rows: Tensor) -> Tensor:
    """Return the tokens (B, H, n, D) of x (B, H, N, D)."""
    return x.flatten(0, 2).index_select(0, rows.flatten()).view(*rows.shape, x.shape[-1])


def _nearest(k: Tensor, sources: Tensor, pivots: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the cosine (B, H, E) with the nearest kept key, and its index in 0..C-1; ties go to the earlier token.

    `padding`: bool (B, H, C), which of the kept ones are none.
    """
    units = F.normalize(_take(k, pivots).float(), dim=-1).transpose(-1, -2)
    dropped = _take(k, sources).float()
    found = [_best(part @ units, padding) for part in _parts(dropped, units)]
    best, index = (torch.cat(each, 2) for each in zip(*found, strict=True))
    # its own length does not change which one is nearest to a dropped key
    return best / torch.linalg.vector_norm(dropped, dim=-1).clamp(min=_LEAST), index


def _parts(keys: Tensor, units: Tensor) -> Iterator[Tensor]:
    """Dropped keys, so many at a time that their cosines with all kept ones fit."""
    step = max(1, CHUNK_ELEMENTS // (units.shape[0] * units.shape[1] * units.shape[3]))
    yield from keys.split(step, 2)


def _best(cosines: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor]:
    best, index = (cosines if padding is None else cosines.masked_fill_(padding.unsqueeze(2), -torch.inf)).max(-1)
    return best, index


def _weights(cosine: Tensor, real: Tensor, rule: str) -> tuple[Tensor, Tensor, Tensor]:
    """pull, own and mass of each dropped token, (B, H, E); 0 where it is padding."""
    one, cosine = real.float(), cosine.masked_fill(~real, 0)
    if rule == "pivot":
        return one / 2, one / 2, one
    if rule == "average":
        return one, torch.zeros_like(one), one
    if rule == "weighted":
        mean = cosine.sum(-1, keepdim=True) / one.sum(-1, keepdim=True).clamp(min=1)
        chosen = one * (cosine >= mean)
        return chosen * cosine, torch.zeros_like(one), chosen
    near = cosine.clamp(min=0)
    return near, torch.zeros_like(one), near
