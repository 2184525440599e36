"""The T5 text encoder on a folder made here: a tiny random network and a word tokenizer, read like Flan-T5-XL."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from t5_files import WORDS, write_t5

from heatkv_cli.errors import ArtifactError, SetupError
from heatkv_cli.models.infinity.text_t5 import Precision, T5Encoder, positive_text

needs_transformers = pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="needs heatkv[t5]")

CHANNELS = 32
PROMPTS = ["a red circle", "two blue square left of the red circle", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_t5(tmp_path_factory.mktemp("flan-t5"), CHANNELS)


def encoder(folder: Path, dtype: Precision = "float32", pad: bool = False, max_length: int = 64) -> T5Encoder:
    return T5Encoder(folder, CHANNELS, max_length, dtype, pad=pad)


def test_features_end_with_the_prompt(folder: Path) -> None:
    rows = encoder(folder).encode(PROMPTS)
    assert [tuple(r.shape) for r in rows] == [(4, CHANNELS), (9, CHANNELS), (1, CHANNELS)]  # the end token is kept
    assert all(r.dtype == torch.float32 and r.isfinite().all() for r in rows)


def test_a_sentencepiece_model_alone_is_enough(folder: Path, tmp_path: Path) -> None:
    """Older folders hold `spiece.model` and no `tokenizer.json`."""
    pieces = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    shutil.copytree(folder, tmp_path / "t5")
    (tmp_path / "t5" / "tokenizer.json").unlink()
    (tmp_path / "words.txt").write_text("\n".join(f"a {c} {s}" for c in ("red", "blue") for s in ("circle", "square")))
    pieces.SentencePieceTrainer.train(
        input=str(tmp_path / "words.txt"),
        model_prefix=str(tmp_path / "t5" / "spiece"),
        vocab_size=len(WORDS),
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "pad_token": "<pad>", "eos_token": "</s>"}
    (tmp_path / "t5" / "tokenizer_config.json").write_text(json.dumps(settings | {"unk_token": "<unk>"}))
    reader = pieces.SentencePieceProcessor(model_file=str(tmp_path / "t5" / "spiece.model"))
    assert reader.get_piece_size() <= len(WORDS)
    net = encoder(tmp_path / "t5")
    (row,) = net.encode(["a red circle"])
    assert net._loaded is not None
    assert net._loaded[0]("a red circle")["input_ids"] == [*reader.encode("a red circle"), 1]
    assert len(row) == len(reader.encode("a red circle")) + 1


def test_a_batch_is_its_prompts_one_by_one_up_to_rounding(folder: Path) -> None:
    """Whatever it is padded to; upstream encodes one prompt, padded to the whole length."""
    upstream = [encoder(folder, pad=True).encode([prompt])[0] for prompt in PROMPTS]
    for pad in (False, True):
        net = encoder(folder, pad=pad)
        for wanted, batch, single in zip(upstream, net.encode(PROMPTS), map(net.encode, zip(PROMPTS)), strict=True):
            assert torch.allclose(batch, wanted, atol=1e-5)
            assert torch.allclose(single[0], wanted, atol=1e-5)
    assert (upstream[0][0] - upstream[1][0]).abs().max() > 0.01  # the same word means another thing elsewhere


def test_the_network_is_transformers_own(folder: Path) -> None:
    """The official call, written out: padded to the whole length, cut to the mask."""
    hub = pytest.importorskip("transformers")
    words = hub.AutoTokenizer.from_pretrained(folder)
    net = hub.T5EncoderModel.from_pretrained(folder).eval()
    for prompt, ours in zip(PROMPTS, encoder(folder).encode(PROMPTS), strict=True):
        read = words([prompt], max_length=64, padding="max_length", truncation=True, return_tensors="pt")
        with torch.no_grad():
            hidden = net(read.input_ids, read.attention_mask).last_hidden_state
        assert torch.allclose(ours, hidden[0, : read.attention_mask.sum()], atol=1e-5)


def test_a_long_prompt_is_cut(folder: Path) -> None:
    (row,) = encoder(folder, max_length=6).encode(["a red circle " * 9])
    assert row.shape == (6, CHANNELS)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_precision_is_a_switch(folder: Path, dtype: Precision) -> None:
    net = encoder(folder, dtype)
    near, exact = net.encode(PROMPTS), encoder(folder).encode(PROMPTS)
    assert net._loaded is not None
    dtypes = {name: p.dtype for name, p in net._loaded[1].named_parameters()}
    for name, found in dtypes.items():
        kept = dtype == "float16" and name.endswith(".wo.weight")  # these overflow in half precision
        assert found == (torch.float32 if kept else getattr(torch, dtype)), name
    for a, b in zip(near, exact, strict=True):
        assert a.dtype == getattr(torch, dtype)  # nothing is gained by more
        assert 0 < (a - b).abs().max() < (0.02 if dtype == "float16" else 0.15)


def test_release_frees_and_the_next_prompt_reads_again(folder: Path) -> None:
    net = encoder(folder)
    first = net.encode(PROMPTS)
    net.release()
    assert net._loaded is None
    assert all(torch.equal(a, b) for a, b in zip(first, net.encode(PROMPTS), strict=True))


def test_nothing_is_read_before_the_first_prompt(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    net = encoder(tmp_path)
    with pytest.raises(ArtifactError, match="damaged or incomplete"):
        net.encode(["a"])


def test_missing_tensors_are_not_made_up(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "t5")
    tensors = load_file(folder / "model.safetensors")
    del tensors["encoder.block.1.layer.0.SelfAttention.q.weight"]
    save_file(tensors, tmp_path / "t5" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ArtifactError, match=r"lacks 1 tensors .*block.1.layer.0.SelfAttention.q"):
        encoder(tmp_path / "t5").encode(["a"])


def test_a_truncated_network(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "t5")
    path = tmp_path / "t5" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ArtifactError, match="damaged or incomplete"):
        encoder(tmp_path / "t5").encode(["a"])


def test_values_that_are_not_finite(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "t5")
    tensors = load_file(folder / "model.safetensors")
    tensors["encoder.final_layer_norm.weight"][3] = torch.nan
    save_file(tensors, tmp_path / "t5" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ArtifactError, match="features of 'a' are not finite"):
        encoder(tmp_path / "t5").encode(["a"])


@needs_transformers
def test_a_folder_that_is_not_it(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="is missing"):
        encoder(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match=r"no config\.json"):
        encoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"d_model": 1024}))
    with pytest.raises(ArtifactError, match="width 1024, the transformer reads 32"):
        encoder(tmp_path)


def test_without_transformers_the_fix_is_the_pip_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SetupError, match="not installed") as caught:
        encoder(tmp_path)
    assert caught.value.hint == "pip install 'heatkv[t5]'"


@pytest.mark.parametrize(
    ("prompt", "person"),
    [
        ("a man on a horse", True),
        ("two women", True),
        ("a mango", True),  # letters, not words
        ("the season of rain", True),
        ("A Man", False),  # case counts
        ("a red circle", False),
        ("", False),
    ],
)
def test_persons_get_good_faces(prompt: str, person: bool) -> None:
    faces = ". very smooth faces, good looking faces, face to the camera, perfect facial features"
    assert positive_text(prompt) == prompt + faces * person
