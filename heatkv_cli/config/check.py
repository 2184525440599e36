"""Composed plain values to a `RunConfig`: numbers, names and budgets are checked here and nowhere else."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import Any

from heatkv_cli.config.groups import choices, read_yaml
from heatkv_cli.config.leaves import BenchmarkConfig, MethodConfig, MetricConfig, ModelConfig
from heatkv_cli.config.settings import RunConfig
from heatkv_cli.config.typed import coerce, from_plain, load_target, show
from heatkv_cli.errors import ConfigError, did_you_mean

_LEAVES = {
    **dict.fromkeys(("method", "reference"), MethodConfig),
    **dict.fromkeys(("benchmark", "calibration_prompts", "calibration_check"), BenchmarkConfig),
}


def typed_run(plain: dict[str, Any], errors: list[ConfigError]) -> RunConfig | None:
    """Turn plain values into a RunConfig."""
    values = dict(plain)
    for key, cls in _LEAVES.items():
        values[key] = _leaf(cls, values[key])
    values["metrics"] = [{"name": name} | _leaf(MetricConfig, item) for name, item in values.pop("metric").items()]
    values["model"] = _at_ratio(_renamed(values["model"]), errors)
    values["limit"] = _limit(values["limit"], errors)
    values["shard"] = _shard(values["shard"], errors)
    values["memory"] = _memory(values["memory"], errors)
    model = values["model"] and from_plain(ModelConfig, values["model"], "model", errors)
    if model is not None:
        _check_model(model, errors)
        values["model"] = model
    _set_budget(values, model, errors)
    if model is None:
        return None
    run = from_plain(RunConfig, values, "", errors)
    if run is not None:
        _check_run(run, errors)
    return run


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


def _leaf(cls: type, content: Mapping[str, Any]) -> dict[str, Any]:
    """Sort the keys of a leaf's YAML: those the dataclass knows, and all others as `params` of its target."""
    fields = {field.name for field in dataclasses.fields(cls)} - {"params"}
    content = _renamed(content)
    known = {key: str(value) if key == "version" else value for key, value in content.items() if key in fields}
    return {**known, "params": {key: value for key, value in content.items() if key not in fields}}


def _limit(value: Any, errors: list[ConfigError]) -> int | None:
    if value == "all":
        return None
    if value is None or (type(value) is int and value > 0):
        return value
    errors.append(ConfigError(f"limit is {show(value)}", "limit=64 takes the first 64 prompts, limit=all takes all"))
    return None


def _shard(value: Any, errors: list[ConfigError]) -> tuple[int, int]:
    index, _, count = str(value).partition("/")
    if index.isdecimal() and count.isdecimal() and int(index) < int(count):
        return int(index), int(count)
    errors.append(ConfigError(f"shard is {show(value)}", "shard=0/4 is the first of four, shard=3/4 the last"))
    return 0, 1


def _memory(value: Any, errors: list[ConfigError]) -> int | None:
    """Bytes from a number and a unit: 24GiB, 80GB, 16e9."""
    if value is None:
        return None
    found = re.fullmatch(r"([\d.]+(?:e\d+)?)\s*(?:([KMGT])(i?))?B?", str(value), re.IGNORECASE)
    with suppress(ValueError):
        if found:
            power = "KMGT".find((found[2] or " ").upper()) + 1
            return int(float(found[1]) * (1024 if found[3] else 1000) ** power)
    errors.append(ConfigError(f"memory is {show(value)}", "memory=24GiB (2^30), memory=80GB (10^9), or bytes"))
    return None


def _set_budget(values: dict[str, Any], model: ModelConfig | None, errors: list[ConfigError]) -> None:
    """Write the canonical budget text, so that one budget has one hash and one folder however it was typed."""
    from heatkv_cli.core.budget import Budget
    from heatkv_cli.core.scales import ScaleSchedule

    budget, rho = values["budget"], values["rho"]
    try:
        if rho is not None:
            values["budget"] = None
            if model is not None:
                Budget.from_rho(_number(rho), ScaleSchedule(model.sizes))
        else:
            values["budget"] = budget_text(Budget.parse(_number(budget)).ratio)
    except ConfigError as error:
        errors.append(error)
        values["budget"], values["rho"] = "1", None  # said once: the types of the rest are checked all the same
    if values["method"].get("budgetless") is True:
        values["budget"], values["rho"] = "1", None


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


