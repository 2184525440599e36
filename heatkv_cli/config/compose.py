"""Overrides in, a typed plan out: the only place that meets Hydra and OmegaConf.

Hydra supplies the grammar (in `sweep.py`) and the composition of the YAML groups; what a user can get wrong is checked
here first, so that all errors come at once and each says which word was probably meant. No DictConfig leaves this file.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heatkv_cli.config.check import typed_run, untrained
from heatkv_cli.config.groups import GROUPS, check_choice, choices, conf_dir, load_yaml, read_yaml
from heatkv_cli.config.plugins import content_of, is_outside, load_plugin
from heatkv_cli.config.settings import Experiment, Plan, RunConfig, config_hash
from heatkv_cli.config.sweep import PATH_KEYS, SHORT, Axis, load_experiment, merge, parse_overrides, product, quote
from heatkv_cli.config.typed import join, show
from heatkv_cli.errors import ConfigError, SetupError, did_you_mean, raise_all
from heatkv_cli.results import check_path

if TYPE_CHECKING:
    from omegaconf import DictConfig

_PROMPTS = {
    "benchmark": "default_benchmark",
    "calibration_prompts": "calibration_prompts",
    "calibration_check": "calibration_check",
}
"""Keys that choose a prompt list, and the model's key that says which when none is named."""

CHOICES = {
    **{"model": "model", "method": "method", "runtime": "runtime", "reference": "method"},
    **dict.fromkeys(_PROMPTS, "benchmark"),
}
"""Keys whose value is the name of a file, and the group it is chosen from."""

_FIXED = (
    "_target_",
    "name",
    "needs",
    "budgetless",
    "paper",
    "note",
    "presets",
    "trained_at",
    "sketch",
    "world",
    "default_metrics",
    *_PROMPTS.values(),
)
"""Keys below a group that belong to its file: reading them from elsewhere would not be seen, or would be a lie."""

_MOVED = {"resamples": "bootstrap.resamples", "confidence": "bootstrap.confidence", "seed": "bootstrap.seed"}
"""Keys that metrics had before the bootstrap became the run's."""

DEFAULTS: dict[str, dict[str, Any]] = {"bench": {"runtime.batch_size": 1}}
"""Values from which a command starts in place of the YAML files': a latency is that of one image."""

DRAWING = ("calibrate", "generate", "eval")
"""Commands that make images."""

SWEEPING = ("calibrate", "build-schedule", "generate", "eval", "bench")
"""Commands that take more than one run."""


def compose(
    overrides: Sequence[str],
    *,
    command: str = "eval",
    options: Mapping[str, str | None] | None = None,
    dry_run: bool = False,
) -> Plan:
    """Return what a command line asks for.

    Args:
        overrides: as typed: `method=full,heatkv`, `budget=0.2,0.1`, `method.window=3`, `experiment=demo`.
        command: the command that asks.
        options: sugar: the values of `--model`, `--out`, ... by key; None where the option was not given.
        dry_run: recorded in the plan.

    Raises:
        ConfigError: one thing is wrong.
        ConfigErrors: several things are; all are named.
    """
    errors: list[ConfigError] = []
    sugar = [
        f"{key}={quote(value) if key in PATH_KEYS else value}"
        for key, value in (options or {}).items()
        if value is not None
    ]
    texts = (*sugar, *overrides)
    typed = parse_overrides(texts, errors)
    experiment, axes = _experiment(typed, errors)
    typed = [axis for axis in typed if axis.key != "experiment"]
    # for calibrate, benchmark is the list of calibration prompts
    names = SHORT | ({"benchmark": "calibration_prompts"} if command == "calibrate" else {})
    keys = [axis.key for axis in typed]
    errors += [
        ConfigError(f"{a} and {b} are both given", "they are two names of one key: keep one")
        for a, b in names.items()
        if {a, b} <= set(keys)
    ]
    if {"budget", "rho"} <= set(keys):
        errors.append(
            ConfigError("budget and rho are both given", "budget is the share kept, rho the share removed: keep one")
        )
    _load_plugins(typed, errors)
    typed = [axis.renamed(names) for axis in typed]
    defaults = [Axis(key, (((key, value),),)) for key, value in DEFAULTS.get(command, {}).items()]
    axes = merge(defaults + [axis.renamed(SHORT) for axis in axes], typed)
    named = frozenset(key for axis in axes for point in axis.points for key, _ in point)
    if "benchmark" in named and "limit" not in named:  # a list that was named is meant whole
        axes.append(Axis("limit", ((("limit", None),),)))
    points: list[tuple[dict[str, Any], RunConfig]] = []
    for assignments in product(axes):
        run = _compose_run(assignments, errors)
        if run is not None and all(run != other for _, other in points):
            points.append((assignments, run))
    runs = _distinct(points, command, errors)
    if command in DRAWING:
        errors += [refused for run in runs if (refused := untrained(run.model))]
    if command != "download":  # which makes the folder
        errors += [
            ConfigError(f"weights={folder} is not a folder", "make it, or leave --weights and HEATKV_WEIGHTS_DIR away")
            for folder in dict.fromkeys(run.weights_folder for run in runs)
            if folder is not None and not folder.is_dir()
        ]
    raise_all(errors)
    if not runs:
        raise ConfigError("there is nothing to run", "an axis of the sweep is empty")
    asked = {str(value) for axis in typed if axis.key in ("budget", "rho") for ((_, value),) in axis.points}
    if asked - {"1", "1.0"} and all(run.method.budgetless for run in runs):
        name = runs[0].method.name
        raise ConfigError(
            f"method={name} has no budget: it keeps everything", f"leave the budget away with method={name}"
        )
    return Plan(command, tuple(runs), texts, experiment, dry_run, named)


