"""Picture files to 8-bit pixels, read exactly or not at all; and pixels to batches of tensors."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from heatkv_cli.errors import ArtifactError, HeatKVError
from heatkv_cli.metrics.networks import check_device
from heatkv_cli.metrics.scores import Pixels

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
"""Formats that a picture file may have, whatever its name. Pillow reads more, one of them by another program."""
_ORIENTATION, _BITS, _PHOTOMETRIC, _BLACK_IS_ZERO = 0x0112, 258, 262, 1
_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}


def printable(path: Path | str) -> str:
    r"""Return a path for messages and names: bytes that are no UTF-8, and control characters, as escapes.

    >>> printable("caf\udce9\n")
    'caf\\xe9\\n'
    """
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def irregular(path: Path) -> str:
    """Return '' for a regular file, which may be reached by a link; else what stands there. Nothing is opened."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return f"{'a link to nothing: ' if os.path.islink(path) else ''}{error.strerror or error}"  # noqa: PTH114 - false for long names
    return "" if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "a device")


def read_image(path: Path) -> Pixels:
    """Return (H, W, 3) 8-bit pixels of a picture file.

    Read exactly: 1, 2, 4 and 8 bits of grey, palettes, RGB; an alpha channel where every pixel is opaque; of 16 bits a
    number the high byte, so that an 8-bit picture that was stored as 16 bits is the 8-bit picture again. Profiles and
    gamma are not applied.

    Raises:
        ArtifactError: the file is missing, is no regular file or is damaged; or its pixels are not 8-bit RGB in an
            agreed way: transparency, float and 32-bit numbers, CMYK, Lab, HSV, YCbCr, several frames, an EXIF
            orientation.
    """
    if wrong := irregular(path):
        raise ArtifactError(f"cannot read {printable(path)}: {wrong}", "make the image again, or remove it")
    try:
        with open(path, "rb", opener=_at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError("it is no regular file any more")
            with Image.open(file, formats=FORMATS) as opened:
                return _exact(opened, path)
    except (HeatKVError, MemoryError):
        raise
    except Exception as error:  # decoders raise whatever the bytes lead them to
        reason = printable(" ".join(str(error).split()).replace(str(path), path.name))
        raise ArtifactError(f"cannot read {printable(path)}: {reason}", "make the image again, or remove it") from error


def _at_once(path: str, flags: int) -> int:
    """Open without waiting: a pipe that took a picture's place would wait for a writer."""
    return os.open(path, flags | os.O_NONBLOCK)


def _exact(opened: Image.Image, path: Path) -> Pixels:
    """Return the pixels of an opened picture.

    Raises:
        ArtifactError: see ``read_image``.
    """
    frames = getattr(opened, "n_frames", 1)
    if frames != 1:
        raise _refused(path, f"it has {frames} frames", "save the frame that is meant as a PNG")
    turned = opened.getexif().get(_ORIENTATION, 1)
    if turned in range(2, 9):
        raise _refused(path, f"its EXIF orientation is {turned}, which programs do not agree on", "turn it and save it")
    opened.load()
    mode = opened.mode
    if mode.startswith("I;16"):
        return _high_byte(opened, path)
    if mode in ("1", "L", "P", "RGB", "LA", "PA", "RGBA"):
        if mode in ("LA", "PA", "RGBA") or "transparency" in opened.info:
            return _opaque(opened, path)
        return np.asarray(opened.convert("RGB"))
    raise _refused(path, f"its pixels are of mode {mode}", "convert it to 8-bit RGB")


def _high_byte(opened: Image.Image, path: Path) -> Pixels:
    tags: Any = getattr(opened, "tag_v2", None)
    if tags is not None and (tuple(tags[_BITS]), tags[_PHOTOMETRIC]) != ((16,), _BLACK_IS_ZERO):
        raise _refused(path, f"it is a TIFF of {tags[_BITS][0]} bits, photometric {tags[_PHOTOMETRIC]}", "save a PNG")
    values: NDArray[np.uint16] = np.asarray(opened).astype(np.uint16)
    if "transparency" in opened.info and (values == opened.info["transparency"]).any():
        raise _transparent(opened, path)
    grey = (values >> 8).astype(np.uint8)
    return np.stack([grey] * 3, axis=2)


def _opaque(opened: Image.Image, path: Path) -> Pixels:
    key = opened.info.get("transparency")
    deep = any(value > 255 for value in key) if isinstance(key, tuple) else isinstance(key, int) and key > 255
    # Pillow reads 16-bit colours as their high bytes, and leaves the colour that stands for transparency as it is.
    pixels = np.asarray(opened.convert("RGBA"))
    if deep or pixels[..., 3].min() < 255:
        raise _transparent(opened, path)
    return np.ascontiguousarray(pixels[..., :3])


def _transparent(opened: Image.Image, path: Path) -> ArtifactError:
    return _refused(path, f"it has transparent pixels (mode {opened.mode})", "put it on a ground and save it as RGB")


def _refused(path: Path, why: str, fix: str) -> ArtifactError:
    return ArtifactError(f"cannot read {printable(path)} as 8-bit RGB: {why}", fix)


# ------------------------------------------------------------------------------------------------- pixels to tensors


def stack(images: Sequence[Pixels], device: str = "cpu") -> Tensor:
    """Return (n, 3, H, W) uint8 of images of one size.

    Raises:
        SetupError: there is no such device.
    """
    check_device(device)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(device)


def by_size(function: Callable[..., Tensor], *sides: Sequence[Pixels]) -> Tensor:
    """Call a function with images of one size at a time, and return its (m, ...) results in the given order.

    Args:
        function: takes as many lists as there are ``sides``, returns a row for each image.
        *sides: lists of equal length; images of one place have one size.
    """
    sizes = [image.shape for image in sides[0]]
    order: list[int] = []
    parts = []
    for size in dict.fromkeys(sizes):
        chosen = [i for i, other in enumerate(sizes) if other == size]
        order += chosen
        parts.append(function(*([side[i] for i in chosen] for side in sides)))
    rows = torch.cat(parts)
    return rows[torch.tensor(order).argsort().to(rows.device)]


def resized_planes(image: Pixels, side: int) -> NDArray[np.float32]:
    """Return (3, side, side) in 0..255: Pillow's bicubic filter per channel in float, cut to the range, not rounded."""
    planes = [Image.fromarray(image[:, :, c].astype(np.float32)) for c in range(3)]
    resized = [np.asarray(plane.resize((side, side), Image.Resampling.BICUBIC)) for plane in planes]
    return np.stack(resized).clip(0, 255)


def sample_pictures() -> tuple[Pixels, Pixels]:
    """Return two pictures for self-tests, 64 x 64: a ramp of colours, and the same with a checked corner."""
    side = np.arange(64)
    ramp = np.stack(np.broadcast_arrays(4 * side[:, None], 4 * side[None], 255 - 2 * side[:, None]), -1).astype(
        np.uint8
    )
    checked = ramp.copy()
    checked[:32, :32] = 255 * ((side[:32, None, None] // 8 + side[None, :32, None] // 8) % 2)
    return ramp, checked
