"""Composed plain values to a `RunConfig`: numbers, names and budgets are checked here and nowhere else."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from decimal import Decimal, localcontext
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

from heatkv_cli.config.groups import choices, read_yaml
from heatkv_cli.config.leaves import BenchmarkConfig, MethodConfig, MetricConfig, ModelConfig, RuntimeConfig
from heatkv_cli.config.settings import RunConfig
from heatkv_cli.config.sweep import PATH_KEYS
from heatkv_cli.config.typed import build, build_leaf, check_arguments, coerce, from_plain, load_target, show
from heatkv_cli.core.budget import Budget
from heatkv_cli.core.scales import ScaleSchedule
from heatkv_cli.errors import ConfigError, ConfigErrors, HeatKVError, did_you_mean
from heatkv_cli.results import check_path

T = TypeVar("T", bound=MethodConfig | BenchmarkConfig | MetricConfig)

MOST = {
    "num_layers": 1024,
    "num_heads": 1024,
    "head_dim": 4096,
    "scales": 256,
    "side": 4096,
    "params": 10**6,
    "runtime.batch_size": 4096,
    "runtime.threads": 1024,
    "runtime.device_index": 1023,
    "repeats": 10_000,
    "warmup": 10_000,
    "contact_sheet": 1000,
    "seed": 2**62,
    "limit": 10**9,
    "shard": 10**6,
}
"""The largest values that make sense; beyond them a number is a slip that would hang a machine or fill a disk."""


def typed_run(plain: dict[str, Any], errors: list[ConfigError]) -> RunConfig | None:
    """Turn plain values into a RunConfig; every leaf is built, so that its mistakes are told with all others.

    Files of benchmarks and weights are not touched; a model is only checked against its arguments.
    """
    values = dict(plain)
    runtime = from_plain(RuntimeConfig, values["runtime"], "runtime", errors)
    if runtime is not None:
        values["runtime"] = runtime = resolved(runtime)
    device = "cpu" if runtime is None else runtime.torch_device
    metrics = values.pop("metric")
    values["metrics"] = tuple(_metric(name, item, device, values["weights"], errors) for name, item in metrics.items())
    budgetless = values["method"].get("budgetless") is True
    for key, (cls, base) in _leaves().items():
        values[key] = _built(cls, base, values[key], key, errors)
    values["model"] = _at_ratio(_renamed(values["model"]), errors)
    values["limit"] = _limit(values["limit"], errors)
    values["shard"] = _shard(values["shard"], errors)
    values["memory"] = _memory(values["memory"], errors)
    model = values["model"] and from_plain(ModelConfig, values["model"], "model", errors)
    if model is not None and _check_model(model, errors):
        values["model"] = model = dataclasses.replace(model, sampling=_sampling(model, errors))
    _set_budget(values, model, budgetless, errors)
    if model is None:
        return None
    broken = {key: None for key in ("runtime", *_leaves()) if values[key] is None}
    if broken or None in values["metrics"]:  # told already; the types of the rest are checked all the same
        values = {**values, "metrics": (), **broken}
    run = from_plain(RunConfig, values, "", errors, skip=set(broken))
    if run is None:
        return None
    _check_run(run, errors)
    return run


def _leaves() -> dict[str, tuple[type, type]]:
    """Return the leaves of a run, each with its config dataclass and what it must build."""
    from heatkv_cli.benchmarks.base import Benchmark
    from heatkv_cli.methods.base import Method

    return {
        **dict.fromkeys(("method", "reference"), (MethodConfig, Method)),
        **dict.fromkeys(("benchmark", "calibration_prompts", "calibration_check"), (BenchmarkConfig, Benchmark)),
    }


def _built(cls: type[T], base: type, content: Mapping[str, Any], where: str, errors: list[ConfigError]) -> T | None:
    """Return a leaf with its object; None, and an error each, for what is wrong with it."""
    leaf = from_plain(cls, _leaf(cls, content), where, errors)
    if leaf is None:
        return None
    return _with_object(leaf, lambda: build_leaf(leaf, base, where=where), errors)


def _metric(
    name: str, content: Mapping[str, Any], device: str, weights: Any, errors: list[ConfigError]
) -> MetricConfig | None:
    """Return a metric; device and folder of weights are those of the run unless its own config names others."""
    leaf = from_plain(MetricConfig, {"name": name} | _leaf(MetricConfig, content), f"metric.{name}", errors)
    if leaf is None:
        return None
    folder = Path(os.path.expanduser(weights)) if isinstance(weights, str) and weights != "random" else None
    offers = {"name": leaf.name, "needs": leaf.needs, "device": device, "weights_folder": folder}
    given = {key: value for key, value in offers.items() if value is not None}
    make = lambda: build(leaf.target, leaf.params, object, where=f"metric.{name}", offers=given)  # noqa: E731
    return _with_object(leaf, make, errors)


def _with_object(leaf: T, make: Callable[[], Any], errors: list[ConfigError]) -> T | None:
    try:
        return dataclasses.replace(leaf, object=make())
    except ConfigErrors as error:
        errors += [one for one in error.errors if isinstance(one, ConfigError)]
    except ConfigError as error:
        errors.append(error)
    return None


def resolved(runtime: RuntimeConfig) -> RuntimeConfig:
    """Return a runtime without `auto`: grouped attention everywhere, a GPU where torch finds one."""
    device, attention = runtime.device, runtime.attention
    if device == "auto":
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    return dataclasses.replace(runtime, device=device, attention="grouped" if attention == "auto" else attention)


def _check_model_params(model: ModelConfig, errors: list[ConfigError]) -> None:
    """Check the arguments of the model's factory by their types and sizes."""
    own = {field.name for field in dataclasses.fields(model)} | {"geometry", "files", "device"}
    before = len(errors)
    check_arguments(load_target(model.target), model.params, "model.params", own, errors)
    if len(errors) > before:  # a wrong type is told once, and not as a size too
        return
    for key, value in _numbers(model.params, "model.params"):
        if not math.isfinite(value) or abs(value) > MOST["params"]:
            errors.append(ConfigError(f"{key} is {show(value)}", f"a number up to {MOST['params']:,}"))


