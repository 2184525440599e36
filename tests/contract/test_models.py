"""What every family of models promises, checked on the bundled model of each: a new family is tested by being there."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from heatkv_cli.calibration.calibration import Calibration
from heatkv_cli.calibration.statistics import AttentionStatistics, concatenate
from heatkv_cli.config import RunConfig, choices, compose
from heatkv_cli.core.budget import Budget
from heatkv_cli.core.cache import KVCache
from heatkv_cli.core.policy import Policy
from heatkv_cli.errors import BudgetError, ConfigError
from heatkv_cli.methods.base import Method, Setting
from heatkv_cli.models.base import ImageModel, Item, Trace
from heatkv_cli.planning.job import geometry_of, load_model, sketch_of
from heatkv_cli.planning.resolver import Resolver

BUNDLED = [name for name in choices("model") if compose([f"model={name}"]).first.model.weights.place == "package"]
IMAGES = 2
families = pytest.mark.parametrize("family", BUNDLED)


def test_both_families_have_a_bundled_model() -> None:
    targets = {compose([f"model={name}"]).first.model.target.split(".")[2] for name in BUNDLED}
    assert targets == {"infinity", "var"}


@cache
def config(family: str) -> RunConfig:
    return compose([f"model={family}"]).first


@cache
def model(family: str) -> ImageModel:
    return load_model(config(family), Resolver().weights(config(family))[0])


@cache
def items(family: str) -> tuple[Item, ...]:
    return Resolver().prompts(config(family).benchmark).items[:IMAGES]


def generators(first: int = 0, count: int = IMAGES) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(first + i) for i in range(count)]


def rows(family: str) -> int:
    return model(family).rows(IMAGES, config(family).model.sampling)


class Noting:
    """Attention to everything, by concatenation; notes who calls in which order."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.k: dict[int, Tensor] = {}
        self.v: dict[int, Tensor] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
        self.calls.append((layer, tuple(q.shape), q.shape == k.shape == v.shape, q.dtype == k.dtype == v.dtype))
        if layer in self.k:
            k, v = torch.cat((self.k[layer], k), 2), torch.cat((self.v[layer], v), 2)
        self.k[layer], self.v[layer] = k, v
        return (q @ k.transpose(-1, -2) * softmax_scale).softmax(-1) @ v

    def end_step(self) -> None:
        self.calls.append("end")


def generate(family: str, seam: Any, forced: Any = (), draw: bool = True, which: slice = slice(None)) -> Trace:
    net, chosen = model(family), items(family)[which]
    seeds = generators(which.start or 0, len(chosen)) if draw else None
    return net.generate(net.encode(chosen), config(family).model.sampling, seam, seeds, forced)


@cache
def free(family: str) -> Trace:
    return generate(family, Noting())


def close(ours: Trace, theirs: Trace, atol: float = 1e-3) -> None:
    for a, b in zip(ours.logits, theirs.logits, strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=1e-3)


@families
def test_one_call_a_layer_and_scale_then_the_end_of_the_step(family: str) -> None:
    net, seam = model(family), Noting()
    generate(family, seam)
    shape, wanted = net.geometry, []
    for tokens in shape.schedule.lengths:
        for layer in range(shape.num_layers):
            wanted.append((layer, (rows(family), shape.num_heads, tokens, shape.head_dim), True, True))
        wanted.append("end")
    assert seam.calls == wanted
    assert net.geometry == geometry_of(config(family).model)


@families
def test_what_a_trace_holds(family: str) -> None:
    """Whole numbers and finite float32 logits for each scale and image, and a latent that becomes a picture."""
    trace, schedule = free(family), model(family).geometry.schedule
    assert len(trace.codes) == len(trace.logits) == schedule.num_scales
    for codes, logits, tokens in zip(trace.codes, trace.logits, schedule.lengths, strict=True):
        assert len(codes) == len(logits) == IMAGES and logits.shape[1] == tokens
        assert not codes.is_floating_point() and codes.numel() % (IMAGES * tokens) == 0
        assert logits.dtype == torch.float32 and bool(logits.isfinite().all())
    pictures = model(family).decode(trace.latent)
    assert pictures.dtype == torch.uint8 and pictures.shape[0] == IMAGES and pictures.shape[-1] == 3
    assert not torch.equal(pictures[0], pictures[1])


@families
def test_forced_codes_make_the_same_image_without_random_numbers(family: str) -> None:
    again = generate(family, Noting(), free(family).codes, draw=False)
    assert all(map(torch.equal, again.codes, free(family).codes))
    torch.testing.assert_close(again.latent, free(family).latent)
    close(again, free(family), 1e-5)


