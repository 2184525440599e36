"""The contract of a metric: pictures (or numbers recorded with them) go in, values with intervals come out.

Two shapes exist, because a metric of a set has no number per image:

* ``ImageMetric`` gives each image a ``Score``; ``summarise`` turns all scores of a run into values. Scores are plain
  rows, so a run can be resumed, sharded, or compared with another run image by image.
* ``SetMetric`` (FID) goes from images to features to additive statistics to values. Features are one row per image, so
  they are resumed and sharded as scores are, and metrics with the same extractor share them.

A metric is a frozen dataclass whose fields are its parameters (see ``parameters``). It reads no images and knows
neither models nor methods: the evaluation stage loads images, hands out samples and writes values. A metric that lacks
weights or a package raises ``SetupError`` at first use, which the stage turns into a row with ``status=skipped``;
``lacks`` says the same before.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, Self

from heatkv_cli.metrics.intervals import DEFAULT, Bootstrap, mean_value
from heatkv_cli.metrics.parameters import DEVICE, aside, check, counting
from heatkv_cli.metrics.scores import Features, Pixels, Sample, Score, Value
from heatkv_cli.metrics.weights import Lack, Wanted, joined_sha256, lacking_package

Kind = Literal["paired", "set", "prompt"]
"""An image against the full run's image of the same seed; many images against many; an image against its prompt."""
Pass = Literal["free", "layout", "forced"]
"""Ordinary generation; the full run's codes copied at the layout scales; teacher-forced on all of the full run's."""


@dataclass(frozen=True)
class Spec:
    """Facts about a metric that result rows hold.

    Attributes:
        name: name in rows and on the command line.
        version: changes whenever the same images give another number.
        unit: unit of the number; '' where it has none.
        higher_is_better: the direction.
        kind: whether pairs, sets, or image and prompt are compared.
        needs: the generation pass whose images are measured.
    """

    name: str
    version: str
    unit: str
    higher_is_better: bool
    kind: Kind
    needs: Pass = "free"


@dataclass(frozen=True)
class Metric:
    """Base of all metrics.

    A subclass is a frozen dataclass with a ``SPEC``; it derives from ``ImageMetric`` or ``SetMetric``.

    Args:
        name: name in the result rows; None is that of ``SPEC``.

    Raises:
        ConfigError: a parameter is out of its range; the message names it, what is allowed, and what to type.
    """

    SPEC: ClassVar[Spec]
    INFINITE: ClassVar[bool] = False
    """Whether a number may be infinite."""

    name: str | None = aside(None, kw_only=True)

    def __post_init__(self) -> None:
        """Check all parameters."""
        check(self, self.spec.name)

    @property
    def spec(self) -> Spec:
        """Name, version, unit, direction, kind and pass."""
        return self.SPEC if self.name is None else replace(self.SPEC, name=str(self.name))

    @property
    def batch_size(self) -> int:
        """Images that are measured at once."""
        return 1

    @property
    def network(self) -> str:
        """Short name of the network that must be in memory; metrics with one name share it. '' for none."""
        return ""

    @property
    def variant(self) -> str:
        """Variant of the headline row."""
        return ""

    def network_bytes(self) -> int:
        """Return the bytes of the network's weights in memory; 0 without a network. Nothing is loaded.

        Raises:
            SetupError: the size is that of a file, and the file is missing.
        """
        return 0

    def packages(self) -> tuple[tuple[str, str], ...]:
        """Return the modules that it imports at first use, each with the extra that brings it."""
        return ()

    def files(self) -> tuple[Wanted, ...]:
        """Return the files of the network's weights."""
        return ()

    def digest(self) -> str:
        """Return one sha256 for all files of weights, '' without files.

        Raises:
            SetupError: a file is missing.
        """
        return joined_sha256([wanted.digest for wanted in self.files()])

    def identity(self) -> dict[str, Any]:
        """Return everything that can change the number of an image, as plain values.

        Raises:
            SetupError: a file of weights is missing.
        """
        cls = type(self)
        return {
            "class": f"{cls.__module__}.{cls.__qualname__}",
            "version": self.spec.version,
            "parameters": self.parameters(),
            "weights": self.digest(),
        }

    def parameters(self) -> dict[str, Any]:
        """Return the parameters that can change a number."""
        return counting(self)

    def settings(self) -> str:
        """Return the parameters that can change the reported number as canonical JSON.

        Weights and the reference are left out: they have columns of their own.
        """
        shown = {key: value for key, value in self.parameters().items() if key != "reference"}
        return json.dumps(shown, sort_keys=True, separators=(",", ":"), allow_nan=False)

    def lacks(self) -> list[Lack]:
        """Return what is missing before the metric can run: packages, then files. Nothing is loaded."""
        packages = [lacking_package(module, extra) for module, extra in self.packages()]
        return [lack for lack in (*packages, *(wanted.lack() for wanted in self.files())) if lack is not None]

    def check_prompt(self, prompt_id: str, meta: Mapping[str, Any]) -> None:
        """Check, before any picture is made, that a prompt says what the metric has to know.

        Args:
            prompt_id: id of the prompt.
            meta: its further fields in the list.

        Raises:
            ConfigError: it does not.
        """

    def self_check(self) -> str:
        """Return '' where weights are what they say and the metric works, else what is wrong.

        Raises:
            SetupError: weights or packages are missing.
            ArtifactError: a file is not what it should be.
        """
        return ""

    def writing_to(self, folder: Path, shard: tuple[int, int]) -> Self:
        """Return the metric told where it may keep files of its own, beside the scores; most keep none.

        Args:
            folder: folder of the run.
            shard: (i, n) of this process; a file has one writer.
        """
        return self


