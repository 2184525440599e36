"""Methods from outside the package: the only way by which a command line brings in code.

`method=module:Class` names a class that Python can import; `--plugin FILE` makes a file importable by its stem. The
class must be a `Method`, a frozen dataclass as those of the package are: all else is refused without being called.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from heatkv_cli.errors import ConfigError, did_you_mean

FORM = "method=module:Class, as in --plugin mine.py method=mine:Latest"


def is_outside(name: str) -> bool:
    """Return whether the name of a method is a class from outside: `module:Class`."""
    return ":" in name


def load_plugin(path: Path) -> None:
    """Import a Python file by its stem; its folder is searched for what it imports.

    Raises:
        ConfigError: it cannot be read or run, or its stem is the name of another module.
    """
    path, name = path.expanduser().resolve(), path.stem
    if path.suffix != ".py" or not path.is_file() or not name.isidentifier():
        raise ConfigError(f"plugin={path} is not a Python file", "--plugin FILE.py, its name a Python word")
    known = importlib.util.find_spec(name)  # of what was imported before, too
    if known is not None and known.origin == str(path) and name in sys.modules:
        return
    if known is not None and known.origin != str(path):
        raise ConfigError(f"plugin={path}: there is another module named {name}", "give the file another name")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # a .py file has both
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.append(str(path.parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ConfigError(f"plugin={path}: {_told(error)}", "correct the file") from error


def content_of(name: str) -> dict[str, Any]:
    """Return what a YAML file of a method from outside would say: its class, its name and its parameters' defaults.

    Args:
        name: `module:Class`.

    Raises:
        ConfigError: there is no such class, it is no method, or a parameter has no default.
    """
    module_name, _, class_name = name.partition(":")
    cls = getattr(_module(module_name, name), class_name, None)
    from heatkv_cli.methods.base import Method

    if cls is None:
        own = vars(sys.modules[module_name]).items()
        names = [word for word, value in own if inspect.isclass(value) and value.__module__ == module_name]
        raise ConfigError(f"method={name}: {module_name} has no {class_name}", did_you_mean(class_name, names))
    if not (inspect.isclass(cls) and issubclass(cls, Method) and dataclasses.is_dataclass(cls)):
        raise ConfigError(f"method={name} is no method", "a frozen dataclass over heatkv_cli.methods.Method")
    content: dict[str, Any] = {"_target_": f"{module_name}.{class_name}", "name": name}
    for field in dataclasses.fields(cls):
        if field.default is dataclasses.MISSING:
            raise ConfigError(f"method={name}: the parameter {field.name} has no default", "give it one in the class")
        content[field.name] = field.default
    return content | {"note": (inspect.getdoc(cls) or "").partition("\n")[0]}


def _module(module_name: str, name: str) -> ModuleType:
    if not all(part.isidentifier() for part in module_name.split(".")):
        raise ConfigError(f"method={name}: '{module_name}' is not a module", FORM)
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name + ".").startswith(error.name + "."):
            raise ConfigError(f"method={name}: there is no module {module_name}", FORM) from error
        raise ConfigError(f"method={name}: {_told(error)}", "install what the module imports") from error
    except Exception as error:
        raise ConfigError(f"method={name}: {_told(error)}", "correct the module") from error


def _told(error: Exception) -> str:
    words = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {words[0]}"
