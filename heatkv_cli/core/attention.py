"""Attention over heads that keep different numbers of tokens: no head is padded to another's length.

Heads of a layer that keep equally many tokens form a group; a group is one `scaled_dot_product_attention` over
[its history, the current scale]. `varlen` hands the same to PyTorch's variable-length kernel in one launch, every
(row, head) a sequence of its own length; it needs CUDA and half precision. The masked oracle computes it from a padded
dense tensor; tests hold every back end to it (docs/exactness.md). Statistics of attention are computed in
chunks of queries, never as one matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from heatkv_cli.core.table import LayerTable, by_length
from heatkv_cli.core.timeline import staged

CHUNK_ELEMENTS = 1 << 22  # probabilities held at once while statistics are computed: 16 MiB in float32
KEYS_TOGETHER = 16  # keys that PyTorch's CPU kernel wants to see a multiple of in half precision, see `kernel_keys`


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
    every = q.shape[1]
    parts: list[Tensor | None] = [None] * every

    def attend(group: Group) -> tuple[Sequence[int], Tensor]:
        queries = take_heads(q, group.heads)
        count = group.k.shape[2] + k.shape[2]
        spare = kernel_keys(q, count) - count
        keys, values = (concat_current(*pair, group.heads, spare) for pair in ((group.k, k), (group.v, v)))
        mask = _last_hidden(queries, count, spare) if spare else None
        return group.heads, F.scaled_dot_product_attention(queries, keys, values, mask, scale=softmax_scale)

    for heads, part in map(attend, groups):  # map lets go of a group before it asks for the next
        if len(heads) == every:
            return part
        for head, answer in zip(heads, part.unbind(1), strict=True):
            parts[head] = answer
    found = [part for part in parts if part is not None]
    if len(found) < every:
        raise ValueError(f"grouped_attention: {every - len(found)} of {every} heads are in no group")
    return torch.stack(found, 2).transpose(1, 2)  # heads beside each other, as the output projection reads them


def kernel_keys(q: Tensor, keys: int) -> int:
    """How many keys a group hands to the kernel: `keys`, or up to 15 zeros more, behind a mask.

    PyTorch's bfloat16 kernel for CPUs takes up to four times as long for 277 or 421 keys as for the next multiple of
    16, mask included; for few keys, and from about a thousand on, there is nothing to gain. The scales up to any one
    have an odd number of tokens in sum, so this concerns nearly every group.

    Args:
        q: (B, H, N, D).
        keys: that the group has.
    """
    gains = q.device.type == "cpu" and q.element_size() == 2 and 64 <= keys < 1024
    return -(-keys // KEYS_TOGETHER) * KEYS_TOGETHER if gains else keys


def _last_hidden(q: Tensor, keys: int, spare: int) -> Tensor:
    """Mask (N, keys + spare) to add to the logits: -inf for the last `spare` keys."""
    mask = q.new_zeros(keys + spare)
    mask[keys:] = -torch.inf
    return mask.expand(q.shape[2], -1)


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], history: tuple[Tensor, Tensor], softmax_scale: float
) -> Tensor:
    """Attention of q over [history of each head, current k, v] in one launch.

    Args:
        q, k, v: of the current scale, (B, H, N, D); k and v without tokens where the history holds the current ones.
        lengths: tokens of each head's history, (H,).
        history: keys and values (B, sum of lengths, D), head after head.
        softmax_scale: factor of q k^T.

    Returns:
        (B, H, N, D).
    """
    rows, heads, queries, head_dim = q.shape
    counts = [n + k.shape[2] for n in lengths]
    keys, values = (_packed(*pair, lengths).reshape(-1, 1, head_dim) for pair in zip(history, (k, v), strict=True))
    # the lengths are known on the host: one small copy that the host does not wait for
    ends = torch.tensor(counts * rows, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    ends = F.pad(ends, (1, 0))
    if q.is_cuda:
        ends = ends.pin_memory()
    starts = torch.arange(0, rows * heads * queries + 1, queries, dtype=torch.int32, device=q.device)
    flat = q.reshape(-1, 1, head_dim)
    offsets = ends.to(q.device, non_blocking=True)
    out = _varlen_kernel(flat, keys, values, starts, offsets, queries, max(counts), softmax_scale)
    return out.view(rows, heads, queries, head_dim)


def _varlen_kernel(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, softmax_scale: float
) -> Tensor:
    """PyTorch's kernel; the seam at which tests put a plain loop, since it has no CPU form."""
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, scale=softmax_scale)
    assert isinstance(out, Tensor)  # a pair only where more is asked for
    return out


@staged("/join")
def _packed(history: Tensor, current: Tensor, lengths: Sequence[int]) -> Tensor:
    """History (B, sum of lengths, D) and current (B, H, N, D) interleaved by head: (B, sum of both, D)."""
    if not current.shape[2]:
        return history
    pairs = zip(history.split(list(lengths), 1), current.unbind(1), strict=True)
    return torch.cat([piece for pair in pairs for piece in pair], 1)


