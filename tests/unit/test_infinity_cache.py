"""A small Infinity with random weights, its attention going through the cache: same bits, logits and pixels as without.

Independent references: attention that concatenates everything it has seen, and one forward of the whole sequence
under a block-causal mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import pytest
import torch
from torch import Tensor

from heatkv_cli.benchmarks.base import items_of
from heatkv_cli.core.budget import Budget
from heatkv_cli.core.cache import KVCache
from heatkv_cli.core.scales import Geometry, ScaleSchedule
from heatkv_cli.methods.base import Method, Setting
from heatkv_cli.methods.full import Full
from heatkv_cli.methods.heatkv import HeatKV
from heatkv_cli.methods.sinks import Sinks
from heatkv_cli.models.base import Cache, Trace
from heatkv_cli.models.infinity.model import InfinityModel
from heatkv_cli.models.infinity.sampling import Sampling, draw_bits
from heatkv_cli.models.infinity.text import WordEncoder
from heatkv_cli.models.infinity.tokenizer import Codes, Tokenizer, TokenizerConfig, resize
from heatkv_cli.models.infinity.transformer import Infinity, InfinityConfig, Text

GEOMETRY = Geometry("small", 4, 4, 16, ScaleSchedule.squares((1, 2, 3, 4, 5, 6, 8, 10)), 1)  # tiny's scales
WORDS = ["<pad>", "<empty>", "a", "red", "blue", "circle", "square", "left", "of", "two"]
PROMPTS = [  # of different lengths: rows are padded, and padding must not be seen
    "a red circle",
    "two blue square",
    "a",
    "",
    "a red circle left of a blue square",
    "a blue circle",
    "two red circle left of two blue square",
    "red",
]
GUIDED = Sampling(cfg=(2.0,) * 8, tau=(1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.3))
PLAIN = Sampling(cfg=(1.0,) * 8, tau=(1.0,) * 8)
samplings = pytest.mark.parametrize("sampling", [GUIDED, PLAIN], ids=["guided", "plain"])


@cache
def model() -> InfinityModel:
    """Random weights, large enough that attention and bits matter."""
    torch.manual_seed(0)
    codes = Codes(8)
    transformer = Infinity(InfinityConfig(4, 64, 4, 2, codes, text_channels=128, text_length=10))
    tokenizer = Tokenizer(TokenizerConfig(8, 16, (1, 1), 8, stem=2))
    text = WordEncoder(WORDS, 10, 128, 1)
    with torch.no_grad():
        for block in transformer.layers():
            block.ada_gss.mul_(4)
            block.sa.scale_mul_1H11.add_(0.5 * torch.randn_like(block.sa.scale_mul_1H11))
            for bias in (block.sa.q_bias, block.sa.v_bias, block.ca.v_bias):
                bias.normal_(std=0.1)
        transformer.head.weight.mul_(2)
    for part in (transformer, tokenizer, text):
        part.eval().requires_grad_(False)
    return InfinityModel(GEOMETRY, transformer, tokenizer, text, (10, 10))


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(100 + i) for i in range(count)]


def kv_cache(method: Method, rows: int, cond: int, text: str = "1") -> KVCache:
    budget = Budget.parse(text)
    return KVCache(GEOMETRY, method.policy(Setting(GEOMETRY, budget, rows)), rows, cond)


def generate(
    method: Method,
    prompts: Sequence[str] = PROMPTS,
    sampling: Sampling = GUIDED,
    forced: Sequence[Tensor] = (),
    text: str = "1",
) -> Trace:
    kv = kv_cache(method, model().rows(len(prompts), sampling), len(prompts), text)
    draws = None if forced else generators(len(prompts))
    return model().generate(model().encode(items_of(prompts)), sampling, kv, draws, forced)


@cache
def full(sampling: Sampling) -> Trace:
    return generate(Full(), sampling=sampling)


def difference(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


@samplings
def test_budget_one_is_the_full_cache_bit_for_bit(sampling: Sampling) -> None:
    reference, made = full(sampling), generate(HeatKV(order="random"), sampling=sampling)
    for name in ("codes", "logits"):
        assert all(map(torch.equal, getattr(reference, name), getattr(made, name)))
    assert torch.equal(reference.latent, made.latent)
    pixels = [model().decode(trace.latent) for trace in (reference, made)]
    assert torch.equal(*pixels)
    assert pixels[0].shape == (len(PROMPTS), 40, 40, 3)


def test_the_cache_matters_in_this_model() -> None:
    """Or the comparisons here would show nothing: without history the logits are others, and images differ."""
    reference = full(GUIDED)
    for method, text in [(Sinks(), "0.1"), (HeatKV(order="random"), "0.1")]:
        made = generate(method, forced=reference.codes, text=text)
        assert torch.equal(made.logits[0], reference.logits[0])  # scale 0 has no history
        assert difference(made.logits[-1:], reference.logits[-1:]) > 0.05
    bits = torch.cat([scale.flatten(1) for scale in reference.codes], 1).float()
    assert 0.2 < float(bits.mean()) < 0.8
    assert len({tuple(image.tolist()) for image in bits}) == len(PROMPTS)


# ----------------------------------------------------------------------------------------------- batches and draws


@samplings
def test_a_batch_of_eight_is_eight_singles(sampling: Sampling) -> None:
    batch = full(sampling)
    for i, prompt in enumerate(PROMPTS):
        single = generate(Full(), [prompt], sampling, [bits[i : i + 1] for bits in batch.codes])
        assert difference(single.logits, [logits[i : i + 1] for logits in batch.logits]) < 1e-4
        torch.testing.assert_close(single.latent, batch.latent[i : i + 1], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("method", "text"), [(HeatKV(order="random"), "0.1"), (Sinks(), "0.1")])
def test_so_it_is_with_a_compressed_cache(method: Method, text: str) -> None:
    bits = full(GUIDED).codes
    batch = generate(method, forced=bits, text=text)
    for i, prompt in enumerate(PROMPTS):
        single = generate(method, [prompt], GUIDED, [scale[i : i + 1] for scale in bits], text)
        assert difference(single.logits, [logits[i : i + 1] for logits in batch.logits]) < 1e-4


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.0), (1, 0.0), (0, 0.9), (900, 0.97)])
def test_draws_depend_on_the_image_s_generator_alone(top_k: int, top_p: float) -> None:
    logits = 3 * torch.randn(8, 7, 5, 2, generator=torch.Generator().manual_seed(1))
    together, batch = generators(8), []
    for _ in range(2):  # the second draw goes on where the first one ended
        batch.append(draw_bits(logits, top_k, top_p, together))
    for i, generator in enumerate(generators(8)):
        single = [draw_bits(logits[i : i + 1], top_k, top_p, [generator]) for _ in range(2)]
        assert all(torch.equal(one[0], many[i]) for one, many in zip(single, batch, strict=True))
        assert torch.equal(generator.get_state(), together[i].get_state())
    if top_k != 1:
        assert not torch.equal(*batch)


def test_a_draw_is_what_multinomial_gives_at_batch_one() -> None:
    """Upstream's call, so `seed_mode=paper` draws the official bits."""
    logits = torch.randn(1, 7, 5, 2, generator=torch.Generator().manual_seed(1))
    mine = draw_bits(logits, 0, 0.0, [torch.Generator().manual_seed(3)])
    probability = logits.softmax(-1).view(-1, 2)
    theirs = torch.multinomial(probability, 1, replacement=True, generator=torch.Generator().manual_seed(3))
    assert torch.equal(mine.flatten().long(), theirs.flatten())


