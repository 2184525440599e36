"""Ways in which a file can be wrong. Every one says what it does, and draws nothing but from its own seed."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sandbox import remove

MARKER = "marker"
"""A file that code of an input would make, in the folder of the case."""


@dataclass(frozen=True)
class Damage:
    """What is done to a file before the command begins.

    Args:
        path: below the folder of the case; `*` stands for what changes with a hash, the first match is meant.
        how: a key of `WAYS`.
        seed: of what it draws.
    """

    path: str
    how: str
    seed: int = 0

    def apply(self, place: Path) -> None:
        """Do it."""
        found = sorted(place.glob(self.path)) if "*" in self.path else [place / self.path]
        assert found, f"the world has no {self.path}"
        found[0].parent.mkdir(parents=True, exist_ok=True)
        WAYS[self.how](found[0], random.Random(f"{self.seed} {self.how}"))


def _truncated(path: Path, draw: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: draw.randrange(1, len(data))])


def _flipped(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def _header_flipped(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[draw.randrange(min(len(data), 100))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def _longer(path: Path, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes() + draw.randbytes(draw.randrange(1, 100)))


def _writes(data: bytes) -> Callable[[Path, random.Random], None]:
    def write(path: Path, draw: random.Random) -> None:
        remove(path)
        path.write_bytes(data)

    return write


def _linked(target: str) -> Callable[[Path, random.Random], None]:
    def link(path: Path, draw: random.Random) -> None:
        remove(path)
        path.symlink_to(target)

    return link


def _garbage(path: Path, draw: random.Random) -> None:
    remove(path)
    path.write_bytes(draw.randbytes(draw.randrange(1, 5000)))


def _zeros(path: Path, draw: random.Random) -> None:
    path.write_bytes(bytes(path.stat().st_size if path.is_file() else 100))


def _folder(path: Path, draw: random.Random) -> None:
    remove(path)
    path.mkdir()


def _pipe(path: Path, draw: random.Random) -> None:
    remove(path)
    os.mkfifo(path)


def _bomb(path: Path, draw: random.Random) -> None:
    """A pickle that makes a file when it is read without care."""
    remove(path)
    path.write_bytes(pickle.dumps(_Touch(str(_place_of(path) / MARKER)), protocol=draw.choice((0, 2, 4))))


def _torch_bomb(path: Path, draw: random.Random) -> None:
    """The same in the zip that torch writes."""
    remove(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(_Touch(str(_place_of(path) / MARKER)), protocol=2))
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")


def _object_array(path: Path, draw: random.Random) -> None:
    """An array of objects, which numpy reads by unpickling."""
    remove(path)
    content = io.BytesIO()
    np.save(content, np.array([_Touch(str(_place_of(path) / MARKER))], dtype=object), allow_pickle=True)
    if path.suffix != ".npz":
        path.write_bytes(content.getvalue())
        return
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("mu", "sigma"):
            archive.writestr(f"{name}.npy", content.getvalue())


class _Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")


def _place_of(path: Path) -> Path:
    return next(parent for parent in path.parents if parent.name == "place")


def _zip_bomb(path: Path, draw: random.Random) -> None:
    """Arrays of 16 GB that take some kilobytes on disk, since all is zero."""
    remove(path)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (2 * 10**9,)})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("mu", "sigma"):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as inside:
                inside.write(header.getvalue())
                for _ in range(64):
                    inside.write(bytes(2**20))


def _lies(size: int) -> Callable[[Path, random.Random], None]:
    """A safetensors file whose header claims to be `size` long."""
    return _writes(struct.pack("<Q", size) + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}' + bytes(4))


def _giant_tensor(path: Path, draw: random.Random) -> None:
    """A safetensors file with a tensor of more numbers than there are bytes in the world."""
    shape = [2**31, 2**31] if draw.random() < 0.5 else [2**60]
    header = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * 2**60]}}).encode()
    remove(path)
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))


def _giant_npy(path: Path, draw: random.Random) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (2**40, 1280)})
    remove(path)
    path.write_bytes(header.getvalue() + bytes(64))


def _rows_twice(path: Path, draw: random.Random) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines, draw.choice(lines[1:] or lines)]))


def _replaced(old: bytes, new: bytes) -> Callable[[Path, random.Random], None]:
    def replace(path: Path, draw: random.Random) -> None:
        data = path.read_bytes()
        assert old in data, f"{path} has no {old!r}"
        path.write_bytes(data.replace(old, new))

    return replace


def _before(start: bytes) -> Callable[[Path, random.Random], None]:
    def write(path: Path, draw: random.Random) -> None:
        path.write_bytes(start + path.read_bytes())

    return write


def _after(end: bytes) -> Callable[[Path, random.Random], None]:
    def write(path: Path, draw: random.Random) -> None:
        path.write_bytes(path.read_bytes() + end)

    return write


def _recoded(encoding: str) -> Callable[[Path, random.Random], None]:
    def recode(path: Path, draw: random.Random) -> None:
        path.write_bytes(path.read_bytes().decode().encode(encoding))

    return recode


def _gone(path: Path, draw: random.Random) -> None:
    remove(path)


def _itself(path: Path, draw: random.Random) -> None:
    remove(path)
    path.symlink_to(path.name)


PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000a49444154789c6300010000050001"
)
"""The beginning of a picture."""

GIANT_PNG = bytes.fromhex("89504e470d0a1a0a0000000d49484452") + struct.pack(
    ">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0
)
"""A picture that says it has 4 * 10**18 pixels."""

YAML_BOMB = b"a: &a [x, x, x, x, x, x, x, x, x]\n" + b"".join(
    b"%c: &%c [%s]\n" % (sign + 1, sign + 1, b", ".join([b"*%c" % sign] * 9)) for sign in range(97, 107)
)
"""Some hundred bytes that stand for 9**11 words."""

WAYS: dict[str, Callable[[Path, random.Random], None]] = {
    "cut short": _truncated,
    "a bit flipped": _flipped,
    "a bit of the first 100 bytes flipped": _header_flipped,
    "longer by some bytes": _longer,
    "empty": _writes(b""),
    "one byte": _writes(b"\x80"),
    "garbage": _garbage,
    "zeros": _zeros,
    "a folder": _folder,
    "a pipe": _pipe,
    "gone": _gone,
    "a link to nothing": _linked("/nonexistent/file"),
    "a link to itself": _itself,
    "a link to /dev/zero": _linked("/dev/zero"),
    "a link to /dev/full": _linked("/dev/full"),
    "a link to /dev/null": _linked("/dev/null"),
    "a link to /proc/self/mem": _linked("/proc/self/mem"),
    "a picture": _writes(PNG),
    "a giant picture": _writes(GIANT_PNG),
    "a page of HTML": _writes(b"<!DOCTYPE html><html><body>404</body></html>\n"),
    "a git-lfs pointer": _writes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n"),
    "a gzip file": _writes(bytes.fromhex("1f8b0800000000000003") + bytes(20)),
    "a zip file of nothing": _writes(b"PK\x05\x06" + bytes(18)),
    "a pickle with code": _bomb,
    "a torch file with code": _torch_bomb,
    "an array of objects with code": _object_array,
    "a zip bomb": _zip_bomb,
    "a header of 2**60 bytes": _lies(2**60),
    "a header of 2**63 bytes": _lies(2**63),
    "a header of 2**64-1 bytes": _lies(2**64 - 1),
    "a tensor of 2**60 numbers": _giant_tensor,
    "an array of 2**40 rows": _giant_npy,
    "deep JSON": _writes(b"[" * 100_000 + b"]" * 100_000),
    "deep JSON objects": _writes(b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
    "a JSON number": _writes(b"7"),
    "a JSON text": _writes(b'"text"'),
    "JSON null": _writes(b"null"),
    "JSON NaN": _writes(b"[NaN, Infinity, -Infinity]"),
    "a JSON list of nothing": _writes(b"[]"),
    "a JSON object of nothing": _writes(b"{}"),
    "a JSON number of 10,000 digits": _writes(b"9" * 10_000),
    "JSON of 1e400": _writes(b'{"a": 1e400}'),
    "text that is not UTF-8": _writes(b"id,prompt\n1,caf\xe9\n"),
    "UTF-16": _recoded("utf-16"),
    "a byte-order mark": _before("\ufeff".encode()),
    "semicolons": _replaced(b",", b";"),
    "tabs": _replaced(b",", b"\t"),
    "a row twice": _rows_twice,
    "NUL characters": _after(b"\0\0\0\n"),
    "carriage returns": _replaced(b"\n", b"\r\n"),
    "another end": _after(b'\n"\n'),
    "YAML with code": _writes(b'!!python/object/apply:os.system ["touch ../../marker"]\n'),
    "YAML with a call": _after(b"\nx: !!python/name:os.system\n"),
    "a YAML bomb": _writes(YAML_BOMB),
    "YAML with a tab": _after(b"\n\tx: 1\n"),
    "YAML that is cut": _after(b"\nx: [1, 2\n"),
    "an unknown key": _after(b"\nnosuchkey: 1\n"),
    "a _target_ with code": _after(b"\n_target_: os.system\n"),
    "a cycle": _after(b"\nx: ${y}\ny: ${x}\n"),
}
"""Every way, by what it makes of the file."""
