"""YAML and overrides to typed runs: composition, sweeps, experiments, hashes, and building what a leaf names."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import pytest

from heatkv_cli.config import (
    Plan,
    RunConfig,
    build,
    build_leaf,
    choices,
    compose,
    conf_dir,
    config_hash,
    groups,
)
from heatkv_cli.config.check import budget_text
from heatkv_cli.config.groups import read_yaml
from heatkv_cli.config.sweep import quote
from heatkv_cli.core.budget import Budget
from heatkv_cli.errors import ConfigError, ConfigErrors

METHODS = choices("method")


def one(*overrides: str, **options: str) -> RunConfig:
    plan = compose(overrides, options=options)
    assert len(plan.runs) == 1
    return plan.first


def digest(run: RunConfig) -> str:
    return config_hash(run.identity())


# ------------------------------------------------------------------------------------------------------ composition


@pytest.mark.parametrize("model", choices("model"))
@pytest.mark.parametrize("method", METHODS)
def test_every_method_composes_with_every_model(model: str, method: str) -> None:
    run = one(f"model={model}", f"method={method}")
    assert (run.model.name, run.method.name) == (model, method)
    assert run.model.num_layers * run.model.num_heads >= 64


def chosen(group: str, name: str) -> list[str]:
    """The words that choose a file of conf/: `prompts` wants a list, a benchmark of a world one of its models."""
    words = [f"{group}={name}", *(["benchmark.file=x.txt"] if name == "prompts" else [])]
    world = read_yaml(group, name).get("world") if group == "benchmark" else None
    models = [model for model in choices("model") if world and read_yaml("model", model).get("world") == world]
    return words + [f"model={model}" for model in models[:1]]


@pytest.mark.parametrize("group", ["benchmark", "metric", "runtime", "experiment"])
def test_every_yaml_composes(group: str) -> None:
    for name in choices(group):
        assert compose(chosen(group, name)).runs


@pytest.mark.parametrize("group", ["model", "method", "benchmark", "metric"])
def test_every_yaml_bears_its_own_name_and_a_launch_line(group: str) -> None:
    for path in (conf_dir() / group).glob("*.yaml"):
        assert path.read_text().startswith("# heatkv "), f"{path} begins with the command that uses it"
        plan = compose(chosen(group, path.stem))
        leaf = plan.first.metrics[0] if group == "metric" else getattr(plan.first, group)
        assert leaf.name == path.stem


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_built(method: str) -> None:
    leaf = one(f"method={method}").method
    assert dataclasses.is_dataclass(leaf.object)
    assert leaf.object == build_leaf(leaf, object, where="method")


@pytest.mark.parametrize("metric", choices("metric"))
def test_every_metric_is_built(metric: str) -> None:
    leaf = one(f"metric={metric}").metrics[0]
    assert leaf.object.spec.name == metric
    assert leaf.needs in (None, leaf.object.spec.needs)


def test_defaults() -> None:
    run = one()
    assert (run.model.name, run.method.name, run.budget.text, run.benchmark.name) == ("tiny", "heatkv", "0.1", "shapes")
    assert (run.limit, run.shard, run.seed, run.seed_mode) == (64, (0, 1), 0, "hash")
    assert run.calibration_prompts.name == run.model.calibration_prompts
    assert tuple(metric.name for metric in run.metrics) == run.benchmark.default_metrics
    assert run.reference.name == "full"


def test_tiny_has_the_geometry_of_the_design() -> None:
    model = one().model
    assert model.sizes == ((1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (6, 6), (8, 8), (10, 10))
    assert (model.sink_scales, model.layout_scales) == (1, (0, 1, 2, 3))
    assert model.num_layers * model.num_heads >= 64
    assert model.sampling.tau == (1, 1, 1, 1, 0.8, 0.6, 0.4, 0.3)
    assert model.sampling.cfg == (2,) * 8


@pytest.mark.parametrize(("name", "tokens"), [("0.06M", 521), ("0.25M", 2521), ("0.60M", 6425), ("1M", 10521)])
def test_infinity_schedules(name: str, tokens: int) -> None:
    for model in ("infinity-2b", "infinity-8b"):
        sizes = one(f"model={model}", f"model.resolution={name}", "force_resolution=true").model.sizes
        assert sum(height * width for height, width in sizes) == tokens


def test_values_are_typed() -> None:
    run = one(
        "model.sampling.cfg=3", "out=some/where", "runtime.threads=2", "limit=all", "shard=1/4", "method.order=scas"
    )
    assert run.model.sampling.cfg == (3.0,) * 8 and type(run.model.sampling.cfg[0]) is float
    assert (run.out, run.runtime.threads, run.limit, run.shard) == (Path("some/where"), 2, None, (1, 4))


def test_options_are_sugar() -> None:
    sugar = compose(
        [], options={"model": "tiny", "method": "full,heatkv", "budget": "0.2", "limit": None, "out": "a b"}
    )
    plain = compose(["model=tiny", "method=full,heatkv", "budget=0.2", 'out="a b"'])
    assert sugar.runs == plain.runs
    assert sugar.first.out == Path("a b")


@pytest.mark.parametrize(
    "path", ["a b", "~", "~/x", "~nobody/x", 'quo"te', "back\\", "a,b", "x{y}=[z]", "ü", "$HOME", "'"]
)
def test_any_path_survives(path: str) -> None:
    assert one(out=path).out == Path(os.path.expanduser(path))
    assert compose([f"out={quote(path)}"]).first.out == Path(os.path.expanduser(path))


def test_environment_speaks_of_paths_and_overrides_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEATKV_OUT", "/elsewhere")
    monkeypatch.setenv("HEATKV_WEIGHTS_DIR", str(tmp_path))
    monkeypatch.setenv("HEATKV_BUDGET", "0.5")
    run = one()
    assert (run.out, run.weights, run.budget.text) == (Path("/elsewhere"), tmp_path, "0.1")
    assert one("out=here").out == Path("here")
    monkeypatch.delenv("HEATKV_OUT")
    assert one().out == Path("runs")


def test_metrics_are_a_list_and_have_parameters() -> None:
    run = one("metric=psnr,kl", "metric.psnr.data_range=1.0")
    assert [metric.name for metric in run.metrics] == ["psnr", "kl"]
    assert run.metrics[0].params["data_range"] == 1.0
    assert one("metric=[psnr,kl]").metrics == one("metric=psnr,kl").metrics


def test_calibrate_takes_its_prompts_from_benchmark() -> None:
    plan = compose(["benchmark=shapes-calibration-b"], command="calibrate")
    assert plan.first.calibration_prompts.name == "shapes-calibration-b"
    assert plan.first.benchmark.name == "shapes"


# ------------------------------------------------------------------------------------------------ budgets and sweeps


def points(plan: Plan) -> list[tuple[str, str]]:
    return [(run.method.name, run.budget.text) for run in plan.runs]


def test_sweep_is_a_product_and_full_comes_once() -> None:
    plan = compose(["method=full,streaming,heatkv", "budget=0.2,0.1,0.04"])
    budgets = ("0.2", "0.1", "0.04")
    assert points(plan) == [("full", "1"), *(("streaming", b) for b in budgets), *(("heatkv", b) for b in budgets)]


def test_hydras_own_sweep_grammar() -> None:
    plan = compose(["method=random", "method.order_seed=range(0,3)", "budget=choice(0.2,0.1)"])
    assert [(run.method.params["order_seed"], run.budget.text) for run in plan.runs] == [
        (seed, budget) for seed in range(3) for budget in ("0.2", "0.1")
    ]


@pytest.mark.parametrize(
    ("typed", "canonical"),
    [("0.1", "0.1"), ("0.10", "0.1"), (".1", "0.1"), ("1/10", "0.1"), ("1e-1", "0.1"), ("1", "1"), ("1.0", "1")]
    + [("21/6425", "21/6425"), ("42/12850", "21/6425"), ("0.0032685", "0.0032685"), ("1/3", "1/3")],
)
def test_one_budget_has_one_text(typed: str, canonical: str) -> None:
    run = one("method=heatkv", f"budget={typed}")
    assert run.budget.text == canonical
    assert run.budget.ratio == Budget.parse(canonical).ratio == Budget.parse(typed).ratio
    assert "/" not in run.budget.slug


def test_budget_text_is_exact() -> None:
    rng = random.Random(0)
    for _ in range(200):
        ratio = Budget.parse(rng.randint(1, 10**9) / 10**9).ratio
        assert Budget.parse(budget_text(ratio)).ratio == ratio


def test_equal_points_of_a_sweep_are_one_run() -> None:
    assert points(compose(["budget=0.1,0.10,1/10"])) == [("heatkv", "0.1")]


def test_rho_takes_the_place_of_the_budget() -> None:
    run = one("rho=0.7")
    assert (run.budget.rho, run.budget.slug) == (Fraction(7, 10), "rho0.7")
    assert (run.plain()["budget"], run.plain()["rho"]) == (None, 0.7)
    assert [
        float(run.budget.rho or 0) for run in compose(["experiment=demo", "method=heatkv", "rho=0.5,0.9"]).runs
    ] == [0.5, 0.9]


def test_reference_of_a_run() -> None:
    run = one("budget=0.04", "seed=3", "limit=5")
    reference = run.as_reference()
    assert reference.is_reference and not run.is_reference
    assert (reference.method.name, reference.budget.text, reference.seed, reference.limit) == ("full", "1", 3, 5)
    assert reference.identity() == one("method=full", "seed=3").identity()


# ------------------------------------------------------------------------------------------------------ experiments


def test_demo() -> None:
    plan = compose(["experiment=demo"])
    methods = ("streaming", "random", "sinks", "heatkv")
    assert points(plan) == [("full", "1"), *((m, b) for m in methods for b in ("0.2", "0.1", "0.04"))]
    assert plan.experiment is not None
    assert plan.experiment.name == "demo"
    assert plan.command_line == "heatkv eval experiment=demo"


def test_rows_carry_parameters_of_their_own() -> None:
    runs = compose(["experiment=tiny-controls"]).runs
    assert [run.method.params["order_seed"] for run in runs if run.method.name == "random"] == [0, 1, 2, 3, 4]
    assert [run.method.name for run in runs if run.method.name != "random"] == ["full", "streaming", "sinks", "heatkv"]
    assert {run.limit for run in runs} == {200}


def test_what_is_typed_beats_the_experiment() -> None:
    plan = compose(["experiment=demo", "method=heatkv", "limit=4", "metric=kl"])
    assert points(plan) == [("heatkv", "0.2"), ("heatkv", "0.1"), ("heatkv", "0.04")]
    assert {run.limit for run in plan.runs} == {4}
    assert [metric.name for metric in plan.first.metrics] == ["kl"]


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of conf/ with an experiment `mine`, still to be written."""
    copied = tmp_path / "conf"
    shutil.copytree(conf_dir(), copied)
    monkeypatch.setattr(groups, "_PACKAGE", tmp_path / "heatkv_cli")
    groups.conf_dir.cache_clear()
    yield copied / "experiment" / "mine.yaml"
    groups.conf_dir.cache_clear()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("swep: {budget: [0.1]}", "unknown key 'swep'"),
        ("overrides: {out: /tmp}", "sets the path 'out'"),
        ("sweep: [1]", "sweep is not a mapping"),
        ("sweep: {method: [heatkv, snapkw]}", "unknown method 'snapkw'"),
        ("overrides: {lmit: 3}", "unknown key 'lmit'"),
        ("sweep: {method: [{random: {order_sed: 1}}]}", "unknown key 'method.order_sed'"),
        ("a: [", "mine.yaml"),
        ("3", "not a mapping"),
    ],
)
def test_mistakes_in_an_experiment(experiment: Path, text: str, words: str) -> None:
    experiment.write_text(text)
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
        compose(["experiment=mine"])


