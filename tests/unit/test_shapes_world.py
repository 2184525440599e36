"""The shapes world: geometry, grammar, drawing, and that the detector reads every drawn scene exactly."""

from __future__ import annotations

import random
import re
from collections import Counter

import numpy as np
import pytest

import shapes_world as world
from heatkv_cli.metrics.base import Sample
from heatkv_cli.metrics.objects import shapes

PER_TASK = 170


@pytest.fixture(scope="module")
def scenes() -> list[world.Scene]:
    rng = random.Random(7)
    return [world.sample(rng, task) for task in world.TASKS for _ in range(PER_TASK)]


@pytest.fixture(scope="module")
def pictures(scenes: list[world.Scene]) -> np.ndarray:
    return (world.render(scenes).permute(0, 2, 3, 1) * 255).round().byte().numpy()


def test_detector_finds_every_object_with_its_colour_shape_and_box(scenes, pictures) -> None:
    pixels = world.SIDE / world.CELLS
    for scene, picture in zip(scenes, pictures, strict=True):
        found = sorted((d.cls, d.colour, d.box) for d in shapes.detect(picture))
        assert len(found) == len(scene.things)
        for thing in scene.things:
            x, y = thing.x * pixels, thing.y * pixels
            (here,) = [f for f in found if f[2][0] < x < f[2][2] and f[2][1] < y < f[2][3]]
            assert here[:2] == (thing.shape, thing.colour), scene.caption
            assert abs((here[2][0] + here[2][2]) / 2 - x) <= 1


@pytest.mark.parametrize("strict", [True, False])
def test_every_drawn_scene_is_judged_correct(scenes, pictures, strict: bool) -> None:
    metric = shapes.ShapesScore(strict=strict)
    for scene, picture in zip(scenes, pictures, strict=True):
        score = metric.score(Sample("x", meta=world.metadata(scene), image=picture))
        assert score.value == 1, (scene.caption, score.note)


def test_drawn_scenes_are_judged_wrong_for_other_prompts(scenes, pictures) -> None:
    metric = shapes.ShapesScore()
    for scene, other, picture in zip(scenes, scenes[1:], pictures, strict=False):
        contradicts = Counter(t.shape for t in scene.things) != Counter(t.shape for t in other.things)
        if contradicts:
            score = metric.score(Sample("x", meta=world.metadata(other), image=picture))
            assert score.value == 0 and score.note


def test_opposite_relation_is_judged_wrong(scenes, pictures) -> None:
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    for scene, picture in zip(scenes, pictures, strict=True):
        if scene.task == "position":
            meta = world.metadata(scene)
            meta["include"][1]["position"] = [opposite[scene.relation], 0]
            assert shapes.ShapesScore().score(Sample("x", meta=meta, image=picture)).value == 0


def test_detector_sees_nothing_on_bare_grounds() -> None:
    for rgb in world.GROUNDS.values():
        picture = np.full((80, 80, 3), np.round(np.array(rgb) * 255), np.uint8)
        assert shapes.detect(picture) == []


def test_geometry(scenes) -> None:
    for scene in scenes:
        assert len(scene.things) == sum(n for n, _, _ in scene.want) <= world.MAX_THINGS
        for i, thing in enumerate(scene.things):
            assert 1.5 <= thing.radius <= 2 and thing.radius <= min(thing.x, thing.y)
            assert max(thing.x, thing.y) + thing.radius <= world.CELLS
            for other in scene.things[:i]:
                gap = max(abs(thing.x - other.x), abs(thing.y - other.y)) - thing.radius - other.radius
                assert gap >= 1


def test_position_scenes_have_a_dominant_axis_with_the_named_order(scenes) -> None:
    position = [s for s in scenes if s.task == "position"]
    assert {s.relation for s in position} == set(world.RELATIONS)
    for scene in position:
        a, b = scene.things
        dx, dy = b.x - a.x, b.y - a.y
        true = {"left of": dx > abs(dy), "right of": -dx > abs(dy), "above": dy > abs(dx), "below": -dy > abs(dx)}
        assert [name for name, holds in true.items() if holds] == [scene.relation]
        assert scene.places == world.PLACES[scene.relation]
    assert all(s.relation is None for s in scenes if s.task != "position")


def test_nouns_point_at_the_shape_words_of_their_groups() -> None:
    rng = random.Random(3)
    for _ in range(500):
        scene = world.sample(rng)
        words = scene.caption.split()
        assert [group for _, group in scene.nouns] == list(range(len(scene.want)))
        for position, group in scene.nouns:
            count, colour, shape = scene.want[group]
            assert words[position] == shape + ("s" if count > 1 else "")
            if colour:
                assert words[position - 1] == colour


