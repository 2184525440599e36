"""Damaged and mistaken checkpoints: each is one clear error, and no pickle's code is run."""

from __future__ import annotations

import json
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from heatkv_cli.errors import ArtifactError, ConfigError, HeatKVError, SetupError
from heatkv_cli.models.infinity.tokenizer import Tokenizer, TokenizerConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))

from infinity_files import flat, load, official, old_format, pixels, sharded_bin, sharded_safetensors, wrapped


class Marker:
    """A pickle that would make a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


class Code:
    """A pickle that would run a command."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def cut(path: Path, fraction: float = 0.6) -> Path:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * fraction)])
    return path


def cut_pth(folder: Path) -> Path:
    return cut(flat(folder, official("A")))


def cut_old_pth(folder: Path) -> Path:
    return cut(old_format(folder, official("A")))


def cut_shard(folder: Path) -> Path:
    path = sharded_safetensors(folder, official("A"))
    cut(path / "model-00002-of-00003.safetensors")
    return path


def cut_header(folder: Path) -> Path:
    path = sharded_safetensors(folder, official("A"))
    cut(path / "model-00002-of-00003.safetensors", 0.001)
    return path


def cut_bin(folder: Path) -> Path:
    path = sharded_bin(folder, official("A"))
    cut(path / "pytorch_model-00002-of-00003.bin")
    return path


def no_shard(folder: Path) -> Path:
    path = sharded_safetensors(folder, official("A"))
    (path / "model-00002-of-00003.safetensors").unlink()
    return path


def no_index(folder: Path) -> Path:
    path = sharded_safetensors(folder, official("A"))
    (path / "model.safetensors.index.json").unlink()
    return path


def bad_index(folder: Path) -> Path:
    path = sharded_safetensors(folder, official("A"))
    cut(path / "model.safetensors.index.json")
    return path


def leaving_index(folder: Path) -> Path:
    path = sharded_safetensors(folder, official("A"))
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"head.bias": "../x.safetensors"}}))
    return path


def other_shard(folder: Path) -> Path:
    path = sharded_safetensors(folder, official("A"))
    (path / "model-00002-of-00003.safetensors").write_bytes((path / "model-00001-of-00003.safetensors").read_bytes())
    return path


def changed(**changes: Any) -> Callable[[Path], Path]:
    """A flat file with tensors replaced; None takes one out."""

    def write(folder: Path) -> Path:
        tensors = official("A")
        for name, value in changes.items():
            name = name.replace("__", ".")
            if value is None:
                del tensors[name]
            else:
                tensors[name] = value(tensors[name]) if callable(value) else value
        return flat(folder, tensors)

    return write


def poisoned(value: float) -> Callable[[Tensor], Tensor]:
    return lambda t: t.index_fill(0, torch.tensor([1]), value)


def wrong_depth(folder: Path) -> Path:
    return flat(folder, {n: t for n, t in official("A").items() if not n.startswith("block_chunks.1.module.1.")})


def wrong_width(folder: Path) -> Path:
    return flat(folder, {n: t.repeat(*(2 if s == 64 else 1 for s in t.shape)) for n, t in official("A").items()})


def code_in_pickle(folder: Path) -> Path:
    torch.save(official("A") | {"x": Marker(folder / "ran")}, folder / "infinity.pth")
    return folder / "infinity.pth"


def code_in_old_pickle(folder: Path) -> Path:
    with (folder / "infinity.pth").open("wb") as handle:
        pickle.dump(Code(f"touch {folder / 'ran'}"), handle)
    return folder / "infinity.pth"


def code_in_new_pickle(folder: Path) -> Path:
    torch.save({"x": Code(f"touch {folder / 'ran'}")}, folder / "infinity.pth", pickle_protocol=4)
    return folder / "infinity.pth"


def code_in_shard(folder: Path) -> Path:
    path = sharded_bin(folder, official("A"))
    torch.save({"x": Code(f"touch {folder / 'ran'}")}, path / "pytorch_model-00002-of-00003.bin")
    return path


def written(data: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / "infinity.pth").write_bytes(data)
        return folder / "infinity.pth"

    return write


def a_list(folder: Path) -> Path:
    torch.save([1, 2], folder / "infinity.pth")
    return folder / "infinity.pth"


BLOCK = "block_chunks__0__module__1__"