# ----------------------------------------------------------------------------------------------------------- hashes


def test_hash_of_plain_values_is_stable() -> None:
    fields = {"b": [1, 2.5, None, True, "ü"], "a": {"y": (1.0, 2), "x": "z"}}
    written = r'{"a":{"x":"z","y":[1,2]},"b":[1,2.5,null,true,"\u00fc"]}'  # sorted, without blanks, 1.0 is 1
    assert config_hash(fields) == hashlib.sha256(written.encode()).hexdigest()
    assert config_hash(fields) == "8034bd9bb8bdb5ddb5860bd00ea8bf9e00616264771d5d0436a9dc9fe09f336b"
    assert config_hash(dict(reversed(fields.items()))) == config_hash(fields)
    assert config_hash({"a": 1}) != config_hash({"a": True}) != config_hash({"a": "1"})


@pytest.mark.parametrize("value", [Path("x"), {1}, object()])
def test_only_plain_values_have_a_hash(value: Any) -> None:
    with pytest.raises(TypeError):
        config_hash({"a": value})
    with pytest.raises(ValueError):
        config_hash({"a": float("nan")})


@pytest.mark.parametrize(
    "override",
    ["limit=3", "limit=all", "shard=1/4", "out=x", "weights=.", "runtime.threads=1", "runtime.device_index=1"]
    + ["metric=kl", "contact_sheet=0", "budget=1/10", "calibration_prompts=shapes-calibration-b", "orders=z.json"],
)
def test_what_cannot_change_an_image_is_not_in_the_hash(override: str) -> None:
    assert digest(one(override)) == digest(one())


