"""Model files: which are there (`heatkv models`); fetching them and prompt lists (`heatkv download`), only when asked.

The hub is met through `hub()` alone; everything else of the program reads files that are already on disk.
"""

from __future__ import annotations

import contextlib
import importlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from heatkv_cli.benchmarks.base import DATA, Benchmark, OnHub
from heatkv_cli.config import RunConfig
from heatkv_cli.console import Console, size_text
from heatkv_cli.errors import ConfigError, SetupError
from heatkv_cli.models.weights import WeightFile, asset, damage, lacking, places
from heatkv_cli.results import hub_cache

PRESENT, MISSING, CORRUPT = "present", "missing", "corrupt"


def inventory(runs: Sequence[RunConfig], ui: Console, deep: bool = False) -> dict[str, Any]:
    """Look for the files of one model or several, print a table, return the records.

    Args:
        runs: one run a model.
        ui: console that shows the table.
        deep: compare digests as well, which reads everything.

    Returns:
        `files`: a record each; `complete`: whether nothing is missing or corrupt.
    """
    records = [record(run, file, deep) for run in runs for file in run.model.weights.files]
    columns = ("model", "file", "size", "licence", "from", "state")
    ui.table(
        columns,
        [
            [
                r["model"],
                r["name"],
                "-" if r["bytes"] is None else size_text(r["bytes"]),
                r["licence"] or "-",
                r["from"],
                f"{r['state']}: {r['problem']}" if r["problem"] else r["state"],
            ]
            for r in records
        ],
    )
    return {"files": records, "complete": all(r["state"] == PRESENT for r in records)}


def record(run: RunConfig, file: WeightFile, deep: bool) -> dict[str, Any]:
    """Everything that is known of one file, and whether it is there."""
    model = run.model
    package = model.weights.place == "package"
    where = [asset(file.name)] if package else list(places(model.name, file, run.weights))
    there = sorted((path for path in where if path.exists()), key=lambda path: bool(lacking(file, path)))
    path = there[0] if there else None
    problem = "" if path is None else damage(file, path, deep and model.weights.verify)
    return {
        "model": model.name,
        "role": file.role,
        "name": file.name,
        "state": MISSING if path is None or lacking(file, path) else CORRUPT if problem else PRESENT,
        "problem": problem,
        "path": None if path is None else str(path),
        "looked_at": [str(place) for place in where],
        "bytes": file.bytes if path is None else _bytes_of(file, path),
        "sha256": file.sha256,
        "licence": file.licence,
        "from": file.origin,
        "urls": list(file.urls),
    }


def _bytes_of(file: WeightFile, path: Path) -> int:
    parts = [path / part for part in file.parts if (path / part).exists()] if path.is_dir() else [path]
    return sum(part.stat().st_size for part in parts)


# ------------------------------------------------------------------------------------------------------- downloading


def download(run: RunConfig, ui: Console, dry_run: bool = False) -> dict[str, Any]:
    """Fetch the files that a model's YAML names and that are not there, into `run.weights` or the hub's cache.

    A download that was cut goes on where it stopped (huggingface_hub keeps what it has).

    Returns:
        `files`: path in the repository, where it goes, bytes; `bytes`: their sum; `revisions`: repository -> commit.

    Raises:
        SetupError: the hub cannot be reached, or the disk is too small; names the addresses for fetching by hand.
    """
    model, target = run.model.name, run.weights or hub_cache()
    states = {file.name: record(run, file, deep=False)["state"] for file in run.model.weights.files}
    wanted = [file for file in run.model.weights.files if file.hub and states[file.name] != PRESENT]
    if not wanted:
        ui.say(f"model {model}: nothing to fetch, all files are there")
        return {"model": model, "files": [], "bytes": 0, "revisions": {}}
    commits, sizes = ({}, {}) if dry_run else _ask(model, wanted, target)
    plan = [
        {"repository": file.repository, "path": path, "bytes": sizes.get((file.repository, path))}
        for file in wanted
        for path in file.hub_files
    ]
    total = sum(file.bytes or 0 for file in wanted) if dry_run else sum(size or 0 for size in sizes.values())
    rows = [
        [file.name, size_text(file.bytes) if file.bytes and number == 0 else "", file.licence, url]
        for file in wanted
        for number, url in enumerate(file.urls)
    ]
    ui.table(("file", "size", "licence", "from"), rows)
    ui.say(f"model {model}: {size_text(total)} to {target}")
    if not dry_run:
        _check_disk(total, target, "name another folder with --weights DIR")
        for file in wanted:
            _fetch(model, file, run.weights, target, again=states[file.name] == CORRUPT)
    return {"model": model, "files": plan, "bytes": total, "revisions": commits, "target": str(target)}