@families
def test_forced_scales_consume_random_numbers_too(family: str) -> None:
    half = free(family).codes[: len(free(family).codes) // 2]
    again = generate(family, Noting(), half)
    assert all(map(torch.equal, again.codes, free(family).codes))


@families
def test_without_generators_every_scale_is_forced(family: str) -> None:
    with pytest.raises(ValueError, match="scale 1"):
        generate(family, Noting(), free(family).codes[:1], draw=False)


@families
def test_an_image_does_not_depend_on_its_batch(family: str) -> None:
    for i in range(IMAGES):
        alone = generate(family, Noting(), [codes[i : i + 1] for codes in free(family).codes], which=slice(i, i + 1))
        for mine, batch in zip(alone.logits, free(family).logits, strict=True):
            torch.testing.assert_close(mine, batch[i : i + 1], atol=1e-3, rtol=1e-3)


@families
def test_divergence_is_zero_of_the_same_and_positive_of_others(family: str) -> None:
    net, logits = model(family), free(family).logits
    mine, other = ([step[i : i + 1] for step in logits] for i in range(2))
    scales = range(1, net.geometry.num_scales)  # the first has no history
    same, found = net.divergence(mine, mine), net.divergence(mine, other)
    assert list(found) == list(same) == ["kl", *(f"kl_s{t}" for t in scales)]
    assert set(same.values()) == {0.0} and all(value > 0 for value in found.values())
    assert min(list(found.values())[1:]) <= found["kl"] <= max(list(found.values())[1:])


@families
def test_spelled_sampling_has_a_value_a_scale(family: str) -> None:
    sampling, shape = config(family).model.sampling, model(family).geometry
    assert sampling.spelled(shape.num_scales, shape.num_layers) == sampling
    first = sampling.at(range(2))
    assert first == first.spelled(2, shape.num_layers) and sampling.at(range(shape.num_scales)) == sampling
    assert model(family).rows(3, sampling) == (6 if sampling.guided else 3)


@families
def test_the_sketch_is_the_model_without_memory(family: str) -> None:
    made = sketch_of(config(family).model, model(family).geometry)
    for name, net in made.networks.items():
        loaded = getattr(model(family), name)
        assert [key for key, _ in net.named_parameters()] == [key for key, _ in loaded.named_parameters()]
        sketched, real = (sum(p.nbytes for p in some.parameters()) for some in (net, loaded))
        assert sketched == pytest.approx(real, rel=0.03)  # the words of a bundled text encoder stand in its file alone
        assert all(p.is_meta for p in net.parameters())
    trace = made.model.generate(made.condition(IMAGES), config(family).model.sampling, _Nothing(), generators())
    assert trace.latent.is_meta and trace.latent.shape == free(family).latent.shape


class _Nothing(Noting):
    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
        return torch.empty_like(q)


@cache
def calibration(family: str) -> Calibration:
    statistics, shape = AttentionStatistics(model(family).geometry, IMAGES), model(family).geometry
    kv = KVCache(shape, Policy(shape.full_tokens), rows(family), IMAGES, observers=(statistics,))
    generate(family, kv)
    return Calibration(shape, "contract", tuple(range(IMAGES)), **concatenate([statistics]))


def through(family: str, name: str, text: str) -> tuple[Trace, dict[str, float]] | BudgetError:
    """The full run's codes once more, through the cache of a method."""
    made: Method = compose([f"method={name}"]).first.method.object
    budget, shape = Budget.parse(text), model(family).geometry
    setting = Setting(shape, budget, rows(family), calibration=calibration(family) if made.calibrated else None)
    try:
        plan = made.plan(setting) if made.plan_type else None
        kv = KVCache(shape, made.policy(replace(setting, plan=plan)), rows(family), IMAGES, budget=budget)
    except BudgetError as error:
        return error
    trace = generate(family, kv, free(family).codes, draw=False)
    return trace, kv.ledger.ratios()


@families
def test_the_full_cache_changes_nothing(family: str) -> None:
    found = through(family, "full", "1")
    assert isinstance(found, tuple)
    close(found[0], free(family))
    assert found[1]["beta_live"] == 1


@pytest.mark.parametrize("name", [name for name in choices("method") if name != "full"])
@families
def test_every_method_runs_within_its_budget_and_is_felt(family: str, name: str) -> None:
    found = through(family, name, "0.3")
    if isinstance(found, BudgetError):
        found = through(family, name, "0.6")
    assert isinstance(found, tuple), found
    trace, ratios = found
    assert ratios["beta_live"] <= ratios["beta_alloc"] <= 0.6 * 1.005
    kl = [
        model(family).divergence(
            *([step[i : i + 1] for step in steps] for steps in (free(family).logits, trace.logits))
        )
        for i in range(IMAGES)
    ]
    assert all(one["kl"] > 1e-5 for one in kl)
    assert torch.equal(trace.latent, free(family).latent)


@families
def test_items_that_the_model_cannot_draw(family: str, tmp_path: Path) -> None:
    """Told by prepare, before the first image."""
    strange = replace(items(family)[0], id="strange", prompt="zebra crossing", meta={"class_index": 10**6})  # type: ignore[type-var]
    with pytest.raises(ConfigError, match=r"zebra|strange") as caught:
        model(family).prepare([*items(family), strange], tmp_path)
    assert caught.value.hint
    model(family).prepare(items(family), tmp_path)
