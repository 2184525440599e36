"""Write the prompt lists of the shapes benchmark.

    python scripts/make_shapes_prompts.py [--out DIR]

Three lists, the same ones every time:

* ``shapes-v1.jsonl``: 660 prompts, 110 per task, tasks in turn, so that every prefix is balanced over the tasks;
* ``shapes-calibration-a.jsonl``: 10 prompts in the benchmark's wording, six of them with two objects;
* ``shapes-calibration-b.jsonl``: 10 prompts of the same tasks in other words.

No scene of one list is described in another one, in whatever words or order. Captions do not repeat within a list,
except where a task has fewer than 110 of them: single_object, two_object and colors repeat all of theirs equally often
(the images still differ, because each prompt id has its own seed).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Iterable
from itertools import cycle, islice
from pathlib import Path

from shapes_world import RELATIONS, TASKS, Scene, metadata, sample

PER_TASK = 110
CALIBRATION = {"single_object": 1, "two_object": 1, "counting": 2, "colors": 1, "position": 3, "color_attr": 2}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
SEED = 20261121
DRAWS = 2_000
"""Scenes drawn per task: meets every caption of the small tasks (at most 54) and far more than 110 of the others."""
ASSETS = Path(__file__).resolve().parent.parent / "heatkv_cli" / "assets"


def meaning(scene: Scene) -> tuple[object, ...]:
    """What a caption says, the same for all its wordings and for both orders of two groups."""
    pairs = list(zip(scene.want, scene.places, strict=True))
    relation = scene.relation
    # 'A left of B' is 'B right of A': name the group first that sorts first.
    if len(pairs) == 2 and repr(pairs[1][0]) < repr(pairs[0][0]):
        pairs.reverse()
        relation = OPPOSITE[relation] if relation in RELATIONS else relation
    return scene.task, tuple(want for want, _ in pairs), relation, scene.ground


def draw_captions(task: str, rng: random.Random, taken: set[tuple[object, ...]]) -> list[Scene]:
    """One scene per caption of a task whose meaning is not taken, in random order, in the benchmark's wording."""
    scenes = (sample(rng, task, "a") for _ in range(DRAWS))
    return list({s.caption: s for s in scenes if meaning(s) not in taken}.values())


def draw_new(task: str, wording: str, rng: random.Random, taken: set[tuple[object, ...]]) -> Scene:
    """One scene whose meaning is not taken, which it is from now on."""
    while meaning(scene := sample(rng, task, wording)) in taken:
        pass
    taken.add(meaning(scene))
    return scene


def build_lists() -> dict[str, list[dict[str, object]]]:
    """Stem of the file -> its lines."""
    rng = random.Random(SEED)
    taken: set[tuple[object, ...]] = set()
    lists: dict[str, list[dict[str, object]]] = {}
    for wording in ("a", "b"):
        tasks = [task for task, count in CALIBRATION.items() for _ in range(count)]
        chosen = [draw_new(task, wording, rng, taken) for task in tasks]
        rng.shuffle(chosen)
        stem = f"shapes-calibration-{wording}"
        lists[stem] = number_lines(stem, chosen)
    columns = [islice(cycle(draw_captions(task, rng, taken)), PER_TASK) for task in TASKS]
    lists["shapes-v1"] = number_lines("shapes-v1", (scene for row in zip(*columns, strict=True) for scene in row))
    return lists


def number_lines(stem: str, scenes: Iterable[Scene]) -> list[dict[str, object]]:
    """Lines in GenEval's form with an id in front."""
    out = []
    for i, scene in enumerate(scenes):
        line = metadata(scene)
        rest = {key: line[key] for key in ("tag", "include")} | {"exclude": line.get("exclude", [])}
        out.append({"id": f"{stem}-{i:04d}", "prompt": scene.caption} | rest)
    return out


def main() -> None:
    """Write the lists and print their sha256 for the benchmark YAMLs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder to write to (default: the package's assets)")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for stem, lines in build_lists().items():
        data = "".join(json.dumps(line) + "\n" for line in lines).encode()
        (out / f"{stem}.jsonl").write_bytes(data)
        captions = len({line["prompt"] for line in lines})
        print(f"{stem}.jsonl: {len(lines)} prompts, {captions} captions, sha256 {hashlib.sha256(data).hexdigest()}")


if __name__ == "__main__":
    main()
