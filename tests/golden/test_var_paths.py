"""Settings that no golden run need show, against a literal VAR that the golden runs check.

Modulation shared or not, attention with and without unit queries, guidance with and without its ramp, smoothing,
sampled codes, ten scales, temperatures above the clamp, the tokenizer in both directions.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import var_golden as golden
import var_literal as literal
from recorder import Recorder
from torch import Tensor, nn
from var_golden import ABSENT, HERE, RUNS, Run, gap, tensor

from heatkv_cli.models.var.model import VarModel
from heatkv_cli.models.var.sampling import Sampling
from heatkv_cli.models.var.tokenizer import Tokenizer, TokenizerConfig
from heatkv_cli.models.var.transformer import Var, VarConfig

pytestmark = pytest.mark.golden

FIVE, TEN = (1, 2, 3, 4, 5), (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)


@pytest.mark.skipif(not HERE, reason=ABSENT)
@pytest.mark.parametrize("name", [n for n in RUNS if not RUNS[n]["more_smooth"]])
def test_the_literal_one_is_right(name: str) -> None:
    run = Run(name, RUNS[name])
    model = run.build()
    config = model.transformer.config
    sides = [h for h, _ in config.sizes]
    setting = literal.Setting(sides, config.heads, run.settings["cfg"], True, config.l2_norm, config.shared)
    weights, pixels = model.transformer.state_dict(), model.tokenizer.state_dict()
    codebook = pixels["quantize.embedding.weight"]
    for b, class_index in enumerate(run.classes.tolist()):
        out = literal.run(weights, pixels, class_index, [codebook[c[b]] for c in run.codes], setting)
        logits = torch.cat([tensor(f"o.{name}.s{s}.cfg_logits")[b] for s in range(len(sides))])
        assert gap(out.logits, logits) < golden.LOGITS
        assert gap(out.latent, tensor(f"o.{name}.s{len(sides) - 1}.f_hat")[b]) < golden.STATE
        for at, part in enumerate("kv"):
            key = f"o.{name}.block3.cached_{part}"
            if key in golden.names():
                assert gap(out.stored[6 + at], tensor(key)[[b, b + len(run.classes)]]) < golden.STATE


@pytest.mark.skipif(not HERE, reason=ABSENT)
def test_the_literal_quantiser_is_right() -> None:
    pixels = golden.tokenizer().state_dict()
    for b in range(2):
        codes, total = literal.encoded(pixels, tensor("o.V.f")[b], FIVE)
        assert all(torch.equal(c, tensor(f"o.V.idx{s}")[b].long()) for s, c in enumerate(codes))
        assert gap(total, tensor("o.V.fhat_last")[b]) < golden.STATE


@dataclass(frozen=True)
class Case:
    """One setting: what differs from a guided, greedy d16-like model."""

    sides: tuple[int, ...] = FIVE
    shared: bool = False
    l2_norm: bool = True
    sampling: Sampling = Sampling(1.5, True, 1, 0.0)  # noqa: RUF009 - frozen


CASES = {
    "main": Case(),
    "ten scales": Case(TEN),
    "shared": Case(shared=True),
    "no unit queries": Case(l2_norm=False),
    "shared, no unit queries": Case(shared=True, l2_norm=False),
    "no guidance": Case(sampling=Sampling(0.0, True, 0, 0.0)),
    "no ramp": Case(sampling=Sampling(1.0, False, 0, 0.0)),
    "top-k": Case(sampling=Sampling(1.5, True, 7, 0.0)),
    "top-p": Case(sampling=Sampling(3.0, True, 0, 0.8)),
    "both, shared": Case(shared=True, sampling=Sampling(4.0, True, 20, 0.9)),
    "smooth": Case(sampling=Sampling(1.5, True, 0, 0.0, more_smooth=True)),
    "smooth, filtered, shared": Case(TEN, shared=True, sampling=Sampling(1.5, True, 20, 0.9, more_smooth=True)),
}


def randomise(net: nn.Module, seed: int) -> None:
    """Weights of a size at which nothing saturates and everything matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in net.named_parameters():
            r = torch.randn(p.shape, generator=generator)
            if name.endswith("scale_mul_1H11"):
                p.copy_(1.5 + r * 0.5)
                p.view(-1)[0] = 5.0  # above the clamp
            elif p.ndim == 1 and "norm" in name and name.endswith("weight"):
                p.copy_(1 + 0.1 * r)
            elif p.ndim >= 2 and name.endswith("weight") and "emb" not in name:
                p.copy_(r / p[0].numel() ** 0.5)
            else:
                p.copy_(0.4 * r)
    net.eval().requires_grad_(False)


def build(case: Case) -> VarModel:
    pixels = Tokenizer(TokenizerConfig(32, 6, 8, (1, 2), 1, 4, 4, 2))
    config = VarConfig(3, 24, 3, tuple((p, p) for p in case.sides), 5, 32, 6, 4.0, case.l2_norm, case.shared)
    net = Var(config)
    randomise(net, 1)
    randomise(pixels, 2)
    return VarModel(golden.geometry(config), net, pixels)


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in (11, 12)]


