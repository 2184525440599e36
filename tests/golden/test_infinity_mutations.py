"""The golden tolerances tell right from wrong: each of these mistakes is put in, and the official runs must notice.

Mistakes and the errors they make: docs/infinity.md, measured with another implementation. An error far from
the one stated there would mean that a mistake is not the one it is called.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import infinity_golden as golden
import pytest
import torch
import torch.nn.functional as F
from infinity_golden import Run
from recorder import Recorder
from torch import Tensor

from heatkv_cli.models.infinity import model as model_module
from heatkv_cli.models.infinity import tokenizer as tokenizer_module
from heatkv_cli.models.infinity import transformer as transformer_module
from heatkv_cli.models.infinity.model import InfinityModel
from heatkv_cli.models.infinity.rope import rope_table
from heatkv_cli.models.infinity.sampling import Sampling
from heatkv_cli.models.infinity.schedules import rope_base
from heatkv_cli.models.infinity.tokenizer import Codes
from heatkv_cli.models.infinity.transformer import Block, FeedForward, Infinity, Text

pytestmark = pytest.mark.golden

RUNS = ("A_forced", "A_forced_portrait2", "B_forced")


@dataclass
class Setup:
    """What a mistake may change."""

    run: Run
    model: InfinityModel
    sampling: Sampling
    cache: Any
    patch: pytest.MonkeyPatch


def no_clamp(s: Setup) -> None:
    s.patch.setattr(transformer_module, "MAX_LOG_SCALE", math.inf)


def softmax_scale(s: Setup) -> None:
    class Scaled(Recorder):
        def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
            return super().attend(layer, q, k, v, q.shape[-1] ** -0.5)

    s.cache = Scaled()


def half_split(s: Setup) -> None:
    def rotate(x: Tensor, table: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat((a * table[0] - b * table[1], a * table[1] + b * table[0]), -1)

    s.patch.setattr(transformer_module, "rotate", rotate)


def table_at(run: Run, position: Callable[[int, int], Tensor]) -> Tensor:
    """A rotary table whose token (r, c) stands at position(h, base_h)[r], position(w, base_w)[c]."""
    dim, base = run.geometry.head_dim, rope_base(run.settings["h_div_w"])
    grid = rope_table(dim, ((128, 128),), (128, 128), 0).view(2, 128, 128, dim // 2)
    maps = [grid[:, position(h, base[0]).long()][:, :, position(w, base[1]).long()] for h, w in run.sizes]
    return torch.cat([m.flatten(1, 2) for m in maps], 1)


def half_even_up(n: int, base: int) -> Tensor:
    return torch.round(torch.arange(n) * (base / n))


def half_up(s: Setup) -> None:
    assert torch.equal(table_at(s.run, half_even_up), s.model.rope)  # the only difference is the rounding
    s.model.rope = table_at(s.run, lambda n, base: torch.floor(torch.arange(n) * (base / n) + 0.5))


def own_grid(s: Setup) -> None:
    s.model.rope = rope_table(s.run.geometry.head_dim, s.run.sizes, s.run.sizes[-1], 2)


def swapped_axes(s: Setup) -> None:
    a, b = s.model.rope.chunk(2, -1)
    s.model.rope = torch.cat((b, a), -1)


def offset_zero(s: Setup) -> None:
    """Issue #91: every scale rotated by the beginning of the table."""
    s.model.rope = torch.cat([s.model.rope[:, : h * w] for h, w in s.run.sizes], 1)


def ada_order(s: Setup) -> None:
    """The six parts read as (shift, scale, gate) twice, which is DiT's order."""
    before, after, order = Block.before, Block.after, [2, 5, 1, 4, 0, 3]
    for block in s.model.transformer.layers():
        s.patch.setattr(block.ada_gss, "data", block.ada_gss.data[:, :, order])

    def wrong_before(self: Block, x: Tensor, ada: Tensor, rope: Tensor) -> Any:
        return before(self, x, ada[:, :, order], rope)

    def wrong_after(self: Block, x: Tensor, y: Tensor, ada: Tensor, *more: Any) -> Tensor:
        return after(self, x, y, ada[:, :, order], *more)

    s.patch.setattr(Block, "before", wrong_before)
    s.patch.setattr(Block, "after", wrong_after)


def plain_cross_norm(s: Setup) -> None:
    for block in s.model.transformer.layers():
        s.patch.setattr(block.ca_norm.weight, "data", torch.ones_like(block.ca_norm.weight))
        s.patch.setattr(block.ca_norm.bias, "data", torch.zeros_like(block.ca_norm.bias))


def exact_gelu(s: Setup) -> None:
    def forward(self: FeedForward, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))

    s.patch.setattr(FeedForward, "forward", forward)


def shrink_with(s: Setup, how: Callable[[Tensor, tuple[int, int]], Tensor]) -> None:
    right = model_module.resize

    def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
        return how(x, size) if x.shape[-1] > size[-1] else right(x, size)

    s.patch.setattr(model_module, "resize", resize)