def hub() -> Any:
    """The package huggingface_hub, imported on the first download."""
    return importlib.import_module("huggingface_hub")


def _ask(
    model: str, wanted: Sequence[WeightFile], target: Path
) -> tuple[dict[str, str], dict[tuple[str, str], int | None]]:
    """Ask the hub for the commit of each repository and the size of each file: the exact total, before anything."""
    commits: dict[str, str] = {}
    sizes: dict[tuple[str, str], int | None] = {}
    for file in wanted:
        try:
            info = hub().HfApi().model_info(file.repository, revision=file.revision, files_metadata=True)
        except _failures() as error:
            raise _unreachable(model, wanted, target, error) from error
        commits[file.repository] = info.sha
        known = {sibling.rfilename: sibling.size for sibling in info.siblings}
        gone = [path for path in file.hub_files if path not in known]
        if gone:
            raise SetupError(
                f"model {model}: huggingface.co/{file.repository} @ {info.sha[:12]} has no {gone[0]}",
                "look at the repository's page; the files and a revision are named in conf/model",
            )
        sizes |= {(file.repository, path): known[path] for path in file.hub_files}
    return commits, sizes


def _failures() -> tuple[type[Exception], ...]:
    """What the hub raises when it cannot be reached or refuses: its HTTP library's errors are not all OSErrors."""
    http = getattr(importlib.import_module("huggingface_hub.errors"), "HTTPError", OSError)
    return (OSError, http)


def _fetch(model: str, file: WeightFile, folder: Path | None, target: Path, again: bool) -> None:
    """Fetch one file or folder and look at what came; `again`: what is there is damaged."""
    where: dict[str, Any] = {"cache_dir": target}
    if folder is not None:
        where = {"local_dir": folder if file.inside else folder / file.name}
    paths = []
    for path in file.hub_files:
        try:
            paths.append(
                hub().hf_hub_download(
                    file.repository, path, revision=file.revision or "main", force_download=again, **where
                )
            )
        except _failures() as error:
            raise _unreachable(model, [file], target, error) from error
    got = Path(paths[0]).parent if file.parts else Path(paths[0])
    if wrong := damage(file, got, deep=True):
        raise SetupError(f"model {model}: {got} came damaged: {wrong}", f"delete it, then: heatkv download {model}")


def _check_disk(total: int, target: Path, hint: str) -> None:
    folder = target.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < total:
        raise SetupError(f"{size_text(total)} do not fit on the disk of {target}: {size_text(free)} are free", hint)


def _unreachable(model: str, files: Sequence[WeightFile], target: Path, error: Exception) -> SetupError:
    lines = [f"  {url}" for url in _by_hand(files)]
    return SetupError(
        f"model {model}: cannot fetch from the hub: {_reason(error)}",
        "\n".join(
            (
                "connect (and unset HF_HUB_OFFLINE), or fetch by hand into a folder named by --weights DIR or "
                "HEATKV_WEIGHTS_DIR:",
                *lines,
            )
        ),
    )


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _by_hand(files: Sequence[WeightFile]) -> Iterator[str]:
    for file in files:
        for part, url in zip(file.parts or ("",), file.urls, strict=True):
            yield f"{url} -> {file.name}{'/' + part if part else ''}"


# -------------------------------------------------------------------------------------------------- benchmarks' files