def _check_model(model: ModelConfig, errors: list[ConfigError]) -> None:
    name = f"model={model.name}"
    if model.resolution not in model.resolutions:
        hint = did_you_mean(model.resolution, list(model.resolutions))
        errors.append(ConfigError(f"{name} has no resolution '{model.resolution}'", hint))
        return
    count = len(model.sizes)
    if min(model.num_layers, model.num_heads, model.head_dim, *(side for size in model.sizes for side in size)) < 1:
        errors.append(ConfigError(f"{name}: dimensions and scales must be positive", "correct the model's YAML"))
    if not 1 <= model.sink_scales < count:
        errors.append(
            ConfigError(f"model.sink_scales is {model.sink_scales}", f"{name} has {count} scales: 1 to {count - 1}")
        )
    if any(not 0 <= scale < count for scale in model.layout_scales):
        hint = f"{name} has the scales 0 to {count - 1}"
        errors.append(ConfigError(f"model.layout_scales is {list(model.layout_scales)}", hint))
    _check_sampling(model, errors)


def _check_sampling(model: ModelConfig, errors: list[ConfigError]) -> None:
    """Values that would give NaN, or that would be passed over in silence."""
    sampling, count, depth = model.sampling, len(model.sizes), model.num_layers
    for key in ("cfg", "tau"):
        value = getattr(sampling, key)
        if isinstance(value, tuple) and len(value) != count:
            hint = f"model={model.name} has {count} scales at {model.resolution}: one value, or {count}"
            errors.append(ConfigError(f"model.sampling.{key} has {len(value)} values", hint))
    numbers = sampling.per_scale(count)
    wrong = {
        "cfg": (not all(map(math.isfinite, numbers["cfg"])), "guidance is a number; 1 is off"),
        "tau": (
            not all(math.isfinite(tau) and tau > 0 for tau in numbers["tau"]),
            "logits are divided by it: above 0; top_k=1 is greedy",
        ),
        "top_k": (sampling.top_k < 0, "0 is off, 1 is greedy"),
        "top_p": (not 0 <= sampling.top_p <= 1, "0 is off, else the share of probability that is kept, up to 1"),
        "guide_layers": (
            not sampling.guide_layers or not all(-depth <= layer <= 0 for layer in sampling.guide_layers),
            f"0 guides the logits, -1 to -{depth} the output of that layer from the end; model.sampling.cfg=1 is off",
        ),
    }
    for key, (bad, hint) in wrong.items():
        if bad:
            errors.append(ConfigError(f"model.sampling.{key} is {show(getattr(sampling, key))}", hint))


def untrained(model: ModelConfig) -> ConfigError | None:
    """The error of a model that shall make images at a resolution it was not trained for, unless that is forced."""
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
    for key, value in (("batch_size", runtime.batch_size), ("threads", runtime.threads)):
        if value is not None and value < 1:
            errors.append(ConfigError(f"runtime.{key} is {value}", f"it is at least 1: runtime.{key}=1"))
    for key, number, least in (("repeats", run.repeats, 1), ("warmup", run.warmup, 0)):
        if number < least:
            errors.append(ConfigError(f"{key} is {number}", f"it is at least {least}: {key}={least}"))
    if run.seed_mode == "paper" and runtime.batch_size != 1:
        errors.append(
            ConfigError(
                f"seed_mode=paper draws one image at a time, runtime.batch_size is {runtime.batch_size}",
                "add runtime.batch_size=1",
            )
        )
    if run.contact_sheet < 0:
        errors.append(
            ConfigError(f"contact_sheet is {run.contact_sheet}", "the number of prompts shown; 0 for no sheet")
        )
