"""The T5 text encoder on a folder made here: a tiny random network and a word tokenizer, read like Flan-T5-XL."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from heatkv_cli.errors import ArtifactError, SetupError
from heatkv_cli.models.infinity.text_t5 import Precision, T5Encoder

needs_transformers = pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="needs heatkv[t5]")

WORDS = [
    "<pad>",
    "</s>",
    "<unk>",
    *"a red blue circle square left of right above the two green ring star arrow cross below touching big".split(),
]
CHANNELS = 32
PROMPTS = ["a red circle", "two blue square left of the red circle", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Flan-T5's shape at a thousandth of its size: gated GELU, relative positions, `</s>` appended, padding 0."""
    hub = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    path = tmp_path_factory.mktemp("flan-t5")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    hub.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(path)
    torch.manual_seed(0)
    config = hub.T5Config(
        vocab_size=len(WORDS), d_model=CHANNELS, d_kv=8, d_ff=64, num_layers=3, num_heads=4,
        feed_forward_proj="gated-gelu", dropout_rate=0.1,
    )  # fmt: skip
    hub.T5EncoderModel(config).save_pretrained(path)
    return path


def encoder(folder: Path, dtype: Precision = "float32", pad: bool = True, max_length: int = 64) -> T5Encoder:
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
        input=str(tmp_path / "words.txt"), model_prefix=str(tmp_path / "t5" / "spiece"), vocab_size=len(WORDS),
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "pad_token": "<pad>", "eos_token": "</s>"}
    (tmp_path / "t5" / "tokenizer_config.json").write_text(json.dumps(settings | {"unk_token": "<unk>"}))
    reader = pieces.SentencePieceProcessor(model_file=str(tmp_path / "t5" / "spiece.model"))
    assert reader.get_piece_size() <= len(WORDS)
    net = encoder(tmp_path / "t5")
    (row,) = net.encode(["a red circle"])
    assert net._loaded is not None
    assert net._loaded[0]("a red circle")["input_ids"] == [*reader.encode("a red circle"), 1]
    assert len(row) == len(reader.encode("a red circle")) + 1


def test_padding_changes_only_the_rounding(folder: Path) -> None:
    padded, plain = encoder(folder).encode(PROMPTS), encoder(folder, pad=False).encode(PROMPTS)
    for a, b in zip(padded, plain, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_a_prompt_does_not_depend_on_its_neighbours(folder: Path) -> None:
    net = encoder(folder)
    together = net.encode(PROMPTS)
    assert all(torch.equal(net.encode([p])[0], row) for p, row in zip(PROMPTS, together, strict=True))


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
        assert a.dtype == torch.float32
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