def download_benchmark(run: RunConfig, ui: Console, dry_run: bool = False, images: bool = False) -> dict[str, Any]:
    """Fetch the prompt list of the run's benchmark to where its YAML looks for it, then read it.

    Files that are there are not fetched again, and never replaced.

    Args:
        run: its benchmark is meant.
        ui: console that shows what is planned.
        dry_run: ask nobody, fetch nothing; sizes are those of the YAML.
        images: also the images that the benchmark is compared with.

    Returns:
        `files`: path in the repository and where it goes; `bytes`: their sum; `revisions`: repository -> commit.

    Raises:
        ConfigError: images were asked for where there are none, or the list is not of its form.
        SetupError: the benchmark is not on the hub, the hub cannot be reached, the disk is too small, or what came is
            not the list that the YAML describes; says where to get it by hand.
    """
    benchmark = run.benchmark.object
    label, source = f"benchmark {benchmark.name}", benchmark.hub
    if images and not (source and source.images):
        raise ConfigError(f"{label} has no images on the hub", "leave --images away")
    wanted = {} if source is None else _places_of(benchmark, source, images)
    wanted = {file: path for file, path in wanted.items() if not path.exists()}
    if source is None or not wanted:
        if source is None and benchmark.source and not benchmark.path.exists():
            raise SetupError(
                f"{label} is not on the hub; it comes from {benchmark.source}",
                f"get it there and put it at {benchmark.path.absolute()} (folder: {DATA})",
            )
        ui.say(f"{label}: nothing to fetch, {len(benchmark.load())} prompts are there")
        return {"benchmark": benchmark.name, "files": [], "bytes": 0, "revisions": {}}
    if dry_run:
        total, revisions = source.bytes * (set(wanted) != {source.images}), {}
        total += source.images_bytes * (source.images in wanted)
    else:
        total, commit = _ask_dataset(label, source, wanted)
        revisions = {source.dataset: commit}
    ui.table(
        ("file", "licence", "from"),
        [[str(path), source.licence or "none stated", source.url(file)] for file, path in wanted.items()],
    )
    ui.say(f"{label}: {size_text(total)}")
    if not dry_run:
        _check_disk(total, benchmark.path, f"name another folder with {DATA}")
        for file, path in wanted.items():
            _fetch_data(label, source, file, path, wanted)
        ui.say(f"{label}: {len(benchmark.load())} prompts")
        if source.images in wanted:
            archive = wanted[source.images]
            ui.say(f"unpack the images: unzip -q {archive} -d {archive.with_suffix('')}")
    files = [{"repository": source.dataset, "path": file, "to": str(path.absolute())} for file, path in wanted.items()]
    return {"benchmark": benchmark.name, "files": files, "bytes": total, "revisions": revisions}


def _places_of(benchmark: Benchmark, source: OnHub, images: bool) -> dict[str, Path]:
    """Paths in the repository, and where the files go; several prompt files make up a folder."""
    path, several = benchmark.path, len(source.files) > 1
    places = {file: path / Path(file).name if several else path for file in source.files}
    return places | ({source.images: (path if several else path.parent) / source.images} if images else {})


def _ask_dataset(label: str, source: OnHub, wanted: dict[str, Path]) -> tuple[int, str]:
    """Return the exact size of what is wanted, and the commit it is of."""
    try:
        info = hub().HfApi().dataset_info(source.dataset, revision=source.revision, files_metadata=True)
    except _failures() as error:
        raise _no_data(label, source, wanted, error) from error
    known = {sibling.rfilename: sibling.size for sibling in info.siblings}
    gone = [file for file in wanted if file not in known]
    if gone:
        raise SetupError(
            f"{label}: huggingface.co/datasets/{source.dataset} @ {info.sha[:12]} has no {gone[0]}",
            "look at the repository's page; the files and a revision are named in conf/benchmark",
        )
    return sum(known[file] or 0 for file in wanted), info.sha


def _fetch_data(label: str, source: OnHub, file: str, path: Path, wanted: dict[str, Path]) -> None:
    """Fetch one file; huggingface_hub keeps the part of a cut download beside it and goes on there."""
    try:
        got = hub().hf_hub_download(
            source.dataset, file, repo_type="dataset", revision=source.revision or "main", local_dir=path.parent
        )
    except _failures() as error:
        raise _no_data(label, source, wanted, error) from error
    Path(got).replace(path)
    for folder in list(Path(file).parents)[:-1]:  # the repository's own folders, once they are empty
        with contextlib.suppress(OSError):
            (path.parent / folder).rmdir()


def _no_data(label: str, source: OnHub, wanted: dict[str, Path], error: Exception) -> SetupError:
    lines = [f"  {source.url(file)} -> {path.absolute()}" for file, path in wanted.items()]
    return SetupError(
        f"{label}: cannot fetch from the hub: {_reason(error)}",
        "\n".join(("connect (and unset HF_HUB_OFFLINE), or fetch by hand:", *lines)),
    )
