"""Models without files: real dimensions and dtypes, finite, not constant, the same every time."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from heatkv_cli.benchmarks.base import items_of

sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))

import infinity_golden as golden
from infinity_files import flat, official, pixels, wrapped
from infinity_files import load as load_files

from heatkv_cli.core.budget import Budget
from heatkv_cli.core.cache import KVCache
from heatkv_cli.methods.base import Setting
from heatkv_cli.methods.full import Full
from heatkv_cli.models.base import Trace
from heatkv_cli.models.infinity.model import InfinityModel
from heatkv_cli.models.infinity.random_weights import TEXT_TOKENS, RandomText
from heatkv_cli.models.infinity.sampling import Sampling
from heatkv_cli.models.infinity.transformer import Text


def load(**changes: Any) -> InfinityModel:
    """A random model of the golden model's size."""
    return load_files(Path(), Path(), files={}, **changes)


def draw(model: InfinityModel, prompts: list[str]) -> Trace:
    geometry = model.geometry
    policy = Full().policy(Setting(geometry, Budget.parse(1), 2 * len(prompts)))
    dtype = model.transformer.layers()[0].sa.mat_qkv.weight.dtype
    cache = KVCache(geometry, policy, 2 * len(prompts), len(prompts), dtype)
    scales = geometry.num_scales
    generators = [torch.Generator().manual_seed(0) for _ in prompts]
    return model.generate(
        model.encode(items_of(prompts)), Sampling((3.0,) * scales, (1.0,) * scales), cache, generators
    )


def test_names_shapes_and_dtypes_are_those_of_a_loaded_model(tmp_path: Path) -> None:
    read = load_files(flat(tmp_path, official("A")), wrapped(tmp_path, pixels("A")), dtype="bfloat16")
    drawn = load(dtype="bfloat16")
    for part in ("transformer", "tokenizer"):
        expected, found = (getattr(model, part).state_dict() for model in (read, drawn))
        assert {n: (t.shape, t.dtype) for n, t in found.items()} == {n: (t.shape, t.dtype) for n, t in expected.items()}
        assert not any(t.is_meta for t in found.values())


def test_the_same_weights_every_time() -> None:
    one, other = load().transformer.state_dict(), load().transformer.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    matrices = [t.flatten()[:8] for name, t in one.items() if t.ndim == 2 and t.numel() >= 64]
    assert len({tuple(t.tolist()) for t in matrices}) == len(matrices), "two matrices were drawn from one seed"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_are_finite_and_bits_vary(dtype: str) -> None:
    geometry = golden.Run("A_forced", golden.RUNS["A_forced"]).geometry
    width = {"float32": 4, "bfloat16": 2}[dtype]
    changed = type(geometry)(**{**geometry.__dict__, "dtype_bytes": width})
    model = load(dtype=dtype, geometry=changed)
    trace = draw(model, ["a", "b"])
    logits, bits = (torch.cat([x.flatten(1).float() for x in part], 1) for part in (trace.logits, trace.codes))
    assert logits.isfinite().all() and 0.1 < logits.std() < 30
    assert 0.2 < bits.mean() < 0.8
    assert not torch.equal(bits[0], bits[1]), "the text decides nothing"
    image = model.decode(trace.latent)
    assert image.float().std() > 1


def test_text_has_one_length_and_depends_on_the_prompt() -> None:
    text = RandomText(8, 5)
    a, b, again = text.encode(["a", "b", "a"])
    assert a.shape == (5, 8) and torch.equal(a, again) and not torch.equal(a, b)
    assert Text.pack(text.encode(["a", "b"])).mask() is None
    assert load().encode(items_of("a")).lengths == (min(TEXT_TOKENS, golden.TEXT_LENGTH),)
