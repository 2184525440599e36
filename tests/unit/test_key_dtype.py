"""Keys stored in the model's dtype after rotation: the bits of the fp32 keys that upstream keeps, at two thirds of it.

Upstream's cache holds rotated keys in float32 and values in bfloat16; autocast casts q and k when they reach attention.
"""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from test_infinity_cache import GEOMETRY, GUIDED, PLAIN, PROMPTS, generators
from test_infinity_cache import model as small
from torch import Tensor

from heatkv_cli.benchmarks.base import items_of
from heatkv_cli.core.attention import Group, grouped_attention
from heatkv_cli.core.cache import FULL_BUDGET, KVCache
from heatkv_cli.core.scales import Geometry
from heatkv_cli.methods.base import Setting
from heatkv_cli.methods.full import Full
from heatkv_cli.models.base import Cache, Trace
from heatkv_cli.models.infinity.model import InfinityModel
from heatkv_cli.models.infinity.rope import rotate
from heatkv_cli.models.infinity.sampling import Sampling
from heatkv_cli.models.infinity.transformer import MAX_LOG_SCALE, SelfAttention, linear

HALF = Geometry("small", GEOMETRY.num_layers, GEOMETRY.num_heads, GEOMETRY.head_dim, GEOMETRY.schedule, 1, 2)


@cache
def model() -> InfinityModel:
    """The small Infinity with its blocks in bfloat16, the rest in float32: the release's split."""
    net = copy.deepcopy(small().transformer)
    net.block_chunks.to(torch.bfloat16)
    return InfinityModel(HALF, net, small().tokenizer, small().text, (10, 10))


class Upstream:
    """Keys in the dtype they come in, values as they are; cast when they are used."""

    def __init__(self) -> None:
        self.k: dict[int, Tensor] = {}
        self.v: dict[int, Tensor] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, *_: object) -> Tensor:
        if layer in self.k:
            k, v = torch.cat((self.k[layer], k), 2), torch.cat((self.v[layer], v), 2)
        self.k[layer], self.v[layer] = k, v
        none = v[:, :, :0]
        whole = Group(range(v.shape[1]), none, none)  # the kernel is the same, only storage is not
        return grouped_attention(q.to(v.dtype), k.to(v.dtype), v, [whole], softmax_scale)

    def end_step(self) -> None:
        pass

    def bytes(self) -> int:
        return sum(x.nbytes for stored in (self.k, self.v) for x in stored.values())


def project_in_float32(self: SelfAttention, x: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q and k as upstream's attention has them: float32 after norm and rotation, v in bfloat16."""
    bias = torch.cat((self.q_bias, self.zero_k_bias, self.v_bias))
    q, k, v = linear(x, self.mat_qkv.weight, bias).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
    temperature = self.scale_mul_1H11.float().clamp(max=MAX_LOG_SCALE).exp()
    return rotate(F.normalize(q.float(), dim=-1) * temperature, rope), rotate(F.normalize(k.float(), dim=-1), rope), v


def generate(seam: Cache, sampling: Sampling) -> Trace:
    return model().generate(model().encode(items_of(PROMPTS)), sampling, seam, generators(len(PROMPTS)))


@pytest.mark.parametrize("sampling", [GUIDED, PLAIN], ids=["guided", "plain"])
def test_not_a_bit_changes_and_a_third_is_saved(sampling: Sampling, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, count = model().rows(len(PROMPTS), sampling), len(PROMPTS)
    ours, policy = Upstream(), Full().policy(Setting(HALF, FULL_BUDGET, rows))
    pool = KVCache(HALF, policy, rows, count, torch.bfloat16)
    traces = [generate(ours, sampling), generate(pool, sampling)]
    monkeypatch.setattr(SelfAttention, "project", project_in_float32)
    theirs = Upstream()
    reference = generate(theirs, sampling)
    assert {k.dtype for k in theirs.k.values()} == {torch.float32}
    assert {x.dtype for x in (*theirs.v.values(), *ours.k.values(), *ours.v.values())} == {torch.bfloat16}
    for trace in traces:
        for name in ("codes", "logits"):
            assert all(map(torch.equal, getattr(trace, name), getattr(reference, name)))
        assert torch.equal(trace.latent, reference.latent)
    for layer, exact in theirs.k.items():  # the keys themselves are others before they are cast
        assert torch.equal(exact.to(torch.bfloat16), ours.k[layer]) and not torch.equal(exact, ours.k[layer].float())

    assert 3 * ours.bytes() == 2 * theirs.bytes()  # 4 bytes a channel of K and V, not 6
    stored = HALF.schedule.peak_tokens * HALF.heads * HALF.head_dim * rows  # without the last scale, which nobody reads
    assert pool.ledger.alloc_bytes == 4 * stored
    whole = sum(HALF.schedule.lengths) * HALF.heads * HALF.head_dim * rows
    assert theirs.bytes() == 6 * whole


def test_it_is_the_cast_that_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention in float32 would give other logits: the comparison above is not blind."""
    monkeypatch.setattr(SelfAttention, "project", project_in_float32)

    class Exact(Upstream):
        def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, *_: object) -> Tensor:
            return super().attend(layer, q, k, v.float(), softmax_scale)

    exact, reference = generate(Exact(), PLAIN), generate(Upstream(), PLAIN)
    assert not torch.equal(exact.logits[-1], reference.logits[-1])
