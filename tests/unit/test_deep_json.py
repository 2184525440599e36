"""JSON that somebody else wrote, nested too deeply or of another form: an error that names the file, never a crash."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from heatkv_cli.benchmarks.trees import read_geneval
from heatkv_cli.errors import ArtifactError
from heatkv_cli.models import weights
from heatkv_cli.models.infinity.containers import open_checkpoint

DEEP = "[" * 100_000
FORMS = [DEEP, '{"a":' * 50_000, "[1]", "null", '{"weight_map": [1]}', '{"weight_map": NaN}', ""]


def of_index(folder: Path, text: str) -> None:
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    open_checkpoint(folder)


def of_tree(folder: Path, text: str) -> None:
    (folder / "00000").mkdir()
    (folder / "00000" / "metadata.jsonl").write_text(text, encoding="utf-8")
    read_geneval(folder)


@pytest.mark.parametrize("text", FORMS, ids=lambda text: text[:20] or "empty")
@pytest.mark.parametrize("read", [of_index, of_tree], ids=["index", "tree"])
def test_reading(read: Callable[[Path, str], None], text: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError) as caught:
        read(tmp_path, text)
    assert str(tmp_path) in caught.value.message


@pytest.mark.parametrize("text", FORMS, ids=lambda text: text[:20] or "empty")
def test_what_is_wrong_with_a_file_of_weights(text: str, tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text, encoding="utf-8")
    assert weights._json_damage(index)
    header = text.encode()
    tensors = tmp_path / "model.safetensors"
    tensors.write_bytes(struct.pack("<Q", len(header)) + header)
    assert weights._safetensors_damage(tensors, tensors.stat().st_size)
