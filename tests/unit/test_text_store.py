"""Text features on disk: encoded once, read after, without the encoder; and the encoder really leaves memory."""

from __future__ import annotations

import gc
import logging
import subprocess
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from t5_files import write_t5
from torch import Tensor

from heatkv_cli.benchmarks.base import items_of
from heatkv_cli.errors import ArtifactError, ConfigError, SetupError
from heatkv_cli.models.infinity.text_t5 import T5Encoder
from heatkv_cli.models.text_store import BATCH, StoredText, TextStore, encoder_sha256, find_features, is_features

SETTINGS = {"precision": "float16", "longest": 64}
PROMPTS = [f"prompt {'x' * (i % 7)} {i}" for i in range(2 * BATCH + 3)]


class Letters:
    """An encoder that can be checked by eye: one row a letter; counts what it is asked."""

    def __init__(self, fails_at: int = -1) -> None:
        self.batches: list[list[str]] = []
        self.released, self.fails_at = 0, fails_at

    def encode(self, texts: Sequence[str]) -> list[Tensor]:
        if len(self.batches) == self.fails_at:
            raise KeyboardInterrupt
        self.batches.append(list(texts))
        return [letters(text) for text in texts]

    def release(self) -> None:
        self.released += 1


def letters(text: str) -> Tensor:
    return torch.tensor([[ord(c), ord(c) / 7] for c in text]).to(torch.float16)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder" / "config.json").write_text("{}")
    return tmp_path / "encoder"


def stored(source: Path, encoder: Letters | None, **changes: str | int) -> StoredText:
    return StoredText(source, encoder, SETTINGS | changes)


def check(text: StoredText, prompts: Sequence[str] = PROMPTS) -> None:
    for prompt, features in zip(prompts, text.encode(prompts), strict=True):
        assert features.dtype == torch.float16 and torch.equal(features, letters(prompt))


def test_every_prompt_is_encoded_once_in_batches(source: Path, tmp_path: Path) -> None:
    encoder = Letters()
    text = stored(source, encoder)
    text.prepare([*PROMPTS, *PROMPTS[:5]], tmp_path / "text")
    assert [len(batch) for batch in encoder.batches] == [BATCH, BATCH, 3]
    assert sorted(t for batch in encoder.batches for t in batch) == sorted(PROMPTS)
    assert encoder.released == 1
    check(text)
    text.prepare(PROMPTS[3:8], tmp_path / "text")
    later = Letters()
    again = stored(source, later)
    again.prepare(PROMPTS, tmp_path / "text")
    check(again)
    assert len(encoder.batches) == 3 and not later.batches and not later.released
    folder = tmp_path / "text" / encoder_sha256(source)
    assert is_features(folder) and len(list(folder.iterdir())) == len(PROMPTS)  # nothing half-written is left


def test_what_was_encoded_before_an_interruption_is_kept(source: Path, tmp_path: Path) -> None:
    first, second = Letters(fails_at=1), Letters()
    with pytest.raises(KeyboardInterrupt):
        stored(source, first).prepare(PROMPTS, tmp_path)
    assert first.released == 1
    stored(source, second).prepare(PROMPTS, tmp_path)
    assert sum(map(len, second.batches)) == len(PROMPTS) - BATCH


@pytest.mark.parametrize("change", [{"precision": "float32"}, {"longest": 65}])
def test_other_settings_are_other_features(source: Path, tmp_path: Path, change: dict[str, str | int]) -> None:
    stored(source, Letters()).prepare(PROMPTS, tmp_path)
    other = Letters()
    stored(source, other, **change).prepare(PROMPTS, tmp_path)
    assert len(other.batches) == 3


def test_another_encoder_has_another_folder(source: Path, tmp_path: Path) -> None:
    stored(source, Letters()).prepare(PROMPTS[:2], tmp_path / "text")
    (source / "config.json").write_text('{"d_model": 2}')
    other = Letters()
    stored(source, other).prepare(PROMPTS[:2], tmp_path / "text")
    assert len(other.batches) == 1
    with pytest.raises(ConfigError, match="features of 2 encoders"):
        find_features(tmp_path / "text")


