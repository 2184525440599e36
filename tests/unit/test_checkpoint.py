"""Official checkpoints at tiny size: every container loads through the very functions the real ones use.

The weights are the committed golden ones, under official names; the bits they must give are the official ones.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from recorder import Recorder
from small_models import SMALL_INFINITY
from torch import nn

from heatkv_cli.config import compose
from heatkv_cli.errors import ArtifactError, SetupError
from heatkv_cli.models.infinity.checkpoint import identify
from heatkv_cli.models.infinity.containers import open_checkpoint
from heatkv_cli.models.infinity.model import InfinityModel
from heatkv_cli.models.weights import sha256_path
from heatkv_cli.planning.job import load_model
from heatkv_cli.planning.resolver import Resolver

sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))

import infinity_golden as golden
from infinity_files import (
    CONTAINERS,
    Tensors,
    flat,
    load,
    official,
    one_safetensors,
    pixels,
    sharded_safetensors,
    training,
    unwrapped,
    wrapped,
)
from test_infinity_keys import TABLE


def same(net: nn.Module, tensors: Tensors) -> bool:
    found = net.state_dict()
    return set(found) == set(tensors) and all(torch.equal(found[name], t) for name, t in tensors.items())


@pytest.mark.parametrize("write", CONTAINERS)
@pytest.mark.parametrize("model", ["A", "B"])
def test_a_container_gives_the_official_bits(tmp_path: Path, model: str, write: Any) -> None:
    tensors, vae = official(model), pixels(model)
    loaded = load(write(tmp_path, tensors), wrapped(tmp_path, vae), model)
    assert same(loaded.transformer, tensors) and same(loaded.tokenizer, vae)
    assert not any(t.is_meta or t.requires_grad for t in loaded.transformer.state_dict().values())
    run, cache = golden.Run(f"{model}_forced", golden.RUNS[f"{model}_forced"]), Recorder()
    result = golden.generate(run, cache, loaded)
    assert not golden.beyond(golden.errors(run, loaded, result, cache.k, cache.v))
    images = loaded.decode(result.trace.latent)
    assert images.shape == (run.batch, 256, 256, 3)


def test_a_free_run_gives_the_official_bits(tmp_path: Path) -> None:
    run, cache = golden.Run("A_nocfg", golden.RUNS["A_nocfg"]), Recorder()
    loaded = load(sharded_safetensors(tmp_path, official("A")), wrapped(tmp_path, pixels("A")))
    result = golden.generate(run, cache, loaded)
    assert torch.equal(run.tokens(result.trace.codes), golden.tensor("run/A_nocfg/bits"))


@pytest.mark.parametrize("model", ["A", "B"])
@pytest.mark.parametrize("write", [wrapped, unwrapped, flat, one_safetensors])
def test_a_tokenizer_in_every_style(tmp_path: Path, model: str, write: Any) -> None:
    vae = pixels(model)
    (tmp_path / "net").mkdir()
    assert same(load(flat(tmp_path / "net", official(model)), write(tmp_path, vae), model).tokenizer, vae)


def test_the_official_tokenizer_gives_the_official_picture(tmp_path: Path) -> None:
    golden.tensor("vaeA/decoder.conv_in.conv.weight")
    vae = {name: t for name, t in golden.weights("vaeA").items() if not name.endswith("lfq.mask")}
    loaded = load(flat(tmp_path, official("A")), unwrapped(tmp_path, vae))
    image = loaded.decode(golden.tensor("run/A_forced/summed_codes")).flip(-1)
    assert (image.int() - golden.tensor("run/A_forced/image_bgr_u8").int()).abs().max() <= 1


def test_blocks_in_the_models_dtype_and_the_rest_in_float32(tmp_path: Path) -> None:
    loaded = load(flat(tmp_path, official("A")), wrapped(tmp_path, pixels("A")), dtype="bfloat16")
    for name, t in loaded.transformer.state_dict().items():
        wanted = torch.bfloat16 if name.startswith("block_chunks.") else torch.float32
        assert t.dtype == wanted, name
        assert torch.equal(t, official("A")[name].to(wanted)), name
    run = golden.Run("A_forced", golden.RUNS["A_forced"])
    logits = golden.difference(run, golden.generate(run, Recorder(), loaded).trace)
    exact = golden.tensor("run/A_forced/logits")
    error = (golden.every(logits, exact, 1) - (exact[..., 1] - exact[..., 0])).abs()
    assert 0 < error.mean() < 0.2  # bfloat16, and not noise
    assert {t.dtype for t in loaded.tokenizer.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("shape", [(1, 1, 4, 1), (1, 1, 1, 4), (4, 1, 1, 1)])
def test_temperatures_in_any_layout(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensors = official("A")
    turned = {n: t.reshape(shape) if n.endswith("scale_mul_1H11") else t for n, t in tensors.items()}
    assert same(load(flat(tmp_path, turned), wrapped(tmp_path, pixels("A"))).transformer, tensors)


@pytest.mark.parametrize(
    ("name", "model", "net"),
    [("infinity-2b", "A", "infinity_2b_reg.pth"), ("infinity-8b", "B", "infinity_8b_weights")],
)
def test_from_the_yaml_and_a_folder_of_weights(tmp_path: Path, name: str, model: str, net: str) -> None:
    """The files under the names of conf/model, all sizes but the kind of token overridden."""
    run = compose(
        [
            f"model={name}",
            f"weights={tmp_path}",
            *SMALL_INFINITY,
            "force_resolution=true",
            f"model.params.tokenizer.bits={golden.CODES[model].bits}",
            "model.weights.verify=false",
            f"model.params.tokenizer.multipliers={[*golden.MULTIPLIERS[model]]}",
        ]
    ).first
    names = {f.role: f.name for f in run.model.weights.files}
    assert names["transformer"] == net
    write = sharded_safetensors if model == "B" else flat
    write(tmp_path, official(model)).rename(tmp_path / net)
    wrapped(tmp_path, pixels(model)).rename(tmp_path / names["tokenizer"])
    with pytest.raises(SetupError, match="flan-t5-xl is missing"):
        Resolver().weights(run)
    (tmp_path / "flan-t5-xl").mkdir()
    files, digest = Resolver().weights(run)
    assert len(digest) == 64
    loaded = load_model(run, {role: path for role, path in files.items() if role != "text"})
    assert isinstance(loaded, InfinityModel) and loaded.codes == golden.CODES[model]
    assert loaded.transformer.layers()[0].ffn.fc1.weight.dtype == torch.bfloat16
    assert loaded.rope.shape[1] == 521


def test_what_may_be_absent_and_what_is_ignored(tmp_path: Path) -> None:
    tensors = {n: t for n, t in official("A").items() if not n.endswith("zero_k_bias")}
    stale = {"lvl_1L": torch.arange(9), "attn_bias_for_masking": torch.full((1, 1, 2, 2), -torch.inf)}
    stale |= {"Infinity_visible_kvlen": torch.ones(3), "Infinity_invisible_qlen": torch.ones(3)}
    net = load(flat(tmp_path, tensors | stale), wrapped(tmp_path, pixels("A"))).transformer
    found = net.state_dict()
    assert all(torch.equal(found[n], tensors[n]) for n in tensors)
    assert all(not found[n].any() for n in found.keys() - tensors.keys())


def test_averaged_weights_only_when_asked_for(tmp_path: Path) -> None:
    path, vae = training(tmp_path, official("A")), wrapped(tmp_path, pixels("A"))
    assert not load(path, vae, ema=True).transformer.head.weight.any()
    with pytest.raises(ArtifactError, match="gpt_ema_fsdp"):
        load(flat(tmp_path, official("A")), vae, ema=True)


def test_checkpoints_of_ones_own_are_settings(tmp_path: Path) -> None:
    """Averaged weights and upstream's other level embedding can be typed, and are other runs then."""
    released = compose(["model=infinity-2b"]).first.model
    assert "ema" not in released.identity()["params"]
    for key in ("ema", "level_embed_per_chunk"):
        assert released.params[key] is None
        own = compose(["model=infinity-2b", f"model.params.{key}=true"]).first.model
        assert own.identity() != released.identity() and own.identity()["params"][key] is True
    vae, net = wrapped(tmp_path, pixels("A")), flat(tmp_path, official("A"))
    assert load(net, vae).transformer.config.level_embed_once
    assert not load(net, vae, level_embed_per_chunk=True).transformer.config.level_embed_once


