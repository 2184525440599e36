"""The contract of a method: a paper's parameters, and the policy that follows from them at a budget.

A method is one frozen dataclass in one file (or folder) of this package, or of anybody's. Its fields are the paper's
parameters, its docstring the paper's rule; `policy(setting)` gives the decisions of one generation. Methods that plan
ahead of any image also say which plan: a file that the stages can write, print and read again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from fractions import Fraction
from math import isfinite
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Literal, Protocol, Self, Union, get_args, get_origin, get_type_hints

from heatkv_cli.calibration.calibration import Calibration
from heatkv_cli.core.budget import Budget
from heatkv_cli.core.policy import Policy
from heatkv_cli.core.scales import Geometry, ScaleSchedule
from heatkv_cli.errors import ConfigError

Granularity = Literal["token", "atom", "-"]
"""The unit that is kept or dropped as one: a token of a head, an atom (all tokens of a scale in a head), nothing."""

Timing = Literal["before", "after"]
"""When a method chooses: before attention, so that only what is kept is attended, or after it."""


class Plan(Protocol):
    """Decisions made ahead of any image, for one model, method and budget."""

    @property
    def sha256(self) -> str:
        """Digest of everything that can change an image."""
        ...

    @property
    def method(self) -> str:
        """Name of the method the plan was made for."""
        ...

    @property
    def budget(self) -> Budget:
        """The budget it was made for."""
        ...

    @property
    def about(self) -> str:
        """Origin of the plan in words, for the table's title."""
        ...

    def table(self) -> list[dict[str, int | float]]:
        """One row per scale, for printing."""
        ...

    def report(self) -> Mapping[str, Any]:
        """Return facts about the plan as plain values, for --json."""
        ...

    def save(self, path: Path | str) -> None:
        """Write it; ArtifactError where that fails."""
        ...

    @classmethod
    def load(cls, path: Path | str, geometry: Geometry | None = None) -> Self:
        """Read it; ArtifactError where it is damaged or made for another model than `geometry`."""
        ...


@dataclass(frozen=True)
class Setting:
    """Everything a method works with in one run.

    Args:
        geometry: shape of the model's cache.
        budget: fraction of it that may be kept.
        rows: batch rows, guidance rows included.
        name: the method's name on the command line, for messages and plans.
        calibration: statistics of the model's attention; None unless the method is calibrated.
        orders: a file of published head orders that stands in for a calibration; None where none was named.
        orders_at: scales at which that file was made; None for those of the geometry.
        plan: the method's own plan, read from a file or made before; None where it is still to be made.
    """

    geometry: Geometry
    budget: Budget
    rows: int = 1
    name: str = "method"
    calibration: Calibration | None = None
    orders: Path | None = None
    orders_at: ScaleSchedule | None = None
    plan: Any = None

    @property
    def cap(self) -> int:
        """Tokens that each head may attend to when all heads keep equally many; see `Budget.cap`."""
        return self.budget.cap(self.geometry.schedule)

    def stored_cap(self, state_bytes: int = 0) -> int:
        """Return the tokens that each head may store when all store equally many; at most P.

        Args:
            state_bytes: bytes the method keeps per stored token of one head and row; they are paid for with tokens.
        """
        return self.budget.slots(self.geometry, self.rows, state_bytes) // self.geometry.heads

    def require(self, smallest: Fraction) -> None:
        """Check that the budget is at least the smallest one the method can meet.

        Raises:
            BudgetError: names the smallest feasible budget.
        """
        self.budget.require(smallest, self.geometry, self.name)

    def require_cap(self, tokens: int, state_bytes: int = 0) -> None:
        """Check that each head may store `tokens` tokens with their state, or all there are.

        Raises:
            BudgetError: names the smallest budget that allows it.
        """
        share = Fraction(self.geometry.bytes_per_token + state_bytes, self.geometry.bytes_per_token)
        self.require(min(Fraction(1), tokens * share / self.geometry.schedule.peak_tokens))

    def evicts(self, timing: Timing) -> bool:
        """Return whether a head ever has more tokens than its cap; where it has not, a method needs no state.

        After attention at most P tokens are stored; before attention T tokens are attended at the last scale.
        """
        schedule = self.geometry.schedule
        return self.cap < (schedule.peak_tokens if timing == "after" else schedule.num_tokens)

    def need_calibration(self) -> Calibration:
        """Return the calibration, checked against the geometry.

        Raises:
            ConfigError: there is none.
            ArtifactError: it is another model's.
        """
        if self.calibration is None:
            raise ConfigError(
                f"method {self.name} needs a calibration", f"heatkv calibrate --model {self.geometry.model}"
            )
        self.calibration.check(self.geometry)
        return self.calibration


@dataclass(frozen=True)
class Method:
    """Base of all methods: a frozen dataclass whose fields are the paper's parameters.

    Class attributes:
        granularity: the unit that is kept or dropped as one.
        plan_type: class of the plan that the method makes ahead of any image; None for methods that decide online.
    """

    granularity: ClassVar[Granularity] = "token"
    plan_type: ClassVar[type[Plan] | None] = None

    def __post_init__(self) -> None:
        """Check every parameter against its annotation; subclasses add their ranges.

        Raises:
            ConfigError: a word that is not among those allowed, a number that is not finite, or another type.
        """
        hints = get_type_hints(type(self))
        for field in fields(self):
            _check_field(self, field.name, hints[field.name])

    @property
    def calibrated(self) -> bool:
        """Whether the method reads a calibration of the model."""
        return False

    def plan(self, setting: Setting) -> Plan:
        """Decide everything ahead of any image; only for methods with a `plan_type`.

        Raises:
            BudgetError: the budget is too small for the method.
        """
        raise NotImplementedError(f"{type(self).__name__} has no plan")

    def policy(self, setting: Setting) -> Policy:
        """Return a fresh policy for one generation.

        Raises:
            BudgetError: the budget is too small for the method.
        """
        raise NotImplementedError


def _check_field(method: Method, name: str, hint: Any) -> None:
    value = getattr(method, name)
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
    types = tuple(kind for kind in kinds if isinstance(kind, type))
    if float in types:
        types = (*types, int)
    if isinstance(value, float) and not isfinite(value):
        raise refused(method, name, "a finite number")
    wanted = isinstance(value, types) and not (isinstance(value, bool) and bool not in types)
    if not wanted and value not in words and types + tuple(words):
        raise refused(method, name, " or ".join([*map(str, words), *(kind.__name__ for kind in types)]))


def refused(method: Method, name: str, allowed: str) -> ConfigError:
    """Return the error of a parameter whose value is not allowed; `allowed` says what is."""
    return ConfigError(
        f"method {type(method).__name__.lower()}: {name} is {getattr(method, name)!r}", f"{allowed}: method.{name}=..."
    )


def at_least(method: Method, **least: float) -> None:
    """Check that numeric parameters are not below a bound; words (`auto`) pass.

    Raises:
        ConfigError: names the first that is.
    """
    for name, bound in least.items():
        value = getattr(method, name)
        if not isinstance(value, str) and value < bound:
            raise refused(method, name, f"at least {bound}")
