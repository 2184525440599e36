"""Queries, scores and masks against loops."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from heatkv_cli.core.cache import KVCache
from heatkv_cli.core.policy import Keep, Policy, View, Visit
from heatkv_cli.core.scales import Geometry, ScaleSchedule
from heatkv_cli.methods.toolkit.selecting import (
    grid_queries,
    kept_state,
    pool_segments,
    recent_queries,
    share_rows,
    top_mask,
    uniform_queries,
)

SCHEDULE = ScaleSchedule.squares((1, 2, 3, 4))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 80))
@example(23, 1, 3)  # fewer tokens than rows of a square grid
def test_grids_are_as_many_as_asked_and_spread(height: int, width: int, count: int) -> None:
    found = grid_queries((height, width), count).tolist()
    assert found == sorted(set(found))
    assert len(found) == min(count, height * width)
    assert found[-1] < height * width
    rows = [index // width for index in found]
    per_row = [rows.count(row) for row in set(rows)]
    assert max(per_row) - min(per_row) <= 1
    gaps = [b - a for a, b in zip(sorted(set(rows)), sorted(set(rows))[1:], strict=False)]
    assert not gaps or max(gaps) - min(gaps) <= 2


@pytest.mark.parametrize("side", [4, 8, 16, 24, 40])
def test_sixteen_of_a_square_are_the_centres_of_patches(side: int) -> None:
    """ScaleKV's observation window: row i * (h / 4) + (h / 4 - 1) // 2, columns alike."""
    lines = [i * (side // 4) + (side // 4 - 1) // 2 for i in range(4)]
    assert grid_queries((side, side), 16).tolist() == [row * side + column for row in lines for column in lines]


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 500), st.integers(1, 64))
def test_lines_of_queries(tokens: int, count: int) -> None:
    uniform, recent = uniform_queries(tokens, count).tolist(), recent_queries(tokens, count).tolist()
    assert recent == list(range(tokens))[-count:]
    expected = [math.floor((j + 0.5) * tokens / count) for j in range(count)]
    assert uniform == (list(range(tokens)) if tokens <= count else expected)


def draw(dice: random.Random, rows: int, heads: int, tokens: int) -> Tensor:
    """Scores with many ties."""
    return torch.tensor(
        [
            [[dice.choice([0.0, 0.5, 1.0, dice.random()]) for _ in range(tokens)] for _ in range(heads)]
            for _ in range(rows)
        ]
    )


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 12), st.integers(0, 14), st.randoms(use_true_random=False))
def test_top_masks(tokens: int, count: int, dice: random.Random) -> None:
    rows, heads = 2, 3
    scores = draw(dice, rows, heads, tokens)
    always = torch.tensor([[[dice.random() < 0.2 for _ in range(tokens)] for _ in range(heads)]])
    counts = torch.tensor([dice.randint(0, count) for _ in range(heads)])
    for asked in (count, counts):
        for protected in (None, always):
            mask = top_mask(scores, asked, protected)
            assert mask.shape == scores.shape
            for row in range(rows):
                for head in range(heads):
                    own = set() if protected is None else set(always[0, head].nonzero().flatten().tolist())
                    values = scores[row, head].tolist()
                    ranked = sorted(range(tokens), key=lambda i: (i not in own, -values[i] if i not in own else 0, i))
                    kept = ranked[: int(asked) if isinstance(asked, int) else int(asked[head])]
                    assert mask[row, head].nonzero().flatten().tolist() == sorted(kept)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([1, 3, 5, 7]), st.sampled_from(["avg", "max"]), st.randoms(use_true_random=False))
