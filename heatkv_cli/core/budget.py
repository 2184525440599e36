"""The only place where "10 %" gets a meaning.

A budget is the fraction *kept*: peak bytes of persistent KV state over the bytes of the full cache of all scales but
the last, same number format, same batch rows. It is held as an exact fraction, so
that the smallest feasible budget can be typed (`budget=21/6425`) and nothing depends on how a decimal rounds.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction

from heatkv_cli.core.scales import Geometry, ScaleSchedule
from heatkv_cli.errors import BudgetError, ConfigError

_NUMBER = re.compile(r"\d+/\d+|(\d+\.?\d*|\.\d+)(e[+-]?\d{1,3})?", re.IGNORECASE)
_HINT = "a budget is the fraction kept, in (0, 1]: budget=0.1 for 10 %, or a fraction, budget=21/6425"
_RHO_HINT = "rho is the fraction removed over all scales, in [0, 1): rho=0.7"


@dataclass(frozen=True)
class Budget:
    """A fraction of the full cache that may be kept.

    Args:
        ratio: the fraction, in (0, 1], exact: "0.1" is 1/10, not the nearest double.
        text: as typed; names folders and fills the CSV cell.
        rho: HACK's compression ratio over all scales, where the budget was given on that axis; then `cap` follows
            rho, and `ratio` is min(beta, 1) with beta = (1 - rho) * T / P.

    >>> Budget.parse("0.1").ratio
    Fraction(1, 10)
    >>> Budget.from_rho(0.7, ScaleSchedule.squares((1, 2, 3, 4, 5, 6, 8, 10, 13, 16))).text
    'rho=0.7'
    """

    ratio: Fraction
    text: str
    rho: Fraction | None = None

    @classmethod
    def parse(cls, value: str | float | Fraction) -> Budget:
        """Return the budget that `value` names.

        Args:
            value: "0.1", "1e-2", "21/6425", 0.1, 1, Fraction(21, 6425). Decimals are taken as typed.

        Raises:
            ConfigError: not a number, or outside (0, 1].
        """
        ratio = _fraction("budget", value, _HINT)
        if ratio <= 0:
            raise ConfigError(f"budget is {value}: nothing would be kept", _HINT)
        if ratio > 1:
            percent = f"; {value} % is budget={float(ratio / 100):g}" if ratio <= 100 else ""
            raise ConfigError(f"budget is {value}: more than the full cache", _HINT + percent)
        return cls(ratio, str(value).strip())

    @classmethod
    def from_rho(cls, rho: str | float | Fraction, schedule: ScaleSchedule) -> Budget:
        """Return the budget of HACK's compression ratio: beta = (1 - rho) * T / P, the pool is min(beta, 1).

        HACK's denominator holds the last scale, which nobody stores; so beta exceeds 1 for small rho (there is no
        compression between the scales at all) and rho = 0.7 is beta = 0.49 for Infinity.

        Args:
            rho: fraction removed, in [0, 1).
            schedule: the scales of the model at hand.

        Raises:
            ConfigError: not a number, or outside [0, 1).
        """
        removed = _fraction("rho", rho, _RHO_HINT)
        if not 0 <= removed < 1:
            raise ConfigError(f"rho is {rho}", _RHO_HINT)
        beta = (1 - removed) * schedule.num_tokens / schedule.peak_tokens
        return cls(min(beta, Fraction(1)), f"rho={str(rho).strip()}", removed)

    @property
    def as_float(self) -> float:
        """The ratio as the nearest double: what the official scheduler computes with."""
        return float(self.ratio)

    @property
    def override(self) -> str:
        """The budget as it is typed: `budget=0.1`, `rho=0.7`."""
        return f"budget={self.text}" if self.rho is None else self.text

    @property
    def slug(self) -> str:
        """The text as a part of a file name: `21/6425` becomes `21of6425`, `rho=0.7` becomes `rho0.7`."""
        return self.text.replace("/", "of").replace("=", "")

    def cap(self, schedule: ScaleSchedule) -> int:
        """Return the tokens that each head may keep when all heads keep the same number.

        floor(ratio * P); on HACK's axis floor((1 - rho) * T), which may exceed P.
        """
        if self.rho is None:
            return math.floor(self.ratio * schedule.peak_tokens)
        return math.floor((1 - self.rho) * schedule.num_tokens)

    def slots(self, geometry: Geometry, rows: int, state_bytes: int = 0) -> int:
        """Return how many token slots the pool of all layers and heads may have.

        One slot holds K and V of one token of one head for all batch rows.

        Args:
            geometry: of the model.
            rows: batch rows, guidance rows included.
            state_bytes: further bytes that a method keeps per stored token of one head and one row (scores,
                quantisation scales); they are paid for with slots.

        Returns:
            floor(ratio * full bytes / (rows * (bytes_per_token + state_bytes))).
        """
        slot_bytes = rows * (geometry.bytes_per_token + state_bytes)
        return math.floor(self.ratio * geometry.full_bytes(rows) / slot_bytes)

    def require(self, smallest: Fraction, geometry: Geometry, method: str) -> None:
        """Check that the budget is at least the smallest one that `method` can meet; decided in exact rationals.

        Raises:
            BudgetError: names the smallest feasible budget, as a fraction and as a decimal rounded up.
        """
        if self.ratio >= smallest:
            return
        decimal = decimal_up(smallest)
        raise BudgetError(
            f"budget {self.text} is too small for method {method} on {geometry.model}: "
            f"the smallest feasible budget is {smallest} ({decimal})",
            f"type budget={smallest} or budget={decimal}, or more",
        )

    def __str__(self) -> str:
        return self.text


def decimal_up(value: Fraction, digits: int = 6) -> str:
    """Return the smallest decimal of `digits` significant digits that is not below `value` > 0.

    >>> decimal_up(Fraction(21, 6425)), decimal_up(Fraction(1, 10)), decimal_up(Fraction(1))
    ('0.00326849', '0.1', '1')
    """
    places = digits
    while value * 10 ** (places - digits + 1) < 1:
        places += 1
    units = math.ceil(value * 10**places)
    whole, part = divmod(units, 10**places)
    return f"{whole}.{part:0{places}d}".rstrip("0").rstrip(".")


def _fraction(name: str, value: str | float | Fraction, hint: str) -> Fraction:
    """Return `value` as typed, exactly; ConfigError naming `name` when it is not a finite number."""
    text = str(value).strip()
    if isinstance(value, bool) or not _NUMBER.fullmatch(text.removeprefix("-")):
        raise ConfigError(f"{name} is {text!r}, which is not a number", hint)
    try:
        return Fraction(text)
    except ZeroDivisionError as error:
        raise ConfigError(f"{name} is {text!r}: division by zero", hint) from error
