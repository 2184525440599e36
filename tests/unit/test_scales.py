"""Scale schedules and geometries by hand."""

from __future__ import annotations

import pytest
import torch

from heatkv_cli.core.scales import Geometry, ScaleSchedule
from heatkv_cli.errors import ConfigError


def geometry(**changes: object) -> Geometry:
    fields: dict[str, object] = {
        "model": "toy",
        "num_layers": 3,
        "num_heads": 4,
        "head_dim": 8,
        "schedule": ScaleSchedule.squares((1, 2, 3, 4)),
        "sink_scales": 1,
    }
    return Geometry(**{**fields, **changes})  # type: ignore[arg-type]


def test_tokens_by_hand() -> None:
    schedule = ScaleSchedule(((1, 1), (2, 2), (2, 4), (5, 3)))
    assert schedule.lengths == (1, 4, 8, 15)
    assert schedule.offsets == (0, 1, 5, 13, 28)
    assert (schedule.num_scales, schedule.num_tokens, schedule.peak_tokens) == (4, 28, 13)
    assert schedule.resolution == "5x3"


@pytest.mark.parametrize(
    ("sides", "peak", "total"),
    [
        ((1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64), 6425, 10521),  # Infinity 1M
        ((1, 2, 3, 4, 5, 6, 8, 10, 13, 16), 424, 680),  # VAR 256
        ((1, 2, 3, 4, 6, 9, 13, 18, 24, 32), 1216, 2240),  # VAR 512
    ],
)
def test_published_schedules(sides: tuple[int, ...], peak: int, total: int) -> None:
    schedule = ScaleSchedule.squares(sides)
    assert (schedule.peak_tokens, schedule.num_tokens) == (peak, total)


def test_scale_of_agrees_with_the_table() -> None:
    schedule = ScaleSchedule(((1, 7), (2, 2), (1, 1), (3, 3)))  # not monotone: HART starts with its text
    table = schedule.scale_table()
    assert table.dtype == torch.long
    assert table.tolist() == [0] * 7 + [1] * 4 + [2] + [3] * 9
    assert torch.equal(schedule.scale_of(torch.arange(schedule.num_tokens)), table)
    assert schedule.scale_of(torch.tensor([[0, 20], [7, 11]], dtype=torch.int32)).tolist() == [[0, 3], [1, 2]]
    assert schedule.scale_of(torch.empty(0, dtype=torch.long)).shape == (0,)


@pytest.mark.parametrize("position", [-1, 30])
def test_scale_of_refuses_positions_outside(position: int) -> None:
    with pytest.raises(ValueError, match=r"outside the schedule's 0\.\.29"):
        ScaleSchedule.squares((1, 2, 3, 4)).scale_of(torch.tensor([0, position]))


def test_lists_become_tuples() -> None:
    schedule = ScaleSchedule([[1, 1], [2, 2]])  # type: ignore[arg-type]
    assert schedule == ScaleSchedule.squares((1, 2))
    assert hash(schedule) == hash(ScaleSchedule.squares((1, 2)))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((), "at least one scale"),
        (((1, 1), (2, 0)), r"scale 1 has size \(2, 0\)"),
        (((-1, 1),), "scale 0"),
        (((1, 1), (2,)), r"scale 1 has size \(2,\), expected two integers"),
        ((1, 2), "scale 0 has size 1, expected two integers"),
        (((1.0, 1.0),), "expected two integers"),
        (((True, True),), "expected two integers"),
    ],
)
def test_bad_sizes(sizes: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        ScaleSchedule(sizes)  # type: ignore[arg-type]
    assert error.value.hint


def test_geometry_by_hand() -> None:
    toy = geometry()
    assert (toy.num_scales, toy.heads, toy.sink_tokens, list(toy.sources)) == (4, 12, 1, [1, 2])
    assert toy.full_tokens == 12 * 14
    assert toy.bytes_per_token == 2 * 8 * 4
    assert toy.full_bytes(rows=2) == 12 * 14 * 64 * 2
    assert geometry(dtype_bytes=2).full_bytes(1) == 12 * 14 * 32
    assert geometry(sink_scales=0).sink_tokens == 0
    assert list(geometry(sink_scales=3).sources) == []
    assert str(toy) == "toy (3 x 4 heads, 4 scales up to 4x4, 1 sink scales)"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 0}, "num_layers of toy is 0"),
        ({"num_heads": 2.0}, "num_heads of toy is 2.0"),
        ({"head_dim": -1}, "head_dim"),
        ({"dtype_bytes": 0}, "dtype_bytes"),
        ({"sink_scales": 4}, "sink_scales of toy is 4"),
        ({"sink_scales": -1}, "sink_scales"),
        ({"schedule": ScaleSchedule.squares((4,))}, "nothing is ever cached"),
    ],
)
def test_bad_geometry(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        geometry(**changes)
    assert error.value.hint


def test_differences_name_both_sides() -> None:
    toy = geometry()
    assert toy.differences(geometry(dtype_bytes=2)) == []
    other = geometry(model="big", num_layers=5, schedule=ScaleSchedule.squares((1, 2, 3, 5)))
    assert toy.differences(other) == [
        "model toy / big",
        "layers x heads 3 x 4 / 5 x 4",
        "scales 4 scales up to 4x4 / 4 scales up to 5x5",
    ]
    inner = geometry(schedule=ScaleSchedule.squares((1, 3, 3, 4)))
    assert toy.differences(inner)[0].startswith("scale sizes ((1, 1), (2, 2)")
