"""CSV: the columns, how a value becomes a cell, reading, and the results file with one tidy row per number."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from heatkv_cli.errors import ArtifactError
from heatkv_cli.results.files import ensure_writable, locked, write_file

Row = Mapping[str, Any]

MANIFEST_COLUMNS: tuple[str, ...] = (
    *("image_id", "prompt_id", "sample", "prompt", "seed", "batch", "file", "sha256", "trace", "trace_sha256"),
    *("height", "width", "seconds", "kv_peak_bytes", "kv_resident_bytes", "cuda_peak_bytes"),
    *("numbers_json", "status", "error"),
)
"""Of `manifest.csv`, one row per image of a pass. `numbers_json`: what the pass recorded for it (KL per bit, ...)."""

FILE_COLUMNS: tuple[tuple[str, str], ...] = (("file", "sha256"), ("trace", "trace_sha256"))
"""Columns that name a file in the folder, each with the column of its sha256."""

RESULT_COLUMNS: tuple[str, ...] = (
    *("run_id", "created_utc", "git_sha", "git_dirty", "heatkv_version"),
    *("model", "weights_sha256", "method", "method_args_json", "budget", "rho", "schedule_sha256"),
    *("benchmark", "benchmark_version", "resolution", "seed", "seed_mode"),
    *("dtype", "attention_backend", "batch_size", "device", "torch_version"),
    *("metric", "metric_version", "metric_weights_sha256", "metric_settings"),
    *("variant", "value", "stderr", "low", "high", "n", "unit", "higher_is_better"),
    *("reference", "status", "reason"),
    *("beta_live", "beta_alloc", "beta_work", "beta_meta", "attended_tokens", "attended_ratio", "seconds_per_image"),
    *("paper_value", "paper_ref", "command"),
)
"""Of `results.csv`, one tidy row per number."""

RESULT_KEY = ("run_id", "metric", "variant")


def cell(value: Any) -> str:
    """Return a value as a CSV cell: nothing for None, true and false, JSON for a mapping or list, repr for a float."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, (Mapping, list, tuple)):
        return json.dumps(value, sort_keys=True)
    return str(value)


def encode_rows(rows: Iterable[Row], columns: Sequence[str]) -> bytes:
    """Return rows as CSV lines, each ended by a line feed.

    Raises:
        ValueError: a row has a column that is not in `columns` (a bug of the caller).
    """
    lines = []
    for row in rows:
        if unknown := set(row) - set(columns):
            raise ValueError(f"no such column: {', '.join(sorted(unknown))}")
        lines.append(",".join(_quoted(cell(row.get(column))) for column in columns) + "\n")
    return "".join(lines).encode()


def _quoted(text: str) -> str:
    """Quote as RFC 4180 does; `csv.writer` leaves a lone carriage return bare, and no reader gets it back."""
    return '"' + text.replace('"', '""') + '"' if any(sign in text for sign in ',"\r\n') else text


def read_csv(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file as texts; none where there is no file.

    Raises:
        ArtifactError: the file is not UTF-8 CSV with a header and equally long rows.
    """
    return _read_csv(path)[1]


def _read_csv(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return [], []
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror or error}", "check the file") from error
    return parse_csv(path, data)


def parse_csv(path: Path, data: bytes) -> tuple[list[str], list[dict[str, str]]]:
    """Return header and rows of CSV text; `path` is for messages. Raises as `read_csv`."""
    try:
        lines = list(csv.reader(io.StringIO(data.decode(), newline=""), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ArtifactError(
            f"{path} is not a CSV file: {error}", "move it away and run the same command again"
        ) from error
    header, body = (lines[0], lines[1:]) if lines else ([], [])
    for number, line in enumerate(body, start=2):
        if len(line) != len(header):
            raise ArtifactError(
                f"{path}: row {number} has {len(line)} cells, the header has {len(header)}",
                "move the file away and run the same command again",
            )
    return header, [dict(zip(header, line, strict=True)) for line in body]


def complete_prefix(data: bytes) -> int:
    """Return how many first bytes of CSV text are whole records.

    A record is whole when a line feed ends it outside of quotes, that is after an even number of quotes: a writer
    doubles those that belong to the text.
    """
    end = quotes = start = 0
    while (stop := data.find(b"\n", start)) >= 0:
        quotes += data.count(b'"', start, stop)
        start = stop + 1
        if quotes % 2 == 0:
            end = start
    return end


def upsert_results(path: Path, rows: Sequence[Row], key: Sequence[str] = RESULT_KEY) -> None:
    """Put rows into a results file, replacing those with the same key; other rows and unknown columns stay.

    Raises:
        SetupError: the file cannot be written.
        ArtifactError: it is there and is not a CSV file.
    """
    ensure_writable(path.parent)
    with locked(path.with_name(f".{path.name}.lock"), wait=True):
        header, kept = _read_csv(path)
        extra = [name for row in rows for name in row if name not in RESULT_COLUMNS]
        columns = list(dict.fromkeys((*(header or RESULT_COLUMNS), *RESULT_COLUMNS, *extra)))
        merged: dict[tuple[str, ...], Row] = {tuple(row.get(name, "") for name in key): row for row in kept}
        merged |= {tuple(cell(row.get(name)) for name in key): row for row in rows}
        titles = dict(zip(columns, columns, strict=True))
        write_file(path, encode_rows([titles, *merged.values()], columns))
