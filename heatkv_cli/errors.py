"""Every error a user can cause, each with the exit code of the command that meets it.

The lowest layer: everything may import this file. An error says what happened and where (`message`) and what to type
next (`hint`); the console prints them as `error: ...` and `fix: ...`. Nothing outside `cli` catches them, except to add
the place where they happened.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from heatkv_cli.interrupts import INTERRUPTED


class HeatKVError(Exception):
    """Something went wrong that the user can understand.

    Args:
        message: what happened, and where (file, key, value).
        hint: what to do or type next; empty when there is nothing to add.

    Attributes:
        exit_code: what the process returns when this error ends a command.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[type[HeatKVError], tuple[str, str]]:
        """Pickle with both arguments, so that an error survives a worker process."""
        return type(self), (self.message, self.hint)


class ConfigError(HeatKVError):
    """The configuration, an option or an override is wrong."""

    exit_code = 2


class BudgetError(ConfigError):
    """The budget cannot be met by this method on this model; the hint names the smallest one that can."""


class Errors(HeatKVError):  # noqa: N818 - it is several
    """Several errors, found in one pass and reported together; the first one's exit code is theirs.

    Args:
        errors: at least one, in the order in which they shall be read.

    Raises:
        ValueError: when `errors` is empty.
    """

    def __init__(self, errors: Iterable[HeatKVError]) -> None:
        self.errors: tuple[HeatKVError, ...] = tuple(errors)
        if not self.errors:
            raise ValueError(f"{type(self).__name__} needs at least one error")
        super().__init__(
            "\n".join(error.message for error in self.errors),
            "\n".join(error.hint for error in self.errors if error.hint),
        )
        self.exit_code = self.errors[0].exit_code

    def __reduce__(self) -> tuple[type[Errors], tuple[tuple[HeatKVError, ...]]]:  # type: ignore[override]
        """Pickle with the errors themselves."""
        return type(self), (self.errors,)


class ConfigErrors(Errors, ConfigError):  # noqa: N818 - it is several
    """Several configuration errors, in the order in which the user typed their causes."""


def raise_all(errors: Sequence[HeatKVError]) -> None:
    """Raise what was collected: nothing, the one error, or all of them together, each once."""
    unique = list({(error.message, error.hint): error for error in errors}.values())
    if len(unique) == 1:
        raise unique[0]
    if unique:
        raise (ConfigErrors if all(isinstance(error, ConfigError) for error in unique) else Errors)(unique)


class SetupError(HeatKVError):
    """A package, weights, data or a device is missing."""

    exit_code = 3


class ArtifactError(HeatKVError):
    """A file is unreadable, or was made for another model or schedule."""

    exit_code = 4


class MemoryLimitError(HeatKVError):
    """The device, or the host, is out of memory; the hint names the next smaller batch."""

    exit_code = 5


class PartialResultError(HeatKVError):
    """The command ended, but points of a sweep cannot exist, or images or metrics failed; the rows say which."""

    exit_code = 6


EXIT_CODES: dict[int, str] = {
    0: "done",
    1: "a bug in heatkv (the trace is in run.log)",
    ConfigError.exit_code: "configuration: an option, an override, a budget",
    SetupError.exit_code: "setup: a package, weights, data or a device is missing",
    ArtifactError.exit_code: "artifact: a file is unreadable or made for another model",
    MemoryLimitError.exit_code: "out of memory",
    PartialResultError.exit_code: "finished, but some budgets cannot be met, or runs, images or metrics failed",
    INTERRUPTED: "interrupted; the same command goes on where it stopped",
}
"""Meaning of each exit code; `heatkv --help` and the README print this table."""


def did_you_mean(word: str, choices: Sequence[str]) -> str:
    """Return a hint for a misspelt word: the nearest choice if one is near, and all choices.

    >>> did_you_mean("heatkvv", ["full", "heatkv"])
    "did you mean 'heatkv'? available: full, heatkv"
    >>> did_you_mean("x", ["full", "heatkv"])
    'available: full, heatkv'
    """
    near = difflib.get_close_matches(word.lower(), choices, n=1, cutoff=0.6)
    available = f"available: {', '.join(choices)}" if choices else "nothing is available"
    return f"did you mean '{near[0]}'? {available}" if near else available
