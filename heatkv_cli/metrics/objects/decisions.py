"""GenEval's judgement as pure functions: detections and a prompt's metadata in, right or wrong out.

Shared by the shapes score (exact detector) and GenEval (Mask2Former); knows neither pictures nor models.

Source: djghosh13/geneval, ``evaluation/evaluate_images.py`` at 16f1681 (its defaults: thresholds 0.3 and 0.9, at most
16 objects per class, overlap 1.0 = no suppression, position threshold 0.1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from heatkv_cli.errors import ConfigError

Box = tuple[float, float, float, float]
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
"""GenEval's tasks, in its order; a score is the unweighted mean over them."""
RELATION_NAMES = ("left of", "right of", "above", "below")
_NO_OFFSET = 1e-3
"""Pixels; a reduced offset smaller than this on both axes is no relation at all (a literal in GenEval's code)."""


@dataclass(frozen=True)
class Detection:
    """One detected object.

    Attributes:
        cls: class name.
        box: (x0, y0, x1, y1) in pixels, y downwards, maximal edges exclusive.
        score: confidence in [0, 1].
        colour: colour name; None where it was not determined, which matches no asked colour.
    """

    cls: str
    box: Box
    score: float = 1.0
    colour: str | None = None


@dataclass(frozen=True)
class Rules:
    """Constants of the judgement; the defaults are GenEval's.

    Attributes:
        threshold: a detection counts if its score is above this.
        counting_threshold: the same for prompts tagged ``counting``.
        max_objects: most detections per class; the most confident ones count.
        nms_threshold: within a class a box is dropped unless its IoU with every more confident kept one is below
            this; 1.0 drops nothing.
        position_threshold: share of the two boxes' sizes by which the offset of their centres is reduced.
        direction_threshold: a relation holds if the reduced offset over the length of the full one exceeds this.
        strict: also require that the picture holds exactly as many objects, of any class, as are asked for.
            Differs: GenEval has no such rule; there objects that nobody asked for are ignored.
    """

    threshold: float = 0.3
    counting_threshold: float = 0.9
    max_objects: int = 16
    nms_threshold: float = 1.0
    position_threshold: float = 0.1
    direction_threshold: float = 0.5
    strict: bool = False


GENEVAL = Rules()


@dataclass(frozen=True)
class Decision:
    """Verdict on one picture; ``reason`` lists everything that is wrong and is '' where nothing is."""

    correct: bool
    reason: str = ""


def decide(detections: Sequence[Detection], metadata: Mapping[str, Any], rules: Rules = GENEVAL) -> Decision:
    """Judge one picture.

    Rule: each ``include`` group takes the ``count`` most confident objects of its class; fewer is wrong. At least
    ``count`` of these must have the asked ``color``; where they have not, the position is not looked at. An asked
    ``position`` must hold for every object of the group against every object of the group it refers to, and fails
    where that group failed. Any ``exclude`` class found ``count`` times or more is wrong.

    Args:
        detections: all objects of the picture.
        metadata: GenEval's form: ``tag``, ``include`` [{``class``, ``count``, ``color``?, ``position``? [relation,
            index of an earlier group]}], ``exclude``? [{``class``, ``count``}].
        rules: constants.

    Raises:
        ValueError: as ``check_metadata``.
    """
    check_metadata(metadata)
    include: Sequence[Mapping[str, Any]] = metadata["include"]
    found = select(detections, metadata.get("tag", ""), rules)
    reasons: list[str] = []
    matched: list[list[Detection] | None] = []
    for group in include:
        objects, wrong = _match(found.get(group["class"], []), group, matched, rules)
        matched.append(None if wrong else objects)
        if wrong:
            reasons.append(wrong)
    for group in metadata.get("exclude", ()):
        number = len(found.get(group["class"], []))
        if number >= group["count"]:
            reasons.append(f"expected fewer than {group['count']} {group['class']}, found {number}")
    if rules.strict:
        wanted, number = sum(group["count"] for group in include), sum(map(len, found.values()))
        if wanted != number:
            reasons.append(f"expected {wanted} objects in all, found {number}")
    return Decision(not reasons, "; ".join(reasons))


def check_metadata(metadata: Mapping[str, Any]) -> None:
    """Check that a picture can be judged by a prompt's metadata.

    Raises:
        ValueError: it is not of the form that ``decide`` wants, or a position has an unknown relation or a group that
            does not come earlier.
    """
    include = metadata.get("include", ())
    if isinstance(include, (list, tuple)) and not include:
        raise ValueError("metadata has no 'include' groups")
    for key, groups in (("include", include), ("exclude", metadata.get("exclude", ()))):
        if not isinstance(groups, (list, tuple)) or not all(isinstance(group, Mapping) for group in groups):
            raise ValueError(f"{key!r} is no list of groups: {groups!r}")
        for group in groups:
            _check_group(key, group)
    for index, group in enumerate(include):
        if "position" in group:
            _position(group["class"], group["position"], index)


def _check_group(key: str, group: Mapping[str, Any]) -> None:
    if not isinstance(group.get("class"), str):
        raise ValueError(f"a group of {key!r} has no 'class': {dict(group)!r}")
    if type(group.get("count")) is not int or group["count"] < 1:
        raise ValueError(f"the 'count' of {group['class']!r} is no whole number of at least 1: {group.get('count')!r}")
    if "color" in group and not isinstance(group["color"], str):
        raise ValueError(f"the 'color' of {group['class']!r} is no text: {group['color']!r}")