def _load_plugins(typed: Sequence[Axis], errors: list[ConfigError]) -> None:
    for path in (value for axis in typed if axis.key == "plugin" for ((_, value),) in axis.points):
        try:
            if isinstance(path, str) and path:  # anything else is told with the types
                check_path(Path(path))
                load_plugin(Path(path))
        except SetupError:
            pass  # and so is what is no name of a file
        except ConfigError as error:
            errors.append(error)


def _distinct(
    points: Sequence[tuple[Mapping[str, Any], RunConfig]], command: str, errors: list[ConfigError]
) -> list[RunConfig]:
    """Return the runs; refuse sweeps whose points would be one piece of work, of which only the first would be done.

    A calibration serves all methods and budgets, so `calibrate` takes their sweeps for one run.
    """
    seen: dict[str, Mapping[str, Any]] = {}
    runs: list[RunConfig] = []
    for assignments, run in points:
        key = config_hash(_work(run, command))
        if key not in seen:
            seen[key] = assignments
            runs.append(run)
            continue
        other = seen[key]
        names = sorted(name for name in {*assignments, *other} if assignments.get(name) != other.get(name))
        if command == "calibrate" and all(name.partition(".")[0] in ("method", "budget", "rho") for name in names):
            continue
        what = "takes one run" if command not in SWEEPING else f"makes the same for every value of {', '.join(names)}"
        errors.append(
            ConfigError(f"heatkv {command} {what}: this sweep has no points", "run the command once for each value")
        )
        break
    return runs


def _work(run: RunConfig, command: str) -> dict[str, Any]:
    """Return everything that tells two pieces of a command's work apart."""
    files = {key: str(getattr(run, key)) for key in ("calibration", "schedule", "orders", "weights")}
    if command not in SWEEPING:
        return {}
    if command == "calibrate":
        check = run.calibration_check.identity()
        return {**run.calibration_identity(), "check": check, "file": files["calibration"]}
    if command == "build-schedule":
        parts = {"method": run.method.identity(), "budget": run.budget.text}
        return {**run.calibration_identity(), **parts, **files}
    return {**run.identity(), **files}


def _experiment(typed: Sequence[Axis], errors: list[ConfigError]) -> tuple[Experiment | None, list[Axis]]:
    names = [value for axis in typed if axis.key == "experiment" for ((_, value),) in axis.points]
    if len(names) > 1:
        errors.append(ConfigError("experiment is a sweep", "run one experiment at a time"))
    if not names or names[0] is None:
        return None, []
    return load_experiment(str(names[0]), errors)


