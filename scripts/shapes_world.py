"""The shapes world: captions, scenes and pictures on which the bundled tiny model is trained and scored.

Six task families follow GenEval (names included): one object, two objects, counting, colours, position, colour
attribution. A scene is drawn first and its caption and picture are made from it, so both are exact.

Lengths are in cells: a picture is ``CELLS`` x ``CELLS`` cells whatever its size in pixels; at ``SIDE`` pixels a cell is
one token of tiny's last scale. Centres lie on the cell grid, radii are 1.5 to 2 cells and the bounding boxes of two
objects are at least one cell apart.

Used by the training script and by ``make_shapes_prompts.py``; the package itself only reads the prompt lists.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from heatkv_cli.metrics.objects.shapes import GROUNDS, PALETTE, SHAPES

CELLS = 10
SIDE = 80
MAX_THINGS = 4
COLOUR_NAMES = list(PALETTE)
GROUND_NAMES = list(GROUNDS)
NUMBERS = {2: "two", 3: "three", 4: "four"}
RADII = {1: (1.5, 1.75, 2.0), 2: (1.5, 1.75), 3: (1.5,), 4: (1.5,)}
"""Radii in cells by number of objects; all objects of a picture are equally large."""

RELATIONS = {"left of": (0, 1), "right of": (0, -1), "above": (1, 1), "below": (1, -1)}
"""Relation of the first group to the second -> (axis, sign of second minus first); y grows downwards."""
PLACES = {
    "left of": ("left", "right"),
    "right of": ("right", "left"),
    "above": ("top", "bottom"),
    "below": ("bottom", "top"),
}

TASKS: dict[str, float] = {
    "single_object": 0.07,
    "two_object": 0.13,
    "counting": 0.22,
    "colors": 0.08,
    "position": 0.32,
    "color_attr": 0.18,
}
"""Task -> share of the training scenes. Position is the hardest and gets the most."""
PAIR_TASKS = ("two_object", "position", "color_attr")
COLOURLESS_TASKS = ("single_object", "two_object")

WORDINGS = ("a", "b", "place")
WORDING_WEIGHTS = (0.55, 0.30, 0.15)
POSITION_WORDING_WEIGHTS = (0.40, 0.25, 0.35)

WORDS: list[str] = [
    "<pad>",
    "<null>",
    *("on", "and", "left", "right", "of", "above", "below", "to", "the", "at", "top", "bottom", "there", "is", "are"),
    *("a", "an"),
    *NUMBERS.values(),
    *COLOUR_NAMES,
    *SHAPES,
    *(f"{shape}s" for shape in SHAPES),
    *GROUND_NAMES,
]
WORD_ID: dict[str, int] = {word: i for i, word in enumerate(WORDS)}
MAX_WORDS = 15
"""Words of the longest caption: 'a red circle on the left and a blue square on the right on white'."""
_NOUNS = frozenset(SHAPES) | frozenset(f"{shape}s" for shape in SHAPES)


@dataclass(frozen=True)
class Thing:
    """One object: centre (x, y) and radius in cells, colour and shape by name."""

    x: int
    y: int
    radius: float
    colour: str
    shape: str


@dataclass(frozen=True)
class Scene:
    """One scene with its caption.

    Attributes:
        task: a key of ``TASKS``.
        caption: the prompt.
        want: per group (count, colour or None where the caption names none, shape), in the order of the caption.
        relation: a key of ``RELATIONS`` (first group to second) for position scenes, else None.
        ground: a key of ``GROUNDS``.
        things: the objects, group after group.
        nouns: (word index in the caption, group index) of every shape word.
        places: per group where the caption says that it lies, seen from the other group: 'left', 'right', 'top',
            'bottom', or '' where the caption says nothing.
    """

    task: str
    caption: str
    want: tuple[tuple[int, str | None, str], ...]
    relation: str | None
    ground: str
    things: tuple[Thing, ...]
    nouns: tuple[tuple[int, int], ...]
    places: tuple[str, ...]


def sample(
    rng: random.Random,
    task: str | None = None,
    wording: str | None = None,
    weights: Mapping[str, float] = TASKS,
) -> Scene:
    """Draw a scene.

    Args:
        rng: source of all random choices.
        task: a key of ``TASKS``; None draws one by ``weights``.
        wording: 'a' (the benchmark's), 'b' (other words, same meaning), 'place' (each of two objects with its own
            place; only for two-object tasks); None draws one by ``WORDING_WEIGHTS``, or for position scenes by
            ``POSITION_WORDING_WEIGHTS``. Tasks with one kind of object never draw 'place'.
        weights: task -> relative frequency.

    Raises:
        ValueError: unknown task or wording, or 'place' for a task with one kind of object.
    """
    if task is None:
        task = rng.choices(list(weights), list(weights.values()))[0]
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; tasks: {', '.join(TASKS)}")
    wording = wording or _draw_wording(rng, task)
    if wording not in WORDINGS or (wording == "place" and task not in PAIR_TASKS):
        raise ValueError(f"wording {wording!r} does not exist for task {task!r}")
    groups = _draw_groups(rng, task)
    ground = rng.choice(GROUND_NAMES)
    relation = rng.choice(list(RELATIONS)) if task == "position" else None
    # A caption with places needs a dominant axis, which for the other pair tasks is drawn but not kept as a relation.
    arranged = relation or (rng.choice(list(RELATIONS)) if wording == "place" else None)
    things = _draw_things(rng, groups, arranged)
    want = tuple((n, None if task in COLOURLESS_TASKS else colour, shape) for n, colour, shape in groups)
    places = PLACES[arranged] if arranged else ("",) * len(groups)
    caption = _caption(want, relation, ground, wording, places)
    positions = [i for i, word in enumerate(caption.split()) if word in _NOUNS]
    nouns = tuple(zip(positions, range(len(groups)), strict=True))
    return Scene(task, caption, want, relation, ground, things, nouns, places)


def _draw_wording(rng: random.Random, task: str) -> str:
    if task not in PAIR_TASKS:
        return rng.choices(WORDINGS[:2], WORDING_WEIGHTS[:2])[0]
    return rng.choices(WORDINGS, POSITION_WORDING_WEIGHTS if task == "position" else WORDING_WEIGHTS)[0]


def _draw_groups(rng: random.Random, task: str) -> list[tuple[int, str, str]]:
    """(count, colour, shape) per group; two groups differ in shape, as GenEval's differ in class."""
    count = rng.choice((2, 3, 4)) if task == "counting" else 1
    if task not in PAIR_TASKS:
        return [(count, rng.choice(COLOUR_NAMES), rng.choice(SHAPES))]
    first, second = rng.sample(COLOUR_NAMES, 2)
    if task == "two_object":
        second = rng.choice(COLOUR_NAMES)
    shapes = rng.sample(SHAPES, 2)
    return [(1, first, shapes[0]), (1, second, shapes[1])]