@dataclass(frozen=True)
class Networked(Metric):
    """Base of metrics that run a network.

    Args:
        device: device of the network: cpu, cuda or cuda:N. It is no part of a score's identity.
        weights_folder: the first of the places where files are looked for.
    """

    device: str = aside("cpu", form=DEVICE, words="cpu, cuda or cuda:N", kw_only=True)
    weights_folder: Path | None = aside(None, kw_only=True)


@dataclass(frozen=True)
class ImageMetric(Metric):
    """A metric with a number per image (kinds ``paired``, ``prompt``). A subclass has ``score`` or ``score_batch``."""

    def score(self, sample: Sample) -> Score:
        """Return the number of one image; raises as ``score_batch``."""
        return self.score_batch([sample])[0]

    def score_batch(self, samples: Sequence[Sample]) -> list[Score]:
        """Return the number of each image.

        Raises:
            ConfigError: the prompt list lacks what the metric needs.
            ArtifactError: an image is missing, image and reference do not belong together, or weights do not fit.
            SetupError: weights or a package are missing.
        """
        return [self.score(sample) for sample in samples]

    def summarise(
        self, scores: Sequence[Score], baseline: Sequence[Score] | None = None, bootstrap: Bootstrap = DEFAULT
    ) -> list[Value]:
        """Return the values of a run, headline first; here the mean over images.

        Args:
            scores: scores of all images, at least one.
            baseline: scores of the run to compare with (the full cache), for paired intervals; images that only one of
                the two runs has are left out of the comparison.
            bootstrap: the run's way of drawing intervals.

        Raises:
            ValueError: no scores.
        """
        return [mean_value(self.variant, scores, baseline, bootstrap)]


class Extractor(Protocol):
    """Images to features, one row per image; the network is loaded at the first call."""

    @property
    def name(self) -> str:
        """Network and preprocessing, for folder names."""
        ...

    def digest(self) -> str:
        """Return the sha256 of the weights; raises SetupError where there are none."""
        ...

    def self_check(self) -> str:
        """Return '' where weights and network work, else what is wrong; raises as an extraction."""
        ...

    def __call__(self, images: Sequence[Pixels]) -> Features:
        """Return (n, d) features of n images, which may differ in size."""
        ...


class Statistics(Protocol):
    """Additive numbers that a set metric keeps of a set: batches and shards give the statistics of the whole."""

    @property
    def n(self) -> int:
        """Number of images."""
        ...

    def add(self, index: Sequence[int], features: Features) -> None:
        """Add images: their places in the list of all images, and their (n, d) features."""
        ...

    def merge(self, other: Self) -> None:
        """Add the statistics of other images."""
        ...


@dataclass(frozen=True)
class SetMetric(Metric):
    """A metric of a whole set of images (kind ``set``)."""

    @property
    def min_images(self) -> int:
        """Smallest number of images on either side; with fewer the metric is skipped."""
        return 2

    @property
    def reference(self) -> str | None:
        """``full`` (the full run's images), a folder, or a file of statistics; None where nothing is compared."""
        return None

    @property
    def extractor(self) -> Extractor:
        """The extractor of its features."""
        raise NotImplementedError

    def self_check(self) -> str:
        """Return '' where weights and network work, else what is wrong; raises as an extraction."""
        return self.extractor.self_check()

    def statistics(self) -> Any:
        """Return new, empty ``Statistics``."""
        raise NotImplementedError

    def compute(self, images: Any, reference: Any = None, bootstrap: Bootstrap = DEFAULT) -> list[Value]:
        """Return the values of a set, headline first.

        Args:
            images: ``Statistics`` of the generated images.
            reference: those of the reference; None for a metric without one.
            bootstrap: the run's way of drawing intervals.

        Raises:
            ValueError: a side has too few images for the formula.
            ArtifactError: the two sides do not belong together.
        """
        raise NotImplementedError
