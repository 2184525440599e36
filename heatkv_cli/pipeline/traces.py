"""Traces on disk: what the full run decided, for runs that copy it.

Codes are always there. The logits they were drawn from are, where they are small (`STORED`); else whoever compares with
them runs the full cache again, batch by batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from heatkv_cli.errors import ArtifactError, ConfigError
from heatkv_cli.models.base import Trace
from heatkv_cli.planning.job import FREE, ImageJob, Job
from heatkv_cli.results import RunFolder

STORED = 2**20
"""Bytes of an image's logits up to which they are written."""

CODES, LOGITS = "codes", "logits"


def encode_trace(trace: Trace, i: int) -> bytes:
    """Return the file of the i-th image of a batch: `codes.{t}` as they are, `logits.{t}` where they are small."""
    one = slice(i, i + 1)
    parts = {CODES: trace.codes}
    if sum(logits[one].nbytes for logits in trace.logits) <= STORED:
        parts[LOGITS] = trace.logits
    named = {f"{name}.{t:03}": x for name, steps in parts.items() for t, x in enumerate(steps)}
    return save({name: x[one].cpu().contiguous() for name, x in named.items()})


def are_stored(job: Job) -> bool:
    """Return whether the full run's logits lie beside its codes."""
    folder = RunFolder.reading(job.folder / FREE)
    first = next((image for image in job.images if folder.row(image.image_id)), None)
    return first is None or bool(_part(folder, first, LOGITS))


def load_codes(folder: RunFolder, batch: Sequence[ImageJob]) -> list[Tensor]:
    """Return the codes of a batch, per scale (B, ...).

    Raises:
        ArtifactError: a trace cannot be read.
        ConfigError: the full run has no such image: it is another shard's.
    """
    return [torch.cat(step) for step in zip(*(_part(folder, image, CODES) for image in batch), strict=True)]


def load_logits(folder: RunFolder, batch: Sequence[ImageJob]) -> list[list[Tensor]] | None:
    """Return the logits of each image of a batch, per scale (1, N, ...); None where they are too large to be there.

    Raises:
        ArtifactError, ConfigError: as `load_codes`.
    """
    found = [_part(folder, image, LOGITS) for image in batch]
    return found if all(found) else None


def _part(folder: RunFolder, image: ImageJob, part: str) -> list[Tensor]:
    row = folder.row(image.image_id)
    if row is None or not row["trace"]:
        raise ConfigError(f"the full run has no image {image.image_id}", "run the same command without --shard")
    path: Path = folder.path / row["trace"]
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"cannot read {path}: {error}", "remove it: the image is made again") from error
    return [tensors[name] for name in sorted(tensors) if name.startswith(part)]