def _numbers(value: Any, where: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _numbers(item, f"{where}.{key}")
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _numbers(item, f"{where}[{i}]")
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield where, value


def _at_ratio(model: dict[str, Any], errors: list[ConfigError]) -> dict[str, Any] | None:
    """Ask the model's family for what follows from the aspect ratio, where the YAML names whom to ask."""
    model = {key: value for key, value in model.items() if key != "presets"}
    ratio, family = model.get("aspect_ratio", 1), model["resolutions"]
    if not isinstance(family, str):
        return model
    if coerce(ratio, float, "model.aspect_ratio", errors) is None:
        return None
    try:
        found = load_target(family)(ratio)
    except ConfigError as error:
        errors.append(error)
        return None
    return {**model, **found, "params": model["params"] | found["params"]}


def _renamed(content: Mapping[str, Any]) -> dict[str, Any]:
    return {"target" if key == "_target_" else key: value for key, value in content.items()}


def _leaf(cls: type[Any], content: Mapping[str, Any]) -> dict[str, Any]:
    """Sort the keys of a leaf's YAML: those the dataclass knows, and all others as `params` of its target."""
    fields = {field.name for field in dataclasses.fields(cls)} - {"params", "object"}
    content = _renamed(content)
    known = {key: _version(value) if key == "version" else value for key, value in content.items() if key in fields}
    return {**known, "params": {key: value for key, value in content.items() if key not in fields}}


def _version(value: Any) -> Any:
    """A version is a text, and may be typed as a number."""
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def _limit(value: Any, errors: list[ConfigError]) -> int | None:
    if value == "all":
        return None
    if value is None or (type(value) is int and 0 < value <= MOST["limit"]):
        return value
    errors.append(ConfigError(f"limit is {show(value)}", "limit=64 takes the first 64 prompts, limit=all takes all"))
    return None


def _shard(value: Any, errors: list[ConfigError]) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,7})/(\d{1,7})", str(value), re.ASCII)
    if found and int(found[1]) < int(found[2]) <= MOST["shard"]:
        return int(found[1]), int(found[2])
    errors.append(ConfigError(f"shard is {show(value)}", "shard=0/4 is the first of four, shard=3/4 the last"))
    return 0, 1


def _memory(value: Any, errors: list[ConfigError]) -> int | None:
    """Return the bytes of a number and a unit: 24GiB, 80GB, 16e9."""
    if value is None:
        return None
    found = re.fullmatch(r"([\d.]{1,30}(?:e\d{1,2})?)\s*(?:([KMGT])(i?))?B?", str(value), re.IGNORECASE)
    with suppress(ValueError):
        if found:
            power = "KMGT".find((found[2] or " ").upper()) + 1
            count = int(float(found[1]) * (1024 if found[3] else 1000) ** power)
            if count > 0:
                return count
    errors.append(ConfigError(f"memory is {show(value)}", "memory=24GiB (2^30), memory=80GB (10^9), or bytes"))
    return None


def _set_budget(values: dict[str, Any], model: ModelConfig | None, budgetless: bool, errors: list[ConfigError]) -> None:
    """Put the budget in the place of `budget` and `rho`; its text is canonical, so that one budget has one hash."""
    budget, rho = values["budget"], values.pop("rho")
    values["budget"] = Budget.parse(
        "1"
    )  # where nothing better is known: the types of the rest are checked all the same
    try:
        if rho is not None:
            found = Budget.from_rho(_number(rho), ScaleSchedule(model.sizes)) if model is not None else None
            found = found and dataclasses.replace(found, text=f"rho={float(found.rho or 0):g}")
        else:
            found = Budget.parse(budget_text(Budget.parse(_number(budget)).ratio))
        if found is not None and not budgetless:
            values["budget"] = found
    except ConfigError as error:
        errors.append(error)


def _number(value: Any) -> str | float:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)


