"""The identity of code: a digest of what Python code means, without its comments, docstrings and layout.

A run's hash holds the digest of the code that can change an image, so that an edited method never meets the images of
the one before. Files are parsed, not imported: a digest costs no torch and runs nothing.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

from heatkv_cli.errors import ConfigError

PACKAGE = Path(__file__).resolve().parent.parent


def code_sha256(files: Iterable[Path]) -> str:
    """Return one digest for some Python files.

    Args:
        files: Python files in any order; below the package their path counts, elsewhere their name.

    Raises:
        ConfigError: a file cannot be read or parsed.
    """
    lines = sorted(f"{_name(path)} {_meaning(path, path.stat().st_mtime_ns)}" for path in set(files))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def run_code_sha256(method: str, model: str) -> str:
    """Return the digest of the code that can change an image: engine, toolkit, method with what it imports, family.

    Args:
        method, model: dotted paths of the method's class and of what makes the model.
    """
    toolkit = {PACKAGE / "methods" / "base.py", *folder_files("methods/toolkit")}
    return code_sha256(folder_files("core") | toolkit | module_files(method) | module_files(model))


def module_files(target: str) -> set[Path]:
    """Return the files of the module that a dotted path names, and the modules beside it that it imports.

    Modules are "beside" in their own folder; inside heatkv those of the same room (`models`, `methods`) are, and a
    module in a folder of its own (a model family, a method in parts) stands for the whole folder.

    Args:
        target: dotted path of a class or function, or the path of a Python file.

    Raises:
        ConfigError: there is no such module.
    """
    path = Path(target) if target.endswith(".py") else _find(target)
    found, todo = set[Path](), _whole(path)
    while todo:
        module = todo.pop()
        if module not in found:
            found.add(module)
            beside = _imported_beside(module, module.stat().st_mtime_ns)
            todo += [file for imported in beside for file in _whole(imported)]
    return found


def _whole(path: Path) -> list[Path]:
    """The file, or all files of the part of heatkv whose folder it lies in."""
    parts = path.relative_to(PACKAGE).parts if path.is_relative_to(PACKAGE) else ()
    return sorted(path.parent.rglob("*.py")) if len(parts) > 2 else [path]


def folder_files(name: str) -> set[Path]:
    """Return the files of one of the package's folders (`core`)."""
    return set((PACKAGE / name).rglob("*.py"))


def _find(target: str) -> Path:
    module = target.rpartition(".")[0]
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None:
        raise ConfigError(f"there is no module {module}", f"check '{target}'")
    return Path(spec.origin)


def _name(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix() if path.is_relative_to(PACKAGE) else path.name


@lru_cache(maxsize=512)
def _meaning(path: Path, changed: int) -> str:
    """Return the digest of a parsed file; `changed` is its time of change, so that an edited file is read again."""
    digest = hashlib.sha256()
    for word in _words(_parse(path)):
        digest.update(word.encode("utf-8", "surrogatepass"))
        digest.update(b"\0")
    return digest.hexdigest()


def _parse(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError) as error:
        raise ConfigError(f"cannot read the code of {path}: {error}", "correct the file") from error


def _words(node: ast.AST) -> Iterator[str]:
    """Yield the tree as words: node types and their values. Empty fields are left out, so versions of Python agree."""
    yield type(node).__name__
    for name, value in ast.iter_fields(node):
        if value is None or value == [] or name in ("type_comment", "kind", "type_ignores"):
            continue
        yield name
        if name == "body" and isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            value = value[1:] if _is_docstring(value[0]) else value
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, ast.AST):
                yield from _words(item)
            else:
                yield f"{type(item).__name__} {item!r}"
    yield ")"


def _is_docstring(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


@lru_cache(maxsize=512)
def _imported_beside(path: Path, changed: int) -> tuple[Path, ...]:
    """Files beside a module that it imports, see `module_files`; `changed` as in `_meaning`.

    By `import x`, `from x import y` or `from . import x`.
    """
    inside, found = path.is_relative_to(PACKAGE), list[Path]()
    room = path.relative_to(PACKAGE).parts[0] if inside else path.parent.name
    for name in _imported(_parse(path)):
        parts = name.split(".")
        if inside:
            places = [PACKAGE.parent.joinpath(*parts)] if parts[:2] == [PACKAGE.name, room] else []
        else:
            own = path.parent.parent.joinpath(*parts)  # the plug-in as a package: its own name comes first
            places = [path.parent.joinpath(*parts), *([own] if parts[0] == room else [])]
        files = (file for place in places for file in (place.with_suffix(".py"), place / "__init__.py"))
        found += [file for file in files if file.is_file()]
    return tuple(found)


def _imported(tree: ast.Module) -> Iterator[str]:
    """Names that may be modules: what is imported, and what it is imported from."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = [node.module] if node.module else []
            yield from module
            yield from (".".join((*module, alias.name)) for alias in node.names)
