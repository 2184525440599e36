"""Official VAR checkpoints at tiny size, through the functions that the real ones go through."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from recorder import Recorder
from safetensors.torch import save_file
from torch import Tensor, nn

from heatkv_cli.core.scales import Geometry, ScaleSchedule
from heatkv_cli.errors import ArtifactError, ConfigError, SetupError
from heatkv_cli.models.var.load import load, networks, save_bundle
from heatkv_cli.models.var.model import VarModel
from heatkv_cli.models.var.sampling import Sampling
from heatkv_cli.models.var.tokenizer import Tokenizer, TokenizerConfig
from heatkv_cli.models.var.transformer import Var, VarConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))


SIZES = ((1, 1), (2, 2), (3, 3))
TOKENS = 14
PIXELS = TokenizerConfig(16, 4, 8, (1, 2), 1, 4)
SETTINGS: dict[str, Any] = {"device": "cpu", "width": 16, "classes": 3, "tokenizer": PIXELS}

Tensors = dict[str, Tensor]


def geometry(depth: int = 2, sizes: tuple[tuple[int, int], ...] = SIZES) -> Geometry:
    return Geometry("var-test", depth, 2, 8, ScaleSchedule(sizes), 1)


def make(shared: bool = False, l2_norm: bool = True, depth: int = 2, **pixels: Any) -> tuple[Var, Tokenizer]:
    torch.manual_seed(depth)
    nets = networks(geometry(depth), 16, 3, shared, l2_norm, replace(PIXELS, **pixels))
    for net in nets:
        net.to_empty(device="cpu")
        for name, t in net.state_dict().items():
            t.zero_() if name.endswith("zero_k_bias") else t.normal_()
    return nets


def official(net: Var) -> Tensors:
    """With the buffers that official files have."""
    level = torch.cat([torch.full((h * w,), s) for s, (h, w) in enumerate(SIZES)])[None]
    mask = torch.where(level[0, :, None] >= level, 0.0, -torch.inf)[None, None]
    return {**net.state_dict(), "lvl_1L": level, "attn_bias_for_masking": mask}


def official_pixels(pixels: Tokenizer) -> Tensors:
    return {**pixels.state_dict(), "quantize.ema_vocab_hit_SV": torch.ones(7, 16)}


def write(folder: Path, net: Tensors, pixels: Tensors) -> dict[str, Path]:
    paths = {"transformer": folder / "var_d2.pth", "tokenizer": folder / "vae.pth"}
    torch.save(net, paths["transformer"])
    torch.save(pixels, paths["tokenizer"])
    return paths


def training(folder: Path, net: Tensors, pixels: Tensors) -> dict[str, Path]:
    """What upstream's train.py saves: one file with both, optimiser and arguments beside them."""
    trainer = {"var_wo_ddp": net, "vae_local": pixels, "var_opt": {"optimizer": {"state": {}}}, "config": {"tclip": 2}}
    path = folder / "ar-ckpt-last.pth"
    torch.save({"epoch": 3, "iter": 0, "trainer": trainer, "args": {"depth": 2, "pn": "1_2_3"}}, path)
    return {"transformer": path, "tokenizer": path}


def safetensors(folder: Path, net: Tensors, pixels: Tensors) -> dict[str, Path]:
    paths = {"transformer": folder / "var.safetensors", "tokenizer": folder / "vae.safetensors"}
    save_file(net, paths["transformer"])
    save_file(pixels, paths["tokenizer"])
    return paths


def same(net: nn.Module, other: nn.Module) -> bool:
    ours, theirs = net.state_dict(), other.state_dict()
    return set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("container", [write, training, safetensors])
@pytest.mark.parametrize(("shared", "l2_norm"), [(False, True), (True, True), (False, False)])
def test_a_container_gives_the_weights(tmp_path: Path, container: Any, shared: bool, l2_norm: bool) -> None:
    net, pixels = make(shared, l2_norm)
    files = container(tmp_path, official(net), official_pixels(pixels))
    model = load(geometry(), files, **SETTINGS, shared=shared, l2_norm=l2_norm)
    assert same(model.transformer, net) and same(model.tokenizer, pixels)
    everything = [*model.transformer.state_dict().values(), *model.tokenizer.state_dict().values()]
    assert not any(t.is_meta or t.requires_grad for t in everything)
    trace = model.generate(torch.tensor([0, 2]), Sampling(), Recorder(), [torch.Generator()] * 2)
    assert model.decode(trace.latent).shape == (2, 6, 6, 3)


