"""The way a run draws its intervals, one value for all its metrics, in plain numbers that a config can hold."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

from heatkv_cli.errors import ConfigError

MOST_RESAMPLES = 1_000_000


@dataclass(frozen=True)
class Bootstrap:
    """The way a run draws its intervals, one value for all its metrics.

    Args:
        resamples: repetitions, 2 to 1,000,000.
        confidence: mass of the interval, in (0, 1).
        seed: seed of the draws, at least 0; the same values and seed give the same interval.

    Raises:
        ConfigError: a number is out of its range.
    """

    resamples: int = 10_000
    confidence: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not _whole(self.resamples) or not 2 <= self.resamples <= MOST_RESAMPLES:
            raise ConfigError(
                f"bootstrap.resamples is {self.resamples!r}",
                f"it must be a whole number from 2 to {MOST_RESAMPLES:,}: bootstrap.resamples=10000",
            )
        number = isinstance(self.confidence, (int, float)) and not isinstance(self.confidence, bool)
        if not number or not 0 < self.confidence < 1:
            raise ConfigError(
                f"bootstrap.confidence is {self.confidence!r}",
                "it must be a number between 0 and 1: bootstrap.confidence=0.95",
            )
        if not _whole(self.seed) or self.seed < 0:
            raise ConfigError(
                f"bootstrap.seed is {self.seed!r}", "it must be a whole number of at least 0: bootstrap.seed=0"
            )

    @property
    def tails(self) -> tuple[float, float]:
        """Quantiles that bound the interval."""
        tail = (1 - self.confidence) / 2
        return tail, 1 - tail

    @property
    def normal(self) -> float:
        """Half width of a normal interval in standard errors: 1.96 at 95 %; two decimals, as tables print it."""
        return round(NormalDist().inv_cdf(0.5 + self.confidence / 2), 2)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


DEFAULT = Bootstrap()