def test_pools_stay_inside_their_scale(kernel: int, mode: str, dice: random.Random) -> None:
    rows, heads, width = 2, 2, 12
    positions = torch.full((rows, heads, width), -1)
    for row in range(rows):
        for head in range(heads):
            chosen = sorted(dice.sample(range(SCHEDULE.num_tokens), dice.randint(1, width)))
            positions[row, head, : len(chosen)] = torch.tensor(chosen)
    without = torch.tensor([[[dice.random() < 0.2 for _ in range(width)]]])
    scores = draw(dice, rows, heads, width)
    found = pool_segments(scores, positions, SCHEDULE, kernel, mode, without)  # type: ignore[arg-type]
    if kernel == 1:
        assert found is scores
        return
    scale = SCHEDULE.scale_of(positions.clamp(min=0))
    for row in range(rows):
        for head in range(heads):
            for i in range(width):
                if positions[row, head, i] < 0 or without[0, 0, i]:
                    assert found[row, head, i] == -math.inf
                    continue
                near = [
                    float(scores[row, head, j])
                    for j in range(max(0, i - kernel // 2), min(width, i + kernel // 2 + 1))
                    if positions[row, head, j] >= 0
                    and not without[0, 0, j]
                    and scale[row, head, j] == scale[row, head, i]
                ]
                expected = max(near) if mode == "max" else sum(near) / len(near)
                assert float(found[row, head, i]) == pytest.approx(expected, rel=1e-6)


def test_equal_neighbours_give_equal_scores() -> None:
    """Ties are broken by position: then rounding must not decide between tokens that see the same neighbours."""
    positions = torch.arange(5, 14).view(1, 1, -1)[..., :3]
    for seed in range(200):
        scores = torch.rand(1, 1, 3, generator=torch.Generator().manual_seed(seed))
        assert len(pool_segments(scores, positions, SCHEDULE, 5).unique()) == 1


def test_pairs_share() -> None:
    scores = torch.rand(6, 2, 3)
    found = share_rows(scores, slice(0, 3))
    for image in range(3):
        for row in (image, image + 3):
            torch.testing.assert_close(found[row], scores[image] + scores[image + 3], atol=0, rtol=0)
    assert torch.equal(share_rows(scores, slice(0, 6)), scores)  # without guidance


def test_state_follows_its_tokens() -> None:
    state = torch.arange(12.0).view(1, 2, 6)
    mask = torch.tensor([[[1, 0, 1, 0, 0, 1], [0, 1, 0, 1, 1, 0]]]).bool()
    assert kept_state(state, mask).tolist() == [[[0, 2, 5], [7, 9, 10]]]


class Watching(Policy):
    """Heads of different lengths, rows with different tokens; compares every observation with a dense softmax."""

    def __init__(self, geometry: Geometry):
        super().__init__(geometry.full_tokens)
        self.seen = 0

    def after_attend(self, visit: Visit) -> list[Keep]:
        view, positions = visit.view(), visit.positions()
        valid = (positions >= 0).expand(len(visit.q), -1, -1)
        assert not view.k[~valid].any()
        logits = (visit.q @ view.k.transpose(2, 3) * visit.softmax_scale).masked_fill(~valid.unsqueeze(2), -math.inf)
        weights = logits.softmax(-1)
        queries = torch.tensor([0, visit.q.shape[2] - 1])
        torch.testing.assert_close(visit.attention(queries), weights[:, :, queries])
        mass = weights.sum(2).masked_fill(~valid, -math.inf)
        observed = weights[:, :, queries].sum(2).masked_fill(~valid, -math.inf)
        torch.testing.assert_close(visit.column_mass(), mass)
        torch.testing.assert_close(visit.column_mass(queries), observed)
        columns, heads = positions.shape[2], positions.shape[1]
        for some in torch.arange(heads).split(2):
            torch.testing.assert_close(visit.column_mass(queries, some), observed[:, some])
        self._check_keys(visit, view, valid)
        self.seen += bool((positions < 0).any())
        mask = torch.zeros(len(visit.q), heads, columns, dtype=torch.bool)
        for row in range(len(visit.q)):
            for head in range(heads):
                there = valid[row, head].nonzero().flatten()
                mask[row, head, there[row % 2 :: head + 2][: max(1, len(there) // (head + 2))]] = True
        fewest = mask.sum(-1).amin(0)
        return [Keep(visit.layer, mask=mask & (mask.cumsum(-1) <= fewest[:, None]))]

    def _check_keys(self, visit: Visit, view: View, valid: Tensor) -> None:
        """Groups hold every head asked for once, and its real tokens in order."""
        asked = list(range(visit.q.shape[1]))[1:]
        seen = []
        for group, keys in visit.cache.keys(visit.layer, asked):
            for place, index in enumerate(group):
                head = asked[index]
                seen.append(head)
                for row in range(len(keys)):
                    assert torch.equal(keys[row, place], view.k[row, head][valid[row, head]])
        assert sorted(seen) == asked


def test_observations_are_attention() -> None:
    geometry = Geometry("toy", 2, 3, 8, ScaleSchedule.squares((2, 3, 4, 5)), 0)
    policy = Watching(geometry)
    cache = KVCache(geometry, policy, 4, 2)
    for tokens in geometry.schedule.lengths:
        for layer in range(geometry.num_layers):
            cache.attend(layer, *torch.randn(3, 4, 3, tokens, 8), 0.3)
        cache.end_step()
    assert policy.seen
