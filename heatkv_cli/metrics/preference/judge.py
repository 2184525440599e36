"""The models of human preference share two back ends, which give the same number.

``native`` runs the checkpoint in our own code; ``official`` asks the authors' package in a Python of its own (see
``official``). That package reads checkpoints with a loader that runs code, so it gets only files of known content.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

from heatkv_cli.errors import ConfigError
from heatkv_cli.metrics.base import ImageMetric, Networked, Sample
from heatkv_cli.metrics.networks import loaded
from heatkv_cli.metrics.parameters import SHA256, aside, parameter
from heatkv_cli.metrics.preference.official import OfficialScorer
from heatkv_cli.metrics.scores import Pixels, image_of
from heatkv_cli.metrics.weights import Lack, NetworkFile, Wanted


class Scorer(Protocol):
    """Numbers of pictures with their prompts."""

    @property
    def versions(self) -> Mapping[str, str]:
        """Packages that an official back end runs on; none for our own networks."""
        ...

    def __call__(self, images: Sequence[Pixels], prompts: Sequence[str]) -> list[float]:
        """Return one number per picture, in order."""
        ...


@dataclass(frozen=True)
class Judge(Networked, ImageMetric):
    """Base of the metrics of human preference.

    Args:
        backend: ``native`` or ``official``.
        weights: checkpoint; None for the usual places.
        weights_sha256: digest that the checkpoint must have; None is the published one, where it is known.
        python: the Python that has the official package, for the official back end.
        timeout: seconds the official back end may take to start, and for each picture.
        batch_size: pictures per pass through the network.

    Raises:
        ConfigError: the official back end lacks its Python.
    """

    PACKAGE: ClassVar[str]
    """The official package."""

    backend: Literal["native", "official"] = parameter("native")
    weights: str | None = aside(None)
    weights_sha256: str | None = aside(None, form=SHA256, words="64 hexadecimal digits, as sha256sum prints them")
    python: str | None = aside(None)
    timeout: float = aside(600.0, above=0, most=1_000_000)
    batch_size: int = aside(16, least=1)

    def __post_init__(self) -> None:
        """Check all parameters."""
        super().__post_init__()
        if self.is_official and self.python is None:
            raise ConfigError(
                f"metric {self.spec.name}: backend=official needs the Python that has {self.PACKAGE}",
                f"set metric.{self.spec.name}.python=/path/to/venv/bin/python",
            )

    @property
    def is_official(self) -> bool:
        """Whether the authors' package scores."""
        return self.backend == "official"

    @property
    def checkpoint(self) -> NetworkFile:
        """The published checkpoint."""
        raise NotImplementedError

    def files(self) -> tuple[Wanted, ...]:
        """Return the checkpoint."""
        return (Wanted(self.checkpoint, self.weights, self.weights_folder, self.weights_sha256),)

    def identity(self) -> dict[str, Any]:
        """Return also the Python whose packages score."""
        return {**super().identity(), **({"python": self.python} if self.is_official else {})}

    def lacks(self) -> list[Lack]:
        """Return also the Python of the official back end where it cannot be started."""
        found = super().lacks()
        if self.is_official and shutil.which(os.path.expanduser(str(self.python))) is None:
            found.append(Lack(f"Python {self.python}", f"set metric.{self.spec.name}.python=/path/to/venv/bin/python"))
        return found

    def scorer(self) -> Scorer:
        """Return the back end, loaded or started at first use.

        Raises:
            SetupError: files, a package or the official back end are missing.
            ArtifactError: a file is not what it should be.
            ConfigError: nothing vouches for a file that the official package would run.
        """
        return self._official() if self.is_official else self._native()

    def _native(self) -> Scorer:
        raise NotImplementedError

    def _official(self) -> Scorer:
        trusted = self.files()[0].trusted(f"metric.{self.spec.name}.weights_sha256")
        options = {"checkpoint": str(trusted.absolute()), **self._options(), "device": self.device}
        key = ("official", self.PACKAGE, self.python, self.timeout, self.digest(), *options.values())
        name = f"metric.{self.spec.name}"
        return loaded(key, lambda: OfficialScorer(self.PACKAGE, str(self.python), options, self.timeout, name))

    def _options(self) -> dict[str, Any]:
        """Further options of the official package."""
        return {}

    def numbers(self, samples: Sequence[Sample]) -> tuple[list[float], str]:
        """Return the number of each picture, and the versions behind them for the table of images.

        Raises:
            ArtifactError: a sample has no image; else as ``scorer``.
        """
        images = [image_of(self.spec.name, sample) for sample in samples]
        scorer = self.scorer()
        found = scorer(images, [sample.prompt for sample in samples])
        return found, ", ".join(f"{name} {version}" for name, version in scorer.versions.items())