def test_absent_zero_biases_are_zero(tmp_path: Path) -> None:
    net, pixels = make()
    tensors = {name: t for name, t in official(net).items() if not name.endswith("zero_k_bias")}
    assert same(load(geometry(), write(tmp_path, tensors, pixels.state_dict()), **SETTINGS).transformer, net)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_blocks_in_the_models_dtype_and_the_rest_in_float32(tmp_path: Path, dtype: str) -> None:
    net, pixels = make()
    files = write(tmp_path, official(net), official_pixels(pixels))
    model, exact = (load(geometry(), files, **SETTINGS, dtype=d) for d in (dtype, "float32"))  # type: ignore[arg-type]
    for name, t in model.transformer.state_dict().items():
        assert t.dtype == (getattr(torch, dtype) if name.startswith("blocks.") else torch.float32), name
    assert {t.dtype for t in model.tokenizer.state_dict().values()} == {torch.float32}
    cache = Recorder()
    codes = [torch.zeros(1, h * w, dtype=torch.int64) for h, w in SIZES]
    classes, sampling = torch.tensor([1]), Sampling()
    rounded = model.generate(classes, sampling, cache, None, codes).logits[-1]
    whole = exact.generate(classes, sampling, Recorder(), None, codes).logits[-1]
    assert rounded.dtype == torch.float32 and cache.k[0].dtype == cache.v[0].dtype == getattr(torch, dtype)
    assert 0 < (rounded - whole).abs().mean() < 0.1 * whole.abs().mean()


def test_a_bundle_comes_back_in_half_precision(tmp_path: Path) -> None:
    net, pixels = make(shared=True)
    path = tmp_path / "tiny.safetensors"
    save_bundle(path, net, pixels)
    model = load(geometry(), {"model": path}, **SETTINGS, shared=True)
    for ours, theirs in ((model.transformer, net), (model.tokenizer, pixels)):
        for name, t in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], t.half().float())


def test_random_weights_run() -> None:
    model = load(geometry(), {}, **SETTINGS)
    trace = model.generate(torch.tensor([0]), Sampling(), Recorder(), [torch.Generator().manual_seed(0)])
    assert isinstance(model, VarModel) and trace.latent.isfinite().all()
    assert same(model.transformer, load(geometry(), {}, **SETTINGS).transformer)


# ----------------------------------------------------------------------------------------------------------- errors


def broken(tmp_path: Path, error: type[Exception], pattern: str, files: dict[str, Path], **settings: Any) -> None:
    with pytest.raises(error, match=pattern) as caught:
        load(settings.pop("geometry", geometry()), files, **(SETTINGS | settings))
    assert caught.value.hint  # type: ignore[attr-defined]


def test_another_depth(tmp_path: Path) -> None:
    net, pixels = make(depth=3)
    files = write(tmp_path, official(net), official_pixels(pixels))
    broken(tmp_path, ArtifactError, "VAR transformer of depth 3.*var-test needs a VAR transformer of depth 2", files)


def test_a_training_checkpoint_of_another_model(tmp_path: Path) -> None:
    net, pixels = make(depth=3)
    files = training(tmp_path, official(net), official_pixels(pixels))
    broken(tmp_path, ArtifactError, "holds a VAR transformer of depth 3", files)


def test_a_training_checkpoint_of_infinity(tmp_path: Path) -> None:
    net, pixels = make()
    files = write(tmp_path, official(net), official_pixels(pixels))
    torch.save({"trainer": {"gpt_fsdp": official(net)}}, files["transformer"])
    broken(tmp_path, ArtifactError, r"no state dict \(looked at the file itself, trainer.var_wo_ddp\)", files)


def test_roles_swapped(tmp_path: Path) -> None:
    net, pixels = make()
    files = write(tmp_path, official(net), official_pixels(pixels))
    swapped = {"transformer": files["tokenizer"], "tokenizer": files["transformer"]}
    broken(tmp_path, ArtifactError, "holds a VAR tokenizer.*needs a VAR transformer", swapped)