def test_a_rewritten_prompt_is_another_text(source: Path, tmp_path: Path) -> None:
    plain, polite = Letters(), Letters()
    stored(source, plain).prepare(["a", "b"], tmp_path)
    text = StoredText(source, polite, SETTINGS, lambda prompt: prompt + (" please" if prompt == "a" else ""))
    text.prepare(["a", "b"], tmp_path)
    assert polite.batches == [["a please"]]  # "b" is what it was
    assert torch.equal(text.encode(["a"])[0], letters("a please"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def other(path: Path) -> None:
    save_file({"something": torch.ones(2)}, path)


def nothing(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut, flip, other, nothing])
def test_a_damaged_file_is_made_again(source: Path, tmp_path: Path, damage, caplog) -> None:  # type: ignore[no-untyped-def]
    encoder = Letters()
    text = stored(source, encoder)
    text.prepare(PROMPTS[:3], tmp_path)
    path = TextStore(tmp_path / encoder_sha256(source), SETTINGS).path(PROMPTS[1])
    damage(path)
    with caplog.at_level(logging.WARNING, "heatkv"):
        check(text, PROMPTS[:3])
    assert f"{path} is damaged" in caplog.text
    assert encoder.batches[1:] == [[PROMPTS[1]]] and encoder.released == 2
    check(stored(path.parent, None), PROMPTS[:3])


def test_features_alone_are_enough(source: Path, tmp_path: Path) -> None:
    stored(source, Letters()).prepare(PROMPTS, tmp_path / "text")
    folder = find_features(tmp_path / "text")
    assert folder is not None and encoder_sha256(folder) == encoder_sha256(source)
    assert find_features(folder) == folder
    text = stored(folder, None)
    text.prepare(PROMPTS, tmp_path / "text")
    check(text)
    with pytest.raises(SetupError, match=r"lacks the text features of 2 prompts \('new', 'newer'\) for precision") as e:
        text.prepare([PROMPTS[0], "new", "newer"], tmp_path / "text")
    assert "text=DIR" in e.value.hint
    assert find_features(tmp_path / "nowhere") is None and find_features(source) is None


def test_the_features_of_another_encoder_are_refused(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / ("0" * 64)
    folder.mkdir()
    with pytest.raises(ArtifactError, match="another encoder"):
        stored(source, Letters()).prepare(PROMPTS, folder)
    with pytest.raises(SetupError, match="lacks the text features"):
        stored(folder, None).encode(["a"])


def test_without_a_store_the_encoder_answers(source: Path) -> None:
    encoder = Letters()
    check(stored(source, encoder), PROMPTS[:2])
    assert not encoder.released  # the caller knows whether there are more


# ----------------------------------------------------------------------------------------------------------- with T5


def test_t5_is_freed_before_anything_is_generated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_t5(tmp_path / "t5")
    seen: list[weakref.ref[object]] = []
    load = T5Encoder.load

    def spied(self: T5Encoder) -> None:
        load(self)
        assert self._loaded is not None
        seen.append(weakref.ref(self._loaded[1]))
        seen.append(weakref.ref(self._loaded[1].encoder.block[0].layer[1].DenseReluDense.wo.weight))

    monkeypatch.setattr(T5Encoder, "load", spied)
    encoder = T5Encoder(source, 32, 64, "float16")
    text = StoredText(source, encoder, SETTINGS)
    gc.disable()  # not by luck
    try:
        text.prepare(["a red circle", "a"], tmp_path / "text")
        assert seen and all(ref() is None for ref in seen)
    finally:
        gc.enable()
    direct = T5Encoder(source, 32, 64, "float16").encode(["a red circle", "a"])
    seen.clear()
    assert all(torch.equal(*pair) for pair in zip(text.encode(["a red circle", "a"]), direct, strict=True))
    assert not seen
    for path in (tmp_path / "text").rglob("*.safetensors"):
        with safe_open(path, "pt") as f:
            assert f.metadata()["text"] in ("a red circle", "a")
        assert load_file(path)["features"].dtype == torch.float16


MEMORY = """
import sys, torch
from pathlib import Path
from heatkv_cli.models.infinity.text_t5 import T5Encoder
from heatkv_cli.models.text_store import StoredText
import transformers

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1024

folder, root = map(Path, sys.argv[1:])
small = T5Encoder(folder.with_name("small"), 32, 64, "float32")
StoredText(small.folder, small, {}).prepare(["a"], root)   # what the libraries keep for themselves
before = anonymous()
net = T5Encoder(folder, 256, 64, "float16")
load, peak = net.load, []
net.load = lambda: (load(), peak.append(anonymous()))
StoredText(folder, net, {}).prepare(["a red circle", "two blue square"], root)
print(peak[0] - before, anonymous() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_the_memory_of_t5_comes_back(tmp_path: Path) -> None:
    write_t5(tmp_path / "small")
    write_t5(tmp_path / "t5", channels=256, layers=8, ff=4096)
    weights = (tmp_path / "t5" / "model.safetensors").stat().st_size / 2**20
    assert weights > 80
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "t5"), str(tmp_path / "text")]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    during, after = map(float, out.split()[-2:])
    assert during > 0.3 * weights  # two thirds in half precision; `wo` stays float32 and is only mapped
    assert after < during / 5


def test_the_official_loader_stores_text(tmp_path: Path) -> None:
    """`load_official` with the encoder, then with the features alone: the same conditions."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))
    import infinity_files as files

    net, vae = files.flat(tmp_path, files.official("A")), files.wrapped(tmp_path, files.pixels("A"))
    source, prompts = write_t5(tmp_path / "t5", 256), ["a man", "a red circle"]
    both = {"transformer": net, "tokenizer": vae}
    model = files.load(net, vae, files=both | {"text": source})
    model.prepare(items_of(prompts), tmp_path / "text")
    condition = model.encode(items_of(prompts))
    assert condition.features.dtype == torch.float32 and condition.lengths == (3, 4)
    (folder,) = (tmp_path / "text").iterdir()
    other = files.load(net, vae, files=both | {"text": folder})
    other.prepare(items_of(prompts), tmp_path / "elsewhere")
    assert torch.equal(other.encode(items_of(prompts)).features, condition.features)
    polite = files.load(net, vae, files=both | {"text": folder}, positive_prompt=True)
    with pytest.raises(SetupError, match=r"1 prompts .'a man. very smooth faces"):
        polite.prepare(items_of(prompts), tmp_path)