def budget_text(ratio: Fraction) -> str:
    """Return the one way in which a ratio is written: a decimal where it is finite, else a fraction.

    >>> budget_text(Fraction(1, 10)), budget_text(Fraction(21, 6425)), budget_text(Fraction(1))
    ('0.1', '21/6425', '1')
    """
    rest = ratio.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    if rest != 1:
        return str(ratio)
    with localcontext() as context:
        context.prec = 200
        text = format(Decimal(ratio.numerator) / Decimal(ratio.denominator), "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def _check_model(model: ModelConfig, errors: list[ConfigError]) -> bool:
    """Append what is wrong with a model's numbers; return whether its scales make sense."""
    _check_model_params(model, errors)
    name = f"model={model.name}"
    if model.resolution not in model.resolutions:
        hint = did_you_mean(model.resolution, list(model.resolutions))
        errors.append(ConfigError(f"{name} has no resolution '{model.resolution}'", hint))
        return False
    count = len(model.sizes)
    for key in ("num_layers", "num_heads", "head_dim"):
        if not 1 <= getattr(model, key) <= MOST[key]:
            errors.append(ConfigError(f"model.{key} is {show(getattr(model, key))}", f"1 to {MOST[key]}"))
    sides = [side for size in model.sizes for side in size]
    if not 2 <= count <= MOST["scales"] or not all(1 <= side <= MOST["side"] for side in sides):
        hint = f"2 to {MOST['scales']} scales with sides of 1 to {MOST['side']}"
        errors.append(ConfigError(f"{name}: the scales of {model.resolution} are {show(model.sizes)}", hint))
        return False
    if not 1 <= model.sink_scales < count:
        errors.append(
            ConfigError(f"model.sink_scales is {model.sink_scales}", f"{name} has {count} scales: 1 to {count - 1}")
        )
    if any(not 0 <= scale < count for scale in model.layout_scales):
        hint = f"{name} has the scales 0 to {count - 1}"
        errors.append(ConfigError(f"model.layout_scales is {list(model.layout_scales)}", hint))
    return True


def _sampling(model: ModelConfig, errors: list[ConfigError]) -> Any:
    """Return the sampling of the model's family, spelled out for its scales; None where something is wrong with it."""
    from heatkv_cli.models.base import Sampling

    params = dict(model.sampling)
    target = params.pop("_target_")
    try:
        return build(target, params, Sampling, where="model.sampling").spelled(len(model.sizes), model.num_layers)
    except ConfigErrors as error:
        errors += [one for one in error.errors if isinstance(one, ConfigError)]
    except ConfigError as error:
        errors.append(error)
    return None


def untrained(model: ModelConfig) -> ConfigError | None:
    """Return an error for images at a resolution that the model was not trained for, unless that is forced."""
    if not model.untrained or model.force_resolution:
        return None
    known = ", ".join(model.trained_at)
    others = [
        name for name in choices("model") if model.resolution in (read_yaml("model", name).get("trained_at") or ())
    ]
    instead = f" or model={others[0]}" if others else ""
    return ConfigError(
        f"model={model.name} was trained at {known}, not at {model.resolution}: its images would be poor",
        f"resolution={known}{instead}, or force_resolution=true",
    )


def _check_run(run: RunConfig, errors: list[ConfigError]) -> None:
    runtime = run.runtime
    ranges: tuple[tuple[str, int | None, int], ...] = (
        ("runtime.batch_size", runtime.batch_size, 1),
        ("runtime.threads", runtime.threads, 1),
        ("runtime.device_index", runtime.device_index, 0),
        ("repeats", run.repeats, 1),
        ("warmup", run.warmup, 0),
        ("contact_sheet", run.contact_sheet, 0),
        ("seed", run.seed, -int(MOST["seed"])),
    )
    for key, value, least in ranges:
        if value is not None and not least <= value <= MOST[key]:
            errors.append(
                ConfigError(f"{key} is {show(value)}", f"it is {least} to {MOST[key]}: {key}={max(least, 0)}")
            )
    for leaf in (run.benchmark, run.calibration_prompts, run.calibration_check):
        if leaf.world not in ("", run.model.world):
            errors.append(
                ConfigError(
                    f"benchmark={leaf.name} is for models of the world of {leaf.world}: a score of "
                    f"model={run.model.name} on it means nothing",
                    f"benchmark={run.model.default_benchmark}, or benchmark=prompts benchmark.file=FILE",
                )
            )
    for key in PATH_KEYS:
        path = getattr(run, key)
        if path is not None and not (key == "weights" and run.random_weights):
            try:
                check_path(path)
            except HeatKVError as error:
                errors.append(ConfigError(f"{key}: {error.message}", error.hint))
    if run.noise_floor == "batch" and runtime.batch_size == 1:
        errors.append(
            ConfigError(
                "noise_floor=batch compares with batches of 1", "set runtime.batch_size, or noise_floor=attention"
            )
        )
    if run.seed_mode == "paper" and runtime.batch_size != 1:
        errors.append(
            ConfigError(
                f"seed_mode=paper draws one image at a time, runtime.batch_size is {runtime.batch_size}",
                "add runtime.batch_size=1",
            )
        )