@pytest.mark.parametrize(
    "override",
    ["budget=0.2", "rho=0.9", "method=random", "seed=1", "runtime.batch_size=4", "runtime.attention=masked"]
    + ["runtime=gpu", "model.sampling.cfg=3", "model.dtype=bfloat16", "model.sink_scales=2", "model=infinity-2b"]
    + ["benchmark=shapes-calibration-a", "benchmark.version=2", "model.params.width=80", "model.layout_scales=[0]"],
)
def test_what_can_change_an_image_is_in_the_hash(override: str) -> None:
    assert digest(one(override)) != digest(one())


def test_calibration_has_a_hash_of_its_own() -> None:
    base = config_hash(one().calibration_identity())
    assert config_hash(one("method=random", "budget=0.2", "limit=3").calibration_identity()) == base
    assert config_hash(one("calibration_prompts=shapes-calibration-b").calibration_identity()) != base


def test_run_name() -> None:
    assert one("budget=21/6425").name("0123456789") == "tiny-heatkv-21of6425-shapes-01234567"


def test_resolved_config_is_json() -> None:
    run = replace(one(), calibration=Path("x"))
    assert json.loads(json.dumps(run.plain()))["calibration"] == "x"


# ----------------------------------------------------------------------------------------------------------- leaves


@dataclass
class Example:
    window: int | Literal["auto"]
    ratio: float = 0.5
    flags: tuple[int, ...] = ()
    name: str = ""

    def __post_init__(self) -> None:
        if self.ratio > 1:
            raise ValueError("ratio is more than 1")


