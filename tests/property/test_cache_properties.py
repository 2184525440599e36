"""The cache against a slow model of it, on a thousand random sequences of decisions.

The slow model is `LiteralCache`: a list of tokens for each layer, row and head, and one float64 softmax per query. A
scripted policy draws decisions of every kind a method may take, and both execute them: attention outputs (all back
ends), stored tokens and used slots must agree after every visit.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from literal_cache import Head, LiteralCache, Token
from torch import Tensor

from heatkv_cli.core import attention
from heatkv_cli.core.cache import KVCache
from heatkv_cli.core.policy import Keep, Merged, Policy, Visit
from heatkv_cli.core.scales import Geometry, ScaleSchedule

LOGIT = 30.0  # the tolerances of docs/exactness.md hold up to here
TOLERANCE = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (2e-2, 0.0)}  # absolute, relative


Columns = list[list[list[int]]]  # [row][head] -> indices into (stored tokens + current tokens) of that head


@dataclass(frozen=True)
class Decision:
    """A Keep, and what it means for the slow model."""

    keep: Keep
    columns: Columns
    merged: list[list[dict[int, tuple[Tensor, Tensor]]]] | None = None  # [row][head][column] -> new k, v


def chosen(tokens: list[Token], decision: Decision | None, row: int, head: int) -> list[Token]:
    """What a decision leaves of the tokens of a row and head."""
    if decision is None:
        return tokens
    out = []
    for column in decision.columns[row][head]:
        token = tokens[column]
        if decision.merged is not None and column in decision.merged[row][head]:
            k, v = decision.merged[row][head][column]
            token = Token(token.position, k.tolist(), v.tolist())
        out.append(token)
    return out


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Within the tolerance of the first one's dtype."""
    absolute, relative = TOLERANCE[actual.dtype]
    difference = (actual.double() - expected.double()).abs()
    assert bool((difference <= absolute + relative * expected.double().abs()).all()), difference.max()


class Script:
    """Draws decisions of every kind from what the slow model holds."""

    def __init__(self, slow: LiteralCache, dice: random.Random, dtype: torch.dtype):
        self.slow, self.dice, self.dtype = slow, dice, dtype
        self.generator = torch.Generator().manual_seed(dice.getrandbits(40))

    def decide(self, layer: int, scale: int, visit: Visit | None, nonempty: bool = False) -> Decision:
        """A decision for a layer; `visit` where it is the visiting one, whose current scale is among the columns."""
        kind = self.dice.choice(["shared", "shared", "rows", "merged", "segments", "segments", "everything"])
        current = 0 if visit is None else visit.k.shape[2]
        lengths = [self.slow.length(layer, h) for h in range(self.slow.geometry.num_heads)]
        if kind == "segments" and not nonempty:
            decision = self._atoms(layer, scale, visit)
            if decision is not None:
                return decision
        columns = self._columns([n + current for n in lengths], kind, nonempty)
        mask = self._mask(columns, lengths, current)
        if kind == "merged":
            return self._merged(layer, mask, columns, lengths)
        return Decision(Keep(layer, mask=mask if kind == "rows" else mask[0]), columns)

    def _columns(self, counts: list[int], kind: str, nonempty: bool) -> Columns:
        """Equally many tokens of a head in every row; the same ones unless the rows differ. Heads often agree."""
        rows = range(self.slow.rows)
        share, out = self.dice.choice([0.0, 0.3, 0.7, 1.0]), []
        for count in counts:
            kept = (
                count if kind == "everything" else round(count * self.dice.choice([share, share, self.dice.random()]))
            )
            kept = max(kept, int(nonempty))
            same = sorted(self.dice.sample(range(count), kept))
            differ = kind == "rows" or (kind == "merged" and self.dice.random() < 0.5)
            out.append([sorted(self.dice.sample(range(count), kept)) if differ else same for _ in rows])
        return [[out[h][row] for h in range(len(counts))] for row in rows]

    def _mask(self, columns: Columns, lengths: list[int], current: int) -> Tensor:
        """(B, H, padded columns); what it says about padding must not matter."""
        width = max(lengths)
        mask = torch.zeros(len(columns), len(lengths), width + current, dtype=torch.bool)
        for h, length in enumerate(lengths):
            mask[:, h, length:width] = self.dice.random() < 0.5
            for row, per_head in enumerate(columns):
                mask[row, h, [c if c < length else width + c - length for c in per_head[h]]] = True
        return mask

    def _merged(self, layer: int, mask: Tensor, columns: Columns, lengths: list[int]) -> Decision:
        """Other keys and values for what some heads keep, or all of them."""
        heads = sorted(self.dice.sample(range(len(lengths)), self.dice.randint(1, len(lengths))))
        counts = [len(columns[0][h]) for h in heads]
        shape = (len(columns), sum(counts), self.slow.geometry.head_dim)
        k, v = (torch.randn(shape, generator=self.generator).to(self.dtype) for _ in range(2))
        merged = [[dict[int, tuple[Tensor, Tensor]]() for _ in lengths] for _ in columns]
        for row, per_head in enumerate(columns):
            for h, *tokens in zip(heads, k[row].split(counts), v[row].split(counts), strict=True):
                merged[row][h] = dict(zip(per_head[h], zip(*tokens, strict=True), strict=True))
        same = all(per_head == columns[0] for per_head in columns)
        return Decision(Keep(layer, mask=mask[0] if same else mask, merged=Merged(heads, k, v)), columns, merged)

    def _atoms(self, layer: int, scale: int, visit: Visit | None) -> Decision | None:
        """Whole source scales; None where rows would keep different numbers of tokens."""
        g = self.slow.geometry
        segments = torch.tensor([[self.dice.random() < 0.6 for _ in range(g.num_scales)] for _ in range(g.num_heads)])
        offsets = g.schedule.offsets
        columns: Columns = []
        for row in range(self.slow.rows):
            per_head = []
            for h in range(g.num_heads):
                positions = [token.position for token in self.slow.tokens(layer, row, h)]
                positions += range(offsets[scale], offsets[scale + 1]) if visit is not None else []
                source = [max(s for s in range(g.num_scales) if offsets[s] <= p) for p in positions]
                per_head.append([i for i, s in enumerate(source) if segments[h, s]])
            columns.append(per_head)
        if any([len(c) for c in per_head] != [len(c) for c in columns[0]] for per_head in columns):
            return None
        return Decision(Keep(layer, atoms=segments), columns)