@pytest.mark.parametrize("name", CASES)
def test_a_setting(name: str) -> None:
    """Free generation: logits, codes, latents, keys and values of two images, each with its own generator."""
    case, cache, classes = CASES[name], Recorder(), torch.tensor([2, 4])
    model, sampling = build(case), case.sampling
    trace = model.generate(classes, sampling, cache, generators())
    setting = literal.Setting(case.sides, 3, sampling.cfg, sampling.ramp, case.l2_norm, case.shared)
    weights, pixels = model.transformer.state_dict(), model.tokenizer.state_dict()
    codebook, scales = pixels["quantize.embedding.weight"], len(case.sides)
    for b, generator in enumerate(generators()):
        vectors = []
        for s in range(scales):  # the stream of this image, asked scale by scale
            index, masked = literal.drawn(trace.logits[s][b], sampling.top_k, sampling.top_p, generator)
            assert torch.equal(index, trace.codes[s][b])
            vectors.append(codebook[index])
            if sampling.more_smooth:
                vectors[-1] = literal.mixed(masked, codebook, s, scales, generator)
        out = literal.run(weights, pixels, int(classes[b]), vectors, setting)
        assert gap(out.logits, torch.cat([part[b] for part in trace.logits])) < golden.LOGITS
        assert gap(out.latent, trace.latent[b]) < golden.LOGITS
        rows = [b, b + 2] if sampling.guided else [b]
        for layer in range(3):
            for ours, theirs in zip((cache.k[layer], cache.v[layer]), out.stored[2 * layer :], strict=False):
                assert gap(theirs if sampling.guided else theirs[None], ours[rows]) < golden.LOGITS


def test_smoothing_changes_the_latent_and_not_the_first_codes() -> None:
    smooth, plain = (build(Case()) for _ in range(2))
    classes = torch.tensor([2, 4])
    with_it = smooth.generate(classes, Sampling(1.5, True, 0, 0.0, True), Recorder(), generators())
    without = plain.generate(classes, Sampling(1.5, True, 0, 0.0), Recorder(), generators())
    assert torch.equal(with_it.codes[0], without.codes[0])
    assert gap(with_it.latent, without.latent) > 0.01


def test_an_image_does_not_depend_on_its_neighbours() -> None:
    model, sampling = build(Case()), Sampling(1.5, True, 0, 0.9)
    both = model.generate(torch.tensor([2, 4]), sampling, Recorder(), generators())
    alone = model.generate(torch.tensor([4]), sampling, Recorder(), generators()[1:])
    assert all(torch.equal(a[1:], b) for a, b in zip(both.codes, alone.codes, strict=True))
    assert gap(both.latent[1:], alone.latent) < golden.LOGITS


@pytest.mark.parametrize("smooth", [False, True])
def test_forced_codes_decide_the_latent(smooth: bool) -> None:
    """Forced, the run repeats itself without generators; with them the other scales draw what they drew."""
    model, plain = build(Case()), Sampling(1.5, True, 0, 0.9)
    classes = torch.tensor([2, 4])
    first = model.generate(classes, plain, Recorder(), generators())
    sampling = Sampling(1.5, True, 0, 0.9, smooth)
    again = model.generate(classes, sampling, Recorder(), None, first.codes)
    assert gap(first.latent, again.latent) == 0
    assert all(torch.equal(a, b) for a, b in zip(first.logits, again.logits, strict=True))
    some = model.generate(classes, plain, Recorder(), generators(), [None, None, first.codes[2]])
    assert all(torch.equal(a, b) for a, b in zip(first.codes, some.codes, strict=True))
    with pytest.raises(ValueError, match="scale 1 is not forced"):
        model.generate(classes, plain, Recorder(), None, first.codes[:1])


@pytest.mark.parametrize("sides", [FIVE, TEN])
def test_the_tokenizer_in_both_directions(sides: tuple[int, ...]) -> None:
    model = build(Case(sides))
    net, sizes = model.tokenizer, model.geometry.schedule.sizes
    image = torch.rand(1, 3, 4 * sides[-1], 4 * sides[-1], generator=torch.Generator().manual_seed(3)) * 2 - 1
    latent = net.features(image)
    total, codes = net.encode(image, sizes)
    wanted, summed = literal.encoded(net.state_dict(), latent[0], sides)
    assert all(torch.equal(a[0], b) for a, b in zip(codes, wanted, strict=True))
    assert gap(total[0], summed) < golden.STATE
    vectors = [net.state_dict()["quantize.embedding.weight"][c] for c in wanted]
    after = literal.summed(net.state_dict(), vectors, sides)
    assert gap(net.quantize.inputs(codes, sizes)[0], literal.inputs(after[:-1], sides)) < golden.STATE
    out = model.decode(total)
    assert out.shape == (1, 4 * sides[-1], 4 * sides[-1], 3) and out.dtype == torch.uint8
    assert torch.equal(out[0], ((net.decode(total)[0].permute(1, 2, 0) + 1) / 2 * 255).to(torch.uint8))


def test_the_stem_is_a_change_of_layout_alone() -> None:
    """A tokenizer with a stem is one without on the rearranged pixels."""
    torch.manual_seed(0)
    one = Tokenizer(TokenizerConfig(32, 6, 8, (1, 2), 1, 4, 4, 2))
    image = torch.randn(1, 3, 8, 8)
    seen: list[Tensor] = []
    one.encoder.conv_in.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    one.features(image)
    for c in range(3):
        for i in range(2):
            for j in range(2):
                assert torch.equal(seen[0][0, 4 * c + 2 * i + j], image[0, c, i::2, j::2])