def test_a_generation_uses_as_many_random_numbers_in_any_batch() -> None:
    """Also where bits are forced (copied layout), and with whatever method."""
    states = []
    for prompts, forced in [(PROMPTS, ()), (PROMPTS[:1], ()), (PROMPTS[:1], full(GUIDED).codes[:4])]:
        draws = generators(len(prompts))
        kv = kv_cache(Full(), 2 * len(prompts), len(prompts))
        model().generate(
            model().encode(items_of(prompts)), GUIDED, kv, draws, [bits[: len(prompts)] for bits in forced]
        )
        states.append(draws[0].get_state())
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], states[2])


def test_something_has_to_decide_each_bit() -> None:
    kv = kv_cache(Full(), 2, 1)
    with pytest.raises(ValueError, match="scale 1 is not forced and there are no generators"):
        model().generate(model().encode(items_of("a")), GUIDED, kv, None, [full(GUIDED).codes[0][:1]])


# ------------------------------------------------------------------------------------------ independent references


class Concatenating:
    """Keys and values of everything so far, one after the other; softmax written out."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
        if layer in self.seen:
            k, v = (torch.cat(pair, 2) for pair in zip(self.seen[layer], (k, v), strict=True))
        self.seen[layer] = k, v
        return (q @ k.transpose(-1, -2) * softmax_scale).softmax(-1) @ v

    def end_step(self) -> None:
        pass


@samplings
def test_the_cache_is_plain_concatenation(sampling: Sampling) -> None:
    plain: Cache = Concatenating()
    reference = full(sampling)
    made = model().generate(model().encode(items_of(PROMPTS)), sampling, plain, None, reference.codes)
    for mine, other in zip(made.logits, reference.logits, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)


class BlockCausal:
    """Attention over the whole sequence at once: a token sees its own scale and the ones before."""

    def __init__(self, schedule: ScaleSchedule) -> None:
        level = torch.tensor([scale for scale, tokens in enumerate(schedule.lengths) for _ in range(tokens)])
        self.hidden = level[:, None] < level[None, :]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
        logits = q @ k.transpose(-1, -2) * softmax_scale
        return logits.masked_fill(self.hidden, -torch.inf).softmax(-1) @ v


def teacher_forced(bits: Sequence[Tensor], sampling: Sampling) -> list[Tensor]:
    """Logits of all scales from one forward; no cache, no loop over scales but to prepare the inputs."""
    network, sizes = model().transformer, GEOMETRY.schedule.sizes
    text = model().encode(items_of(PROMPTS))
    rows = [row[:n] for row, n in zip(text.features, text.lengths, strict=True)]
    if sampling.guided:
        rows += [network.cfg_uncond[:n] for n in text.lengths]
    cond = network.condition(Text.pack(rows))
    inputs, latent = [network.start(cond)], torch.zeros(len(PROMPTS), 8, 10, 10)
    for scale, size in enumerate(sizes[1:], 1):
        latent = latent + resize(model().codes.embed(bits[scale - 1]), (10, 10))
        tokens = model().codes.to_tokens(resize(latent, size))
        inputs.append(network.embed(tokens).repeat(len(rows) // len(PROMPTS), 1, 1))
    levels = GEOMETRY.schedule.scale_table()
    hidden = network.blocks(torch.cat(inputs, 1), levels, cond, model().rope, BlockCausal(GEOMETRY.schedule))
    logits = network.logits(hidden, cond)
    out = []
    for scale, part in enumerate(logits.split(GEOMETRY.schedule.lengths, 1)):
        yes, no = part.chunk(2) if sampling.guided else (part, part)
        guided = sampling.cfg[scale] * yes + (1 - sampling.cfg[scale]) * no
        out.append(guided[..., 1] - guided[..., 0])
    return out


@samplings
def test_teacher_forcing_is_one_block_causal_forward(sampling: Sampling) -> None:
    """Free and forced runs through the cache give the logits of the form in which the model is trained."""
    reference = full(sampling)
    expected = teacher_forced(reference.codes, sampling)
    forced = generate(Full(), sampling=sampling, forced=reference.codes)
    assert difference(forced.logits, reference.logits) == 0
    assert difference(forced.logits, expected) < 1e-4
