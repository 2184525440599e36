"""The pictures of a calibration, read back pixel by pixel."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image, ImageColor

from heatkv_cli.calibration.statistics import elbow
from heatkv_cli.pipeline import figures
from heatkv_cli.pipeline.figures import CELL, CURVE_BOX, CURVE_SIZE, panel_corner, write_scas_map, write_variance_curve

LEFT, TOP, RIGHT, BOTTOM = CURVE_BOX


def heights(picture: Image.Image, colour: str) -> dict[int, float]:
    """Mean height over the axis, 0..1, of a colour's pixels in each column of the plot."""
    wanted, found = ImageColor.getrgb(colour), {}
    for x in range(LEFT + 1, RIGHT):
        rows = [y for y in range(TOP, BOTTOM + 1) if picture.getpixel((x, y)) == wanted]
        if rows:
            found[x] = (BOTTOM - sum(rows) / len(rows)) / (BOTTOM - TOP)
    return found


def test_the_curve_follows_the_data(tmp_path: Path) -> None:
    shares = torch.linspace(0, 1, 200, dtype=torch.float64)
    variance = (shares**4)[torch.randperm(200, generator=torch.Generator().manual_seed(1))].view(10, 20) * 7
    picture = Image.open(write_variance_curve(tmp_path / "new" / "curve.png", variance, 0.5)).convert("RGB")
    assert picture.size == CURVE_SIZE
    found = heights(picture, figures.CURVE)
    assert len(found) > 0.98 * (RIGHT - LEFT)
    for x, height in found.items():
        assert height == pytest.approx(((x - LEFT) / (RIGHT - LEFT)) ** 4, abs=0.02)


def test_another_curve_is_another_picture(tmp_path: Path) -> None:
    picture = Image.open(write_variance_curve(tmp_path / "a.png", torch.arange(64.0).view(8, 8), 0.5)).convert("RGB")
    for x, height in heights(picture, figures.CURVE).items():
        assert height == pytest.approx((x - LEFT) / (RIGHT - LEFT), abs=0.02)


@pytest.mark.parametrize("alpha", [0.25, 0.8])
def test_alpha_and_elbow_are_marked(tmp_path: Path, alpha: float) -> None:
    shares = torch.linspace(0, 1, 100, dtype=torch.float64)
    variance = shares**6
    picture = Image.open(write_variance_curve(tmp_path / "a.png", variance.view(5, 20), alpha)).convert("RGB")
    line = LEFT + alpha * (RIGHT - LEFT)
    marks = [x for x in range(LEFT, RIGHT) if picture.getpixel((x, BOTTOM - 5)) == ImageColor.getrgb(figures.MARK)]
    assert marks and all(abs(x - line) <= 1 for x in marks)
    knee = LEFT + elbow(variance) * (RIGHT - LEFT)
    greys = [
        x for x in range(LEFT + 2, RIGHT - 1) if picture.getpixel((x, TOP + 60)) == ImageColor.getrgb(figures.GREY)
    ]
    assert greys and all(abs(x - knee) <= 1 for x in greys)


def test_every_head_has_its_cell(tmp_path: Path) -> None:
    sources, layers, heads = range(3, 12), 4, 8
    scores = torch.rand(len(sources), layers, heads, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    picture = Image.open(write_scas_map(tmp_path / "map.png", scores, sources)).convert("RGB")
    for index in range(len(sources)):
        x, y = panel_corner(index, layers, heads, columns=len(sources))
        for layer in range(layers):
            for head in range(heads):
                centre = (x + head * CELL + CELL // 2, y + layer * CELL + CELL // 2)
                assert picture.getpixel(centre) == figures.heat(float(scores[index, layer, head] / scores.max()))


@pytest.mark.parametrize(("sources", "layers", "heads"), [(9, 32, 16), (9, 40, 28), (6, 8, 8), (1, 1, 1)])
def test_all_panels_are_on_the_sheet(tmp_path: Path, sources: int, layers: int, heads: int) -> None:
    """The last cell of the last panel carries the only score."""
    scores = torch.zeros(sources, layers, heads)
    scores[-1, -1, -1] = 0.5
    picture = Image.open(write_scas_map(tmp_path / "map.png", scores, range(3, 3 + sources))).convert("RGB")
    dark = [i for i, pixel in enumerate(picture.get_flattened_data()) if pixel == figures.HEAT[-1]]
    rows = {i // picture.width for i in dark if i % picture.width < picture.width - 71}
    assert len(rows) == CELL
    assert picture.width < 1200


def test_hotter_is_darker() -> None:
    light = [sum(figures.heat(share / 50)) for share in range(51)]
    assert light == sorted(light, reverse=True) and light[0] == 765
    assert figures.heat(-1) == figures.heat(0) and figures.heat(2) == figures.heat(1)


def test_elbow_of_known_curves() -> None:
    corner = torch.cat((torch.zeros(70), torch.linspace(0.1, 1, 30)))
    assert elbow(corner) == pytest.approx(0.7)
    assert elbow(corner.flip(0).view(10, 10)) == pytest.approx(0.7)
    late, early = torch.zeros(100), torch.arange(100.0) ** 0.1
    late[-1] = 1
    assert elbow(late) == 0.8
    assert elbow(early) == 0.2
