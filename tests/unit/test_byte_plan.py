"""The byte plan against what is measured: the ledger of real generations, live tensors, and the memory of a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from heatkv_cli.benchmarks.base import items_of
from heatkv_cli.config import RunConfig, build, choices, compose
from heatkv_cli.core.cache import KVCache
from heatkv_cli.core.ledger import Ledger
from heatkv_cli.core.live_bytes import Watched
from heatkv_cli.core.policy import Keep, Policy, Visit
from heatkv_cli.core.scales import Geometry, ScaleSchedule
from heatkv_cli.errors import BudgetError, ConfigError
from heatkv_cli.methods.base import Setting
from heatkv_cli.models.base import ImageModel, Sketch
from heatkv_cli.models.infinity.sketch import t5_bytes
from heatkv_cli.planning.byte_plan import BytePlan, byte_plan
from heatkv_cli.planning.footprint import CacheBytes, Footprint, Growing, LooksAtKeysError, rehearse
from heatkv_cli.planning.job import geometry_of, load_model
from heatkv_cli.planning.preflight import stand_in
from heatkv_cli.planning.resolver import Resolver

ROOT = Path(__file__).parents[2]
MIDDLE = [
    *("model=infinity-2b", "resolution=0.06M", "model.dtype=float32", "model.num_layers=2", "model.num_heads=2"),
    *("model.head_dim=64", "model.params.width=128", "model.params.block_chunks=2", "model.params.text_channels=512"),
    "model.params.tokenizer.base_channels=32",
]
"""Few and narrow layers over the tokens of 256 x 256: activations and cache outweigh the weights."""
TOKENIZERS = {"infinity-2b": 110_118_051, "infinity-8b": 81_624_209}
METHODS = (("full",), ("streaming", "budget=0.2"), ("random", "budget=0.1"), ("sinks", "budget=0.1"))


def config(*overrides: str) -> RunConfig:
    return compose(overrides, command="bench").first


def plan_of(*overrides: str) -> BytePlan:
    plan = byte_plan(config(*overrides), Resolver())
    assert plan is not None
    return plan


@cache
def tiny() -> ImageModel:
    cfg = config("model=tiny")
    return load_model(cfg, Resolver().weights(cfg)[0])


def generated(cfg: RunConfig, model: ImageModel, batch: int) -> Ledger:
    """The ledger of a real generation."""
    sampling, method = cfg.model.sampling, cfg.method.object
    rows, budget = model.rows(batch, sampling), cfg.budget
    calibration = stand_in(model.geometry) if method.calibrated else None
    policy = method.policy(Setting(model.geometry, budget, rows, calibration=calibration))
    kv = KVCache(model.geometry, policy, rows, batch, budget=budget)
    generators = [torch.Generator().manual_seed(i) for i in range(batch)]
    model.generate(model.encode(items_of(["a red circle"] * batch)), sampling, Watched(kv), generators)
    return kv.ledger


def check_work(plan: BytePlan, batch: int, ledger: Ledger) -> None:
    """What was measured is the plan and a host's index tables: eight numbers of 4 bytes for each token of a layer."""
    assert ledger.work_peak is not None
    tables = 8 * 4 * ledger.geometry.num_heads * ledger.geometry.schedule.offsets[-1]
    assert 0 <= ledger.work_peak - plan.kv_work(batch) <= tables


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("method", [*METHODS, ("heatkv", "budget=0.1"), ("heatkv", "budget=0.04")])
def test_pool_transient_and_index_are_the_ledgers(method: tuple[str, ...], batch: int) -> None:
    cfg = config("model=tiny", f"method={method[0]}", *method[1:])
    plan = byte_plan(cfg, Resolver())
    ledger = generated(cfg, tiny(), batch)
    assert plan is not None
    assert plan.kv(batch) == ledger.alloc_bytes
    check_work(plan, batch, ledger)
    assert plan.cache.index == ledger.meta_peak
    assert plan.exact == (method[0] != "heatkv")  # random orders stand in for those of a calibration


def test_unguided_models_have_a_row_an_image() -> None:
    cfg = config("model=tiny", "method=full", "model.sampling.cfg=1")
    plan = byte_plan(cfg, Resolver())
    assert plan is not None
    check_work(plan, 2, generated(cfg, tiny(), 2))
    assert plan.kv_work(2) == plan_of("model=tiny", "method=full").kv_work(1)


