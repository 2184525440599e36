"""Removal orders: ranking, seeded orders, and every way in which an order file can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from heatkv_cli.core.budget import Budget
from heatkv_cli.core.scales import Geometry, ScaleSchedule
from heatkv_cli.errors import ArtifactError
from heatkv_cli.methods.heatkv.orders import Orders, ascending_orders, load_orders, order_ranks, random_orders
from heatkv_cli.methods.heatkv.scheduler import removal_schedule

TOY = Geometry("toy", 3, 2, 8, ScaleSchedule.squares((1, 2, 3, 4, 5)), 1)  # sources 1..3
SMALL = Geometry("toy", 3, 2, 8, ScaleSchedule.squares((1, 2, 3, 4)), 1)  # sources 1..2


def write(path: Path, data: Any) -> Path:
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return path


@pytest.fixture
def lists() -> list[Any]:
    orders: list[Any] = random_orders(TOY, 1).order.tolist()
    return orders


def test_ascending_by_score_then_head_then_layer() -> None:
    scores = torch.tensor([[[0.5, 0.1], [0.2, 0.5], [0.5, 0.1]]])  # (1, L=3, H=2)
    assert ascending_orders(scores).tolist() == [[[1, 0], [1, 2], [0, 1], [0, 0], [0, 2], [1, 1]]]


def test_ranks_invert_the_order() -> None:
    order = random_orders(TOY, 3).order
    ranks = order_ranks(order, TOY)
    for index in range(3):
        for rank, (head, layer) in enumerate(order[index].tolist()):
            assert ranks[index, layer, head] == rank


def test_random_orders_are_seeded_and_independent_per_source() -> None:
    first, again, other = random_orders(TOY, 1), random_orders(TOY, 1), random_orders(TOY, 2)
    assert first.sha256 == again.sha256 != other.sha256
    assert first.name == "random-1"
    assert first.order[0].tolist() != first.order[1].tolist()
    assert torch.equal(random_orders(SMALL, 1).order, first.order[:2])  # a source keeps its order
    assert random_orders(TOY, 0).order[0].tolist() == [[0, 0], [1, 2], [1, 1], [1, 0], [0, 1], [0, 2]]


def test_a_file_is_read(tmp_path: Path, lists: list[Any]) -> None:
    path = write(tmp_path / "toy.json", lists)
    orders = load_orders(path, TOY)
    assert orders.order.tolist() == lists
    assert (orders.name, orders.calibrated_on) == ("toy", TOY.schedule)
    assert len(orders.source_sha256) == 64


def test_a_locally_computed_upstream_file_is_read_and_checked(tmp_path: Path, lists: list[Any]) -> None:
    metadata = {"num_layers": 3, "num_heads": 2, "sink_scales": 1, "model": "infinity_2b"}
    path = write(tmp_path / "scas_orders.json", {"orders": lists, "metadata": metadata})
    assert load_orders(path, TOY).order.tolist() == lists
    write(path, {"orders": lists, "metadata": {**metadata, "sink_scales": 2}})
    with pytest.raises(ArtifactError, match="made with sink_scales = 2"):
        load_orders(path, TOY)


def broken(lists: list[Any], change: str) -> Any:
    """Return the lists with one defect."""
    if change == "repeat":
        lists[2][4] = lists[2][1]
    elif change == "head":
        lists[1][3] = [2, 0]
    elif change == "layer":
        lists[1][3] = [0, -1]
    elif change == "entry":
        lists[0][5] = [0, 1, 2]
    elif change == "float":
        lists[0][5] = [0.0, 1]
    elif change == "short":
        lists[1].pop()
    elif change == "count":
        lists.pop()
    elif change == "flat":
        return lists[0][0]
    else:
        return "[[[0, 1"
    return lists


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("repeat", r"list 2 \(source scale 3\), entry 4 repeats entry 1"),
        ("head", r"list 1 \(source scale 2\), entry 3 is \[head 2, layer 0\], out of range for 2 heads and 3 layers"),
        ("layer", r"list 1 .* entry 3 is \[head 0, layer -1\], out of range"),
        ("entry", r"list 0 .* entry 5 is \[0, 1, 2\], expected \[head, layer\]"),
        ("float", r"list 0 .* entry 5"),
        ("short", r"list 1 \(source scale 2\) has 5 entries, expected 6"),
        ("count", r"has 2 lists, expected 3: one per source scale 1\.\.3"),
        ("flat", "is not a list of lists"),
        ("json", "is not JSON"),
    ],
)
def test_defects_are_named(tmp_path: Path, lists: list[Any], change: str, message: str) -> None:
    path = write(tmp_path / "toy.json", broken(lists, change))
    with pytest.raises(ArtifactError, match=message) as error:
        load_orders(path, TOY)
    assert str(path) in error.value.message
    assert error.value.hint


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot be read: No such file") as error:
        load_orders(tmp_path / "none.json", TOY)
    assert "heatkv calibrate --model toy" in error.value.hint


def test_another_resolution(tmp_path: Path, lists: list[Any]) -> None:
    path = write(tmp_path / "toy.json", lists)
    with pytest.raises(ArtifactError, match="has 3 lists, expected 2") as error:
        load_orders(path, SMALL)
    assert "another resolution" in error.value.hint
    orders = load_orders(path, SMALL, calibrated_on=TOY.schedule)
    assert orders.order.tolist() == lists[:2]
    assert orders.calibrated_on == TOY.schedule
    with pytest.raises(ArtifactError, match=r"has lists for 2 source scales, toy .* needs 3"):
        load_orders(write(path, lists[:2]), TOY, calibrated_on=SMALL.schedule)


def test_a_schedule_cuts_orders_of_a_higher_resolution() -> None:
    schedule = removal_schedule(SMALL, Budget.parse("0.5"), random_orders(TOY, 5))
    own = removal_schedule(SMALL, Budget.parse("0.5"), random_orders(SMALL, 5))
    assert torch.equal(schedule.first_absent, own.first_absent)
    assert schedule.calibrated_on == TOY.schedule
    assert own.calibrated_on == SMALL.schedule


def test_a_bare_tensor_is_checked() -> None:
    order = random_orders(TOY, 0).order
    assert removal_schedule(TOY, Budget.parse("0.5"), order).order == "custom"
    with pytest.raises(ArtifactError, match=r"has shape \(2, 6, 2\)"):
        removal_schedule(TOY, Budget.parse("0.5"), order[:2])
    order[1, 0] = order[1, 1]
    with pytest.raises(ArtifactError, match=r"list 1 .* entry 1 repeats entry 0"):
        removal_schedule(TOY, Budget.parse("0.5"), Orders(order, "twice", TOY.schedule))
