"""Plain values (YAML, overrides) to typed ones, with an error that names the key; and leaves (`_target_`) to objects.

`from_plain` fills a dataclass and collects every error; `build` imports a dotted path and calls it. Neither knows
which dataclasses exist or what the objects are for.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
import sys
import types
import typing
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, Union, get_args, get_origin, get_type_hints

from heatkv_cli.errors import ConfigError, did_you_mean, raise_all

T = TypeVar("T")

MOST_WHOLE = 2**63 - 1
"""The largest whole number that tensors and files can hold."""

_MISSING = object()
_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    Path: "a path",
    type(None): "null",
}


def from_plain(
    cls: type[T], values: Mapping[str, Any], where: str, errors: list[ConfigError], skip: Collection[str] = ()
) -> T | None:
    """Return a dataclass filled from plain values.

    Args:
        cls: a dataclass; its annotations say what is accepted.
        values: one value per field; fields with a default may be left out.
        where: key under which `values` stands ("model"), for messages; "" at the top.
        errors: every problem is appended here.
        skip: fields that are known to be wrong, and told already; there is no object then.

    Returns:
        The object, or None where something was appended.
    """
    before = len(errors)
    hints = get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            errors.append(ConfigError(f"unknown key '{join(where, key)}'", did_you_mean(key, list(fields))))
    filled: dict[str, Any] = {}
    for name, spec in fields.items():
        if name in skip:
            continue
        if name in values:
            filled[name] = coerce(values[name], hints[name], join(where, name), errors)
        elif spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
            errors.append(ConfigError(f"'{join(where, name)}' is missing", f"it is {describe(hints[name])}"))
    if len(errors) > before or skip:
        return None
    try:
        return cls(**filled)
    except ConfigError as error:
        errors.append(error)
        return None


def coerce(value: Any, hint: Any, where: str, errors: list[ConfigError]) -> Any:
    """Return `value` as the annotation `hint` wants it, or append one error and return None.

    Nothing is guessed: "3" is not a number and 1 is not true. A whole number is a number, a text is a path, a list is
    a tuple, and a single value is a tuple of one where only a tuple fits.
    """
    result = _convert(value, hint, where, errors)
    if result is _MISSING:
        errors.append(ConfigError(f"{where} is {show(value)}", f"it must be {describe(hint)}"))
        return None
    return result


def _convert(value: Any, hint: Any, where: str, errors: list[ConfigError]) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        if isinstance(value, hint):  # type: ignore[arg-type]
            return value
        return from_plain(hint, value, where, errors) if isinstance(value, Mapping) else _MISSING  # type: ignore[arg-type]
    if origin is Literal:
        return value if value in args and type(value) in {type(arg) for arg in args} else _MISSING
    if origin in (Union, types.UnionType):
        return _convert_union(value, args, where, errors)
    if origin in (tuple, list):
        return _convert_sequence(value, origin, args, where, errors)
    if origin is dict:
        if not isinstance(value, Mapping):
            return _MISSING
        return {str(key): coerce(item, args[1], join(where, str(key)), errors) for key, item in value.items()}
    if hint is Path:
        return Path(os.path.expanduser(value)) if isinstance(value, (str, Path)) and str(value) else _MISSING
    if hint is float:
        return _number(value, where, errors)
    if type(value) is int and hint is int and abs(value) > MOST_WHOLE:
        errors.append(ConfigError(f"{where} is {show(value)}", f"it must be a whole number up to {MOST_WHOLE:,}"))
        return None
    if hint in (int, str, bool, type(None)):
        return value if type(value) is hint else _MISSING
    return value  # Any, protocols, tensors: whoever uses it knows better


def _number(value: Any, where: str, errors: list[ConfigError]) -> Any:
    """Return a finite float; a whole number is one too."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return _MISSING
    if abs(value) > sys.float_info.max or value != value:
        errors.append(ConfigError(f"{where} is {show(value)}", "it must be a finite number"))
        return None
    return float(value)


def _convert_union(value: Any, args: tuple[Any, ...], where: str, errors: list[ConfigError]) -> Any:
    for arg in sorted(args, key=lambda arg: type(value) is not arg):  # an int stays an int in `int | float`
        trial: list[ConfigError] = []
        result = _convert(value, arg, where, trial)
        if result is not _MISSING and not trial:
            return result
    return _MISSING


def _convert_sequence(
    value: Any, origin: type, args: tuple[Any, ...], where: str, errors: list[ConfigError]
) -> tuple[Any, ...] | list[Any] | Any:
    if isinstance(value, (Mapping, type(None))):
        return _MISSING
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    fixed = origin is tuple and Ellipsis not in args
    if fixed and len(items) != len(args):
        return _MISSING
    wanted = args if fixed else [args[0]] * len(items)
    found = [
        coerce(item, hint, f"{where}[{i}]", errors) for i, (item, hint) in enumerate(zip(items, wanted, strict=True))
    ]
    return tuple(found) if origin is tuple else found


def describe(hint: Any) -> str:
    """Return an annotation in words, for messages.

    >>> describe(int | Literal["auto"] | None)
    "a whole number or 'auto' or null"
    """
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " or ".join(repr(arg) for arg in args)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(arg) for arg in args)
    if origin in (tuple, list):
        if origin is tuple and Ellipsis not in args:
            return f"a list of {len(args)}: {', '.join(describe(arg) for arg in args)}"
        return f"a list, each {describe(args[0])}"
    if origin is dict or dataclasses.is_dataclass(hint):
        return "a mapping"
    return _WORDS.get(hint, getattr(hint, "__name__", str(hint)))


