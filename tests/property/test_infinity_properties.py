"""Infinity's tables, packing and sampling against literal computations on arbitrary inputs."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from heatkv_cli.core.scales import Geometry, ScaleSchedule
from heatkv_cli.errors import ConfigError
from heatkv_cli.models.infinity.model import InfinityModel
from heatkv_cli.models.infinity.rope import rope_table, rotate
from heatkv_cli.models.infinity.sampling import Sampling, draw_bits, filter_logits
from heatkv_cli.models.infinity.schedules import (
    RATIOS,
    RESOLUTIONS,
    nearest_ratio,
    pixel_size,
    rope_base,
    scale_sizes,
)
from heatkv_cli.models.infinity.tokenizer import Codes, quantise, resize
from heatkv_cli.models.infinity.transformer import Conditioning, Infinity, InfinityConfig, Text
from tiny_net import FullAttention

# --------------------------------------------------------------------------------------------------------- schedules

# FoundationVision/Infinity @ 4c27bbb, dynamic_resolution.py
# portrait ratio, its landscape, tokens and pixels (height, width) at 0.06M, 0.25M, 0.60M, 1M
OFFICIAL = [
    (1.0, None, (521, 2521, 6425, 10521), ((256, 256), (512, 512), (768, 768), (1024, 1024))),
    (1.25, 0.8, (614, 2814, 6854, 10774), ((320, 256), (560, 448), (880, 704), (1120, 896))),
    (1.333, 0.75, (665, 2657, 7085, 10973), ((320, 240), (576, 432), (960, 720), (1152, 864))),
    (1.5, 0.666, (533, 2759, 6941, 10997), ((336, 224), (624, 416), (1008, 672), (1248, 832))),
    (1.75, 0.571, (472, 2628, 7220, 11252), ((336, 192), (672, 384), (1120, 640), (1344, 768))),
    (2.0, 0.5, (451, 2681, 7219, 11269), ((352, 176), (736, 368), (1184, 592), (1440, 720))),
    (2.5, 0.4, (555, 2555, 6805, 10805), ((400, 160), (800, 320), (1280, 512), (1600, 640))),
    (3.0, 0.333, (509, 2588, 7016, 11123), ((432, 144), (864, 288), (1440, 480), (1776, 592))),
]


@pytest.mark.parametrize(("portrait", "landscape", "tokens", "pixels"), OFFICIAL)
def test_the_official_maps(
    portrait: float, landscape: float | None, tokens: tuple[int, ...], pixels: tuple[tuple[int, int], ...]
) -> None:
    for resolution, count, size in zip(RESOLUTIONS, tokens, pixels, strict=True):
        maps = scale_sizes(resolution, portrait)
        assert sum(h * w for h, w in maps) == count == ScaleSchedule(maps).num_tokens
        assert pixel_size(resolution, portrait) == size
        assert maps == scale_sizes("1M", portrait)[: len(maps)]
        assert all(a[0] <= b[0] and a[1] <= b[1] for a, b in pairwise(maps))
        if landscape is not None:
            assert scale_sizes(resolution, landscape) == tuple((w, h) for h, w in maps)
            assert pixel_size(resolution, landscape) == size[::-1]
    assert rope_base(portrait) == (pixels[-1][0] // 16, pixels[-1][1] // 16)


def test_the_official_order_of_the_ratios() -> None:
    order = (1.0, 1.25, 0.8, 1.333, 0.75, 1.5, 0.666, 1.75, 0.571, 2.0, 0.5, 2.5, 0.4, 3.0, 0.333)
    assert order == RATIOS
    assert [len(scale_sizes(r)) for r in RESOLUTIONS] == [7, 10, 12, 13]


@given(st.floats(0.01, 100))
def test_the_nearest_ratio(ratio: float) -> None:
    chosen, best = nearest_ratio(ratio), math.inf
    for official in RATIOS:  # upstream's loop: the first of the smallest
        if abs(official - ratio) < best:
            first, best = official, abs(official - ratio)
    assert chosen == first


def test_what_is_not_official_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"no resolution '1\.0M'") as error:
        scale_sizes("1.0M")
    assert "0.06M, 0.25M, 0.60M, 1M" in error.value.hint
    for call in (lambda: scale_sizes("1M", 0.6), lambda: rope_base(0.6), lambda: pixel_size("1M", 0.6)):
        with pytest.raises(ConfigError, match=r"ratio 0\.6 ") as error:
            call()
        assert "1.333" in error.value.hint
        assert "the nearest is 0.571" in error.value.hint
    for bad in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ConfigError, match="no picture"):
            nearest_ratio(bad)


# -------------------------------------------------------------------------------------------------------------- rope


def half_even(product: float) -> int:
    """Round half to even, of a number rounded to float32 first."""
    low = math.floor(product)
    rest = product - low
    return low + (rest > 0.5 or (rest == 0.5 and low % 2 == 1))


@pytest.mark.parametrize("ratio", RATIOS)
def test_rotary_positions_of_every_ratio(ratio: float) -> None:
    """Frequency 1 of rows and of columns gives the position back; ties exist for every ratio but 1."""
    sizes, base = scale_sizes("1M", ratio), rope_base(ratio)
    table, at, ties = rope_table(8, sizes, base), 0, 0
    for h, w in sizes:
        part = table[:, at : at + h * w].view(2, h, w, 4)
        for axis, (n, b) in enumerate(((h, base[0]), (w, base[1]))):
            places = (torch.arange(n) * (b / n)).tolist()
            expected = torch.tensor([float(half_even(p)) for p in places])
            ties += sum(p % 1 == 0.5 for p in places)
            turned = part[:, :, 0, 0] if axis == 0 else part[:, 0, :, 2]
            assert torch.equal(turned, torch.stack((expected.cos(), expected.sin())))
        at += h * w
    assert (ties == 0) == (ratio == 1)
    assert at == table.shape[1]


def test_the_examples_of_rotary_positions() -> None:
    wanted = {6: "0 11 21 32 43 53", 12: "0 5 11 16 21 27 32 37 43 48 53 59"}
    for n, text in wanted.items():
        assert [half_even(p) for p in (torch.arange(n) * (64 / n)).tolist()] == [int(p) for p in text.split()]
    assert [half_even(p) for p in (torch.arange(2) * (45 / 2)).tolist()] == [0, 22]


@given(ratio=st.sampled_from(RATIOS), mode=st.sampled_from([0, 1, 2]), quarter=st.integers(1, 6))
@settings(max_examples=20, deadline=None)
def test_lower_resolutions_share_the_table(ratio: float, mode: int, quarter: int) -> None:
    base = rope_base(ratio)
    large = rope_table(4 * quarter, scale_sizes("0.25M", ratio), base, mode)
    small = rope_table(4 * quarter, scale_sizes("0.06M", ratio), base, mode)
    assert torch.equal(small, large[:, : small.shape[1]])
    assert large.shape == (2, sum(h * w for h, w in scale_sizes("0.25M", ratio)), 2 * quarter)
    if mode != 1:  # interpolated cosines and sines are no longer rotations
        assert torch.allclose(large.square().sum(0), torch.ones(()), atol=1e-5)


@pytest.mark.parametrize("mode", [0, 2])
def test_attention_sees_distances_only(mode: int) -> None:
    """Within a scale: q . k depends on the difference of the positions (mode 0: of rows and columns)."""
    sizes = ((8, 8),)
    table = rope_table(16, sizes, (16, 16), mode)
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(16, generator=generator).expand(1, 1, 64, 16) for _ in range(2))
    dots = (rotate(q, table) @ rotate(k, table).transpose(-1, -2))[0, 0].view(8, 8, 8, 8)
    for dr, dc in ((0, 0), (1, 0), (0, 3), (2, 1)):
        same = torch.stack([dots[r, c, r + dr, c + dc] for r in range(8 - dr) for c in range(8 - dc)])
        assert torch.allclose(same, same[0].expand_as(same), atol=1e-4)


def test_an_impossible_table_is_refused() -> None:
    for dim, mode in ((6, 2), (8, 3)):
        with pytest.raises(ValueError, match="rope"):
            rope_table(dim, ((1, 1),), (4, 4), mode)


# ----------------------------------------------------------------------------------------------------------- packing


@given(
    bits=st.integers(1, 5), patch=st.integers(1, 3), h=st.integers(1, 4), w=st.integers(1, 4), seed=st.integers(0, 99)
)
@settings(max_examples=40, deadline=None)
def test_packing_is_pixel_shuffle_by_loops(bits: int, patch: int, h: int, w: int, seed: int) -> None:
    codes = Codes(bits, patch)
    tokens = torch.randint(0, 2, (2, h * w, codes.token_bits), generator=torch.Generator().manual_seed(seed))
    grid = torch.zeros(2, h * patch, w * patch, bits, dtype=tokens.dtype)
    for n in range(h * w):
        for c in range(bits):
            for i in range(patch):
                for j in range(patch):
                    y, x = n // w * patch + i, n % w * patch + j
                    grid[:, y, x, c] = tokens[:, n, patch**2 * c + patch * i + j]
    assert codes.grid((h, w)) == (h * patch, w * patch)
    assert torch.equal(codes.to_grid(tokens, (h, w)), grid)
    assert torch.equal(codes.to_tokens(grid.permute(0, 3, 1, 2)), tokens)


@given(bits=st.integers(1, 32), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_codes_are_vertices_of_the_unit_sphere(bits: int, seed: int) -> None:
    drawn = torch.randint(0, 2, (2, 3, 4, bits), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    code = Codes(bits, 2).embed(drawn)
    assert code.shape == (2, bits, 3, 4)
    assert torch.allclose(code.abs(), torch.tensor(bits**-0.5), atol=1e-6)
    assert torch.equal(code > 0, drawn.permute(0, 3, 1, 2) > 0)


@given(ratio=st.sampled_from(RATIOS), patch=st.sampled_from([1, 2]), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_the_sum_is_that_of_the_bits(ratio: float, patch: int, seed: int) -> None:
    """Summing the codes of the bits gives the sum that quantisation returned; a latent of 0 has bits 0."""
    codes = Codes(3, patch)
    sizes = [codes.grid(size) for size in scale_sizes("0.06M", ratio)]
    latent = torch.randn(2, 3, *sizes[-1], generator=torch.Generator().manual_seed(seed))
    total, bits = quantise(latent, sizes, codes)
    again = torch.stack([resize(codes.embed(part), sizes[-1]) for part in bits]).sum(0)
    assert torch.allclose(total, again, atol=1e-5)
    assert [part.shape for part in bits] == [(2, *size, 3) for size in sizes]
    _, nothing = quantise(torch.zeros(1, 3, *sizes[-1]), sizes, codes)
    assert not nothing[0].any()


# ---------------------------------------------------------------------------------------------------------- sampling

LOGIT = st.sampled_from([-30.0, -3.5, -3.4761, -1.0, 0.0, 0.5, 1.0, 3.4761, 3.5, 30.0])


def literal_filter(pair: list[float], top_k: int, top_p: float) -> list[float]:
    """Step 3 of docs/infinity.md, one bit."""
    kept = [True, True]
    if top_k == 1:
        kept = [value >= max(pair) for value in pair]
    if top_p > 0:
        weight = [math.exp(v - max(pair)) if k else 0.0 for v, k in zip(pair, kept, strict=True)]
        order = sorted((0, 1), key=lambda i: (pair[i] if kept[i] else -math.inf, i))
        if weight[order[0]] / sum(weight) <= 1 - top_p:
            kept[order[0]] = False
    return [value if keep else -math.inf for value, keep in zip(pair, kept, strict=True)]


@given(
    pairs=st.lists(st.tuples(LOGIT, LOGIT), min_size=1, max_size=12),
    top_k=st.sampled_from([0, 1, 2, 900]),
    top_p=st.sampled_from([0.0, 0.3, 0.9, 0.97, 1.0]),
)
@settings(max_examples=200, deadline=None)
def test_top_k_and_top_p(pairs: list[tuple[float, float]], top_k: int, top_p: float) -> None:
    ours = filter_logits(torch.tensor(pairs), top_k, top_p)
    for pair, kept in zip(pairs, ours.tolist(), strict=True):
        wanted = literal_filter(list(pair), top_k, top_p)
        if top_p > 0 and pair[0] == pair[1]:
            assert sorted(map(math.isinf, kept)) == sorted(map(math.isinf, wanted))  # which one goes is not defined
        else:
            assert kept == pytest.approx(wanted)


@given(seed=st.integers(0, 999), top_k=st.sampled_from([0, 1, 900]), top_p=st.sampled_from([0.0, 0.97]))
@settings(max_examples=30, deadline=None)
def test_a_draw_is_multinomial_s(seed: int, top_k: int, top_p: float) -> None:
    """One generator: the very draw of `torch.multinomial` over the flattened pairs, as upstream makes it."""
    logits = torch.randn(1, 7, 5, 2, generator=torch.Generator().manual_seed(seed)) * 3
    ours = draw_bits(logits, top_k, top_p, [torch.Generator().manual_seed(seed)])
    kept = torch.tensor([literal_filter(pair, top_k, top_p) for pair in logits.view(-1, 2).tolist()])
    generator = torch.Generator().manual_seed(seed)
    theirs = torch.multinomial(kept.softmax(-1), 1, replacement=True, generator=generator)
    assert torch.equal(ours.flatten(), theirs.flatten().to(torch.uint8))
    assert ours.dtype == torch.uint8
    if top_k == 1:
        assert torch.equal(ours, logits.argmax(-1).to(torch.uint8))


def test_a_greedy_tie_is_drawn() -> None:
    """Both values have the largest logit, so both stay, as upstream's comparison with the k-th logit has it."""
    tied = torch.zeros(1, 400, 1, 2)
    assert torch.isfinite(filter_logits(tied, 1, 0.0)).all()
    share = draw_bits(tied, 1, 0.0, [torch.Generator().manual_seed(0)]).float().mean().item()
    assert 0.4 < share < 0.6
    near = tied.clone()
    near[..., 1] = 1e-7
    assert draw_bits(near, 1, 0.0, [torch.Generator().manual_seed(0)]).all()


