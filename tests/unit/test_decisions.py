"""GenEval's rules: a table of border cases, and a second implementation on random scenes."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from heatkv_cli.errors import ConfigError
from heatkv_cli.metrics.objects.decisions import GENEVAL, RELATION_NAMES, Detection, Rules, decide, relations, select
from heatkv_cli.metrics.objects.geneval import GenEval
from heatkv_cli.metrics.objects.shapes import ShapesScore

STRICT = Rules(strict=True)


def cat(x: float = 0, y: float = 0, size: float = 10, score: float = 0.95, colour: str | None = None) -> Detection:
    return Detection("cat", (x, y, x + size, y + size), score, colour)


def dog(x: float = 0, y: float = 0, size: float = 10, score: float = 0.95, colour: str | None = None) -> Detection:
    return Detection("dog", (x, y, x + size, y + size), score, colour)


def ask(tag: str, *include: dict[str, Any], exclude: tuple[dict[str, Any], ...] = ()) -> dict[str, Any]:
    return {"tag": tag, "include": list(include), "exclude": list(exclude)}


ONE_CAT = {"class": "cat", "count": 1}
ONE_DOG = {"class": "dog", "count": 1}
TWO_CATS = {"class": "cat", "count": 2}
RED_CAT = ONE_CAT | {"color": "red"}
BLUE_DOG = ONE_DOG | {"color": "blue"}
DOG_LEFT = ONE_DOG | {"position": ["left of", 0]}
COUNT_TWO = ask("counting", TWO_CATS, exclude=({"class": "cat", "count": 3},))


BROKEN: list[tuple[dict[str, Any], str]] = [
    ({}, "no 'include' groups"),
    ({"include": []}, "no 'include' groups"),
    ({"include": "abc"}, "'include' is no list of groups"),
    ({"include": {"class": "cat"}}, "'include' is no list of groups"),
    ({"include": ["cat"]}, "'include' is no list of groups"),
    ({"include": [{"count": 1}]}, "has no 'class'"),
    ({"include": [{"class": 3, "count": 1}]}, "has no 'class'"),
    *(({"include": [{"class": "cat", "count": c}]}, "the 'count' of 'cat'") for c in ("1", 0, -1, 1.5, True, None)),
    ({"include": [ONE_CAT | {"color": 3}]}, "the 'color' of 'cat'"),
    ({"include": [ONE_CAT, ONE_DOG | {"position": "left of"}]}, "the 'position' of 'dog'"),
    ({"include": [ONE_CAT, ONE_DOG | {"position": ["left of", "0"]}]}, "the 'position' of 'dog'"),
    ({"include": [ONE_CAT, ONE_DOG | {"position": ["beside", 0]}]}, "unknown relation 'beside'"),
    ({"include": [ONE_CAT, ONE_DOG | {"position": ["left of", 1]}]}, "refers to group 1"),
    ({"include": [ONE_CAT], "exclude": "cat"}, "'exclude' is no list of groups"),
    ({"include": [ONE_CAT], "exclude": [{"class": "cat"}]}, "the 'count' of 'cat'"),
]


@pytest.mark.parametrize(("metadata", "text"), BROKEN)
def test_metadata_that_cannot_be_judged_by(metadata: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        decide([cat()], {"tag": "colors"} | metadata)
    for metric in (ShapesScore(), GenEval()):
        with pytest.raises(ConfigError, match=f"metric {metric.spec.name}: prompt p7") as caught:
            metric.check_prompt("p7", {"tag": "colors"} | metadata)
        assert caught.value.hint
        with pytest.raises(ConfigError, match="no 'tag' and 'include'"):
            metric.check_prompt("p7", {"tag": 3} | metadata)
        metric.check_prompt("p7", {"tag": "colors", "include": [ONE_CAT]})


@pytest.mark.parametrize(
    ("detections", "metadata", "rules", "correct", "reason"),
    [
        ([], ask("single_object", ONE_CAT), GENEVAL, False, "expected 1 cat, found 0"),
        ([cat()], ask("single_object", ONE_CAT), GENEVAL, True, ""),
        ([dog()], ask("single_object", ONE_CAT), GENEVAL, False, "found 0"),
        # Thresholds are exclusive, and counting has its own.
        ([cat(score=0.3)], ask("single_object", ONE_CAT), GENEVAL, False, "found 0"),
        ([cat(score=0.301)], ask("single_object", ONE_CAT), GENEVAL, True, ""),
        ([cat(), cat(20, score=0.9)], COUNT_TWO, GENEVAL, False, "found 1"),
        ([cat(), cat(20, score=0.901)], COUNT_TWO, GENEVAL, True, ""),
        ([cat(), cat(20), cat(40, score=0.8)], COUNT_TWO, GENEVAL, True, ""),
        # Surplus objects: free, unless excluded or strict.
        ([cat(), cat(20)], ask("single_object", ONE_CAT), GENEVAL, True, ""),
        ([cat(), dog(20)], ask("single_object", ONE_CAT), GENEVAL, True, ""),
        ([cat(), dog(20)], ask("single_object", ONE_CAT), STRICT, False, "expected 1 objects in all, found 2"),
        ([cat(), dog(20, score=0.2)], ask("single_object", ONE_CAT), STRICT, True, ""),
        ([cat(), cat(20), cat(40)], COUNT_TWO, GENEVAL, False, "fewer than 3 cat, found 3"),
        ([cat(), cat(20), dog(40)], COUNT_TWO, GENEVAL, True, ""),
        ([cat()], ask("two_object", ONE_CAT, ONE_DOG), GENEVAL, False, "expected 1 dog, found 0"),
        ([cat(), dog(20)], ask("two_object", ONE_CAT, ONE_DOG), STRICT, True, ""),
        # Only the most confident `count` objects are looked at.
        ([cat(colour="red")], ask("colors", RED_CAT), GENEVAL, True, ""),
        ([cat()], ask("colors", RED_CAT), GENEVAL, False, "found 0 (None)"),
        ([cat(colour="red", score=0.5), cat(20, colour="blue")], ask("colors", RED_CAT), GENEVAL, False, "(blue)"),
        ([cat(colour="red"), cat(20, colour="blue", score=0.5)], ask("colors", RED_CAT), GENEVAL, True, ""),
        (
            [cat(colour="red"), cat(20, colour="blue")],
            ask("counting", TWO_CATS | {"color": "red"}),
            GENEVAL,
            False,
            "expected 2 red cat, found 1 (red, blue)",
        ),
        (
            [cat(colour="red"), dog(20, colour="red")],
            ask("color_attr", RED_CAT, BLUE_DOG),
            GENEVAL,
            False,
            "expected 1 blue dog, found 0 (red)",
        ),
        ([cat(colour="red"), dog(20, colour="blue")], ask("color_attr", RED_CAT, BLUE_DOG), GENEVAL, True, ""),
        # Position: the group is placed relative to an earlier one; a failed target or colour fails it.
        ([cat(40), dog(0)], ask("position", ONE_CAT, DOG_LEFT), GENEVAL, True, ""),
        ([cat(0), dog(40)], ask("position", ONE_CAT, DOG_LEFT), GENEVAL, False, "found right of"),
        ([cat(0), dog(0)], ask("position", ONE_CAT, DOG_LEFT), GENEVAL, False, "found no relation"),
        ([dog(0)], ask("position", ONE_CAT, DOG_LEFT), GENEVAL, False, "no target for dog to be left of"),
        (
            [cat(40, colour="blue"), dog(0)],
            ask("position", RED_CAT, DOG_LEFT),
            GENEVAL,
            False,
            "expected 1 red cat, found 0 (blue); no target for dog to be left of",
        ),
        (
            [cat(0), dog(40, colour="red")],
            ask("position", ONE_CAT, DOG_LEFT | {"color": "blue"}),
            GENEVAL,
            False,
            "expected 1 blue dog, found 0 (red)",
        ),
        # Every object of the group against every target.
        (
            [cat(40), cat(80), dog(0), dog(60)],
            ask("position", TWO_CATS, DOG_LEFT | {"count": 2}),
            GENEVAL,
            False,
            "found right of",
        ),
        ([cat(60), cat(80), dog(0), dog(20)], ask("position", TWO_CATS, DOG_LEFT | {"count": 2}), GENEVAL, True, ""),
    ],
)
def test_rule_table(
    detections: list[Detection], metadata: dict[str, Any], rules: Rules, correct: bool, reason: str
) -> None:
    decision = decide(detections, metadata, rules)
    assert decision.correct is correct
    assert reason in decision.reason if reason else decision.reason == ""


@pytest.mark.parametrize(
    ("dx", "dy", "expected"),
    [
        (0, 0, set()),
        (2, 0, set()),  # the reduction by 0.1 (10 + 10) leaves nothing
        (2.0009, 0, set()),  # less than a thousandth of a pixel
        (4, 0, set()),  # (4 - 2) / 4 is 0.5, and the limit is exclusive
        (4.001, 0, {"right of"}),
        (-4.001, 0, {"left of"}),
        (0, 4.001, {"below"}),
        (0, -4.001, {"above"}),
        (100, 100, {"right of", "below"}),  # 98 / 141 = 0.69
        (-100, 100, {"left of", "below"}),
        (100, 55, {"right of"}),  # 53 / 114 = 0.46
        (100, 65, {"right of", "below"}),  # 63 / 119 = 0.53
    ],
)
def test_relations_of_two_boxes_of_ten_pixels(dx: float, dy: float, expected: set[str]) -> None:
    assert relations((50 + dx, 50 + dy, 60 + dx, 60 + dy), (50, 50, 60, 60)) == expected


def test_at_most_sixteen_objects_per_class_most_confident_first() -> None:
    cats = [cat(20 * i, score=0.5 + 0.01 * i) for i in range(20)]
    found = select(cats, "single_object")["cat"]
    assert found == cats[:3:-1]
    assert decide(cats, ask("counting", {"class": "cat", "count": 17}), Rules(counting_threshold=0.0)).correct is False


def test_overlap_suppression_is_off_at_one() -> None:
    twins = [cat(score=0.9), cat(score=0.8), dog(score=0.7)]
    assert len(select(twins, "")["cat"]) == 2
    assert select(twins, "", Rules(nms_threshold=0.9)) == {"cat": [twins[0]], "dog": [twins[2]]}
    # Sides count one pixel more: 10 x 10 boxes shifted by 5 share 6 * 11 of 176 pixels.
    halves = [cat(0), cat(5, score=0.8)]
    assert len(select(halves, "", Rules(nms_threshold=66 / 176))["cat"]) == 1
    assert len(select(halves, "", Rules(nms_threshold=66 / 176 + 1e-9))["cat"]) == 2


@pytest.mark.parametrize(
    ("metadata", "text"),
    [
        ({"tag": "colors"}, "include"),
        ({"tag": "colors", "include": []}, "include"),
        (ask("position", ONE_CAT, ONE_DOG | {"position": ["beside", 0]}), "beside"),
        (ask("position", ONE_CAT, ONE_DOG | {"position": ["above", 1]}), "earlier"),
        (ask("position", ONE_CAT, ONE_DOG | {"position": ["above", -1]}), "earlier"),
    ],
)
def test_unusable_metadata_is_an_error(metadata: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        decide([cat(), dog()], metadata)


def oracle(detections: list[Detection], metadata: dict[str, Any], rules: Rules) -> bool:
    """The rules once more, written from the paper's description with arrays and without early exits."""
    limit = {"counting": rules.counting_threshold}.get(metadata["tag"], rules.threshold)
    pool: dict[str, list[Detection]] = {}
    for cls in {d.cls for d in detections}:
        members = [d for d in detections if d.cls == cls and d.score > limit]
        order = np.argsort([-d.score for d in members], kind="stable")[: rules.max_objects]
        alive = [members[i] for i in order]
        if rules.nms_threshold < 1:
            keep: list[Detection] = []
            while alive:
                keep.append(alive[0])
                alive = [d for d in alive[1:] if iou(keep[-1].box, d.box) < rules.nms_threshold]
            alive = keep
        pool[cls] = alive
    verdicts, groups = [], []
    for group in metadata["include"]:
        best = pool.get(group["class"], [])[: group["count"]]
        good = len(best) == group["count"]
        good &= "color" not in group or [d.colour for d in best].count(group["color"]) == group["count"]
        if "position" in group:
            name, index = group["position"]
            good &= groups[index] is not None
            if good:
                good &= all(holds(name, d.box, t.box, rules) for d in best for t in groups[index])
        groups.append(best if good else None)
        verdicts.append(good)
    verdicts += [len(pool.get(g["class"], [])) < g["count"] for g in metadata.get("exclude", [])]
    if rules.strict:
        verdicts.append(sum(len(p) for p in pool.values()) == sum(g["count"] for g in metadata["include"]))
    return all(verdicts)


