"""The same prompts in columns, the runs in rows: one picture to look at."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from heatkv_cli.planning.job import ImageJob
from heatkv_cli.results import write_file

CELL, LABEL, GAP = 120, 110, 4


def write_contact_sheet(path: Path, runs: Sequence[tuple[str, Path]], images: Sequence[ImageJob]) -> Path:
    """Draw the sheet.

    Args:
        path: PNG to write.
        runs: a label and the folder of the pictures of each row.
        images: the columns.
    """
    font, title = ImageFont.load_default(11), 64
    width = LABEL + len(images) * (CELL + GAP)
    sheet = Image.new("RGB", (width, title + len(runs) * (CELL + GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, image in enumerate(images):
        words = "\n".join(textwrap.wrap(image.item.prompt, 20)[:4])
        draw.multiline_text((LABEL + column * (CELL + GAP) + 2, 4), words, "black", font)
    for row, (label, folder) in enumerate(runs):
        top = title + row * (CELL + GAP)
        draw.text((4, top + CELL // 2 - 6), label, "black", font)
        for column, image in enumerate(images):
            file = folder / f"{image.image_id}.png"
            if file.exists():
                picture = Image.open(file).convert("RGB").resize((CELL, CELL), Image.Resampling.NEAREST)
                sheet.paste(picture, (LABEL + column * (CELL + GAP), top))
    data = io.BytesIO()
    sheet.save(data, format="png")
    write_file(path, data.getvalue())  # in the place of a link, and not where it leads
    return path