def _draw_things(rng: random.Random, groups: Sequence[tuple[int, str, str]], relation: str | None) -> tuple[Thing, ...]:
    """Objects on the cell grid, by rejection; with a relation its axis dominates by at least one cell."""
    kinds = [(colour, shape) for count, colour, shape in groups for _ in range(count)]
    while True:
        radius = rng.choice(RADII[len(kinds)])
        centres = _draw_centres(rng, len(kinds), radius)
        if centres is None:
            continue
        if relation is not None:
            axis, sign = RELATIONS[relation]
            offset = [b - a for a, b in zip(centres[0], centres[1], strict=True)]
            if offset[axis] * sign <= abs(offset[1 - axis]):
                continue
        return tuple(Thing(x, y, radius, *kind) for (x, y), kind in zip(centres, kinds, strict=True))


def _draw_centres(rng: random.Random, count: int, radius: float) -> list[tuple[int, int]] | None:
    centres: list[tuple[int, int]] = []
    for _ in range(12 * count):
        x, y = rng.randint(2, CELLS - 2), rng.randint(2, CELLS - 2)
        if all(max(abs(x - a), abs(y - b)) >= 2 * radius + 1 for a, b in centres):
            centres.append((x, y))
            if len(centres) == count:
                return centres
    return None


def _caption(
    want: Sequence[tuple[int, str | None, str]],
    relation: str | None,
    ground: str,
    wording: str,
    places: Sequence[str],
) -> str:
    phrases = [_phrase(*group) for group in want]
    if wording == "place":
        prepositions = {"left": "on", "right": "on", "top": "at", "bottom": "at"}
        phrases = [f"{phrase} {prepositions[p]} the {p}" for phrase, p in zip(phrases, places, strict=True)]
        return f"{' and '.join(phrases)} on {ground}"
    if wording == "a":
        return f" {relation or 'and'} ".join(phrases) + f" on {ground}"
    joint = {"left of": "to the left of", "right of": "to the right of"}.get(relation or "", relation or "and")
    return f"on {ground} there {'are' if want[0][0] > 1 else 'is'} " + f" {joint} ".join(phrases)


