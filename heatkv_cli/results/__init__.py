"""What is written: manifests, result rows and meta files, so that a kill at any moment loses nothing.

Files, formats and locks only: no tensors, no pandas, no idea of what the numbers mean. Everything above may use this
package; it imports nothing but `errors`.
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
from heatkv_cli.results.large_files import hub_cache, hub_snapshot, sha256_known
from heatkv_cli.results.lines import MANIFEST_FIELDS, Fields, encode_lines, parse_lines
from heatkv_cli.results.meta import environment, finish_meta, read_meta, utc_now, write_meta
from heatkv_cli.results.tables import (
    RESULT_COLUMNS,
    RESULT_KEY,
    cell,
    encode_rows,
    read_csv,
    read_results,
    upsert_results,
)

__all__ = [
    "MANIFEST_FIELDS",
    "RESULT_COLUMNS",
    "RESULT_KEY",
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
    "read_csv",
    "read_meta",
    "read_regular",
    "read_results",
    "sha256_file",
    "sha256_known",
    "upsert_results",
    "utc_now",
    "write_file",
    "write_meta",
]