@runtime_checkable
class Speaks(Protocol):
    def speak(self) -> str: ...


def with_context(window: int, device: object) -> Example:
    return Example(window, name=str(device))


HERE = f"{__name__}.Example"


def test_build() -> None:
    assert build(HERE, {"window": "auto", "ratio": 1, "flags": [1, 2]}, Example) == Example("auto", 1.0, (1, 2))
    assert build(HERE, {"window": 3}, Example, offers={"name": "x", "nothing": 1}) == Example(3, name="x")
    assert build(f"{__name__}.with_context", {"window": 3}, Example, device="d") == Example(3, name="d")


@pytest.mark.parametrize(
    ("target", "params", "words"),
    [
        (HERE, {"windw": 3, "window": 3}, "no key 'windw'"),
        (HERE, {}, "'method.window' is missing"),
        (HERE, {"window": "automatic"}, "method.window is 'automatic'"),
        (HERE, {"window": True}, "method.window is true"),
        (HERE, {"window": 1, "flags": ["a"]}, r"method.flags\[0\] is 'a'"),
        (HERE, {"window": 1, "ratio": 2.0}, "ratio is more than 1"),
        (HERE + "s", {}, "has no Examples"),
        ("heatkv_cli.methods.nothing.X", {}, "no module heatkv_cli.methods.nothing"),
        ("nothing", {}, "not a dotted path"),
    ],
)
def test_build_refuses(target: str, params: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        build(target, params, Example, where="method")
    assert caught.value.hint


def test_build_collects_and_suggests() -> None:
    with pytest.raises(ConfigErrors) as caught:
        build(HERE, {"windw": 3, "ratio": "x"}, Example, where="method")
    assert len(caught.value.errors) == 3
    assert "did you mean 'window'?" in caught.value.hint


def test_build_checks_the_kind() -> None:
    with pytest.raises(ConfigError, match="makes a Example, not a Speaks"):
        build(HERE, {"window": 1}, Speaks)
