"""Tokens that layers get when they do not get the same: exact integers that never exceed the total."""

from __future__ import annotations

import math
from collections.abc import Sequence


def early_caps(caps: Sequence[Sequence[int]], total: int) -> list[list[int]]:
    """Return planned caps that never exceed the total in the middle of a pass: HeatKV's early activation for caps.

    While layer l takes what it gets for scale t, later layers still hold what they got for t - 1. Where that is too
    much, later layers keep at t - 1 no more than they will get at t, the last layer first. They lose tokens one visit
    early, and nobody attends to those tokens in between.

    Args:
        caps: tokens of each head of a layer after its visit, [scale 0..K-2][layer]; every row sums to <= total.
        total: tokens of one head, summed over layers.

    Returns:
        The caps to apply, same form.

    Raises:
        ValueError: the caps of one scale exceed the total.
    """
    held = [list(row) for row in caps]
    for t, row in enumerate(held):
        if sum(row) > total:
            raise ValueError(f"caps of scale {t} are {sum(row)} tokens, {total} are allowed")
        for layer in range(len(row) if t else 0):
            excess = sum(row[: layer + 1]) + sum(held[t - 1][layer + 1 :]) - total
            for later in range(len(row) - 1, layer, -1):
                given = max(0, min(excess, held[t - 1][later] - row[later]))
                held[t - 1][later] -= given
                excess -= given
    return held


def shares(weights: Sequence[float], total: int, available: Sequence[int]) -> list[int]:
    """Split `total` tokens in proportion to weights, nobody above what is available; the sum is exact.

    What a layer cannot use is spread evenly over those that can; fractions go to the largest remainders, of equal ones
    to the lower layer. Weights that are all 0 are equal.

    Args:
        weights: >= 0, one a layer.
        total: tokens of one head, summed over layers.
        available: the most that each layer can use.

    Returns:
        Tokens of each layer; they sum to min(total, sum of available).
    """
    if sum(available) <= total:
        return list(available)
    scale = sum(weights)
    wanted = [total * w / scale if scale > 0 else total / len(weights) for w in weights]
    while excess := sum(max(0.0, w - a) for w, a in zip(wanted, available, strict=True)):
        wanted = [min(w, float(a)) for w, a in zip(wanted, available, strict=True)]
        below = [i for i, w in enumerate(wanted) if w < available[i]]
        for i in below:
            wanted[i] += excess / len(below)
        if not below:
            break
    split = [max(0, math.floor(w - 1e-9)) for w in wanted]  # never above the exact sum, whatever floats did
    by_remainder = sorted(range(len(split)), key=lambda i: (split[i] - wanted[i], i))
    left = total - sum(split)
    while left:
        for i in by_remainder:
            if left and split[i] < available[i]:
                split[i] += 1
                left -= 1
    return split