@pytest.mark.parametrize(
    ("task", "wording", "pattern"),
    [
        ("single_object", "a", r"a (circle|square|triangle) on \w+"),
        ("two_object", "a", r"a \w+ and a \w+ on \w+"),
        ("counting", "a", r"(two|three|four) \w+ \w+s on \w+"),
        ("position", "a", r"an? \w+ \w+ (left of|right of|above|below) an? \w+ \w+ on \w+"),
        ("single_object", "b", r"on \w+ there is a \w+"),
        ("counting", "b", r"on \w+ there are (two|three|four) \w+ \w+s"),
        ("position", "b", r"on \w+ there is an? \w+ \w+ (to the left of|to the right of|above|below) an? \w+ \w+"),
        ("position", "place", r"an? \w+ \w+ (on|at) the (\w+) and an? \w+ \w+ (on|at) the (\w+) on \w+"),
    ],
)
def test_grammar(task: str, wording: str, pattern: str) -> None:
    rng = random.Random(5)
    for _ in range(50):
        caption = world.sample(rng, task, wording).caption
        assert re.fullmatch(pattern, caption), caption
        assert "a orange" not in caption


def test_places_of_the_caption_are_the_places_of_the_picture() -> None:
    rng = random.Random(11)
    for task in world.PAIR_TASKS:
        for _ in range(100):
            scene = world.sample(rng, task, "place")
            a, b = scene.things
            horizontal = abs(a.x - b.x) > abs(a.y - b.y)
            first = ("left" if a.x < b.x else "right") if horizontal else ("top" if a.y < b.y else "bottom")
            assert scene.places[0] == first
            assert first in scene.caption.split(" and ")[0]


def test_every_caption_is_in_the_vocabulary_and_fits() -> None:
    rng = random.Random(1)
    captions = [
        world.sample(rng, task, wording).caption
        for task in world.TASKS
        for wording in world.WORDINGS
        if wording != "place" or task in world.PAIR_TASKS
        for _ in range(200)
    ]
    assert max(len(c.split()) for c in captions) == world.MAX_WORDS <= 20
    used = {word for c in captions for word in c.split()}
    assert used == set(world.WORDS) - {"<pad>", "<null>"}
    for caption in captions:
        ids = world.encode_words(caption)
        assert len(ids) == world.MAX_WORDS
        assert " ".join(world.WORDS[i] for i in ids if i) == caption
    assert world.WORDS[:2] == ["<pad>", "<null>"] and len(set(world.WORDS)) == len(world.WORDS)


def test_unknown_word_and_long_caption_are_named() -> None:
    with pytest.raises(ValueError, match="'crimson'"):
        world.encode_words("a crimson circle on white")
    with pytest.raises(ValueError, match="at most"):
        world.encode_words("a " * (world.MAX_WORDS + 1))


@pytest.mark.parametrize(("task", "wording"), [("portrait", None), ("position", "c"), ("counting", "place")])
def test_impossible_scenes_are_errors(task: str, wording: str | None) -> None:
    with pytest.raises(ValueError, match=task):
        world.sample(random.Random(0), task, wording)


def test_shares_of_tasks_and_wordings() -> None:
    rng = random.Random(2)
    drawn = [world.sample(rng) for _ in range(4000)]
    for task, weight in world.TASKS.items():
        assert abs(sum(s.task == task for s in drawn) / 4000 - weight) < 0.03
    position = [s.caption for s in drawn if s.task == "position"]
    placed = sum(" the " in c and not c.startswith("on ") for c in position) / len(position)
    assert abs(placed - 0.35) < 0.05
    assert {world.sample(rng, weights={"colors": 1.0}).task for _ in range(20)} == {"colors"}


def test_same_seed_same_batch_and_another_side() -> None:
    first, ids, scenes = world.batch(6, random.Random(4))
    second, *_ = world.batch(6, random.Random(4))
    assert (first == second).all() and first.shape == (6, 3, 80, 80) and ids.shape == (6, world.MAX_WORDS)
    assert first.min() >= 0 and first.max() <= 1
    small = world.render(scenes, side=40)
    coarse = first.unflatten(2, (40, 2)).unflatten(4, (40, 2)).mean((3, 5))
    assert (small - coarse).abs().mean() < 0.01


def test_order_is_counted_among_pictures_with_the_right_objects() -> None:
    rng = random.Random(5)
    metric, scores = shapes.ShapesScore(), []
    for number, swap in enumerate((False, True, False)):
        scene = world.sample(rng, "position", "a")
        meta = world.metadata(scene)
        if swap:
            opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
            relation, index = meta["include"][1]["position"]
            meta["include"][1]["position"] = [opposite[relation], index]
        elif number == 2:
            meta["include"][0]["class"] = "hexagon"
        image = world.render([scene])[0].permute(1, 2, 0).mul(255).round().byte().numpy()
        scores.append(metric.score(Sample(str(number), meta=meta, image=image)))
    assert [dict(s.parts) for s in scores] == [{"position_order": 1.0}, {"position_order": 0.0}, {}]
    values = {value.variant: value for value in metric.summarise(scores)}
    assert (values["position_order"].value, values["position_order"].n) == (0.5, 2)
    assert values["position"].value == pytest.approx(1 / 3)
