"""The contract between the cache and what decides: Visit -> Policy -> Keep, and Observer.

A policy is a method at work in one generation: it sees each visit and answers with what to keep. It never touches
storage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from heatkv_cli.core.attention import column_mass, probabilities, take_heads
from heatkv_cli.core.scales import Geometry


@dataclass(frozen=True)
class View:
    """Tokens of one layer, heads side by side.

    Shapes: k, v (B, H, N, D); positions int32 (B or 1, H, N) on the host, the index of a token in the whole sequence
    and -1 where a shorter head is padded. Columns are [cache, current]; the current scale's tokens are the last ones.
    """

    k: Tensor
    v: Tensor
    positions: Tensor

    @property
    def valid(self) -> Tensor:
        """bool (B or 1, H, N): real tokens."""
        return self.positions >= 0


class Candidates(Protocol):
    """Where a visit gets its view from; the cache."""

    def view(self, layer: int, heads: Tensor | None = None) -> View:
        """Stored tokens of a layer, for the visiting layer followed by the current scale; of some heads or all."""
        ...

    def keys(self, layer: int, heads: Sequence[int]) -> Iterator[tuple[list[int], Tensor]]:
        """Keys of some heads, those with equally many together: indices into `heads`, (B, G, n, D); no padding."""
        ...

    def positions(self, layer: int) -> Tensor:
        """Positions alone: no keys or values are read."""
        ...


@dataclass(frozen=True)
class Visit:
    """Layer `layer` processing scale `scale`.

    Shapes: q, k, v (B, H, N, D) of the current scale, exactly what attention multiplies (normalised, rotated).
    `cond`: the conditional rows; the others are guidance.
    """

    layer: int
    scale: int
    q: Tensor
    k: Tensor
    v: Tensor
    softmax_scale: float
    cond: slice
    geometry: Geometry
    cache: Candidates

    def view(self, heads: Tensor | None = None) -> View:
        """[cache, current] of this layer, copied together; for methods that look at values too.

        Args:
            heads: long, of which; None is all of them. The columns are the same.
        """
        return self.cache.view(self.layer, heads)

    def positions(self) -> Tensor:
        """int32 (B or 1, H, N) of [cache, current]; see `View`."""
        return self.cache.positions(self.layer)

    def attention(self, queries: Tensor) -> Tensor:
        """Attention probabilities of a few observed queries over [cache, current]; float32 (B, H, n, N).

        n N D multiplications per head and two buffers of the result's size; padding gets 0.

        Args:
            queries: long (n,), indices of the current scale's queries; few (n <= 64).
        """
        return self.by_column(self._of(queries), partial(probabilities, softmax_scale=self.softmax_scale))

    def column_mass(self, queries: Tensor | None = None, heads: Tensor | None = None) -> Tensor:
        """Attention received by each token of [cache, current], summed over queries; float32 (B, heads, N).

        Exact, in chunks of queries: the attention matrix is never whole. Padding gets -inf, the lowest of all scores.

        Args:
            queries: long (n,), indices of the current scale's queries; None is all of them.
            heads: long, of which; None is all of them.
        """
        look = partial(column_mass, softmax_scale=self.softmax_scale)
        return self.by_column(self._of(queries), look, heads, -torch.inf)

    def by_column(
        self,
        q: Tensor,
        look: Callable[[Tensor, Tensor], Tensor],
        heads: Tensor | None = None,
        padding: float = 0.0,
    ) -> Tensor:
        """What some queries make of the keys of [cache, current]; of heads that differ in length, none is padded.

        Args:
            q: (B, H, n, D).
            look: from queries and keys of some heads, (B, G, n, D) and (B, G, M, D), to a number per key, (..., M).
            heads: long, of which; None is all of them.
            padding: what columns get in which a head has no token.

        Returns:
            (..., N) over the columns.
        """
        chosen = list(range(q.shape[1])) if heads is None else heads.tolist()
        columns, current, found = self.positions().shape[2], self.k.shape[2], None
        for group, keys in self.cache.keys(self.layer, chosen):
            queries = take_heads(q, [chosen[i] for i in group])
            part = look(queries, keys)
            if part.shape[1] == len(chosen) and part.shape[-1] == columns:
                return part
            del keys  # before the next ones are read
            if found is None:
                found = part.new_full((len(part), len(chosen), *part.shape[2:-1], columns), padding)
            stored = part.shape[-1] - current
            found[:, group, ..., :stored] = part[..., :stored]
            found[:, group, ..., columns - current :] = part[..., stored:]
        assert found is not None  # a layer has heads
        return found

    def _of(self, queries: Tensor | None) -> Tensor:
        return self.q if queries is None else self.q.index_select(2, queries.to(self.q.device))


@dataclass(frozen=True)
class Merged:
    """What merging puts in the place of the kept tokens' own keys and values.

    Args:
        heads: of which heads, ascending.
        k, v: (B, n, D), the kept tokens of these heads, head after head.
    """

    heads: Sequence[int]
    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class Keep:
    """What stays of one layer's tokens: exactly one of `mask` and `atoms`.

    Args:
        layer: any layer.
        mask: bool (H, N), the same for all rows, or (B, H, N) with equally many kept tokens per head in every row;
            columns as in `View`. For the visiting layer they include the current scale, for others the cache alone.
        atoms: bool (H, K) by source scale: whole atoms, no look at tokens needed.
        merged: other keys and values for kept tokens, in storage and, where the Keep was made before attention, in
            attention too.
    """

    layer: int
    mask: Tensor | None = None
    atoms: Tensor | None = None
    merged: Merged | None = None


class Policy:
    """Decisions of one generation. The default keeps everything.

    Args:
        capacity: token slots (one head, all rows) that the plan needs at its peak.
        state_bytes: bytes the policy stores per kept token of one head and one row, charged to the budget.

    Attributes:
        chosen: numbers that the method chose for itself (`window: auto`), for the results' rows.
    """

    def __init__(self, capacity: int, state_bytes: int = 0):
        self.capacity, self.state_bytes = capacity, state_bytes
        self.chosen: dict[str, float] = {}

    def before_attend(self, visit: Visit) -> Keep | None:
        """Choose among [cache, current] before attention: only what is kept is attended, and later stored."""
        return None

    def after_attend(self, visit: Visit) -> Iterable[Keep]:
        """Choose after attention what is stored, for this layer or any other. Not asked at the last scale."""
        return ()


class Observer(Protocol):
    """Sees every visit right after its attention, the last scale's included; changes nothing."""

    def observe(self, visit: Visit) -> None:
        """One visit."""
        ...