SHOWN = 200
"""Characters of a value that a message repeats."""


def show(value: Any) -> str:
    """Return a value as a user would type it, cut where it is very long."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}... ({len(text)} characters)"


def join(where: str, key: str) -> str:
    """Return the dotted key of `key` below `where`."""
    return f"{where}.{key}" if where else key


def load_target(target: str) -> Any:
    """Import the object that a dotted path names.

    Raises:
        ConfigError: there is no such module or name. An error while the module runs is not hidden.
    """
    module_name, _, name = target.rpartition(".")
    if not module_name:
        raise ConfigError(f"_target_ '{target}' is not a dotted path", "write package.module.Name")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise  # the module exists, something it imports does not
        raise ConfigError(
            f"_target_ '{target}': there is no module {error.name}", "check the YAML of this group"
        ) from error
    if not hasattr(module, name):
        public = [word for word in vars(module) if not word.startswith("_")]
        raise ConfigError(f"_target_ '{target}': {module_name} has no {name}", did_you_mean(name, public))
    return getattr(module, name)


class Leaf(Protocol):
    """A config dataclass made from one YAML file with a `_target_`."""

    @property
    def target(self) -> str:
        """Dotted path of what is built."""
        ...

    @property
    def params(self) -> dict[str, Any]:
        """Arguments that the user may set."""
        ...


def build_leaf(leaf: Leaf, expect: type[T], *, where: str = "", **context: Any) -> T:
    """Return the object of a config dataclass; its other fields (name, needs, ...) go where the target takes them."""
    known = {f.name: getattr(leaf, f.name) for f in dataclasses.fields(leaf)}  # type: ignore[arg-type]
    given = {key: value for key, value in known.items() if key not in ("target", "params") and value not in (None, "")}
    return build(leaf.target, leaf.params, expect, where=where, offers=given, **context)


def build(
    target: str,
    params: Mapping[str, Any],
    expect: type[T],
    *,
    where: str = "",
    offers: Mapping[str, Any] | None = None,
    **context: Any,
) -> T:
    """Return the object of a config leaf: `target` called with `params`.

    Args:
        target: dotted path of a class or function.
        params: values that the user may set; every key and every annotated type is checked.
        expect: class of the result, or a protocol, which is checked where it is runtime-checkable.
        where: the config group, for messages ("method").
        offers: arguments that are passed where the target has a parameter of that name, and dropped elsewhere.
        **context: arguments that the target must take; they are passed on unchecked.

    Raises:
        ConfigError: unknown or missing keys, wrong types, an object of another kind, or a value that the object
            itself refuses with a ValueError.
        ConfigErrors: several of these.
    """
    factory = load_target(target)
    taken = inspect.signature(factory).parameters
    context |= {key: value for key, value in (offers or {}).items() if key in taken and key not in (*params, *context)}
    errors: list[ConfigError] = []
    arguments = check_arguments(factory, params, where or target, set(context), errors)
    raise_all(errors)
    try:
        result = factory(**arguments, **context)
    except ValueError as error:
        raise ConfigError(f"{where or target}: {error}", f"look at the values of {where or target}") from error
    checkable = getattr(expect, "_is_runtime_protocol", True) or not getattr(expect, "_is_protocol", False)
    if checkable and not isinstance(result, expect):
        raise ConfigError(
            f"{target} makes a {type(result).__name__}, not a {expect.__name__}", "check _target_ in the YAML"
        )
    return result


def check_arguments(
    factory: Any, params: Mapping[str, Any], where: str, given: set[str], errors: list[ConfigError]
) -> dict[str, Any]:
    """Return the arguments of a class or function from plain values, typed; append what is wrong.

    Args:
        factory: callable that would be called.
        params: values that the user may set.
        where: the key they stand under, for messages.
        given: further arguments that the caller will pass.
        errors: every problem is appended here.
    """
    parameters = inspect.signature(factory).parameters
    kinds = {parameter.kind for parameter in parameters.values()}
    names = [
        name
        for name, parameter in parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY) and name not in given
    ]
    hints = _hints(factory)
    checked: dict[str, Any] = {}
    for key, value in params.items():
        if key in names:
            checked[key] = coerce(value, hints.get(key, Any), join(where, key), errors)
        elif inspect.Parameter.VAR_KEYWORD in kinds:
            checked[key] = value
        else:
            errors.append(ConfigError(f"{where} has no key '{key}'", did_you_mean(key, names)))
    for name in names:
        if name not in params and parameters[name].default is inspect.Parameter.empty:
            errors.append(ConfigError(f"'{join(where, name)}' is missing", f"it is {describe(hints.get(name, Any))}"))
    return checked


def _hints(factory: Any) -> dict[str, Any]:
    """Return the annotations of a factory's arguments; nothing where they cannot be resolved at run time."""
    source = factory.__init__ if inspect.isclass(factory) and not dataclasses.is_dataclass(factory) else factory
    try:
        return typing.get_type_hints(source)
    except NameError:
        return {}