def take_heads(x: Tensor, heads: Sequence[int]) -> Tensor:
    """Heads of (B, H, N, D), ascending. Stacked views: several times faster than an index, and no wait for a device."""
    return x if len(heads) == x.shape[1] else torch.stack([x[:, head] for head in heads], 1)


@staged("/join")
def concat_current(history: Tensor, current: Tensor, heads: Sequence[int], spare: int = 0) -> Tensor:
    """History (B, G, n, D), the heads' share of the current scale (B, H, N, D) and `spare` zeros, copied once."""
    if not spare:
        if not current.shape[2]:
            return history
        if not history.shape[2]:
            return take_heads(current, heads)
        if len(heads) == current.shape[1]:
            return torch.cat((history, current), 2)
    end = [history.new_zeros(len(history), spare, history.shape[-1])] if spare else []
    pieces = [piece for i, head in enumerate(heads) for piece in (history[:, i], current[:, head], *end)]
    return torch.cat(pieces, 1).view(len(history), len(heads), -1, history.shape[-1])


def group_packed(k: Tensor, v: Tensor, counts: Sequence[int]) -> Iterator[Group]:
    """Heads with equally many of the packed tokens (B, number kept, D) together."""
    for _, heads in by_length(counts):
        yield Group(heads, *(_unpack_equal(x, heads, counts) for x in (k, v)))


def _unpack_equal(x: Tensor, heads: Sequence[int], counts: Sequence[int]) -> Tensor:
    """Equally long heads of packed tokens (B, number kept, D), beside each other: (B, G, n, D)."""
    if len(heads) == len(counts):
        return as_heads(x, len(heads))
    parts = x.split(list(counts), 1)
    return torch.stack([parts[h] for h in heads], 1)


def pack(x: Tensor, chosen: Tensor) -> Tensor:
    """Tokens of x (B, H, N, D) that `chosen` (H, N) on the host names, head after head: (B, number chosen, D)."""
    whole = chosen.all(1)
    if bool((whole == chosen.any(1)).all()):  # atoms are kept or dropped as a whole: views will do
        return torch.cat([x[:, head] for head in whole.nonzero().flatten().tolist()], 1)
    index = chosen.flatten().nonzero().flatten()
    return x.flatten(1, 2).index_select(1, index.to(x.device, non_blocking=True))


def unpack(x: Tensor, mask: Tensor) -> Tensor:
    """Packed tokens (B, number kept, D) where a mask (B or 1, H, N) has them, zeros elsewhere: (B, H, N, D)."""
    mask = mask.expand(len(x), -1, -1).to(x.device)
    dense = x.new_zeros(*mask.shape, x.shape[-1])
    dense[mask] = x.flatten(0, 1)
    return dense


def as_heads(x: Tensor, heads: int) -> Tensor:
    """Packed tokens (B, heads * n, D) of equally long heads beside each other: (B, heads, n, D)."""
    return x.view(len(x), heads, x.shape[1] // heads, x.shape[2])


def pad_heads(history: Tensor, current: Tensor, heads: Sequence[int], table: LayerTable, width: int) -> Tensor:
    """Heads of unequal length beside each other: (B, G, width + N, D), zeros between a short history and the rest.

    Args:
        history: (B, sum of lengths, D), head after head.
        current: (B, H, N, D), of all heads.
        heads: which of them the histories are of.
        table: of these heads; none is longer than `width`.
        width: where the current tokens begin.
    """
    if not width:
        return take_heads(current, heads)
    if min(table.lengths) == width:
        return concat_current(as_heads(history, len(heads)), current, heads)
    dense = unpack(history, table.occupied(width + current.shape[2]).unsqueeze(0))
    for row, head in enumerate(heads):
        dense[:, row, width:] = current[:, head]
    return dense


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


def probability_chunks(q: Tensor, k: Tensor, softmax_scale: float) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the attention matrix, some queries at a time.

    Args:
        q: (B, H, Q, D).
        k: (B, H, N, D).
        softmax_scale: factor of q k^T.

    Yields:
        The queries' slice and their probabilities over the keys, float32 (B, H, q, N).
    """
    queries, step, keys = q.shape[2], chunk_queries(k), k.float()
    for start in range(0, queries, step):
        part = slice(start, min(start + step, queries))
        yield part, probabilities(q[:, :, part], keys, softmax_scale)


def chunk_queries(k: Tensor) -> int:
    """Queries whose probabilities over k (B, H, N, D) are held at once."""
    rows, heads, tokens, _ = k.shape
    return max(1, CHUNK_ELEMENTS // (rows * heads * tokens))


def probabilities(q: Tensor, k: Tensor, softmax_scale: float) -> Tensor:
    """Attention of q over k, shapes as in `probability_chunks`; float32 (B, H, Q, N), and twice that while it works."""
    return (q.float() @ k.float().transpose(-1, -2)).mul_(softmax_scale).softmax(-1)


def column_mass(q: Tensor, k: Tensor, softmax_scale: float) -> Tensor:
    """Attention that each key receives, summed over the queries: exact, in float32.

    Shapes as in `probability_chunks`; returns (B, H, N).
    """
    parts = (weights.sum(2) for _, weights in probability_chunks(q, k, softmax_scale))
    return reduce(torch.add, parts)
