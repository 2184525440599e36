"""Folders as the official scorers read them, so that a run can be judged by the originals as well.

GenEval: ``00000/metadata.jsonl``, ``00000/samples/0000.png``; the folder is the prompt's place in the list.
HPSv2: ``<style>/00000.jpg``; the number is the prompt's place in its style.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from heatkv_cli.benchmarks.base import ORIGINAL, PromptItem
from heatkv_cli.benchmarks.formats import STYLES
from heatkv_cli.errors import ArtifactError, ConfigError
from heatkv_cli.results import load_json, sha256_file, write_file

_GENEVAL_KEYS = ("tag", "include", "exclude")


@dataclass(frozen=True)
class Picture:
    """An image of a run: its prompt, which of the prompt's images it is, and where it lies (PNG)."""

    item: PromptItem
    sample: int
    file: Path


def check_geneval(prompts: Sequence[PromptItem], samples: int) -> None:
    """Raise a ConfigError unless every prompt has what GenEval's scorer reads; it takes any number of images."""
    for item in prompts:
        if not isinstance(item.meta.get("tag"), str) or not isinstance(item.meta.get("include"), list):
            raise ConfigError(f"prompt {item.id} is not of GenEval's list", "use a run of benchmark=geneval")


def write_geneval(pictures: Iterable[Picture], prompts: Sequence[PromptItem], folder: Path) -> int:
    """Lay out a run of benchmark ``geneval`` as GenEval's ``evaluate_images.py`` reads it.

    Args:
        pictures: of the run, any part of it.
        prompts: the whole list, whose order names the folders.
        folder: made if need be; what is there with the same content stays.

    Returns:
        The number of images.

    Raises:
        ConfigError: a prompt has no ``tag`` and ``include``.
        SetupError: a file cannot be written.
    """
    check_geneval(prompts, 1)
    place = {item.id: i for i, item in enumerate(prompts)}
    written = 0
    for picture in pictures:
        item = picture.item
        below = folder / f"{place[item.id]:05d}"
        metadata = {key: item.meta[key] for key in _GENEVAL_KEYS if key in item.meta}
        metadata["prompt"] = item.meta.get(ORIGINAL, item.prompt)
        facts, data = below / "metadata.jsonl", (json.dumps(metadata) + "\n").encode()
        if not facts.is_file() or facts.read_bytes() != data:
            write_file(facts, data)
        _link(picture.file, below / "samples" / f"{picture.sample:04d}.png")
        written += 1
    return written


def _link(file: Path, target: Path) -> None:
    """Give a file a second name; where the file system has no hard links, a copy. What is there already stays."""
    if target.exists() and (target.samefile(file) or sha256_file(target) == sha256_file(file)):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        target.hardlink_to(file)
    except OSError:
        write_file(target, file.read_bytes())


def read_geneval(folder: Path) -> list[Picture]:
    """Images of a folder in GenEval's form, by prompt and number; ids are the folders' names.

    Raises:
        ArtifactError: no such images, or a folder without usable ``metadata.jsonl``.
    """
    found = []
    for below in sorted(path for path in folder.glob("*") if path.is_dir() and path.name.isdigit()):
        try:
            meta = load_json((below / "metadata.jsonl").read_text(encoding="utf-8"))
            item = PromptItem(below.name, meta.pop("prompt"), meta)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(f"{below}: no usable metadata.jsonl: {error}", "write the folder again") from error
        files = [file for file in (below / "samples").glob("*") if re.fullmatch(r"\d+\.(png|jpg)", file.name)]
        found += [Picture(item, int(file.stem), file) for file in sorted(files, key=lambda file: int(file.stem))]
    if not found:
        raise ArtifactError(f"{folder} holds no 00000/samples/0000.png", "is it a folder in GenEval's form?")
    return found


def check_hpsv2(prompts: Sequence[PromptItem], samples: int) -> None:
    """Raise a ConfigError unless every prompt has a place of its own in HPSv2's folder, and one image."""
    seen: dict[tuple[str, int], str] = {}
    for item in prompts:
        style, index = item.meta.get("style"), item.meta.get("style_index")
        if samples != 1 or style not in STYLES or type(index) is not int or not 0 <= index < 100_000:
            raise ConfigError(
                f"prompt {item.id}, {samples} images: HPSv2's folder has one image a prompt, of its list",
                "use a run of benchmark=hpsv2 with one sample per prompt",
            )
        if (style, index) in seen:
            raise ConfigError(
                f"prompts {seen[style, index]} and {item.id} have one place in HPSv2's folder: {style} {index}",
                "give every prompt a style_index of its own",
            )
        seen[style, index] = item.id


def write_hpsv2(pictures: Iterable[Picture], folder: Path, jpeg_quality: int | None = None) -> int:
    """Lay out a run of benchmark ``hpsv2`` as ``hpsv2.evaluate`` reads it; returns the number of images.

    Args:
        pictures: of the run, any part of it.
        folder: made if need be; what is there with the same content stays.
        jpeg_quality: of the files. None keeps the PNG, under the name that is asked for: the scorer goes by the
            content, and compression would change the scores.

    Raises:
        ConfigError: a prompt has no style, or more than one image.
    """
    written = 0
    for picture in pictures:
        check_hpsv2([picture.item], picture.sample + 1)
        meta = picture.item.meta
        target = folder / meta["style"] / f"{meta['style_index']:05d}.jpg"
        if jpeg_quality is None:
            _link(picture.file, target)
        else:
            buffer = io.BytesIO()
            with Image.open(picture.file) as opened:
                opened.convert("RGB").save(buffer, "JPEG", quality=jpeg_quality)
            write_file(target, buffer.getvalue())
        written += 1
    return written


def read_hpsv2(folder: Path, prompts: Sequence[PromptItem]) -> list[Picture]:
    """Images of a folder in HPSv2's form, in the order of the list; prompts without an image are left out.

    Raises:
        ArtifactError: no such images.
    """
    found = []
    for item in prompts:
        file = folder / str(item.meta.get("style")) / f"{item.meta.get('style_index', -1):05d}.jpg"
        if file.is_file():
            found.append(Picture(item, 0, file))
    if not found:
        raise ArtifactError(f"{folder} holds no <style>/00000.jpg", "is it a folder in HPSv2's form?")
    return found


@dataclass(frozen=True)
class Layout:
    """A tree of one benchmark: whether a list fits into it (prompts, images of each), and writing it."""

    check: Callable[[Sequence[PromptItem], int], None]
    write: Callable[[Sequence[Picture], Sequence[PromptItem], Path], int]


LAYOUTS = {
    "geneval": Layout(check_geneval, write_geneval),
    "hpsv2": Layout(check_hpsv2, lambda pictures, prompts, folder: write_hpsv2(pictures, folder)),
}
"""By the benchmark's name."""
