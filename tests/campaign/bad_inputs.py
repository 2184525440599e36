"""A seeded generator of command lines that are wrong, and of some that only look it; see `case`."""

from __future__ import annotations

import random
from collections import defaultdict

import bad_files
import bad_places
import bad_words
from case import Case

FAMILIES = (*bad_words.FAMILIES, *bad_files.FAMILIES, *bad_places.FAMILIES)
SLOW = ("bench", "output", "features", "statistics", "of a model", "of a tokenizer", "of an encoder")
"""Kinds of cases that take seconds each."""


def campaign(seed: int) -> list[Case]:
    """Return every case that a seed draws, no two of them with the same words, files and surroundings."""
    cases = [case for family in FAMILIES for case in family(random.Random(f"{seed} {family.__name__}"))]
    return list({(c.argv, c.damages, c.env, c.stdout, c.stderr): c for c in cases}.values())


def sample(cases: list[Case], count: int, seed: int) -> list[Case]:
    """Return some cases, as many of each kind as may be, none of them slow."""
    draw, kinds = random.Random(seed), defaultdict[str, list[Case]](list)
    for case in cases:
        if not any(word in case.kind for word in SLOW):
            kinds[case.kind].append(case)
    for same in kinds.values():
        draw.shuffle(same)
    found: list[Case] = []
    while len(found) < count:
        found += [same.pop() for same in kinds.values() if same]
    return found[:count]