def test_the_unconditional_text_gets_the_models_length(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors, vae = official("A"), wrapped(tmp_path, pixels("A"))
    short = load(flat(tmp_path, tensors), vae, text_length=20).transformer.cfg_uncond
    assert torch.equal(short, tensors["cfg_uncond"][:20]) and not caplog.records
    with caplog.at_level("WARNING", "heatkv"):
        long = load(flat(tmp_path, tensors), vae, text_length=40).transformer.cfg_uncond
    assert torch.equal(long[:32], tensors["cfg_uncond"]) and "rows 32 to 39" in caplog.text
    # upstream's constructor: truncated normal of 1.2 from seed 0 over the square root of the channels
    start = torch.empty(40, 256)
    nn.init.trunc_normal_(start, std=1.2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(long[32:], start[32:] / 16)


def test_without_a_text_encoder_features_are_passed_in(tmp_path: Path) -> None:
    loaded = load(flat(tmp_path, official("A")), wrapped(tmp_path, pixels("A")))
    assert loaded.text is None


def test_the_digest_of_a_folder_is_that_of_its_files(tmp_path: Path) -> None:
    folder = sharded_safetensors(tmp_path, official("A"))
    before = sha256_path(folder)
    (folder / "README.md").write_text("not read by a loader")
    assert sha256_path(folder) == before
    (folder / "model.safetensors.index.json").write_text("{}")
    assert sha256_path(folder) != before


def test_the_released_models_are_recognised() -> None:
    names = {name: identify({k: tuple(s) for k, s in keys.items()}).name for name, keys in TABLE.items()}  # type: ignore[union-attr]
    assert names["infinity_2b"] == "infinity-2b" and names["infinity_8b"] == "infinity-8b"
    assert "d32reg" in names["vae_d32_s16"] and "patchify" in names["vae_d14_s8_patchify"]


def test_opening_reads_no_tensors(tmp_path: Path) -> None:
    entries = open_checkpoint(sharded_safetensors(tmp_path, official("A")))
    assert {n: e.shape for n, e in entries.items()} == {n: tuple(t.shape) for n, t in official("A").items()}
