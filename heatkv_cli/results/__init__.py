"""Files that are written: manifests, result rows and meta files. A kill at any moment loses nothing.

Files, formats and locks only: no tensors, no idea of what the numbers mean. Everything above may use this package; it
imports nothing but `errors`, and pandas only where a table is asked for (`read`, `scores`).
"""

from __future__ import annotations

from heatkv_cli.results.files import (
    check_path,
    ensure_writable,
    load_json,
    locked,
    read_regular,
    sha256_file,
    write_file,
)
from heatkv_cli.results.folder import RunFolder
from heatkv_cli.results.frame import read, read_table, scores
from heatkv_cli.results.large_files import hub_cache, hub_snapshot, sha256_known
from heatkv_cli.results.lines import MANIFEST_FIELDS, SCORE_FIELDS, Fields, encode_lines, parse_lines
from heatkv_cli.results.meta import environment, finish_meta, read_meta, utc_now, write_meta
from heatkv_cli.results.tables import (
    EMPTY,
    RESULT_COLUMNS,
    RESULT_KEY,
    cell,
    encode_rows,
    read_csv,
    read_results,
    upsert_results,
)

__all__ = [
    "EMPTY",
    "MANIFEST_FIELDS",
    "RESULT_COLUMNS",
    "RESULT_KEY",
    "SCORE_FIELDS",
    "Fields",
    "RunFolder",
    "cell",
    "check_path",
    "encode_lines",
    "encode_rows",
    "ensure_writable",
    "environment",
    "finish_meta",
    "hub_cache",
    "hub_snapshot",
    "load_json",
    "locked",
    "parse_lines",
    "read",
    "read_csv",
    "read_meta",
    "read_regular",
    "read_results",
    "read_table",
    "scores",
    "sha256_file",
    "sha256_known",
    "upsert_results",
    "utc_now",
    "write_file",
    "write_meta",
]
