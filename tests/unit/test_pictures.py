"""Picture files: read exactly or refused by name; folders with things in them that are no pictures."""

from __future__ import annotations

import os
import socket
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from heatkv_cli.console import Console
from heatkv_cli.errors import ArtifactError, SetupError
from heatkv_cli.pipeline.image_folder import digest_of, read_image, reference_of, scan, stamp

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (5, 7), dtype=np.uint8)
RGB = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)
DEEP = RNG.integers(0, 65536, (5, 7, 3), dtype=np.uint16)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(values: np.ndarray, colour: int, bits: int, between: bytes = b"") -> bytes:
    """A PNG by hand: (H, W) or (H, W, C) values; ``colour`` 0 grey, 2 RGB, 4 grey and alpha, 6 RGB and alpha."""
    height, width = values.shape[:2]
    if bits < 8:
        rows = [np.packbits(np.unpackbits(row[:, None], axis=1)[:, 8 - bits :]) for row in values.astype(np.uint8)]
    else:
        rows = list(values.astype(">u2" if bits == 16 else "u1"))
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + between + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def tiff(values: np.ndarray, order: str, *, bits: int = 16, kind: int = 1, photometric: int | None = None) -> bytes:
    """An uncompressed TIFF by hand; ``kind`` 1 unsigned, 2 signed, 3 float."""
    height, width = values.shape[:2]
    count = 1 if values.ndim == 2 else values.shape[2]
    photometric = photometric if photometric is not None else (1 if count == 1 else 2)
    data = values.tobytes()
    bits_at = 8 + 2 + 12 * 10 + 4
    tags = {
        256: (4, 1, width),
        257: (4, 1, height),
        258: (3, count, bits if count == 1 else bits_at),
        259: (3, 1, 1),
        262: (3, 1, photometric),
        273: (4, 1, bits_at + 2 * count),
        277: (3, 1, count),
        278: (4, 1, height),
        279: (4, 1, len(data)),
        339: (3, 1, kind),
    }
    out = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, len(tags))
    for tag, (size, number, value) in tags.items():
        short = size == 3 and number == 1
        out += struct.pack(order + "HHI", tag, size, number)
        out += struct.pack(order + "HH", value, 0) if short else struct.pack(order + "I", value)
    return out + struct.pack(order + "I", 0) + struct.pack(order + "H" * count, *[bits] * count) + data


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def grey(values: np.ndarray) -> np.ndarray:
    return np.stack([values] * 3, axis=2)


# ---- read exactly


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (png(GREY, 0, 8), grey(GREY)),
        (png(RGB, 2, 8), RGB),
        (png(GREY >> 7, 0, 1), grey((GREY >> 7) * 255)),
        (png(GREY >> 6, 0, 2), grey((GREY >> 6) * 85)),
        (png(GREY >> 4, 0, 4), grey((GREY >> 4) * 17)),
        # 16 bits: the high byte; an 8-bit picture stored as 16 bits by either factor is itself again.
        (png(DEEP[..., 0], 0, 16), grey(DEEP[..., 0] >> 8)),
        (png(DEEP, 2, 16), DEEP >> 8),
        (png(GREY.astype(np.uint16) * 257, 0, 16), grey(GREY)),
        (png(GREY.astype(np.uint16) * 256, 0, 16), grey(GREY)),
        (png(RGB.astype(np.uint16) * 257, 2, 16), RGB),
        (png(RGB.astype(np.uint16) * 256, 2, 16), RGB),
        (png(np.dstack([DEEP, np.full((5, 7), 65535)]), 6, 16), DEEP >> 8),
        (png(np.dstack([DEEP[..., 0], np.full((5, 7), 65535)]), 4, 16), grey(DEEP[..., 0] >> 8)),
        *((tiff(DEEP[..., 0].astype(f"{order}u2"), order), grey(DEEP[..., 0] >> 8)) for order in "<>"),
        *((tiff(DEEP.astype(f"{order}u2"), order), DEEP >> 8) for order in "<>"),
        # An alpha channel that hides nothing.
        (png(np.dstack([RGB, np.full((5, 7), 255)]), 6, 8), RGB),
        (png(np.dstack([GREY, np.full((5, 7), 255)]), 4, 8), grey(GREY)),
        (png(RGB, 2, 8, chunk(b"tRNS", struct.pack(">HHH", 0, 1, 0))), RGB),
    ],
)
def test_pictures_of_any_depth_are_read_exactly(data: bytes, expected: np.ndarray, tmp_path: Path) -> None:
    found = read_image(written(tmp_path / "a.png", data))
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, expected)


