"""What is written: manifests, result rows and meta files, so that a kill at any moment loses nothing.

Files, formats and locks only: no tensors, no pandas, no idea of what the numbers mean. Everything above may use this
package; it imports nothing but `errors`.
"""

from __future__ import annotations

from heatkv_cli.results.files import ensure_writable, locked, sha256_file, write_file
from heatkv_cli.results.folder import RunFolder
from heatkv_cli.results.large_files import hub_cache, hub_snapshot, sha256_known
from heatkv_cli.results.meta import environment, finish_meta, read_meta, utc_now, write_meta
from heatkv_cli.results.tables import (
    MANIFEST_COLUMNS,
    RESULT_COLUMNS,
    RESULT_KEY,
    cell,
    encode_rows,
    read_csv,
    upsert_results,
)

__all__ = [
    "MANIFEST_COLUMNS",
    "RESULT_COLUMNS",
    "RESULT_KEY",
    "RunFolder",
    "cell",
    "encode_rows",
    "ensure_writable",
    "environment",
    "finish_meta",
    "hub_cache",
    "hub_snapshot",
    "locked",
    "read_csv",
    "read_meta",
    "sha256_file",
    "sha256_known",
    "upsert_results",
    "utc_now",
    "write_file",
    "write_meta",
]