DAMAGE: dict[str, tuple[Callable[[Path], Path], type[HeatKVError], str]] = {
    "truncated pth": (cut_pth, ArtifactError, "cut short"),
    "truncated pth of the old format": (cut_old_pth, ArtifactError, "cut short|damaged"),
    "truncated shard": (cut_shard, ArtifactError, "00002.*cut short"),
    "truncated header of a shard": (cut_header, ArtifactError, "00002.*(cut short|not a checkpoint)"),
    "truncated bin": (cut_bin, ArtifactError, "00002.*cut short"),
    "missing shard": (no_shard, SetupError, "lacks 1 of 3 shards: model-00002"),
    "missing index": (no_index, ArtifactError, "no index"),
    "damaged index": (bad_index, ArtifactError, "index.json is not an index"),
    "index that leaves its folder": (leaving_index, ArtifactError, "outside its folder"),
    "shard of another download": (other_shard, ArtifactError, "00002.*(lacks|repeats)"),
    "NaN": (changed(**{f"{BLOCK}ffn__fc1__weight": poisoned(torch.nan)}), ArtifactError, "1.ffn.fc1.weight.*NaN"),
    "infinity": (changed(pos_start=lambda t: t / 0), ArtifactError, "pos_start holds NaN or infinite"),
    "wrong depth": (wrong_depth, ArtifactError, "transformer of depth 3, .* needs a transformer of depth 4"),
    "wrong width": (wrong_width, ArtifactError, "width 128.* needs .*width 64"),
    "missing key": (changed(**{f"{BLOCK}sa__q_bias": None}), ArtifactError, "1 missing .*module.1.sa.q_bias"),
    "missing word_embed": (changed(word_embed__weight=None), ArtifactError, r"1 missing \(word_embed.weight\)"),
    "unexpected key": (changed(ca_gamma=torch.ones(3)), ArtifactError, r"1 unexpected \(ca_gamma\)"),
    "swapped q and v bias": (
        changed(**{f"{BLOCK}sa__q_bias": torch.zeros(192), f"{BLOCK}sa__v_bias": torch.zeros(1, 64)}),
        ArtifactError,
        r"sa.q_bias has shape \[192\], the model needs \[64\] \(and 1 more\)",
    ),
    "temperatures of other heads": (
        changed(**{f"{BLOCK}sa__scale_mul_1H11": torch.zeros(1, 8, 1, 1)}),
        ArtifactError,
        "scale_mul_1H11 has shape",
    ),
    "integers": (changed(head__bias=lambda t: t.long()), ArtifactError, "head.bias holds torch.int64"),
    "code in a pickle": (code_in_pickle, ArtifactError, "asks for code to be run.*nothing was run"),
    "code in an old pickle": (code_in_old_pickle, ArtifactError, "asks for code to be run.*nothing was run"),
    "code in a pickle of protocol 4": (code_in_new_pickle, ArtifactError, "asks for code to be run.*nothing was run"),
    "code in a shard": (code_in_shard, ArtifactError, "00002.*asks for code to be run.*nothing was run"),
    "a text": (written(b"<!doctype html><html>Not found"), ArtifactError, "not a checkpoint"),
    "nothing": (written(b""), ArtifactError, "not a checkpoint"),
    "a pickle of nonsense": (written(b"\x80\x02nonsense"), ArtifactError, "not a checkpoint"),
    "a zip of nonsense": (written(b"PK\x05\x06" + bytes(18)), ArtifactError, "damaged"),
    "a git-lfs pointer": (written(b"version https://git-lfs.github.com/spec/v1\noid"), ArtifactError, "git-lfs"),
    "a list": (a_list, ArtifactError, "holds no state dict.* a list"),
    "no file": (lambda folder: folder / "infinity.pth", SetupError, "is missing"),
    "a tokenizer": (lambda folder: wrapped(folder, pixels("A")), ArtifactError, "holds a tokenizer of bits 8"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_one_clear_error(tmp_path: Path, kind: str) -> None:
    write, error, message = DAMAGE[kind]
    (tmp_path / "net").mkdir()
    path, vae = write(tmp_path / "net"), wrapped(tmp_path, pixels("A"))
    with pytest.raises(error, match=message) as caught:
        load(path, vae)
    assert str(tmp_path) in caught.value.message and caught.value.hint and "\n" not in caught.value.message
    assert not (tmp_path / "net" / "ran").exists()


def test_the_code_in_those_pickles_would_have_run(tmp_path: Path) -> None:
    for write in (code_in_pickle, code_in_old_pickle):
        path = write(tmp_path)
        if write is code_in_pickle:
            torch.load(path, weights_only=False)
        else:
            pickle.loads(path.read_bytes())
        (tmp_path / "ran").unlink()  # it was made


def test_values_beyond_half_precision(tmp_path: Path) -> None:
    path = changed(**{f"{BLOCK}sa__q_bias": lambda t: t + 1e5})(tmp_path)
    load(path, wrapped(tmp_path, pixels("A")))
    with pytest.raises(ArtifactError, match=r"sa.q_bias does not fit in torch.float16"):
        load(path, wrapped(tmp_path, pixels("A")), dtype="float16")


def test_a_wrong_pair_names_both(tmp_path: Path) -> None:
    net, vae = flat(tmp_path, official("A")), wrapped(tmp_path, pixels("A", bits=16))
    with pytest.raises(
        ArtifactError, match=r"vae.pth does not fit .*infinity.pth: .* 16 bits a token.* reads 8|reads 8"
    ):
        load(net, vae)
    net = flat(tmp_path, official("B"))  # 2 x 2 x 4 bits are not 2 x 2 x 8
    with pytest.raises(ArtifactError, match="2 x 2 positions a token gives 32 bits a token"):
        load(net, wrapped(tmp_path, pixels("B", bits=8)), "B")


def test_a_tokenizer_of_the_right_bits_and_another_shape(tmp_path: Path) -> None:
    vae = dict(Tokenizer(TokenizerConfig(8, 32, (1, 1, 2, 2))).state_dict())
    with pytest.raises(ArtifactError, match=r"levels 4.* needs a tokenizer of bits 8, levels 5"):
        load(flat(tmp_path, official("A")), wrapped(tmp_path, vae))


@pytest.mark.parametrize("leave_out", ["encoder.conv_in.conv.bias", "decoder.up.0.block.1.norm1.norm.weight"])
def test_an_incomplete_tokenizer(tmp_path: Path, leave_out: str) -> None:
    vae = pixels("A")
    del vae[leave_out]
    with pytest.raises(ArtifactError, match=f"1 missing .{leave_out}"):
        load(flat(tmp_path, official("A")), wrapped(tmp_path, vae))


def test_a_width_that_the_geometry_contradicts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="head_dim"):
        load(flat(tmp_path, official("A")), wrapped(tmp_path, pixels("A")), width=128)
