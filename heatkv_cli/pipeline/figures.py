"""Pictures of a calibration: the curve by which HACK cuts heads, and the map by which HeatKV ranks them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from heatkv_cli.calibration.statistics import elbow

FONT = ImageFont.load_default(11)
GREY, CURVE, MARK = "#888888", "#1f5fbf", "#c03020"
CURVE_BOX = (70, 30, 620, 330)  # left, top, right, bottom of the plot
CURVE_SIZE = (640, 380)
HEAT = ((255, 255, 255), (254, 217, 118), (240, 59, 32), (60, 0, 30))  # from 0 to the largest score
CELL, GAP, MARGIN = 6, 14, 24


def write_variance_curve(path: Path, variance: Tensor, alpha: float) -> Path:
    """Draw the column variance of all heads in ascending order, with HACK's cut and the elbow.

    Args:
        path: PNG to write.
        variance: (L, H).
        alpha: share of contextual heads that HACK cuts off by default.
    """
    left, top, right, bottom = CURVE_BOX
    image = Image.new("RGB", CURVE_SIZE, "white")
    draw = ImageDraw.Draw(image)
    values = variance.flatten().double().sort().values
    highest = float(values[-1]) or 1.0
    draw.text((left, 8), "Variance of attention columns at the final scale, heads in ascending order", "black", FONT)
    for part in range(5):
        y, x = bottom - (bottom - top) * part / 4, left + (right - left) * part / 4
        draw.line((left - 4, y, left, y), GREY)
        draw.text((left - 8, y), f"{highest * part / 4:.3g}", "black", FONT, anchor="rm")
        draw.line((x, bottom, x, bottom + 4), GREY)
        draw.text((x, bottom + 8), f"{part / 4:g}", "black", FONT, anchor="mt")
    draw.text(((left + right) / 2, bottom + 26), "share of heads", "black", FONT, anchor="mt")
    for place, (name, share) in enumerate((("alpha", alpha), ("elbow", elbow(variance)))):
        x = left + share * (right - left)
        draw.line((x, top, x, bottom), MARK if name == "alpha" else GREY)
        draw.text((x - 4, top + 6 + 14 * place), f"{name} {share:.2f}", "black", FONT, anchor="rt")
    draw.text((left + 6, bottom - 40), "contextual", GREY, FONT)
    draw.text((right - 6, bottom - 40), "structural", GREY, FONT, anchor="ra")
    draw.rectangle(CURVE_BOX, outline=GREY)
    step = (right - left) / max(1, len(values) - 1)
    draw.line([(left + i * step, bottom - v / highest * (bottom - top)) for i, v in enumerate(values.tolist())], CURVE)
    return _save(image, path)


def write_scas_map(path: Path, scores: Tensor, sources: Sequence[int]) -> Path:
    """Draw the S-CAS of every head, one panel (layers down, heads across) a source scale, one colour scale for all.

    Args:
        path: PNG to write.
        scores: (S, L, H).
        sources: the source scales, (S,).
    """
    count, layers, heads = scores.shape
    columns = min(count, max(1, 900 // (heads * CELL + GAP)))
    rows = -(-count // columns)
    width, height = heads * CELL + GAP, layers * CELL + GAP + 14
    legend = MARGIN + max(columns * width, 260)
    image = Image.new("RGB", (legend + 70, max(MARGIN + 14 + rows * height, 200)), "white")
    draw, highest = ImageDraw.Draw(image), float(scores.max()) or 1.0
    title = "S-CAS by source scale: layers down, heads across"
    draw.text((MARGIN, 6), title, "black", FONT)
    for index, source in enumerate(sources):
        x, y = panel_corner(index, layers, heads, columns)
        draw.text((x, y - 13), f"scale {source}", "black", FONT)
        for layer, line in enumerate(scores[index].tolist()):
            for head, score in enumerate(line):
                corner = (x + head * CELL, y + layer * CELL)
                draw.rectangle((*corner, corner[0] + CELL - 1, corner[1] + CELL - 1), heat(score / highest))
        draw.rectangle((x - 1, y - 1, x + heads * CELL, y + layers * CELL), outline=GREY)
    for step in range(100):
        y = 150 - step
        draw.line((legend, y, legend + 12, y), heat(step / 99))
    for share in (0, 0.5, 1):
        draw.text((legend + 18, 150 - 99 * share), f"{highest * share:.3g}", "black", FONT, anchor="lm")
    return _save(image, path)


def panel_corner(index: int, layers: int, heads: int, columns: int) -> tuple[int, int]:
    """Left and top pixel of the cells of the index-th panel."""
    row, column = divmod(index, columns)
    return MARGIN + column * (heads * CELL + GAP), MARGIN + 14 + row * (layers * CELL + GAP + 14)


def heat(share: float) -> tuple[int, int, int]:
    """Colour of a number in 0..1: white, yellow, red, dark."""
    place = min(max(share, 0.0), 1.0) * (len(HEAT) - 1)
    low = min(int(place), len(HEAT) - 2)
    red, green, blue = (round(a + (b - a) * (place - low)) for a, b in zip(HEAT[low], HEAT[low + 1], strict=True))
    return red, green, blue


def _save(image: Image.Image, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path
