"""What a folder of results holds, without times: equal for a command that was disturbed and for one that was not."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TIMES = {"created_utc", "finished_utc", "seconds_per_image", "seconds", "text_seconds", "load_seconds"}
TIMES |= {"starts", "command", "git_dirty", "key", "sha256_row"}
"""Names of columns and keys that differ from run to run: times, who wrote it, digests of lines with times."""

DATA = (".png", ".safetensors", ".npy", ".npz")
LINES = (".jsonl",)
RECORDS = ("meta.json",)


def lasting(value: Any) -> Any:
    """A record without its times; shares of the time end in `_share`."""
    if isinstance(value, dict):
        return {key: lasting(item) for key, item in value.items() if key not in TIMES and not key.endswith("_share")}
    return [lasting(item) for item in value] if isinstance(value, list) else value


def rows(out: Path) -> list[str]:
    """The rows of results.csv in the order of their words, each with everything that is no time."""
    path = out / "results.csv"
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as handle:
        read = [row for row in csv.DictReader(handle) if not row["metric"].endswith("_share")]
    return sorted(json.dumps(lasting(row), sort_keys=True) for row in read)


def kept(out: Path, *, skip: tuple[str, ...] = ()) -> dict[str, Any]:
    """Every file of a folder: pictures and tensors by their hash, lines and records without times, others by name.

    Args:
        out: the folder of results.
        skip: names of files that are left out.
    """
    return {"results.csv: rows": rows(out), **dict(_files(out, skip))}


def _files(out: Path, skip: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    for path in sorted(out.rglob("*")):
        if path.is_dir() or path.name in skip:
            continue
        name = str(path.relative_to(out))
        if path.suffix in DATA:
            yield name, hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.suffix in LINES:
            yield name, [lasting(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
        elif path.name in RECORDS:
            yield name, lasting(json.loads(path.read_text(encoding="utf-8")))
        else:
            yield name, "there"


def differences(undisturbed: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """How two folders differ, a line each."""
    told = []
    for name in sorted(undisturbed.keys() | found.keys()):
        if name not in found:
            told.append(f"{name} is missing")
        elif name not in undisturbed:
            told.append(f"{name} is left over")
        elif undisturbed[name] != found[name]:
            told.append(f"{name}: {_first(undisturbed[name], found[name])}")
    return told


def _first(sound: Any, found: Any) -> str:
    """Where two values begin to differ."""
    if isinstance(sound, list) and isinstance(found, list):
        if len(sound) != len(found):
            return f"{len(found)} entries, not {len(sound)}"
        return next(f"entry {i}: {_first(a, b)}" for i, (a, b) in enumerate(zip(sound, found, strict=True)) if a != b)
    if isinstance(sound, dict) and isinstance(found, dict):
        keys = sorted(key for key in sound.keys() | found.keys() if sound.get(key) != found.get(key))
        return f"{keys[0]}: {_first(sound.get(keys[0]), found.get(keys[0]))}"
    if isinstance(sound, str) and sound.startswith("{") and isinstance(found, str):
        return _first(json.loads(sound), json.loads(found))
    return f"{str(found)[:200]}, not {str(sound)[:200]}"