def test_a_tokenizer_of_another_shape(tmp_path: Path) -> None:
    net, pixels = make(vocabulary=32)
    files = write(tmp_path, official(make()[0]), official_pixels(pixels))
    broken(tmp_path, ArtifactError, "holds a VAR tokenizer of codes 32.*needs a VAR tokenizer of codes 16", files)
    files = write(tmp_path, official(make()[0]), official_pixels(make()[1]))
    broken(tmp_path, ArtifactError, "needs a VAR transformer", files, tokenizer=replace(PIXELS, vocabulary=32))
    assert net.config.vocabulary == 32


def test_attention_without_temperatures(tmp_path: Path) -> None:
    """Files from before the temperatures, which were replaced by their authors."""
    net, pixels = make(l2_norm=False)
    files = write(tmp_path, official(net), official_pixels(pixels))
    broken(tmp_path, ArtifactError, "no scale_mul_1H11.*the model needs", files)
    other = write(tmp_path, official(make()[0]), official_pixels(pixels))
    broken(tmp_path, ArtifactError, "a scale_mul_1H11.*has none", other, l2_norm=False)


def test_a_modulation_of_the_other_kind(tmp_path: Path) -> None:
    net, pixels = make(shared=True)
    files = write(tmp_path, official(net), official_pixels(pixels))
    broken(tmp_path, ArtifactError, "shared_ada_lin.*model has none", files)


def test_other_scales_with_as_many_tokens(tmp_path: Path) -> None:
    net, pixels = make()
    tensors = official(net) | {"lvl_1L": torch.tensor([[0] * 4 + [1] + [2] * 9])}
    files = write(tmp_path, tensors, official_pixels(pixels))
    broken(tmp_path, ArtifactError, "trained at other scales than the 3", files)


def test_another_resolution(tmp_path: Path) -> None:
    net, pixels = make()
    files = write(tmp_path, official(net), official_pixels(pixels))
    other = geometry(sizes=((1, 1), (2, 2), (4, 4)))
    broken(tmp_path, ArtifactError, f"tokens {TOKENS}.*needs.*tokens 21", files, geometry=other)


@pytest.mark.parametrize("role", ["transformer", "tokenizer"])
@pytest.mark.parametrize("change", ["missing", "unexpected", "nan", "cut", "absent"])
def test_damage(tmp_path: Path, role: str, change: str) -> None:
    net, pixels = make()
    parts = {"transformer": official(net), "tokenizer": official_pixels(pixels)}
    name = "head.bias" if role == "transformer" else "decoder.conv_out.bias"
    if change == "missing":
        del parts[role][name]
    if change == "unexpected":
        parts[role]["extra.weight"] = torch.ones(1)
    if change == "nan":
        parts[role][name] = torch.full_like(parts[role][name], torch.nan)
    files = write(tmp_path, parts["transformer"], parts["tokenizer"])
    if change == "cut":
        files[role].write_bytes(files[role].read_bytes()[:-5000])
    if change == "absent":
        files[role].unlink()
    pattern = {
        "missing": f"1 missing .{name}",
        "unexpected": "1 unexpected .extra.weight",
        "nan": f"{name} holds NaN",
        "cut": "cut short",
        "absent": "is missing",
    }[change]
    broken(tmp_path, SetupError if change == "absent" else ArtifactError, pattern, files)


def test_a_file_that_is_no_bundle(tmp_path: Path) -> None:
    net, _ = make()
    path = tmp_path / "x.safetensors"
    save_file(dict(net.state_dict()), path)
    broken(tmp_path, ArtifactError, "is not a bundled model: it holds", {"model": path})


def test_numbers_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match="width 20 over 2 heads is not head_dim 8"):
        load(geometry(), {}, **(SETTINGS | {"width": 20}))
    with pytest.raises(ConfigError, match="heads must divide the width"):
        VarConfig(2, 17, 2, SIZES)
    with pytest.raises(ConfigError, match="1 scales and 1000 classes"):
        VarConfig(2, 16, 2, SIZES[:1])
    with pytest.raises(ConfigError, match="0 classes"):
        load(geometry(), {}, **(SETTINGS | {"classes": 0}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocabulary", 0),
        ("channels", 0),
        ("base_channels", -8),
        ("multipliers", ()),
        ("multipliers", (1, 0)),
        ("blocks", 0),
        ("norm_groups", 0),
        ("norm_groups", 3),
        ("phi", 0),
        ("stem", 0),
    ],
)
def test_numbers_that_no_tokenizer_has(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"tokenizer: {field} is") as caught:
        replace(PIXELS, **{field: value})
    assert field in caught.value.hint
