"""VAR behind today's contract: classes as prompts, guidance as weights, a sketch without memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from heatkv_cli.core.scales import Geometry, ScaleSchedule
from heatkv_cli.errors import ConfigError
from heatkv_cli.models.base import Sampling
from heatkv_cli.models.var.adapter import VarImageModel, load_model, sketch
from heatkv_cli.models.var.sampling import VarSampling
from heatkv_cli.models.var.tokenizer import TokenizerConfig
from tiny_net import FullAttention

GEOMETRY = Geometry("var-test", 2, 2, 8, ScaleSchedule.squares((1, 2, 3)), 1)
PIXELS = TokenizerConfig(16, 4, 8, (1, 2), 1, 4)
SETTINGS: dict[str, Any] = {"width": 16, "classes": 3, "tokenizer": PIXELS}
NAMES = ("hat", "shoe", "ankle boot")


def model(names: tuple[str, ...] | None = NAMES) -> VarImageModel:
    return load_model(GEOMETRY, {}, "cpu", names=names, **SETTINGS)


def sampling(cfg: tuple[float, ...] = (1.0, 1.75, 2.5), **more: Any) -> Sampling:
    return Sampling(**{"cfg": cfg, "tau": (1.0,) * 3, **more})


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(3)]


def test_a_class_by_its_name_or_its_index() -> None:
    assert model().encode(["ankle boot", "0", "shoe"]).tolist() == [2, 0, 1]
    with pytest.raises(ConfigError, match="no class 'shoes'") as caught:
        model().encode(["shoes"])
    assert "did you mean 'shoe'" in caught.value.hint
    for wrong in ("3", "-1", "1.5"):
        with pytest.raises(ConfigError, match="has no class"):
            model().encode([wrong])
    with pytest.raises(ConfigError, match="has no class 'shoe'"):
        model(None).encode(["shoe"])


@pytest.mark.parametrize(
    ("cfg", "own"), [((1.0, 1.75, 2.5), VarSampling(1.5, True, 5, 0.9)), ((2.5,) * 3, VarSampling(1.5, False, 5, 0.9))]
)
def test_guidance_is_that_of_the_family(cfg: tuple[float, ...], own: VarSampling) -> None:
    net, classes = model(), torch.tensor([1])
    trace = net.generate(classes, sampling(cfg, top_k=5, top_p=0.9), FullAttention(), generators())
    wanted = net.model.generate(classes, own, FullAttention(), generators())
    assert all(torch.equal(a, b) for a, b in zip(trace.bits, wanted.codes, strict=True))
    assert torch.equal(trace.latent, wanted.latent) and trace.logits == ()
    assert net.decode(trace.latent).shape == (1, 6, 6, 3)
    assert net.rows(4, sampling(cfg)) == 8 and net.rows(4, sampling((1.0,) * 3)) == 4


@pytest.mark.parametrize("wrong", [{"cfg": (1.0, 3.0, 2.5)}, {"tau": (1.0, 1.0, 0.5)}, {"guide_layers": (0, -1)}])
def test_knobs_that_the_family_does_not_have(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        model().generate(torch.tensor([1]), sampling(**wrong), FullAttention(), generators())


def test_there_is_no_kl_per_bit() -> None:
    with pytest.raises(ConfigError, match="no KL per bit"):
        model().generate(torch.tensor([1]), sampling(), FullAttention(), None)


def test_a_sketch_has_shapes_and_no_memory() -> None:
    made = sketch(GEOMETRY, dtype="bfloat16", **SETTINGS)
    assert all(p.is_meta for net in made.networks.values() for p in net.parameters())
    trace = made.model.generate(made.condition(2), sampling(), FullAttention(), generators() * 2)
    assert trace.latent.shape == (2, 4, 3, 3) and trace.latent.is_meta
    assert made.model.decode(trace.latent).shape == (2, 6, 6, 3)
    whole = sum(p.nbytes for p in made.networks["transformer"].parameters())
    assert whole < sum(p.numel() * 4 for p in made.networks["transformer"].parameters())
