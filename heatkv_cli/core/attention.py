"""Attention over heads that keep different numbers of tokens: never padded, never masked.

Heads of a layer that keep equally many tokens form a group; a group is one `scaled_dot_product_attention` over
[its history, the current scale]. The masked oracle computes the same from a padded dense tensor; tests hold every back
end to it (design.md 10, tolerances). Statistics of attention are computed in chunks of queries, never as one matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_ELEMENTS = 1 << 22  # probabilities held at once while statistics are computed: 16 MiB in float32


@dataclass(frozen=True)
class Group:
    """Heads with equally long histories: `heads` in ascending order, k and v (B, G, n, D); n may be 0."""

    heads: Sequence[int]
    k: Tensor
    v: Tensor


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, groups: Iterable[Group], softmax_scale: float) -> Tensor:
    """Attention of q over [history of each head, current k, v].

    Args:
        q, k, v: of the current scale, (B, H, N, D); k and v without tokens where `groups` hold the current ones too.
        groups: every head in exactly one; consumed one at a time, so that only one group's copies are alive.
        softmax_scale: factor of q k^T.

    Returns:
        (B, H, N, D) in q's dtype.
    """
    out: Tensor | None = None
    for group in groups:
        part = _group_attention(q, k, v, group, softmax_scale)
        if len(group.heads) == q.shape[1]:
            return part
        out = torch.empty_like(q) if out is None else out
        out[:, list(group.heads)] = part
    if out is None:
        raise ValueError("grouped_attention: no groups")
    return out


def _group_attention(q: Tensor, k: Tensor, v: Tensor, group: Group, softmax_scale: float) -> Tensor:
    heads = slice(None) if len(group.heads) == q.shape[1] else list(group.heads)
    keys, values = _joined(group.k, k[:, heads]), _joined(group.v, v[:, heads])
    return F.scaled_dot_product_attention(q[:, heads], keys, values, scale=softmax_scale)


def _joined(history: Tensor, current: Tensor) -> Tensor:
    """Both along the tokens; no copy where one of them is empty."""
    if not history.shape[2]:
        return current
    return torch.cat((history, current), 2) if current.shape[2] else history


def masked_attention(q: Tensor, k: Tensor, v: Tensor, valid: Tensor, softmax_scale: float) -> Tensor:
    """The oracle: dense attention with -inf where a key is not kept; float32 inside.

    Args:
        q: (B, H, Q, D).
        k, v: padded keys and values (B, H, N, D).
        valid: bool (B or 1, H, N); every head keeps at least one key.
        softmax_scale: factor of q k^T.

    Returns:
        (B, H, Q, D) in q's dtype.
    """
    logits = q.float() @ k.float().transpose(-1, -2) * softmax_scale
    weights = logits.masked_fill(~valid.to(q.device).unsqueeze(2), -torch.inf).softmax(-1)
    return (weights @ v.float()).to(q.dtype)


def probability_chunks(
    q: Tensor, k: Tensor, softmax_scale: float, valid: Tensor | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the attention matrix, some queries at a time.

    Args:
        q: (B, H, Q, D).
        k: (B, H, N, D), padded where heads differ.
        softmax_scale: factor of q k^T.
        valid: bool (B or 1, H, N) or None when all keys are real.

    Yields:
        The queries' slice and their probabilities over the keys, float32 (B, H, q, N).
    """
    queries, step, keys = q.shape[2], chunk_queries(k), k.float()
    for start in range(0, queries, step):
        part = slice(start, min(start + step, queries))
        yield part, probabilities(q[:, :, part], keys, softmax_scale, valid)


def chunk_queries(k: Tensor) -> int:
    """Queries whose probabilities over k (B, H, N, D) are held at once."""
    rows, heads, tokens, _ = k.shape
    return max(1, CHUNK_ELEMENTS // (rows * heads * tokens))


def probabilities(q: Tensor, k: Tensor, softmax_scale: float, valid: Tensor | None = None) -> Tensor:
    """Attention of q over k, shapes as in `probability_chunks`; float32 (B, H, Q, N), and twice that while it works."""
    logits = (q.float() @ k.float().transpose(-1, -2)).mul_(softmax_scale)
    if valid is not None:
        logits.masked_fill_(~valid.to(q.device).unsqueeze(2), -torch.inf)
    return logits.softmax(-1)


def column_mass(q: Tensor, k: Tensor, softmax_scale: float, valid: Tensor | None = None) -> Tensor:
    """Attention that each key receives, summed over the queries: exact, in float32.

    Shapes as in `probability_chunks`; returns (B, H, N), 0 where a key is padding.
    """
    total = torch.zeros(k.shape[:3], dtype=torch.float32, device=k.device)
    for _, weights in probability_chunks(q, k, softmax_scale, valid):
        total += weights.sum(2)
    return total
