"""Networks of metrics in memory: loaded once, shared by all who ask for the same, and let go together.

A network is found by its kind, the digests of its files and everything else it is built from. ``release`` frees all of
them, so that a stage can hold one judge in memory at a time.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable
from typing import Any, TypeVar, cast

import torch
from torch import nn

from heatkv_cli.errors import ArtifactError, SetupError

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)

_loaded: dict[Hashable, Any] = {}


def loaded(key: Hashable, load: Callable[[], T]) -> T:
    """Return what ``load`` makes; it runs once for a key until ``release``.

    A file that does not fit is remembered too: two gigabytes are not read again for every image.

    Raises:
        ArtifactError: ``load`` raised it, now or before; any other error of ``load`` is not kept.
    """
    if key not in _loaded:
        try:
            _loaded[key] = load()
        except ArtifactError as error:
            _loaded[key] = error
    found = _loaded[key]
    if isinstance(found, ArtifactError):
        raise found.with_traceback(None)
    return cast(T, found)


def release() -> None:
    """Free every loaded network, and end the workers of official packages."""
    _loaded.clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def ready(network: M, device: str) -> M:
    """Return a network for inference on a device.

    Raises:
        SetupError: there is no such device.
    """
    check_device(device)
    return network.requires_grad_(False).eval().to(device)


def check_device(device: str) -> None:
    """Check that a device is there.

    Raises:
        SetupError: it is not.
    """
    if device == "cpu":
        return
    kind, _, index = device.partition(":")
    count = torch.cuda.device_count() if kind == "cuda" else int(torch.backends.mps.is_available())
    if int(index or 0) >= count:
        raise SetupError(f"torch finds no device {device}: there are {count} of this kind", "use runtime=cpu")
