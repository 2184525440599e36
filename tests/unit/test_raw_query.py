"""The raw query: what it is, that nobody makes it unasked, and that it arrives at the policy."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor

from heatkv_cli.core.cache import KVCache
from heatkv_cli.core.policy import Keep, Policy, Visit
from heatkv_cli.core.scales import Geometry, ScaleSchedule
from heatkv_cli.models.infinity.rope import rope_table
from heatkv_cli.models.infinity.tokenizer import Codes
from heatkv_cli.models.infinity.transformer import Infinity, InfinityConfig, Text, modulate

GEOMETRY = Geometry("raw", 2, 2, 8, ScaleSchedule.squares((1, 2)), 1)


@pytest.fixture
def network() -> Infinity:
    torch.manual_seed(0)
    net = Infinity(InfinityConfig(2, 128, 2, 1, Codes(4), text_channels=128, text_length=4)).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return net


class Recorder:
    """A cache of one scale that keeps what it was given."""

    def __init__(self) -> None:
        self.makers: list[Callable[[], Tensor]] = []
        self.inputs: list[Tensor] = []

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        softmax_scale: float,
        raw_query: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        assert raw_query is not None
        self.makers.append(raw_query)
        return torch.zeros_like(v)


@torch.no_grad()
def test_it_is_the_bare_projection(network: Infinity, monkeypatch: pytest.MonkeyPatch) -> None:
    text = Text.pack([torch.randn(3, 128), torch.randn(3, 128)])
    condition, x = network.condition(text), torch.randn(2, 4, 128)
    recorder, calls = Recorder(), []
    block = network.layers()[0]
    original = block.sa.raw_query
    monkeypatch.setattr(block.sa, "raw_query", lambda inner: calls.append(1) or original(inner))
    rope = rope_table(64, ((2, 2),), (2, 2), 2)
    network.blocks(x, torch.tensor(0), condition, rope, recorder)
    assert not calls
    made = recorder.makers[0]()
    assert calls == [1] and made.shape == (2, 2, 4, 64)
    _, _, scale, _, shift, _ = (block.ada_gss + condition.ada).unbind(2)
    inner = modulate(x + network.lvl_embed(torch.tensor(0)), scale, shift)
    projection = block.sa.mat_qkv.weight[:128]
    for head in range(2):
        rows = projection[64 * head : 64 * (head + 1)]
        torch.testing.assert_close(made[:, head], inner @ rows.T, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        block.sa.q_bias += 1
    torch.testing.assert_close(block.sa.raw_query(inner), made)


class Asks(Policy):
    def __init__(self) -> None:
        super().__init__(GEOMETRY.full_tokens)
        self.seen: list[Tensor | None] = []

    def after_attend(self, visit: Visit) -> Iterable[Keep]:
        self.seen.append(None if visit.raw_query is None else visit.raw_query())
        return ()


def test_it_arrives_at_the_policy() -> None:
    policy = Asks()
    cache = KVCache(GEOMETRY, policy, 1, 1)
    q, k, v, raw = torch.randn(4, 1, 2, 1, 8)
    cache.attend(0, q, k, v, 1.0, lambda: raw)
    cache.attend(1, q, k, v, 1.0)
    assert policy.seen == [raw, None]
