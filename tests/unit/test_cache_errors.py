"""What a policy or a caller of the cache may not do, and what it is told then."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from heatkv_cli.core.cache import KVCache
from heatkv_cli.core.policy import Keep, Policy, Visit
from heatkv_cli.core.scales import Geometry, ScaleSchedule
from heatkv_cli.errors import BudgetError, ConfigError

TWO = Geometry("toy", 2, 2, 4, ScaleSchedule(((1, 2), (1, 1), (2, 2))), 1)


class Answers(Policy):
    """Gives fixed answers at one scale of layer 0."""

    def __init__(
        self, scale: int, before: Keep | None = None, after: tuple[Keep, ...] = (), capacity: int | None = None
    ):
        super().__init__(TWO.full_tokens if capacity is None else capacity)
        self.scale, self.before, self.after = scale, before, after

    def before_attend(self, visit: Visit) -> Keep | None:
        return self.before if (visit.scale, visit.layer) == (self.scale, 0) else None

    def after_attend(self, visit: Visit) -> Iterable[Keep]:
        return self.after if (visit.scale, visit.layer) == (self.scale, 0) else ()


def run(policy: Policy, rows: int = 2) -> KVCache:
    cache, generator = KVCache(TWO, policy, rows, 1), torch.Generator().manual_seed(0)
    for tokens in TWO.schedule.lengths:
        for layer in range(TWO.num_layers):
            cache.attend(layer, *torch.randn(3, rows, TWO.num_heads, tokens, 4, generator=generator), 0.5)
        cache.end_step()
    return cache


def mask(*heads: str) -> Tensor:
    return torch.tensor([[sign == "x" for sign in head] for head in heads])


ROWS_DIFFER = torch.stack((mask("xx", "xx"), mask("x.", "xx")))
FORBIDDEN = {
    "needs a mask or atoms": Answers(0, after=(Keep(0),)),
    "mask .* for tokens": Answers(0, after=(Keep(0, mask=mask("xxx", "xxx")),)),
    "rows keep different numbers": Answers(0, after=(Keep(0, mask=ROWS_DIFFER),)),
    "layer 0 at scale 0: more than one Keep": Answers(0, after=(Keep(0, mask=mask("xx", "x.")),) * 2),
    "layer 1 at scale 1: more than one Keep": Answers(1, after=(Keep(1, mask=mask("xx", "x.")),) * 2),
    "layer 0 at scale 1: more than one Keep": Answers(
        1, Keep(0, mask=mask("x.x", "x.x")), (Keep(0, mask=mask("xxx", "xxx")),)
    ),
    "layer 0 at scale 1 answered for layer 1": Answers(1, Keep(1, mask=mask("xx", "xx"))),
    "leaves a head nothing": Answers(1, Keep(0, mask=mask("x.x", "..."))),
}


@pytest.mark.parametrize("message", FORBIDDEN)
def test_a_wrong_answer_is_an_error(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(FORBIDDEN[message])


def test_spending_too_much_is_an_error() -> None:
    with pytest.raises(BudgetError, match="asked for 2 more token slots, 1 of 11 are free"):
        run(Answers(9, capacity=TWO.full_tokens - 1))
    assert run(Answers(9, capacity=TWO.full_tokens)).pool.peak == TWO.full_tokens == 12


def test_a_cache_is_asked_for_in_a_way_that_exists() -> None:
    with pytest.raises(ConfigError, match="backend 'flash' is unknown"):
        KVCache(TWO, Policy(12), 2, 1, backend="flash")
    with pytest.raises(ConfigError, match="varlen runs on CUDA"):
        KVCache(TWO, Policy(12), 2, 1, backend="varlen")
    with pytest.raises(ConfigError, match=r"stores torch.bfloat16 but the budget is counted in 4-byte"):
        KVCache(TWO, Policy(12), 2, 1, dtype=torch.bfloat16)


def test_a_cache_serves_one_generation_of_its_geometry() -> None:
    cache = KVCache(TWO, Policy(TWO.full_tokens), 2, 1)
    x = torch.zeros(2, 2, 2, 4)
    with pytest.raises(ValueError, match=r"layer 1 at scale 0: got \(2, 2, 1, 4\), expected \(2, 2, 2, 4\)"):
        cache.attend(1, x, x[:, :, :1], x[:, :, :1], 0.5)
    with pytest.raises(ValueError, match="all 3 scales are done"):
        run(Policy(TWO.full_tokens)).attend(0, x, x, x, 0.5)