@given(batch=st.integers(1, 4), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_a_draw_does_not_depend_on_its_neighbours(batch: int, seed: int) -> None:
    logits = torch.randn(batch, 4, 3, 2, generator=torch.Generator().manual_seed(seed))
    together = draw_bits(logits, 0, 0.9, [torch.Generator().manual_seed(i) for i in range(batch)])
    for i in range(batch):
        alone = draw_bits(logits[i : i + 1], 0, 0.9, [torch.Generator().manual_seed(i)])
        assert torch.equal(alone[0], together[i])


# ---------------------------------------------------------------------------------------------------------- guidance

SIZES = ((1, 1), (2, 2), (3, 2))
DEPTH = 4


def tiny(level_once: bool = True) -> Infinity:
    torch.manual_seed(3)
    net = Infinity(InfinityConfig(DEPTH, 64, 2, 2, Codes(2, 2), 256, 8, level_once)).eval().requires_grad_(False)
    for p in net.parameters():
        p.copy_(torch.randn_like(p) * 0.15)
    return net


@given(
    guide=st.sets(st.sampled_from([0, -1, -2, -3, -4]), min_size=1),
    cfg=st.tuples(*[st.sampled_from([0.5, 1.0, 2.0, 3.0])] * 3),
    level_once=st.booleans(),
    seed=st.integers(0, 20),
)
@settings(max_examples=30, deadline=None)
def test_guidance_by_the_letter(guide: set[int], cfg: tuple[float, ...], level_once: bool, seed: int) -> None:
    """-n: after layer depth - n both rows become cfg * cond + (1 - cfg) * uncond; 0: the same on the logits.

    The two rows are computed one after the other here, with a cache and a conditioning each.
    """
    net, codes = tiny(level_once), Codes(2, 2)
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(5, 256, generator=generator)
    bits = [torch.randint(0, 2, (1, 2 * h, 2 * w, 2), generator=generator, dtype=torch.uint8) for h, w in SIZES]
    geometry = Geometry("letter", DEPTH, 2, 32, ScaleSchedule(SIZES), 1)
    model = InfinityModel(geometry, net, None, None, (6, 4))  # type: ignore[arg-type]
    sampling = Sampling(cfg, (1.0,) * 3, guide_layers=tuple(guide))
    trace = model.generate(Text.pack([text]), sampling, FullAttention(), None, bits)
    guided = any(c != 1 for c in cfg)
    assert model.rows(1, sampling) == 1 + guided
    conditions = [net.condition(Text.pack([t])) for t in ((text, net.cfg_uncond[:5]) if guided else (text,))]
    caches, inputs = [FullAttention(), FullAttention()], [net.start(c) for c in conditions]
    offsets, total = geometry.schedule.offsets, torch.zeros(1, 2, 6, 4)
    for s in range(len(SIZES)):
        hidden = list(inputs)
        for layer, block in enumerate(net.layers()):
            for row, cond in enumerate(conditions):
                x = hidden[row]
                if layer == 0 or (layer == 2 and not level_once):  # two chunks of two blocks
                    x = x + net.lvl_embed.weight[s]
                hidden[row] = one_block(block, x, cond, model.rope[:, offsets[s] : offsets[s + 1]], caches[row], layer)
            if layer - DEPTH in guide and cfg[s] != 1:
                hidden = [cfg[s] * hidden[0] + (1 - cfg[s]) * hidden[1]] * 2
        logits = [net.logits(x, cond) for x, cond in zip(hidden, conditions, strict=False)]
        out = logits[0]
        if 0 in guide and cfg[s] != 1:
            out = cfg[s] * logits[0] + (1 - cfg[s]) * logits[1]
        assert torch.allclose(trace.logits[s], out[..., 1] - out[..., 0], atol=1e-4, rtol=1e-4)
        total = total + resize(codes.embed(bits[s]), (6, 4))
        if s + 1 < len(SIZES):
            tokens = codes.to_tokens(resize(total, codes.grid(SIZES[s + 1])))
            inputs = [net.embed(tokens) for _ in conditions]


def one_block(block, x: Tensor, cond: Conditioning, rope: Tensor, cache: FullAttention, layer: int) -> Tensor:  # type: ignore[no-untyped-def]
    q, k, v = block.before(x, cond.ada, rope)
    return block.after(x, cache.attend(layer, q, k, v, 1.0), cond.ada, cond.cross[layer], cond.mask)


@pytest.mark.parametrize(
    ("field", "value", "words"), [("block_chunks", 3, "depth 4"), ("heads", 5, "width 64"), ("width", 32, "FFN")]
)
def test_sizes_that_do_not_divide_are_refused(field: str, value: int, words: str) -> None:
    sizes = {"depth": 4, "width": 64, "heads": 4, "block_chunks": 2, "codes": Codes(8), "text_channels": 256}
    with pytest.raises(ConfigError, match=words):
        InfinityConfig(**{**sizes, field: value})