@pytest.mark.parametrize(("model", "parameters"), [("infinity-2b", 2_204_564_032), ("infinity-8b", 8_375_791_824)])
def test_weights_of_the_released_models(model: str, parameters: int) -> None:
    """Parameters as docs/infinity.md counts them; blocks in bfloat16, the rest and the tokenizer in float32."""
    cfg = config(f"model={model}")
    sketch = build(cfg.model.sketch, cfg.model.params, Sketch, geometry=geometry_of(cfg.model), dtype="bfloat16")
    net = sketch.networks["transformer"]
    assert sum(p.numel() for p in net.parameters()) == parameters
    blocks = {name: t for name, t in net.state_dict().items() if name.startswith("block_chunks")}
    rest = [t for name, t in net.state_dict().items() if name not in blocks]
    assert sum(p.numel() for p in sketch.networks["tokenizer"].parameters()) == TOKENIZERS[model]
    assert {t.dtype for t in blocks.values()} == {torch.bfloat16} and {t.dtype for t in rest} == {torch.float32}


def test_full_cache_of_the_2b() -> None:
    """By hand: 32 layers, 16 heads of 128, 6425 stored tokens, K and V in bfloat16, one row."""
    geometry = geometry_of(config("model=infinity-2b").model)
    assert rehearse(geometry, Policy(geometry.full_tokens)).alloc == 2 * 2 * 32 * 16 * 128 * 6425


@pytest.mark.parametrize("precision", ["float16", "bfloat16", "float32"])
def test_the_text_encoders_bytes(precision: str) -> None:
    """Flan-T5-XL as transformers builds it, without memory."""
    transformers = pytest.importorskip("transformers")
    shape = transformers.T5Config(
        vocab_size=32128, d_model=2048, d_kv=64, d_ff=5120, num_layers=24, num_heads=32, feed_forward_proj="gated-gelu"
    )
    with torch.device("meta"):
        net = transformers.T5EncoderModel(shape)
    dtype = getattr(torch, precision)
    wide = {"wo.weight"} if precision == "float16" else set()
    expected = sum(
        p.numel() * (4 if any(name.endswith(end) for end in wide) else dtype.itemsize)
        for name, p in net.named_parameters()
    )
    assert t5_bytes(precision) == expected  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------- counting by itself


def test_random_weights_come_without_a_text_encoder() -> None:
    drawn, read = (plan_of("model=infinity-2b", "resolution=0.06M", *more) for more in (["weights=random"], []))
    assert drawn.phases(1)["text"] == drawn.weights == read.weights
    assert read.phases(1)["text"] == read.weights + read.model.encoder > read.weights


def test_what_grows_is_linear_in_the_batch() -> None:
    plan = plan_of(*MIDDLE, "method=full")
    for first, second in pairwise(plan.transient(batch) for batch in (1, 2, 3, 4)):
        assert second - first == plan.transient(2) - plan.transient(1)


@pytest.mark.parametrize(
    "look",
    [
        lambda visit: visit.view(),
        lambda visit: visit.column_mass(),
        lambda visit: visit.attention(torch.tensor([visit.k.shape[2] - 1])),
    ],
    ids=["view", "all queries", "the last query"],
)
def test_policies_that_look_at_keys_are_not_rehearsed(look: Callable[[Visit], object]) -> None:
    class Looks(Policy):
        def after_attend(self, visit: Visit) -> tuple[Keep, ...]:
            if visit.scale == 1:
                look(visit)
            return ()

    geometry = Geometry("small", 2, 2, 8, ScaleSchedule.squares((1, 2, 3)), 1)
    with pytest.raises(LooksAtKeysError):
        rehearse(geometry, Looks(geometry.full_tokens))
    full = rehearse(geometry, Policy(geometry.full_tokens))
    assert full.alloc == geometry.full_bytes(1)


@pytest.mark.parametrize("name", choices("method"))
def test_every_method_has_a_plan(name: str) -> None:
    """A bound for methods that look at keys or attention: their pool is never larger than planned."""
    overrides = ["model=tiny", f"method={name}", *([] if name == "full" else ["budget=0.2"])]
    cfg, plan = config(*overrides), plan_of(*overrides)
    if cfg.method.object.calibrated:  # without a calibration at hand there is only a bound
        assert 0 < plan.kv(1) <= 2 * plan.full * 0.2
    else:
        assert plan.kv(1) == generated(cfg, tiny(), 1).alloc_bytes