def test_palettes_and_lossless_formats_are_read_exactly(tmp_path: Path) -> None:
    palette = Image.fromarray(RGB).quantize(16)
    palette.save(tmp_path / "p.png")
    np.testing.assert_array_equal(read_image(tmp_path / "p.png"), np.asarray(palette.convert("RGB")))
    opaque = palette.convert("RGBA").quantize(8, Image.Quantize.FASTOCTREE)
    opaque.save(tmp_path / "q.png")
    np.testing.assert_array_equal(read_image(tmp_path / "q.png"), np.asarray(opaque.convert("RGB")))
    for name in ("a.bmp", "a.webp", "A.PNG"):
        Image.fromarray(RGB).save(tmp_path / name, lossless=True)
        np.testing.assert_array_equal(read_image(tmp_path / name), RGB)
    Image.fromarray(RGB).save(tmp_path / "a.jpg", quality=95)
    np.testing.assert_array_equal(read_image(tmp_path / "a.jpg"), np.asarray(Image.open(tmp_path / "a.jpg")))
    (tmp_path / "link.png").symlink_to(tmp_path / "p.png")
    np.testing.assert_array_equal(read_image(tmp_path / "link.png"), read_image(tmp_path / "p.png"))


# ---- refused by name


def animated(path: Path) -> None:
    first, second = Image.fromarray(RGB), Image.fromarray(255 - RGB)
    first.save(path, format=path.suffix[1:].upper(), save_all=True, append_images=[second], lossless=True)


