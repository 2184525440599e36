"""Settings that no golden run shows, against a literal Infinity that the golden runs check.

Other aspect ratios and resolutions, every rotary mode, guidance inside the network, lists of cfg and tau, negative
prompts, batches, both tokenizers in both directions.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import infinity_golden as golden
import infinity_literal as literal
import pytest
import torch
from infinity_golden import CODES, MULTIPLIERS, RUNS, Run, tensor
from recorder import Recorder
from torch import Tensor

from heatkv_cli.core.scales import Geometry, ScaleSchedule
from heatkv_cli.models.infinity.model import InfinityModel
from heatkv_cli.models.infinity.sampling import Sampling
from heatkv_cli.models.infinity.schedules import rope_base, scale_sizes
from heatkv_cli.models.infinity.tokenizer import Codes, Tokenizer, TokenizerConfig
from heatkv_cli.models.infinity.transformer import Infinity, InfinityConfig, Text

pytestmark = pytest.mark.golden

CFG = (1.0, 2.0, 3.0, 1.0, 4.0, 1.5, 3.0)
CONSTANT = (3.0,) * 13
STATE = 5e-5  # of keys and values: what float32 loses against float64 where attention logits reach 100


@pytest.mark.parametrize("name", [n for n in RUNS if RUNS[n]["ca_fp32"] and RUNS[n]["pn"] == "0.06M"])
def test_the_literal_one_is_right(name: str) -> None:
    run = Run(name, RUNS[name])
    bits, codes = run.forced, run.codes
    if not bits:
        parts = tensor(f"run/{name}/bits").split([h * w for h, w in run.sizes], 1)
        bits = tuple(codes.to_grid(part, size) for part, size in zip(parts, run.sizes, strict=True))
    s = run.settings
    setting = literal.Setting(
        run.sizes,
        rope_base(s["h_div_w"]),
        s["cfg_list"],
        4,
        s["rope2d_normalized_by_hw"],
        s["cfg_insertion_layer"],
        bool(s["add_lvl_embeding_only_first_block"]),
        codes.patch,
    )
    tau = torch.cat([torch.full((h * w,), t) for (h, w), t in zip(run.sizes, s["tau_list"], strict=True)])
    weights = golden.weights(f"model{run.model}")
    for b, text in enumerate(s["text"]):
        other = tensor(f"text/{s['negative'][b]}") if s["negative"] else None
        out = literal.run(weights, tensor(f"text/{text}"), other, [part[b] for part in bits], setting)
        official = tensor(f"run/{name}/logits")[b]
        assert golden.gap(out.logits / tau[:, None, None], official) < 1e-4
        assert golden.gap(out.latent, tensor(f"run/{name}/summed_codes")[b]) < 1e-5
        for ours, short in ((out.keys, "kcache"), (out.values, "vcache")):
            stored = run.get(f"{short}_l3_every4")
            if stored is not None:
                assert golden.gap(ours[3][:, :, ::4], stored) < 1e-5


@dataclass(frozen=True)
class Case:
    """One setting: what differs from a square 0.06M image of model A with cfg 3."""

    model: str = "A"
    resolution: str = "0.06M"
    ratio: float = 1.0
    mode: int = 2
    cfg: tuple[float, ...] = CONSTANT
    tau: tuple[float, ...] = (1.0,) * 13
    guide: tuple[int, ...] = (0,)
    level_once: bool = True
    text: tuple[str, ...] = ("t0",)
    negative: tuple[str, ...] = ()
    top: tuple[int, float] = (900, 0.97)
    layers: list[int] = field(default_factory=lambda: [0, 3])


CASES = {
    "main": Case(top=(1, 0.0)),
    "B main": Case("B", top=(1, 0.0)),
    "rope 0": Case(mode=0),
    "rope 1": Case(mode=1),
    "B rope 0": Case("B", mode=0),
    "B rope 1, 0.75": Case("B", mode=1, ratio=0.75),
    "rope 1, 3.0": Case(mode=1, ratio=3.0),
    "landscape 0.5": Case(ratio=0.5),
    "landscape 0.75": Case("B", ratio=0.75),
    "landscape 0.333": Case(ratio=0.333),
    "portrait 1.25": Case("B", ratio=1.25),
    "portrait 1.75": Case(ratio=1.75),
    "portrait 1.333": Case(ratio=1.333, cfg=CFG),
    "portrait 1.5": Case("B", ratio=1.5),
    "landscape 0.8": Case(ratio=0.8),
    "landscape 0.571": Case("B", ratio=0.571, cfg=CFG),
    "landscape 0.4": Case(ratio=0.4),
    "no guidance": Case("B", cfg=(1.0,) * 13, tau=(0.5,) * 13, top=(0, 0.0)),
    "lists": Case("B", cfg=CFG, tau=(1.0, 0.5, 0.7, 1.0, 1.3, 0.5, 0.9)),
    "batch": Case(text=("t0", "t1", "neg"), cfg=CFG),
    "batch of equal lengths": Case("B", text=("t1", "t1")),
    "negative": Case("B", negative=("neg",), cfg=CFG),
    "negative, longer, batch": Case(text=("t0", "neg"), negative=("t1", "t0"), ratio=2.0),
    "guide -1": Case(guide=(-1,)),
    "guide -4": Case(guide=(-4,), cfg=CFG),
    "guide 0 and -1": Case(guide=(0, -1)),
    "guide 0, -2 and -3": Case("B", guide=(0, -2, -3), cfg=CFG, text=("t0", "t1")),
    "level per chunk": Case("B", level_once=False, cfg=CFG),
    "level per chunk, landscape, guide -2": Case(level_once=False, ratio=0.666, guide=(0, -2)),
    "0.25M": Case(resolution="0.25M", cfg=(1.0,) * 13),
    "0.25M, guided at one scale, 2.5": Case("B", resolution="0.25M", cfg=(1.0,) * 9 + (2.0,), ratio=2.5),
}


@pytest.mark.parametrize("name", CASES)
def test_a_setting(name: str) -> None:
    case = CASES[name]
    sizes, base, codes = scale_sizes(case.resolution, case.ratio), rope_base(case.ratio), CODES[case.model]
    geometry = Geometry("case", 4, 4, 16, ScaleSchedule(sizes), 3)
    net = golden.transformer(case.model, case.level_once)
    model = InfinityModel(geometry, net, None, None, base, case.mode)  # type: ignore[arg-type]
    count = len(sizes)
    sampling = Sampling(case.cfg[:count], case.tau[:count], *case.top, case.guide)
    texts, others = ([tensor(f"text/{n}") for n in names] for names in (case.text, case.negative))
    cache = Recorder()
    generators = [torch.Generator().manual_seed(i) for i in range(len(texts))]
    negative = Text.pack(others) if others else None
    trace = model.generate(Text.pack(texts), sampling, cache, generators, negative=negative)
    setting = literal.Setting(sizes, base, sampling.cfg, 4, case.mode, case.guide, case.level_once, codes.patch)
    compare(setting, golden.weights(f"model{case.model}"), texts, others, trace, cache, case.layers)
    assert all(0.02 < part.float().mean() < 0.98 for part in trace.codes[3:])  # no constant bits


def compare(setting, weights, texts, others, trace, cache, layers) -> None:  # type: ignore[no-untyped-def]
    logits = torch.cat(trace.logits, 1)
    for b, text in enumerate(texts):
        other = others[b] if others else None
        out = literal.run(weights, text, other, [part[b] for part in trace.codes], setting)
        wanted = out.logits[..., 1] - out.logits[..., 0]
        assert golden.gap(logits[b], wanted) < golden.TOLERANCE["logits"]
        assert golden.gap(trace.latent[b], out.latent) < golden.TOLERANCE["summed_codes"]
        for layer in layers:
            assert golden.gap(cache.k[layer][b :: len(texts)], out.keys[layer]) < STATE
            assert golden.gap(cache.v[layer][b :: len(texts)], out.values[layer]) < STATE


def random_weights(net: torch.nn.Module, std: float) -> None:
    generator = torch.Generator().manual_seed(5)
    for name, p in net.named_parameters():
        p.data = torch.randn(p.shape, generator=generator) * (1.0 if name.endswith(("scale_mul_1H11", "gss")) else std)


def test_the_largest_resolution() -> None:
    """All 13 scales, 10,521 tokens, through a network small enough for it."""
    codes = Codes(2, 2)
    net = Infinity(InfinityConfig(2, 64, 1, 2, codes, 256, 8)).eval().requires_grad_(False)
    random_weights(net, 0.15)
    sizes = scale_sizes("1M")
    geometry = Geometry("large", 2, 1, 64, ScaleSchedule(sizes), 3)
    model, cache = InfinityModel(geometry, net, None, None, rope_base()), Recorder()  # type: ignore[arg-type]
    texts = [torch.randn(5, 256, generator=torch.Generator().manual_seed(1))]
    sampling = Sampling((1.0,) * 13, (1.0,) * 13)
    trace = model.generate(Text.pack(texts), sampling, cache, [torch.Generator().manual_seed(0)])
    assert torch.cat(trace.logits, 1).std() > 0.5
    setting = literal.Setting(sizes, (64, 64), sampling.cfg, heads=1, patch=2)
    compare(setting, net.state_dict(), texts, [], trace, cache, [0, 1])


# -------------------------------------------------------------------------------------------------------- tokenizers


def test_the_literal_tokenizer_is_right() -> None:
    weights = golden.weights("vaeA")
    assert golden.gap(literal.decode(weights, tensor("vaeio/A/z"), 5), tensor("vaeio/A/recon")) < 5e-4
    assert golden.gap(literal.encode(weights, tensor("vaeio/A/image"), 5), tensor("vaeio/A/h")) < 5e-4


@pytest.mark.parametrize("letter", ["A", "B"])
@pytest.mark.parametrize("size", [(64, 64), (96, 32)])
def test_a_tokenizer_in_both_directions(letter: str, size: tuple[int, int]) -> None:
    bits, multipliers = CODES[letter].bits, MULTIPLIERS[letter]
    net = Tokenizer(TokenizerConfig(bits, 32, multipliers)).eval().requires_grad_(False)
    random_weights(net, 0.12)
    image = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(2)) * 2 - 1
    weights: dict[str, Tensor] = net.state_dict()
    latent = literal.encode(weights, image, len(multipliers))
    assert latent.abs().max() > 0.1
    assert latent.shape[2:] == (size[0] // net.config.stride, size[1] // net.config.stride)
    assert golden.gap(net.encoder(image), latent) < 5e-4
    pixels = literal.decode(weights, latent, len(multipliers))
    assert pixels.std() > 0.1
    assert golden.gap(net.decode(latent.float()), pixels) < 5e-4
