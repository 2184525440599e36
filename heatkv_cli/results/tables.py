"""`results.csv`: one tidy row per number, from many commands, safe against all that happens to files people open.

A row is known by everything that can change its number (`RESULT_KEY`); a command replaces its own rows and no others.
A file that heatkv did not write is refused and stays as it is. A file that a spreadsheet has saved again is read where
nothing in it is ambiguous (a byte-order mark, other line ends, trailing empty columns), else refused.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from heatkv_cli.errors import ArtifactError
from heatkv_cli.results.files import ensure_writable, locked, read_regular, write_file

Row = Mapping[str, Any]

RESULT_COLUMNS: tuple[str, ...] = (
    "run_id",
    "created_utc",
    "git_sha",
    "git_dirty",
    "heatkv_version",
    "code",
    "code_sha256",
    "model",
    "weights_sha256",
    "method",
    "method_args_json",
    "budget",
    "rho",
    "schedule_sha256",
    "benchmark",
    "benchmark_version",
    "resolution",
    "seed",
    "seed_mode",
    "dtype",
    "attention_backend",
    "batch_size",
    "device",
    "torch_version",
    "metric",
    "metric_version",
    "metric_weights_sha256",
    "metric_settings",
    "bootstrap",
    "variant",
    "value",
    "stderr",
    "low",
    "high",
    "n",
    "asked",
    "total",
    "unit",
    "higher_is_better",
    "reference",
    "status",
    "reason",
    "beta_live",
    "beta_alloc",
    "beta_work",
    "beta_meta",
    "attended_tokens",
    "attended_ratio",
    "seconds_per_image",
    "command",
)
"""The columns of `results.csv`."""

RESULT_KEY = (
    "run_id",
    "metric",
    "metric_version",
    "metric_weights_sha256",
    "metric_settings",
    "bootstrap",
    "variant",
    "reference",
    "asked",
)
"""Columns that tell rows apart: the images (`run_id`, `asked`) and all that makes a number of them."""

EMPTY = ("skipped", "failed", "infeasible")
"""Statuses of rows that have a reason in place of a value."""

REQUIRED = ("run_id", "metric", "variant")
"""Columns that every results file has had; without them a file is somebody else's."""

_MOVE = "move it away (or name another folder with --out DIR) and run the same command again"


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
    return "".join(lines).encode("utf-8", "surrogatepass")


def _quoted(text: str) -> str:
    """Quote as RFC 4180 does; `csv.writer` leaves a lone carriage return bare, and no reader gets it back."""
    return '"' + text.replace('"', '""') + '"' if any(sign in text for sign in ',"\r\n') else text


def read_csv(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file as texts; none where there is no file.

    Raises:
        ArtifactError: the file is not UTF-8 CSV with a header of different names and equally long rows.
    """
    return _read(path)[1]


def _read(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    try:
        data = read_regular(path)
    except FileNotFoundError:
        return [], []
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror or error}", "check the file") from error
    return parse_csv(path, data)


def parse_csv(path: Path, data: bytes) -> tuple[list[str], list[dict[str, str]]]:
    """Return header and rows of CSV text; `path` is for messages. Raises as `read_csv`."""
    limit = csv.field_size_limit(max(len(data), 1))
    try:
        text = data.decode("utf-8-sig", "surrogatepass")
        lines = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ArtifactError(f"{path} is not a CSV file: {error}", _MOVE) from error
    finally:
        csv.field_size_limit(limit)
    header, body = (lines[0], lines[1:]) if lines else ([], [])
    body = [line for line in body if any(line)]
    while len(header) > 1 and not header[-1] and not any(len(line) == len(header) and line[-1] for line in body):
        body = [line[: len(header) - 1] for line in body]
        header = header[:-1]
    if len(set(header)) < len(header):
        double = next(name for name in header if header.count(name) > 1)
        raise ArtifactError(f"{path}: the header names column {double!r} twice", _MOVE)
    for number, line in enumerate(body, start=2):
        if len(line) != len(header):
            raise ArtifactError(f"{path}: row {number} has {len(line)} cells, the header has {len(header)}", _MOVE)
    return header, [dict(zip(header, line, strict=True)) for line in body]


def read_results(path: Path) -> tuple[list[str], dict[tuple[str, ...], dict[str, str]]]:
    """Return header and rows by key of a results file; nothing where there is no file.

    Raises:
        ArtifactError: heatkv did not write the file, or somebody has changed it so that rows cannot be told apart.
    """
    header, rows = _read(path)
    if not header:
        return [], {}
    missing = [name for name in REQUIRED if name not in header]
    if missing:
        spread = next((sign for sign in ";\t" if sign in header[0]), None)
        if spread:
            raise ArtifactError(
                f"{path} has {'semicolons' if spread == ';' else 'tabs'} between its cells",
                "save it with commas, or " + _MOVE,
            )
        near = [name for name in header if name.strip().lower() in missing]
        renamed = f"; it has {', '.join(map(repr, near))}" if near else ""
        raise ArtifactError(f"{path} is not a results file of heatkv: no column {', '.join(missing)}{renamed}", _MOVE)
    found: dict[tuple[str, ...], dict[str, str]] = {}
    for number, row in enumerate(rows, start=2):
        if not row["run_id"] or not row["metric"]:
            raise ArtifactError(f"{path}: row {number} names no run_id or no metric", _MOVE)
        key = tuple(row.get(name, "") for name in RESULT_KEY)
        if key in found:
            raise ArtifactError(f"{path}: row {number} is there twice ({row['run_id']}, {row['metric']})", _MOVE)
        found[key] = row
    return header, found


def _is_empty(row: Mapping[str, str]) -> bool:
    """Return whether a row says why there is no number; the number, or another reason, takes its place."""
    return row.get("value", "") == "" and row.get("status") in EMPTY


def upsert_results(path: Path, rows: Sequence[Row]) -> None:
    """Put rows into a results file, replacing those with the same key; other rows and unknown columns stay.

    A row without a value (skipped, failed, infeasible) is replaced by whatever the same run and metric say next.

    Raises:
        SetupError: the file cannot be written.
        ArtifactError: as `read_results`; the file stays as it is.
    """
    if not rows:
        return
    ensure_writable(path.parent)
    with locked(path.with_name(f".{path.name}.lock"), wait=True):
        header, found = read_results(path)
        fresh = {(cell(row.get("run_id")), cell(row.get("metric"))) for row in rows}
        found = {
            key: row for key, row in found.items() if not (_is_empty(row) and (row["run_id"], row["metric"]) in fresh)
        }
        extra = [name for row in rows for name in row if name not in RESULT_COLUMNS]
        columns = list(dict.fromkeys((*(header or RESULT_COLUMNS), *RESULT_COLUMNS, *extra)))
        merged: dict[tuple[str, ...], Row] = {**found}
        merged |= {tuple(cell(row.get(name)) for name in RESULT_KEY): row for row in rows}
        titles = dict(zip(columns, columns, strict=True))
        write_file(path, encode_rows([titles, *merged.values()], columns))
