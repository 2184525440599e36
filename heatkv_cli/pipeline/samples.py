"""The images of a pass as metrics take them: one at a time, loaded when they are asked for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from heatkv_cli.benchmarks.base import ORIGINAL
from heatkv_cli.metrics.pictures import read_image
from heatkv_cli.metrics.scores import Sample
from heatkv_cli.pipeline.measure import Item
from heatkv_cli.planning.job import FREE, ImageJob, Job
from heatkv_cli.results import RunFolder


def items_of_pass(job: Job, kind: str, full: Job | None) -> list[Item]:
    """Return the images of a pass that are there and asked for; none is loaded yet.

    Args:
        job: the run.
        kind: the pass.
        full: the run whose images stand beside them; None where no metric looks at those.
    """
    folder = RunFolder.reading(job.folder / kind)
    reference = None if full is None else RunFolder.reading(full.folder / FREE)
    items = []
    for image in job.shown:
        row = folder.row(image.image_id)
        if row is None:
            continue  # another shard's
        other = reference.row(image.image_id) if reference else None
        file = folder.path / row["file"] if row["file"] else None
        beside = reference.path / other["file"] if reference and other and other["file"] else None
        items.append(
            Item(image.image_id, _key(image, row, other), partial(_sample, image, row["numbers"] or {}, file, beside))
        )
    return items


def _key(image: ImageJob, row: Mapping[str, Any], other: Mapping[str, Any] | None) -> str:
    """Changes whenever the image, its reference or its prompt does."""
    made = row["sha256"] or json.dumps(row["numbers"], sort_keys=True)
    beside = (other or {}).get("sha256") or ""
    meta = json.dumps(dict(image.item.meta), sort_keys=True, default=str)
    return hashlib.sha256(
        "\0".join((made, beside, image.item.prompt, meta)).encode("utf-8", "surrogatepass")
    ).hexdigest()[:16]


def _sample(image: ImageJob, numbers: Mapping[str, float], file: Path | None, reference: Path | None) -> Sample:
    return Sample(
        prompt_id=image.item.id,
        prompt=image.item.meta.get(ORIGINAL, image.item.prompt),
        meta=image.item.meta,
        image=None if file is None else read_image(file),
        reference=None if reference is None else read_image(reference),
        recorded=numbers,
        index=image.sample,
    )
