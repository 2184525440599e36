"""Typed words as axes of a sweep: overrides in Hydra's own grammar, and experiment files.

`method=full,heatkv budget=0.2,0.1` is two axes of two points. A point sets one key or, in an experiment row that
carries its own parameters, several. The product of the axes is the list of runs, first axis outermost.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from heatkv_cli.config.groups import read_yaml
from heatkv_cli.config.settings import Experiment
from heatkv_cli.errors import ConfigError, did_you_mean

PATH_KEYS = ("out", "weights", "text", "calibration", "schedule", "orders", "plugin")
"""Keys that hold a path; the environment (HEATKV_OUT, HEATKV_WEIGHTS_DIR) speaks of these alone, experiments never."""

SHORT = {key: f"model.{key}" for key in ("preset", "resolution", "aspect_ratio", "force_resolution")}
"""Short names of keys of the model."""

LIST_KEYS = ("metric",)
"""Keys whose comma list is a value, not a sweep."""

MOST_POINTS = 10_000
"""Values of one axis."""

_QUOTE = "quote a value that holds special characters: 'key=\"...\"'"

Point = tuple[tuple[str, Any], ...]
"""(key, value) pairs that one point of an axis sets."""


@dataclass(frozen=True)
class Axis:
    """One override, or one line of an experiment: the key it is about, and its points (one: no sweep)."""

    key: str
    points: tuple[Point, ...]

    def renamed(self, names: Mapping[str, str]) -> Axis:
        """Return this axis with its keys under the names that `names` has for them."""
        points = tuple(tuple((names.get(key, key), value) for key, value in point) for point in self.points)
        return Axis(names.get(self.key, self.key), points)


def quote(value: str) -> str:
    """Return a text (a path) so that Hydra's grammar reads it back unchanged.

    >>> quote("runs/a b"), quote("../runs-2")
    ('"runs/a b"', '../runs-2')
    """
    if re.fullmatch(r"[\w./+-]+", value, re.ASCII):
        return value
    escaped = value.replace("\\", "\\\\") if value.endswith("\\") else value
    return '"' + escaped.replace('"', '\\"') + '"'


def parse_overrides(texts: Sequence[str], errors: list[ConfigError]) -> list[Axis]:
    """Return one axis per override; what cannot be read is appended to `errors`."""
    axes: list[Axis] = []
    for text in texts:
        try:
            axis = _parse(text)
        except ConfigError as error:
            errors.append(error)
            continue
        if axis.key in {other.key for other in axes}:
            errors.append(
                ConfigError(f"{axis.key} is given twice", "keep one of them (an option such as --model counts)")
            )
        else:
            axes.append(axis)
    return axes


def _parse(text: str) -> Axis:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if "=" not in text and not text.startswith("~"):
        raise ConfigError(f"'{text}' is not an override", "an override is key=value, such as method=heatkv budget=0.1")
    parser = OverridesParser.create()
    try:
        override = parser.parse_override(text)
        key = override.key_or_group
        if override.is_delete() or override.package is not None or not override.value_type:
            raise ConfigError(f"'{text}': keys can be set, not removed or moved", "write key=value")
        if override.is_sweep_override():
            items = list(itertools.islice(override.sweep_string_iterator(), MOST_POINTS + 1))
            if len(items) > MOST_POINTS:
                raise ConfigError(f"{key} has more than {MOST_POINTS} points", "sweep fewer values at once")
            values = [parser.parse_override(f"{key}={item}").value() for item in items]
        else:
            values = [override.value()]
    except (HydraException, ValueError, ArithmeticError, TypeError, RecursionError) as error:
        # range(0,3,0), a number of 5,000 digits, a thousand brackets
        key, _, value = text.partition("=")
        if key in PATH_KEYS:  # a path with a tilde or a blank, as shells hand it over
            return Axis(key, (((key, value),),))
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ConfigError(f"cannot read the override '{text[:200]}': {reason}", _QUOTE) from error
    if key in LIST_KEYS:
        values = [_flat(values)]
    return Axis(key, tuple(((key, value),) for value in values))


def _flat(values: Iterable[Any]) -> list[Any] | None:
    """Return `a,b`, `[a,b]` and `a` alike as a list; None where the value is null."""
    items = [item for value in values for item in (value if isinstance(value, list) else [value])]
    return None if items == [None] else items


def load_experiment(name: str, errors: list[ConfigError]) -> tuple[Experiment | None, list[Axis]]:
    """Read `conf/experiment/<name>.yaml`: `title`, `note`, `overrides: {key: value}` and `sweep: {key: [rows]}`.

    A row is a value (`heatkv`), or a value with parameters of its own (`random: {order_seed: [0, 1]}`), whose lists
    are swept inside the row.
    """
    try:
        content = read_yaml("experiment", name)
    except ConfigError as error:
        errors.append(error)
        return None, []
    where = f"experiment={name}"
    known = ("title", "note", "overrides", "sweep")
    errors += [ConfigError(f"{where}: unknown key '{k}'", did_you_mean(k, known)) for k in content if k not in known]
    axes: list[Axis] = []
    for part in ("overrides", "sweep"):
        lines = content.get(part) or {}
        if not isinstance(lines, Mapping):
            errors.append(ConfigError(f"{where}: {part} is not a mapping", f"write {part}: {{key: value}}"))
            continue
        for key, value in lines.items():
            if key in PATH_KEYS:
                errors.append(ConfigError(f"{where}: sets the path '{key}'", "paths belong to the command line"))
            elif part == "sweep":
                rows = value if isinstance(value, list) else [value]
                axes.append(Axis(key, tuple(itertools.chain.from_iterable(_row(key, row) for row in rows))))
            else:
                axes.append(Axis(key, (((key, _flat([value]) if key in LIST_KEYS else value),),)))
    title, note = str(content.get("title", "")), str(content.get("note", ""))
    return Experiment(name=name, title=title, note=note), axes


def _row(key: str, row: Any) -> list[Point]:
    if not isinstance(row, Mapping):
        return [((key, row),)]
    points: list[Point] = []
    for value, params in row.items():
        names = [f"{key}.{name}" for name in params or {}]
        lists = [item if isinstance(item, list) else [item] for item in (params or {}).values()]
        points += [((key, value), *zip(names, combination, strict=True)) for combination in itertools.product(*lists)]
    return points


def merge(experiment: Sequence[Axis], typed: Sequence[Axis]) -> list[Axis]:
    """Return the axes of a plan: the experiment's, each replaced in its place where the user typed the same key.

    `budget` and `rho` are one axis under two names.
    """
    by_key = {axis.key: axis for axis in typed}
    other = {"budget": "rho", "rho": "budget"}
    axes: list[Axis] = []
    for axis in experiment:
        key = axis.key if axis.key in by_key else other.get(axis.key, axis.key)
        axes.append(by_key.pop(key, axis))
    return axes + [axis for axis in typed if axis.key in by_key]


def product(axes: Sequence[Axis]) -> list[dict[str, Any]]:
    """Return what each run sets, first axis outermost."""
    runs = itertools.product(*(axis.points for axis in axes))
    return [dict(itertools.chain.from_iterable(points)) for points in runs]
