"""JSON lines: one object a line, so that types survive and a torn end is what follows the last line feed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import UnionType
from typing import Any

from heatkv_cli.errors import ArtifactError
from heatkv_cli.results.files import load_json

Row = Mapping[str, Any]
Fields = Mapping[str, type | UnionType]
"""The fields of a line and the types they may have."""

MANIFEST_FIELDS: Fields = {
    "image_id": str,
    "prompt_id": str | None,
    "sample": int | None,
    "prompt": str | None,
    "seed": int | None,
    "batch": str | int | None,
    "file": str | None,
    "sha256": str | None,
    "trace": str | None,
    "trace_sha256": str | None,
    "height": int | None,
    "width": int | None,
    "seconds": float | int | None,
    "kv_peak_bytes": int | None,
    "kv_resident_bytes": int | None,
    "cuda_peak_bytes": int | None,
    "numbers": dict | None,
    "status": str | None,
    "error": str | None,
}
"""A line of `manifest.jsonl`: one image of a pass. `numbers`: what the pass recorded for it (KL per bit, ...)."""

SCORE_FIELDS: Fields = {
    "image_id": str,
    "metric": str,
    "value": float | str,
    "stratum": str,
    "note": str,
}
"""A line of a run's `scores.jsonl`: one image's number of one metric; infinities are texts."""

FILE_FIELDS: tuple[tuple[str, str], ...] = (("file", "sha256"), ("trace", "trace_sha256"))
"""Fields that name a file in the folder, each with the field of its sha256."""


def encode_lines(rows: Iterable[Row], fields: Fields) -> bytes:
    """Return rows as lines; fields that a row lacks are null, numbers that are not finite are texts.

    Raises:
        ValueError: a row has a field that is not in `fields` (a bug of the caller).
    """
    return b"".join(_line(row, fields) for row in rows)


def _line(row: Row, fields: Fields) -> bytes:
    if unknown := set(row) - set(fields):
        raise ValueError(f"no such field: {', '.join(sorted(unknown))}")
    whole = {name: _finite(row.get(name)) for name in fields}
    return (json.dumps(whole, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8", "surrogatepass")


def _finite(value: Any) -> Any:
    """Return a value with its infinities and NaN as texts ("inf"), which `float` reads back."""
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def whole_lines(data: bytes) -> int:
    """Return how many first bytes are whole lines."""
    return data.rfind(b"\n") + 1


def parse_lines(path: Path, data: bytes, fields: Fields) -> list[dict[str, Any]]:
    """Return the rows of whole lines.

    Args:
        path: file that the lines are from, for messages.
        data: whole lines.
        fields: fields that a line must have.

    Raises:
        ArtifactError: a line is not a JSON object, or has other fields or types; names the line.
    """
    rows = []
    for number, line in enumerate(data.split(b"\n")[:-1], start=1):
        try:
            row = load_json(line.decode("utf-8", "surrogatepass"))
            if not isinstance(row, dict):
                raise ValueError("it is not a JSON object")
            if row.keys() != fields.keys():
                odd = sorted(row.keys() ^ fields.keys())
                raise ValueError(f"its fields are not those this heatkv writes ({', '.join(odd[:3])})")
            for name, kind in fields.items():
                if not isinstance(row[name], kind):
                    raise ValueError(f"'{name}' is {row[name]!r}")
        except ValueError as error:
            raise ArtifactError(
                f"{path}, line {number}: {error}",
                "remove that line (its image is made again), or choose another --out",
            ) from error
        rows.append(row)
    return rows