class Scripted(Policy):
    """Plays back the decisions of one visit."""

    def __init__(self, capacity: int):
        super().__init__(capacity)
        self.before: Decision | None = None
        self.after: list[Decision] = []

    def before_attend(self, visit: Visit) -> Keep | None:
        return None if self.before is None else self.before.keep

    def after_attend(self, visit: Visit) -> Iterable[Keep]:
        return [decision.keep for decision in self.after]


@pytest.fixture(autouse=True, scope="module")
def varlen_kernel() -> Iterator[None]:
    """The variable-length kernel has no CPU form: a loop over its sequences computes the same."""

    def one_by_one(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *rest: float) -> Tensor:
        out = torch.empty_like(q)
        queries, keys = cu_q.tolist(), cu_k.tolist()
        for (a, b), (c, d) in zip(pairwise(queries), pairwise(keys), strict=True):
            logits = q[a:b, 0].float() @ k[c:d, 0].float().T * rest[-1]
            out[a:b, 0] = (logits.softmax(-1) @ v[c:d, 0].float()).to(q.dtype)
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "_varlen_kernel", one_by_one)
        yield


@dataclass
class Run:
    """One generation, on the slow model and on all back ends."""

    geometry: Geometry
    rows: int
    dtype: torch.dtype
    seed: int

    def __post_init__(self) -> None:
        self.dice = random.Random(self.seed)
        self.generator = torch.Generator().manual_seed(self.seed)
        self.slow, self.attended = LiteralCache(self.geometry, self.rows), 0
        self.script = Script(self.slow, self.dice, self.dtype)
        self.policies = [Scripted(self.geometry.full_tokens) for _ in range(3)]
        self.caches = [
            KVCache(self.geometry, policy, self.rows, self.rows, self.dtype, backend=backend)
            for policy, backend in zip(self.policies, ("grouped", "masked", "grouped"), strict=True)
        ]
        self.caches[2].backend = "varlen"  # refused on a CPU; here a plain loop stands for its kernel

    def generate(self) -> None:
        for scale in range(self.geometry.num_scales):
            for layer in range(self.geometry.num_layers):
                self.visit(layer, scale)
                self.check_storage()
            for cache in self.caches:
                cache.end_step()
        for cache in self.caches:
            assert cache.pool.used == 0
            assert sorted(cache.pool.take(cache.pool.capacity).tolist()) == list(range(cache.pool.capacity))

    def draw(self, layer: int, scale: int) -> Visit:
        g = self.geometry
        shape = (self.rows, g.num_heads, g.schedule.lengths[scale], g.head_dim)
        q, k, v = (torch.randn(shape, generator=self.generator).to(self.dtype) for _ in range(3))
        return Visit(layer, scale, q, k, v, 1.0, slice(None), g, self.caches[0])

    def visit(self, layer: int, scale: int) -> None:
        visit, last = self.draw(layer, scale), scale == self.geometry.num_scales - 1
        before = self.script.decide(layer, scale, visit, nonempty=True) if self.dice.random() < 0.25 else None
        after = [] if last else self.after(visit, before)
        heads = self.slow.heads(layer, scale, visit.q, visit.k, visit.v, 1.0)
        seen = {at: chosen(head.tokens, before, *at) for at, head in heads.items()}
        self.check_outputs(visit, before, after, heads, seen)
        own = next((decision for decision in after if decision.keep.layer == layer), before)
        for at, head in heads.items():
            self.slow.stored[layer, *at] = [] if last else chosen(head.tokens, own, *at)
            for decision in after:
                other = decision.keep.layer
                if other != layer:
                    self.slow.stored[other, *at] = chosen(self.slow.tokens(other, *at), decision, *at)

    def check_outputs(
        self,
        visit: Visit,
        before: Decision | None,
        after: list[Decision],
        heads: dict[tuple[int, int], Head],
        seen: dict[tuple[int, int], list[Token]],
    ) -> None:
        """Attend with all back ends; `seen`: by (row, head), what the slow model attends to."""
        largest = max(float(heads[at].products(tokens).abs().max()) for at, tokens in seen.items())
        scale = self.dice.random() * LOGIT / max(largest, 1.0)
        expected = torch.empty(visit.q.shape, dtype=torch.float64)
        for at, tokens in seen.items():
            heads[at].softmax_scale = scale
            expected[at] = heads[at].attend(tokens)
        self.attended += sum(len(tokens) for (row, _), tokens in seen.items() if row == 0)
        outputs = []
        for cache, policy in zip(self.caches, self.policies, strict=True):
            policy.before, policy.after = before, after
            outputs.append(cache.attend(visit.layer, visit.q, visit.k, visit.v, scale))
            assert outputs[-1].dtype == self.dtype
            assert_close(outputs[-1], expected)
            assert cache.ledger.attended_tokens == self.attended
        assert_close(outputs[0], outputs[1])
        assert_close(outputs[2], outputs[1])

    def after(self, visit: Visit, before: Decision | None) -> list[Decision]:
        """Decisions for the visiting layer, and now and then for others, in any order."""
        decisions = []
        if before is None and self.dice.random() < 0.85:
            decisions.append(self.script.decide(visit.layer, visit.scale, visit))
        for other in range(self.geometry.num_layers):
            if other != visit.layer and self.dice.random() < 0.3:
                decisions.append(self.script.decide(other, visit.scale, None))
        self.dice.shuffle(decisions)
        return decisions

    def check_storage(self) -> None:
        used = self.slow.used
        for cache in self.caches:
            assert cache.pool.used == cache.ledger.used_slots == used
            slots = torch.cat([table.slots for table in cache.tables]).tolist()
            assert len(set(slots)) == len(slots) == used
        self.slow.check(self.caches[0])


sides = st.integers(1, 3)
geometries = st.builds(
    lambda layers, heads, dim, sizes: Geometry("toy", layers, heads, dim, ScaleSchedule(tuple(sizes)), 1),
    st.integers(1, 3),
    st.integers(1, 4),
    st.sampled_from([1, 4, 8]),
    st.lists(st.tuples(sides, sides), min_size=2, max_size=4),
)


@given(
    geometries,
    st.integers(1, 3),
    st.sampled_from([torch.float32, torch.float32, torch.bfloat16]),
    st.integers(0, 2**32),
)
@settings(max_examples=1000, deadline=None, derandomize=True)
def test_the_cache_is_its_slow_model(geometry: Geometry, rows: int, dtype: torch.dtype, seed: int) -> None:
    sized = Geometry(
        geometry.model, geometry.num_layers, geometry.num_heads, geometry.head_dim, geometry.schedule, 1, dtype.itemsize
    )
    Run(sized, rows, dtype, seed).generate()
