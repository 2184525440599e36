"""The YAML files and what they say about themselves, for `ls`, completion and did-you-mean.

Only listing and plain reading: no composition, and no import that makes `heatkv --help` or a completion slow.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from heatkv_cli.errors import ConfigError, SetupError, did_you_mean
from heatkv_cli.results import read_regular

GROUPS = ("model", "method", "benchmark", "metric", "runtime", "experiment")
"""The folders of conf/."""

_PACKAGE = Path(__file__).resolve().parent.parent


@lru_cache(maxsize=1)
def conf_dir() -> Path:
    """Return the folder of the config groups: inside the installed package, or beside it in a checkout.

    Raises:
        SetupError: the installation is incomplete.
    """
    for folder in (_PACKAGE / "conf", _PACKAGE.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise SetupError(
        f"no conf/config.yaml beside {_PACKAGE}", "install heatkv again: pip install --force-reinstall heatkv"
    )


def choices(group: str) -> list[str]:
    """Return the names a group offers, sorted."""
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))


def check_choice(group: str, name: str, key: str = "") -> None:
    """Raise a ConfigError with a suggestion unless the group offers `name`; `key` is what the user typed for it."""
    available = choices(group)
    if name not in available:
        raise ConfigError(f"unknown {group} '{name}' in {key or group}={name}", did_you_mean(name, available))


def read_yaml(group: str, name: str) -> dict[str, Any]:
    """Return the plain content of one file of a group, on top of those its `defaults` name; before composition.

    Raises:
        ConfigError: there is no such file, or it is not a mapping.
    """
    check_choice(group, name)
    content = load_yaml(conf_dir() / group / f"{name}.yaml")
    bases = [read_yaml(group, base) for base in content.pop("defaults", ()) if base != "_self_"]
    return {key: value for part in (*bases, content) for key, value in part.items()}


def load_yaml(path: Path) -> dict[str, Any]:
    """Return the content of a YAML file: plain data in a mapping, each value written once.

    Raises:
        ConfigError: it is no regular file, no YAML in UTF-8, no mapping, has a key twice, or repeats values by
            aliases, of which some hundred bytes can stand for more than any memory holds.
    """
    import yaml  # comes with omegaconf

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("it has an alias; write the value out")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [str(key.value) for key, _ in node.value]
            if twice := next((key for key in keys if keys.count(key) > 1), None):
                raise yaml.YAMLError(f"it has {twice} twice")
            return super().construct_mapping(node, deep)

    try:
        content = yaml.load(read_regular(path).decode(), Loader)
    except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ConfigError(f"{path}: {reason}", "correct the YAML file") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is not a mapping", "correct the YAML file")
    return content


def catalogue(group: str) -> list[dict[str, Any]]:
    """Return one record per file of a group: name, note, paper and what else it says about itself in single values."""
    records = []
    for name in choices(group):
        content = read_yaml(group, name)
        shown = {key: value for key, value in content.items() if isinstance(value, (str, int, float, bool))}
        shown.pop("name", None)
        note = shown.pop("note", "") or _first_comment(conf_dir() / group / f"{name}.yaml")
        records.append({"name": name, "note": note, "paper": shown.pop("paper", ""), **shown})
    return records


def _first_comment(path: Path) -> str:
    """Return what a file says about itself in its first lines, the command that launches it left out."""
    words = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# heatkv "):
            words.append(line.lstrip("# "))
    return " ".join(words)
