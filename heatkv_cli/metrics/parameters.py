"""Parameters of metrics: the values that a field may hold, and whether it can change a number.

A metric is a frozen dataclass and its fields are its parameters. Every field counts, which means that it belongs to the
identity of a score and to the settings of a result row, unless it is declared with ``aside``. So a new parameter counts
by default.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from heatkv_cli.errors import ConfigError, ConfigErrors

DEVICE = r"cpu|mps|cuda(:\d+)?"
SHA256 = r"[0-9a-f]{64}"


@dataclass(frozen=True)
class Range:
    """Limits of a field beyond its type.

    Attributes:
        least: smallest allowed number.
        above: bound that a number must exceed.
        most: largest allowed number.
        form: regular expression that a whole text must match.
        words: the form in words.
    """

    least: float | None = None
    above: float | None = None
    most: float | None = None
    form: str = ""
    words: str = ""

    def holds(self, value: Any) -> bool:
        """Return whether a value of the right type lies in the range."""
        if isinstance(value, str):
            return not self.form or re.fullmatch(self.form, value) is not None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return True
        low = (self.least is None or value >= self.least) and (self.above is None or value > self.above)
        return low and (self.most is None or value <= self.most)

    def __str__(self) -> str:
        """Say the range in words, '' where there is none."""
        if self.form:
            return self.words
        parts = [f"of at least {self.least:g}" if self.least is not None else ""]
        parts.append(f"above {self.above:g}" if self.above is not None else "")
        parts.append(f"{'and ' if any(parts) else ''}at most {self.most:,g}" if self.most is not None else "")
        return " ".join(part for part in parts if part)


def parameter(default: Any, *, counts: bool = True, kw_only: bool = False, **limits: Any) -> Any:
    """Return a dataclass field.

    Args:
        default: default of the parameter.
        counts: whether the parameter can change a number.
        kw_only: whether it is given by name only.
        **limits: fields of ``Range``.
    """
    return field(default=default, kw_only=kw_only, metadata={"range": Range(**limits), "counts": counts})


def aside(default: Any, *, kw_only: bool = False, **limits: Any) -> Any:
    """Return the field of a parameter that can change speed and places alone; files count by their digests."""
    return parameter(default, counts=False, kw_only=kw_only, **limits)


def counting(values: Any) -> dict[str, Any]:
    """Return the parameters of a dataclass that can change a number, as plain values for JSON."""
    found = {f.name: getattr(values, f.name) for f in dataclasses.fields(values) if f.metadata.get("counts", True)}
    return {name: _plain(value) for name, value in found.items()}


def _plain(value: Any) -> Any:
    """Return a value as JSON has it; 255.0 and 255 are one number."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return str(value) if isinstance(value, Path) else value


def check(values: Any, label: str) -> None:
    """Check all fields of a dataclass: types, finite numbers, ranges.

    Args:
        values: the dataclass.
        label: name of the metric, for messages.

    Raises:
        ConfigError: a field holds something else; the message says what is allowed and what to type.
        ConfigErrors: several fields do.
    """
    errors = [
        ConfigError(f"metric.{label}.{name} is {shown}", f"it must be {allowed}: metric.{label}.{name}={default}")
        for name, shown, allowed, default in _wrong(values)
    ]
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise ConfigErrors(errors)


def _wrong(values: Any) -> Iterator[tuple[str, str, str, str]]:
    hints = typing.get_type_hints(type(values))
    for each in dataclasses.fields(values):
        value, limits = getattr(values, each.name), each.metadata.get("range", Range())
        if not _fits(value, hints[each.name]) or not limits.holds(value):
            allowed = " or ".join(_words(hints[each.name], limits))
            yield each.name, repr(value), allowed, _typed(each.default)


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a value has the annotated type; true is no number, numbers are finite, texts are not empty."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is Literal:
        return any(type(value) is type(arg) and value == arg for arg in args)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is str:
        return isinstance(value, str) and bool(value.strip())
    if hint is type(None):
        return value is None
    if origin is not None and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and _is_json(value)
    return isinstance(value, hint)


def _is_json(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_json(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(_is_json(item) for item in value)
    return value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value))


def _words(hint: Any, limits: Range) -> Iterator[str]:
    """The alternatives of an annotation in words, numbers and texts with their range."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        for arg in args:
            yield from _words(arg, limits)
    elif origin is Literal:
        yield from (str(arg) for arg in args)
    elif hint in (int, float):
        noun = "a whole number" if hint is int else "a finite number"
        yield f"{noun} {limits}".strip()
    elif hint is str:
        yield str(limits) or "a text"
    else:
        known = {bool: "true or false", type(None): "null", Path: "a path"}
        yield known.get(hint, "a mapping of plain values")


def _typed(value: Any) -> str:
    """Return a default as a user would type it."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value)
