"""The time that a large model would take on this CPU: a warning before the first image, not a measurement."""

from __future__ import annotations

from time import perf_counter

import torch

from heatkv_cli.config import RunConfig
from heatkv_cli.planning.job import geometry_of, sketch_of

LARGE = 500_000_000
"""Parameters from which a model on a CPU wants to be asked for twice."""


def large(run: RunConfig) -> bool:
    """Return whether a run's model has so many parameters that a CPU takes minutes for an image."""
    return _parameters(run) >= LARGE


def hours_text(run: RunConfig, images: int) -> str:
    """Return the time of some images in words: 2 x parameters x tokens x rows, over this CPU's rate."""
    rows = 2 if run.model.sampling.guided else 1
    tokens = geometry_of(run.model).schedule.num_tokens
    hours = 2 * _parameters(run) * tokens * rows * images / _rate(getattr(torch, run.model.dtype)) / 3600
    return f"{hours:.0f} hours" if hours >= 2 else f"{max(1, round(60 * hours))} minutes"


def _parameters(run: RunConfig) -> int:
    model = run.model
    if not model.sketch:
        return 0
    networks = sketch_of(model, geometry_of(model)).networks.values()
    return sum(parameter.numel() for net in networks for parameter in net.parameters())


def _rate(dtype: torch.dtype) -> float:
    """Multiplications and additions a second of a matrix product of this CPU, the best of three."""
    a = torch.ones(1024, 1024, dtype=dtype)
    seconds = []
    for _ in range(3):
        begin = perf_counter()
        a @ a
        seconds.append(perf_counter() - begin)
    return 2 * 1024**3 / min(seconds)