def _position(cls: str, position: Any, earlier: int) -> tuple[str, int]:
    """Relation and group of a position; ``earlier`` groups come before its own."""
    if not isinstance(position, (list, tuple)) or len(position) != 2 or type(position[1]) is not int:
        raise ValueError(f"the 'position' of {cls!r} is no pair of relation and group: {position!r}")
    relation, index = position
    if relation not in RELATION_NAMES:
        raise ValueError(f"unknown relation {relation!r}; relations: {', '.join(RELATION_NAMES)}")
    if not 0 <= index < earlier:
        raise ValueError(f"position of {cls!r} refers to group {index}, which does not come earlier")
    return relation, index


def judged_by(metric: str, prompt_id: str, metadata: Mapping[str, Any], fix: str) -> None:
    """Check a prompt's metadata for a metric.

    Args:
        metric: its name, for messages.
        prompt_id: id of the prompt.
        metadata: the prompt's further fields.
        fix: hint where there is none at all.

    Raises:
        ConfigError: there is none, or ``check_metadata`` refuses it.
    """
    if not isinstance(metadata.get("tag"), str) or not metadata.get("include"):
        raise ConfigError(f"metric {metric}: prompt {prompt_id} has no 'tag' and 'include' to be judged by", fix)
    try:
        check_metadata(metadata)
    except ValueError as error:
        raise ConfigError(f"metric {metric}: prompt {prompt_id}: {error}", "correct the list of prompts") from error


def select(detections: Sequence[Detection], tag: str, rules: Rules = GENEVAL) -> dict[str, list[Detection]]:
    """Return the detections that count, by class, most confident first (equal scores keep their order).

    Args:
        detections: all objects of the picture.
        tag: the prompt's task; ``counting`` has its own threshold.
        rules: constants.
    """
    threshold = rules.counting_threshold if tag == "counting" else rules.threshold
    by_class: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda d: -d.score):
        if detection.score > threshold:
            by_class.setdefault(detection.cls, []).append(detection)
    return {cls: _suppress(found[: rules.max_objects], rules.nms_threshold) for cls, found in by_class.items()}


def relations(box: Box, other: Box, rules: Rules = GENEVAL) -> frozenset[str]:
    """Return where ``box`` lies relative to ``other``: none, one or two of ``RELATION_NAMES``.

    >>> sorted(relations((0, 0, 10, 10), (40, 0, 50, 10)))
    ['left of']
    """
    offset = [(box[i] + box[i + 2] - other[i] - other[i + 2]) / 2 for i in (0, 1)]
    sizes = [abs(box[i + 2] - box[i]) + abs(other[i + 2] - other[i]) for i in (0, 1)]
    reduced = [
        math.copysign(max(abs(o) - rules.position_threshold * size, 0.0), o)
        for o, size in zip(offset, sizes, strict=True)
    ]
    if all(abs(r) < _NO_OFFSET for r in reduced):
        return frozenset()
    dx, dy = (r / math.hypot(*offset) for r in reduced)
    limit = rules.direction_threshold
    holds = (dx < -limit, dx > limit, dy < -limit, dy > limit)
    return frozenset(name for name, true in zip(RELATION_NAMES, holds, strict=True) if true)


def _match(
    found: Sequence[Detection],
    group: Mapping[str, Any],
    earlier: Sequence[Sequence[Detection] | None],
    rules: Rules,
) -> tuple[list[Detection], str]:
    """Return the objects that stand for one ``include`` group, and what is wrong with them ('' where nothing is)."""
    cls, count = group["class"], group["count"]
    objects = list(found[:count])
    if len(objects) < count:
        return objects, f"expected {count} {cls}, found {len(objects)}"
    if "color" in group:
        asked = group["color"]
        number = sum(d.colour == asked for d in objects)
        if number < count:
            colours = ", ".join(str(d.colour) for d in objects)
            return objects, f"expected {count} {asked} {cls}, found {number} ({colours})"
    if "position" in group:
        return objects, _misplaced(objects, cls, group["position"], earlier, rules)
    return objects, ""


def _misplaced(
    objects: Sequence[Detection],
    cls: str,
    position: Sequence[Any],
    earlier: Sequence[Sequence[Detection] | None],
    rules: Rules,
) -> str:
    relation, index = _position(cls, position, len(earlier))
    targets = earlier[index]
    if targets is None:
        return f"no target for {cls} to be {relation}"
    for detection in objects:
        for target in targets:
            true = relations(detection.box, target.box, rules)
            if relation not in true:
                return f"expected {cls} {relation} {target.cls}, found {' and '.join(sorted(true)) or 'no relation'}"
    return ""


def _suppress(ordered: Sequence[Detection], threshold: float) -> list[Detection]:
    """Non-maximum suppression within one class, most confident first."""
    # GenEval tests equality with 1: with identical boxes "IoU < 1" would drop one, "off" must not.
    if threshold == 1:
        return list(ordered)
    kept: list[Detection] = []
    for detection in ordered:
        if all(_overlap(detection.box, k.box) < threshold for k in kept):
            kept.append(detection)
    return kept


def _overlap(a: Box, b: Box) -> float:
    """IoU with GenEval's sides, which are one pixel longer than the difference of the edges."""
    inner = (max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    shared = _area(inner)
    union = _area(a) + _area(b) - shared
    return shared / union if union else 0.0


def _area(box: Box) -> float:
    return max(box[2] - box[0] + 1, 0) * max(box[3] - box[1] + 1, 0)