def _compose_run(assignments: Mapping[str, Any], errors: list[ConfigError]) -> RunConfig | None:
    """Compose, check and type one run; append what is wrong with it, and return None then."""
    before = len(errors)
    chosen, unknown = _choose(assignments, errors)
    if chosen is None:
        return None
    config = copy.deepcopy(_composed(chosen))
    config |= _outside(assignments, errors)
    if not _apply_preset(config["model"], assignments.get("model.preset"), errors):
        assignments = {key: value for key, value in assignments.items() if key != "model.preset"}
    for key, value in assignments.items():
        if key not in CHOICES and key != "metric" and key.partition(".")[0] not in unknown:
            _assign(config, key, value, errors)
    plain = _resolve(config, errors)
    if plain is None:
        return None
    if "rho" in assignments:
        plain["budget"] = None
    elif "budget" in assignments:
        plain["rho"] = None
    run = typed_run(plain, errors)
    return run if len(errors) == before else None


def _outside(assignments: Mapping[str, Any], errors: list[ConfigError]) -> dict[str, Any]:
    """Return the content of methods that are classes from outside, by key."""
    found: dict[str, Any] = {}
    for key in (key for key, group in CHOICES.items() if group == "method"):
        name = assignments.get(key)
        try:
            if isinstance(name, str) and is_outside(name):
                found[key] = content_of(name)
        except ConfigError as error:
            errors.append(error)
    return found


def _choose(assignments: Mapping[str, Any], errors: list[ConfigError]) -> tuple[tuple[str, ...] | None, set[str]]:
    """Return Hydra's overrides for the chosen files, and the keys whose file does not exist (a default stands in)."""
    names: dict[str, str] = {}
    unknown: set[str] = set()
    for key, group in CHOICES.items():
        if key not in assignments:
            continue
        name = assignments[key]
        if isinstance(name, (list, dict)) or name is None:
            errors.append(
                ConfigError(f"{key} is {show(name)}", f"{key} is one name; a sweep is a comma list: {key}=a,b")
            )
            unknown.add(key)
        elif group == "method" and is_outside(str(name)):
            continue  # no file stands for it
        elif _check(errors, group, str(name), key):
            names[key] = str(name)
        else:
            unknown.add(key)
    try:
        model = read_yaml("model", names.get("model", _default_model()))
        for key, default in _PROMPTS.items():
            if key not in names:
                names[key] = str(model.get(default))
                check_choice(CHOICES[key], names[key], f"model.{default}")
        metrics = assignments.get("metric")
        if metrics is None:
            metrics = read_yaml("benchmark", names["benchmark"]).get("default_metrics") or []
    except ConfigError as error:
        errors.append(error)
        return None, unknown
    metrics = [str(name) for name in metrics if _check(errors, "metric", str(name), "metric")]
    if len(metrics) != len(set(metrics)):
        errors.append(ConfigError(f"metric={','.join(metrics)} names a metric twice", "name each metric once"))
    swapped = {key: f"{group}@{key}" for key, group in CHOICES.items() if key != group}
    texts = [f"{swapped.get(key, key)}={name}" for key, name in names.items()]
    return (*texts, *(f"+metric@metric.{name}={name}" for name in dict.fromkeys(metrics))), unknown


def _check(errors: list[ConfigError], group: str, name: str, key: str) -> bool:
    try:
        check_choice(group, name, key)
    except ConfigError as error:
        errors.append(error)
        return False
    return True


@lru_cache(maxsize=1)
def _default_model() -> str:
    return _defaults()["model"]


def _defaults() -> dict[str, str]:
    """The file of each group that `config.yaml` chooses."""
    path = conf_dir() / "config.yaml"
    listed = load_yaml(path).get("defaults")
    found = {
        str(group): str(name)
        for entry in (listed if isinstance(listed, list) else ())
        if isinstance(entry, dict)
        for group, name in entry.items()
    }
    if "model" not in found:
        raise ConfigError(f"{path} chooses no model", "correct the YAML file")
    return found