def iou(a: Any, b: Any) -> float:
    a, b = np.array(a).reshape(2, 2), np.array(b).reshape(2, 2)
    shared = np.clip(np.minimum(a[1], b[1]) - np.maximum(a[0], b[0]) + 1, 0, None).prod()
    return shared / ((a[1] - a[0] + 1).prod() + (b[1] - b[0] + 1).prod() - shared)


def holds(name: str, a: Any, b: Any, rules: Rules) -> bool:
    a, b = np.array(a).reshape(2, 2), np.array(b).reshape(2, 2)
    offset = a.mean(0) - b.mean(0)
    slack = rules.position_threshold * (np.ptp(a, axis=0) + np.ptp(b, axis=0))
    left = np.sign(offset) * np.clip(np.abs(offset) - slack, 0, None)
    if (np.abs(left) < 1e-3).all():
        return False
    axis, sign = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}[name]
    return bool(sign * left[axis] / np.linalg.norm(offset) > rules.direction_threshold)


def random_case(rng: random.Random) -> tuple[list[Detection], dict[str, Any], Rules]:
    classes, colours = ["cat", "dog", "cow"], ["red", "blue"]
    detections = []
    for _ in range(rng.randint(0, 9)):
        x, y = rng.randint(0, 60), rng.randint(0, 60)
        box = (x, y, x + rng.randint(4, 30), y + rng.randint(4, 30))
        score = rng.choice((0.2, 0.3, 0.5, 0.8, 0.9, 0.95, 0.99))
        detections.append(Detection(rng.choice(classes), box, score, rng.choice([*colours, None])))
    include: list[dict[str, Any]] = []
    for _ in range(rng.randint(1, 2)):
        group: dict[str, Any] = {"class": rng.choice(classes), "count": rng.choice((1, 1, 1, 2))}
        if rng.random() < 0.2:
            group["color"] = rng.choice(colours)
        if include and rng.random() < 0.7:
            group["position"] = [rng.choice(RELATION_NAMES), 0]
        include.append(group)
    exclude = [{"class": rng.choice(classes), "count": rng.randint(1, 4)}] if rng.random() < 0.2 else []
    tag = rng.choice(("counting", "position", "position"))
    rules = Rules(
        strict=rng.random() < 0.1, nms_threshold=rng.choice((1.0, 1.0, 0.5, 0.1)), max_objects=rng.choice((16, 2))
    )
    return detections, {"tag": tag, "include": include, "exclude": exclude}, rules


def test_second_implementation_agrees_on_random_scenes() -> None:
    rng = random.Random(0)
    cases = [random_case(rng) for _ in range(10_000)]
    verdicts = [decide(*case).correct for case in cases]
    assert verdicts == [oracle(*case) for case in cases]
    assert sum(verdicts) > 1000
    positions = [v for v, (_, meta, _) in zip(verdicts, cases, strict=True) if "position" in meta["include"][-1]]
    assert sum(positions) > 70