def area(s: Setup) -> None:
    shrink_with(s, lambda x, size: F.interpolate(x, size, mode="area"))


def antialias(s: Setup) -> None:
    shrink_with(s, lambda x, size: F.interpolate(x, size, mode="bilinear", antialias=True))


def level_per_chunk(s: Setup) -> None:
    s.patch.setattr(s.model.transformer, "config", replace(s.model.transformer.config, level_embed_once=False))


def wrong_unconditional_head(s: Setup) -> None:
    right = s.model.transformer.logits

    def logits(hidden: Tensor, cond: Any) -> Tensor:
        head = cond.head[: len(cond.head) // 2].repeat(2, 1, 1, 1)
        return right(hidden, replace(cond, head=head))

    s.patch.setattr(s.model.transformer, "logits", logits)


def guidance_1_plus_w(s: Setup) -> None:
    s.sampling = replace(s.sampling, cfg=tuple(c + 1 for c in s.sampling.cfg))


def whole_unconditional(s: Setup) -> None:
    def unconditional(self: Infinity, text: Text) -> list[Tensor]:
        return [self.cfg_uncond for _ in text.lengths]

    s.patch.setattr(Infinity, "unconditional", unconditional)


def wrong_unshuffle(s: Setup) -> None:
    def to_tokens(self: Codes, latent: Tensor) -> Tensor:
        b, d, h, w = latent.shape
        p = self.patch
        x = latent.view(b, d, h // p, p, w // p, p).permute(0, 3, 5, 1, 2, 4)  # offsets first, channel last
        return x.reshape(b, p * p * d, -1).transpose(1, 2)

    s.patch.setattr(Codes, "to_tokens", to_tokens)


def wrong_code_scale(s: Setup) -> None:
    right = tokenizer_module.Codes.embed

    def embed(self: Codes, bits: Tensor) -> Tensor:
        return right(self, bits) / self.patch

    s.patch.setattr(Codes, "embed", embed)


# Those errors are of single logits, and these of differences of two, hence the factor of two below.
# mistake -> logit error on each of RUNS as docs/infinity.md states it: lowest and highest; None: cannot be seen there
Bounds = tuple[float, float] | None
MISTAKES: dict[str, tuple[Callable[[Setup], None], tuple[Bounds, Bounds, Bounds]]] = {
    "no clamp": (no_clamp, ((5e-2, 5e-2), (6e-2, 6e-2), (2e-1, 2e-1))),
    "softmax scale 1/sqrt(D)": (softmax_scale, ((1, 1),) * 3),
    "half-split rotation": (half_split, ((1.2, 1.8),) * 3),
    "rows and columns swapped": (swapped_axes, ((1.2, 1.9),) * 3),
    "half-up rounding": (half_up, (None, (6.6e-1, 6.6e-1), None)),
    "own grid": (own_grid, ((1.5, 1.5),) * 3),
    "rotation from the beginning": (offset_zero, ((1.1, 1.8),) * 3),
    "AdaLN order": (ada_order, ((4, 4),) * 3),
    "cross-attention norm without affine": (plain_cross_norm, ((2e-2, 2e-2),) * 3),
    "exact GELU": (exact_gelu, ((3e-4, 5e-4),) * 3),
    "area": (area, ((0.7, 2.4),) * 3),
    "antialias": (antialias, ((0.7, 2.4),) * 3),
    "level per chunk": (level_per_chunk, ((2, 2.7),) * 3),
    "conditional vector in both heads": (wrong_unconditional_head, ((0.4, 0.5),) * 3),
    "guidance 1 + w": (guidance_1_plus_w, ((0.9, 0.9),) * 3),
    "full-length unconditional text": (whole_unconditional, ((1.3, 1.8),) * 3),
    "pixel-unshuffle order": (wrong_unshuffle, (None, None, (13, 13))),
    "1/sqrt(4d)": (wrong_code_scale, (None, None, (3.7, 3.7))),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("name", RUNS)
def test_a_mistake_is_noticed(mistake: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(name, golden.RUNS[name])
    make, stated = MISTAKES[mistake]
    bounds = stated[RUNS.index(name)]
    setup = Setup(run, run.build(), run.sampling, Recorder(), monkeypatch)
    make(setup)
    result = golden.generate(run, setup.cache, setup.model, setup.sampling)
    official = golden.tensor(f"run/{name}/logits")
    error = golden.gap(golden.difference(run, result.trace), official[..., 1] - official[..., 0])
    tolerance = golden.TOLERANCE["logits"]
    if bounds is None:
        assert error < tolerance
    else:
        assert error > 2 * tolerance
        assert bounds[0] / 2 < error < bounds[1] * 2


@pytest.mark.parametrize("name", RUNS)
def test_without_a_mistake_the_error_is_far_below(name: str) -> None:
    run = Run(name, golden.RUNS[name])
    result = golden.generate(run, Recorder())
    official = golden.tensor(f"run/{name}/logits")
    error = golden.gap(golden.difference(run, result.trace), official[..., 1] - official[..., 0])
    assert error < golden.TOLERANCE["logits"] / 3