@pytest.mark.parametrize(("alpha", "smallest"), [("0.2", 5), ("0.5", 3), ("0.8", 2), ("elbow", 2)])
def test_a_budget_is_refused_if_no_calibration_could_meet_it(alpha: str, smallest: int) -> None:
    """HACK's contextual heads get a fifth of the tokens of the others: the more there are, the less it needs.

    `elbow` is anything from 0.2 to 0.8, as the calibration will say.
    """
    words = ("method=hack", f"method.alpha={alpha}")
    with pytest.raises(BudgetError):
        plan_of(*words, f"budget={smallest - 1}/155")
    plan = plan_of(*words, f"budget={smallest}/155")
    assert not plan.exact
    assert plan.kv(1) == 2 * plan.full * smallest // 155


# ------------------------------------------------------------------------------------------------------ what is said


def small_plan() -> BytePlan:
    parts = (Growing(10, 5), Growing(0, 2), Growing(0, 30))
    return BytePlan(Footprint({"net": 100}, 50, *parts), CacheBytes(7, 9, 1), 20, 2, True)


def test_phases_and_the_largest_batch_by_hand() -> None:
    plan = small_plan()
    assert plan.phases(1) == {"text": 150, "generate": 100 + 14 + 1 + 15, "decode": 130}
    assert [plan.total(batch) for batch in (1, 2, 3)] == [150, 160, 190]
    assert [plan.largest_batch(memory) for memory in (149, 150, 159, 160, 189, 190, 10_000)] == [0, 1, 1, 2, 2, 3, 330]
    for memory in range(150, 1000, 37):
        batch = plan.largest_batch(memory)
        assert plan.total(batch) <= memory < plan.total(batch + 1)


@pytest.mark.parametrize(
    ("typed", "size"),
    [("24GiB", 24 * 2**30), ("80GB", 80 * 10**9), ("1e6", 10**6), ("512", 512), ("1.5K", 1500), ("2gib", 2**31)],
)
def test_memory_is_typed_with_a_unit(typed: str, size: int) -> None:
    assert config(f"memory={typed}").memory == size


@pytest.mark.parametrize("typed", ["much", "-1", "1.2.3GB", "GiB", "5 parsecs"])
def test_memory_that_is_none(typed: str) -> None:
    with pytest.raises(ConfigError, match="memory is"):
        config(f"memory='{typed}'")


def test_memory_changes_no_image() -> None:
    assert config("memory=1GB").identity() == config().identity()


# -------------------------------------------------------------------------------------------------------- the process

MEASURE = """
import json, sys, torch
from heatkv_cli.benchmarks.base import items_of
from heatkv_cli.config import compose
from heatkv_cli.core.cache import KVCache
from heatkv_cli.methods.base import Setting
from heatkv_cli.planning.job import load_model
from heatkv_cli.pipeline.process_memory import peak_memory

middle, methods, batch = json.loads(sys.argv[1])
config = lambda *overrides: compose([*middle, *overrides], command="bench").first
model, found = load_model(config(), {}), {}
for turn in range(2):  # the first one pays for what libraries map and keep once
    for method in methods:
        cfg = config("method=" + method[0], *method[1:])
        chosen, budget, sampling = cfg.method.object, cfg.budget, cfg.model.sampling
        text, rows = model.encode(items_of("x" * batch)), model.rows(batch, sampling)
        generators = [torch.Generator().manual_seed(i) for i in range(batch)]
        with peak_memory("cpu") as memory:
            policy = chosen.policy(Setting(model.geometry, budget, rows))
            kv = KVCache(model.geometry, policy, rows, batch, budget=budget)
            latent = model.generate(text, sampling, kv, generators).latent
        del kv
        found[method[0]] = memory.peak - memory.before
    with peak_memory("cpu") as memory:
        model.decode(latent[:1])
    found["decode"] = memory.peak - memory.before
print(json.dumps(found))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's high-water mark")
def test_the_peak_of_a_process_is_the_plans() -> None:
    """Beside the weights, within 3 %: the system's own count of resident memory, in a process of its own.

    glibc keeps freed blocks below 32 MB for itself; at real sizes tensors are above, here the limit is set down.
    """
    batch = 8
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps([MIDDLE, METHODS, batch])],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    measured = json.loads(done.stdout)
    for method in METHODS:
        plan = plan_of(*MIDDLE, f"method={method[0]}", *method[1:])
        expected = plan.phases(batch)["generate"] - plan.weights
        assert measured[method[0]] == pytest.approx(expected, rel=0.03), method
    assert measured["decode"] == pytest.approx(plan.model.decode.of(1), rel=0.03)