@lru_cache(maxsize=64)
def _composed(chosen: tuple[str, ...]) -> dict[str, Any]:
    """Compose the YAML files, interpolations unresolved. What fails here is a fault in conf/, not in what was typed."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    _read_files(chosen)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir()), job_name="heatkv"):
            return _plain(hydra_compose(config_name="config", overrides=list(chosen)), resolve=False)
    except (HydraException, OmegaConfBaseException, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"cannot compose {conf_dir()}: {error}", "correct the YAML files") from error


def _read_files(chosen: tuple[str, ...]) -> None:
    """Read every file that is to be composed: what is wrong with one is told of that file, and nothing hangs."""
    files = {}
    for key, name in (*_defaults().items(), *(text.split("=", 1) for text in chosen)):
        files[key.lstrip("+")] = name
    for key, name in files.items():
        group = key.partition("@")[0].lstrip("/").removeprefix("override ")
        if group in GROUPS:
            read_yaml(group, name)


def _apply_preset(model: dict[str, Any], typed: Any, errors: list[ConfigError]) -> bool:
    """Write the values of the model's preset, the typed one or its own, where single keys can still replace them.

    Returns:
        Whether there is such a preset; an error is appended where there is none.
    """
    presets = model.get("presets")
    if not presets:
        return True
    name = model["preset"] if typed is None else str(typed)
    if name not in presets:
        errors.append(ConfigError(f"model={model['name']} has no preset '{name}'", did_you_mean(name, list(presets))))
        return False
    for section, values in presets[name].items():
        model[section] |= values
    return True


def _assign(config: dict[str, Any], key: str, value: Any, errors: list[ConfigError]) -> None:
    """Set one key that exists; append an error with a suggestion where it does not."""
    *path, last = key.split(".")
    node: Any = config
    for depth, part in enumerate((*path, last)):
        where = ".".join(path[:depth])
        owner = f" of {_owner(config, path[0])}" if depth else ""
        if not isinstance(node, dict):
            errors.append(ConfigError(f"unknown key '{key}'{owner}", f"'{where}' is a single value"))
            return
        if depth and part in _FIXED and part in node:
            errors.append(
                ConfigError(f"'{key}' cannot be set", f"it belongs to the file of{owner[3:]}: choose another")
            )
            return
        if part not in node and path[:1] == ["metric"] and depth == 2 and part in _MOVED:
            errors.append(ConfigError(f"'{key}' is the run's now", f"{_MOVED[part]}={show(value)} serves all metrics"))
            return
        if part not in node:
            if key in SHORT.values() and depth:
                have = [name for name in choices("model") if part in read_yaml("model", name)]
                errors.append(ConfigError(f"{owner[4:]} has no {part}", f"models that have one: {', '.join(have)}"))
                return
            known = [join(where, name) for name in node if not (depth and name in _FIXED)]
            known += [] if depth else [group for group in GROUPS if group not in known]
            wrong = join(where, part)
            errors.append(ConfigError(f"unknown key '{wrong}'{owner}", did_you_mean(wrong, known)))
            return
        if depth < len(path):
            node = node[part]
    if isinstance(node[last], dict) and not isinstance(value, dict):
        below = [f"{key}.{name}" for name in node[last] if name not in _FIXED]
        hint = f"set one of: {', '.join(below)}" if below else f"{last} has no parameters: leave {key} away"
        errors.append(ConfigError(f"'{key}' is a group of keys, not a value", hint))
    elif isinstance(node[last], dict) or (isinstance(node[last], str) and last == "resolutions"):
        errors.append(ConfigError(f"'{key}' cannot be set as a whole", f"set single keys below {key}"))
    else:
        node[last] = value


def _owner(config: Mapping[str, Any], group: str) -> str:
    content = config.get(group)
    name = content.get("name") if group in CHOICES and isinstance(content, dict) else None
    return f"{group}={name}" if name else group


def _resolve(config: dict[str, Any], errors: list[ConfigError]) -> dict[str, Any] | None:
    """Replace the interpolations; None, and an error each, where a value is still missing."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        node = OmegaConf.create(config)
        missing = sorted(OmegaConf.missing_keys(node))
        errors += [ConfigError(f"'{key}' has no value", f"add {key}=...") for key in missing]
        return None if missing else _plain(node)
    except OmegaConfBaseException as error:
        errors.append(ConfigError(f"config: {str(error).splitlines()[0]}", "set the value it needs"))
        return None


def _plain(node: DictConfig, *, resolve: bool = True) -> dict[str, Any]:
    from omegaconf import OmegaConf

    plain = OmegaConf.to_container(node, resolve=resolve)
    return {str(key): value for key, value in plain.items()} if isinstance(plain, dict) else {}