def _phrase(count: int, colour: str | None, shape: str) -> str:
    words = ([colour] if colour else []) + [shape + ("s" if count > 1 else "")]
    article = "an" if words[0][0] in "aeiou" else "a"
    return " ".join([article if count == 1 else NUMBERS[count], *words])


def encode_words(caption: str) -> list[int]:
    """Word ids of a caption, padded with 0 to ``MAX_WORDS``.

    Raises:
        ValueError: a word outside ``WORDS`` (named), or more than ``MAX_WORDS`` words.
    """
    words = caption.split()
    if len(words) > MAX_WORDS:
        raise ValueError(f"caption has {len(words)} words, at most {MAX_WORDS} are allowed: {caption!r}")
    for word in words:
        if word not in WORD_ID:
            raise ValueError(f"unknown word {word!r} in caption {caption!r}")
    return [WORD_ID[word] for word in words] + [0] * (MAX_WORDS - len(words))


def render(scenes: Sequence[Scene], side: int = SIDE) -> torch.Tensor:
    """Draw scenes with antialiased signed distance functions.

    Returns:
        (B, 3, side, side) float32 in [0, 1].
    """
    n = len(scenes)
    pixels_per_cell = side / CELLS
    grid = (torch.arange(side) + 0.5) / pixels_per_cell
    yy, xx = torch.meshgrid(grid, grid, indexing="ij")
    absent = (0.0, 0.0, -1.0, 0.0, 0.0)
    rows = [[_numbers(t) for t in s.things] + [absent] * (MAX_THINGS - len(s.things)) for s in scenes]
    table = torch.tensor(rows).view(n, MAX_THINGS, 5)
    palette = torch.tensor(list(PALETTE.values()))
    image = torch.tensor([GROUNDS[s.ground] for s in scenes]).view(n, 3, 1, 1).expand(n, 3, side, side)
    for thing in table.unbind(1):
        cx, cy, r, _, shape = (column.view(n, 1, 1) for column in thing.unbind(1))
        x, y = xx - cx, yy - cy  # (B, side, side), in cells
        circle = (x * x + y * y).sqrt() - r
        square = torch.maximum(x.abs(), y.abs()) - 0.9 * r
        triangle = torch.maximum(y - 0.9 * r, (1.9 * x.abs() - (y + 0.95 * r)) / 2.15)
        distance = torch.where(shape == 0, circle, torch.where(shape == 1, square, triangle))
        alpha = ((0.5 - distance * pixels_per_cell).clamp(0, 1) * (r > 0))[:, None]
        image = image * (1 - alpha) + palette[thing[:, 3].long()].view(n, 3, 1, 1) * alpha
    return image.clamp(0, 1)


def _numbers(thing: Thing) -> tuple[float, float, float, float, float]:
    return thing.x, thing.y, thing.radius, COLOUR_NAMES.index(thing.colour), SHAPES.index(thing.shape)


def batch(
    n: int, rng: random.Random, task: str | None = None, side: int = SIDE
) -> tuple[torch.Tensor, torch.Tensor, list[Scene]]:
    """Draw ``n`` scenes: images (n, 3, side, side), word ids (n, MAX_WORDS) long, and the scenes."""
    scenes = [sample(rng, task) for _ in range(n)]
    return render(scenes, side), torch.tensor([encode_words(s.caption) for s in scenes]), scenes


def metadata(scene: Scene) -> dict[str, object]:
    """The scene as a line of GenEval's ``evaluation_metadata.jsonl`` (keys tag, include, exclude, prompt).

    As there, a position scene lists the reference object first and the placed one second, with
    ``"position": [relation, 0]``; a counting scene excludes one object too many.
    """
    include: list[dict[str, object]] = []
    for count, colour, shape in scene.want:
        include.append({"class": shape, "count": count} | ({"color": colour} if colour else {}))
    if scene.relation:
        include.reverse()
        include[1]["position"] = [scene.relation, 0]
    out: dict[str, object] = {"tag": scene.task, "include": include}
    if scene.task == "counting":
        out["exclude"] = [{"class": shape, "count": count + 1} for count, _, shape in scene.want]
    return out | {"prompt": scene.caption}