def turned(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(RGB).save(path, exif=exif)


def saved(mode: str, kind: str = "TIFF") -> Callable[[Path], None]:
    def save(path: Path) -> None:
        Image.fromarray(RGB).convert(mode).save(path, format=kind)

    return save


def holding(data: bytes) -> Callable[[Path], None]:
    return lambda path: written(path, data) and None


HALF = np.dstack([RGB, GREY])
REFUSED: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "alpha": ("a.png", holding(png(HALF, 6, 8)), "transparent pixels (mode RGBA)"),
    "grey alpha": ("a.png", holding(png(HALF[..., 2:], 4, 8)), "transparent pixels (mode"),
    "a transparent colour": (
        "a.png",
        holding(png(RGB, 2, 8, chunk(b"tRNS", struct.pack(">HHH", *RGB[0, 0])))),
        "transparent pixels",
    ),
    "a transparent deep colour": (
        "a.png",
        holding(png(DEEP, 2, 16, chunk(b"tRNS", struct.pack(">HHH", *DEEP[0, 0])))),
        "transparent pixels",
    ),
    "a transparent deep grey": (
        "a.png",
        holding(png(DEEP[..., 0], 0, 16, chunk(b"tRNS", struct.pack(">H", DEEP[0, 0, 0])))),
        "transparent pixels (mode I;16)",
    ),
    "float": ("a.png", holding(tiff(RGB[..., 0].astype("<f4"), "<", bits=32, kind=3)), "mode F"),
    "32 bits": ("a.png", holding(tiff(RGB[..., 0].astype("<i4"), "<", bits=32, kind=2)), "mode I"),
    "16 bits, signed": ("a.png", holding(tiff(RGB[..., 0].astype("<i2"), "<", kind=2)), "mode I"),
    "white is zero": ("a.png", holding(tiff(DEEP[..., 0].astype("<u2"), "<", photometric=0)), "photometric 0"),
    "CMYK": ("a.jpg", saved("CMYK", "JPEG"), "mode CMYK"),
    "CMYK in TIFF": ("a.png", saved("CMYK"), "mode CMYK"),
    "Lab": ("a.png", saved("LAB"), "mode LAB"),
    "frames of a PNG": ("a.png", animated, "it has 2 frames"),
    "frames of a WebP": ("a.webp", animated, "it has 2 frames"),
    "EXIF in JPEG": ("a.jpg", turned, "EXIF orientation is 6"),
    "EXIF in PNG": ("a.png", turned, "EXIF orientation is 6"),
    "EXIF in WebP": ("a.webp", turned, "EXIF orientation is 6"),
    "another format": ("a.png", holding(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "cannot identify"),
    "PPM": ("a.png", holding(b"P6\n7 5\n65535\n" + DEEP.astype(">u2").tobytes()), "cannot identify"),
    "nothing": ("a.png", holding(b""), "cannot identify"),
    "half": ("a.png", holding(png(RGB, 2, 8)[:60]), "cannot read"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_8_bit_rgb_is_refused_by_name(name: str, tmp_path: Path) -> None:
    file, write, text = REFUSED[name]
    write(tmp_path / file)
    with pytest.raises(ArtifactError) as caught:
        read_image(tmp_path / file)
    assert text in caught.value.message and str(tmp_path / file) in caught.value.message and caught.value.hint
    assert "\n" not in caught.value.message


# ---- what is no file


def strange(folder: Path) -> dict[str, str]:
    """Things with the names of images, and what is said of them."""
    os.mkfifo(folder / "pipe.png")
    (folder / "nowhere.png").symlink_to(folder / "gone.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "folder.png").mkdir()
    with socket.socket(socket.AF_UNIX) as endpoint:
        here = Path.cwd()
        os.chdir(folder)  # names of sockets are short
        endpoint.bind("socket.png")
        os.chdir(here)
    return {
        "pipe": "a pipe",
        "nowhere": "a link to nothing",
        "loop": "levels of symbolic links",
        "folder": "a folder",
        "socket": "a socket",
    }


def test_things_that_are_no_files_cost_themselves(tmp_path: Path) -> None:
    said = strange(tmp_path)
    Image.fromarray(RGB).save(tmp_path / "good.png")
    found = scan(tmp_path)
    assert set(found) == {*said, "good"}
    np.testing.assert_array_equal(read_image(found["good"]), RGB)
    for name, text in said.items():
        assert text in stamp(found[name])
        with pytest.raises(ArtifactError, match=f"{name}.png: .*{text}"):
            read_image(found[name])
    with pytest.raises(ArtifactError, match=r"no\.png: No such file"):
        read_image(tmp_path / "no.png")
    with pytest.raises(ArtifactError, match="File name too long"):
        read_image(tmp_path / ("x" * 300 + ".png"))


@pytest.mark.parametrize("name", ["pipe", "nowhere", "loop", "folder", "socket"])
def test_a_reference_with_such_a_thing_is_a_setup_error(name: str, tmp_path: Path) -> None:
    strange(tmp_path)
    Image.fromarray(RGB).save(tmp_path / "good.png")
    files = {key: path for key, path in scan(tmp_path).items() if key in (name, "good")}
    with pytest.raises(SetupError, match=f"{name}.png is no picture"):
        digest_of(files)


def test_names_that_are_no_text_are_printable_and_work(tmp_path: Path) -> None:
    picture = png(RGB, 2, 8)
    raw = os.fsencode(tmp_path)
    for name in (b"caf\xe9.png", b"esc\x1b[31m.png", b"new\nline.png", "größe 猫.png".encode()):
        Path(os.fsdecode(raw + b"/" + name)).write_bytes(picture)
    found = scan(tmp_path)
    assert set(found) == {"caf\\xe9", "esc\\x1b[31m", "new\\nline", "größe 猫"}
    for image_id, path in found.items():
        image_id.encode()
        np.testing.assert_array_equal(read_image(path), RGB)
        assert stamp(path) == stamp(path)
    assert len(digest_of(found)) == 64
    Path(os.fsdecode(raw + b"/\xff.png")).write_bytes(b"no picture")
    with pytest.raises(ArtifactError, match=r"/\\xff.png: cannot identify") as caught:
        read_image(scan(tmp_path)["\\xff"])
    caught.value.message.encode()
    (tmp_path / "caf\\xe9.jpg").write_bytes(picture)
    with pytest.raises(ArtifactError, match="two images are called"):
        scan(tmp_path)


# ---- references in files


def gaussian(**changes: Any) -> dict[str, Any]:
    root = RNG.normal(size=(6, 4))
    return {"mu": np.zeros(4), "sigma": root.T @ root, "n": np.array(6)} | changes


SIGMA = gaussian()["sigma"]
NO_GAUSSIANS: dict[str, tuple[dict[str, Any], str]] = {
    "no mu": ({"sigma": SIGMA}, "'mu'"),
    "no sigma": ({"mu": np.zeros(4)}, "'sigma'"),
    "NaN": (gaussian(mu=np.array([0, 0, np.nan, 0])), "not finite"),
    "infinite": (gaussian(sigma=SIGMA + np.diag([np.inf, 0, 0, 0])), "not finite"),
    "square mu": (gaussian(mu=np.zeros((2, 2))), "expected (d,) and (d, d)"),
    "short mu": (gaussian(mu=np.zeros(3)), "expected (d,) and (d, d)"),
    "flat sigma": (gaussian(sigma=np.zeros(4)), "expected (d,) and (d, d)"),
    "empty": (gaussian(mu=np.zeros(0), sigma=np.zeros((0, 0))), "expected (d,) and (d, d)"),
    "integers": (gaussian(mu=np.zeros(4, int)), "no floating-point numbers"),
    "complex": (gaussian(sigma=SIGMA + 0j), "no floating-point numbers"),
    "text": (gaussian(mu=np.array(["a"] * 4)), "no floating-point numbers"),
    "objects": (gaussian(mu=np.array([None] * 4)), "allow_pickle"),
    "asymmetric": (gaussian(sigma=SIGMA + np.triu(np.ones((4, 4)))), "not symmetric"),
    "negative variance": (gaussian(sigma=SIGMA - 99 * np.eye(4)), "the variance -"),
    "negative number": (gaussian(n=np.array(-1)), "'n' is -1"),
    "half an image": (gaussian(n=np.array(2.5)), "'n' is 2.5"),
    "several numbers": (gaussian(n=np.array([1, 2])), "'n' is [1, 2]"),
    "no number": (gaussian(n=np.array("x")), "'n' is 'x'"),
}


class Asked:
    """A set metric that is only asked for empty moments."""

    def statistics(self) -> Any:
        from heatkv_cli.metrics.statistics import Moments

        return Moments(4)


def read(path: Path, tmp_path: Path) -> Any:
    return reference_of(path, tmp_path, Console(quiet=True))(Asked())  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NO_GAUSSIANS)
def test_a_file_that_is_no_gaussian_is_refused(name: str, tmp_path: Path) -> None:
    arrays, text = NO_GAUSSIANS[name]
    np.savez(tmp_path / "ref.npz", **arrays)
    with pytest.raises(ArtifactError) as caught:
        read(tmp_path / "ref.npz", tmp_path)
    assert text in caught.value.message and "ref.npz" in caught.value.message and caught.value.hint


def test_gaussians_in_single_and_double_precision(tmp_path: Path) -> None:
    for dtype in (np.float32, np.float64):
        stored = gaussian(mu=np.arange(4, dtype=dtype), sigma=SIGMA.astype(dtype))
        np.savez(tmp_path / "ref.npz", **stored)
        found = read(tmp_path / "ref.npz", tmp_path)
        np.testing.assert_array_equal(found.mu, np.arange(4))
        np.testing.assert_array_equal(found.sigma, stored["sigma"].astype(np.float64))
        assert found.n == 6
        assert np.linalg.norm(found.sigma - SIGMA) <= found.sigma_error < 1e-5
    del stored["n"]
    np.savez(tmp_path / "ref.npz", **stored)
    assert read(tmp_path / "ref.npz", tmp_path).n == 0


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "whole.npz", **gaussian())
    whole = (tmp_path / "whole.npz").read_bytes()
    np.save(tmp_path / "single.npy", np.zeros(4))
    damages = [b"", b"PK\x03\x04", b"garbage" * 50, (tmp_path / "single.npy").read_bytes()]
    damages += [whole[: len(whole) * k // 20] for k in range(1, 20)]
    damages += [
        whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :] for place in range(30, len(whole), 131)
    ]
    refused = 0
    for data in damages:
        (tmp_path / "ref.npz").write_bytes(data)
        try:
            read(tmp_path / "ref.npz", tmp_path)
        except ArtifactError as error:
            refused += 1
            assert "ref.npz" in error.message
    assert refused >= 23  # a changed byte may lie where nobody looks
    for name in ("gone", "loop", "pipe"):
        path = tmp_path / f"{name}.npz"
        if name == "loop":
            path.symlink_to(path)
        elif name == "pipe":
            os.mkfifo(path)
        with pytest.raises(ArtifactError, match=f"{name}.npz"):
            read(path, tmp_path)
