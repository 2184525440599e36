"""KL against the full cache, teacher-forced: the attention error alone, without the chaos of sampling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from heatkv_cli.errors import ArtifactError
from heatkv_cli.metrics.base import ImageMetric, Sample, Score, Spec, Value
from heatkv_cli.metrics.intervals import DEFAULT, Bootstrap, bootstrap_interval, mean_value

_SCALE = "kl_s"
"""Begins the names of the recorded numbers of single scales."""


@dataclass(frozen=True)
class KL(ImageMetric):
    """KL(full || method) in nats per code that is drawn, mean over all of target scales 1..K-1.

    A code is what the model's family draws at once: a bit of Infinity, a token of VAR (`ImageModel.divergence`); so
    values of different families do not compare.

    Rule: the forced pass feeds the full run's codes at every scale through the ordinary cache path and compares the
    logits that sampling uses (after guidance, tau = 1, before top-k and top-p). Variants give each target scale.

    Source: definition of this toolkit. Targets are the same for every method, and evictions happen as in generation.
    """

    SPEC: ClassVar[Spec] = Spec("kl", "1", "nats", higher_is_better=False, kind="paired", needs="forced")

    def score(self, sample: Sample) -> Score:
        """Return the recorded KL of one image.

        Raises:
            ArtifactError: the pass recorded none, or something that is no number.
        """
        recorded = {key: value for key, value in sample.recorded.items() if key == "kl" or key.startswith(_SCALE)}
        if "kl" not in recorded:
            raise ArtifactError(f"metric kl: nothing was recorded for prompt {sample.prompt_id}", "run it again")
        wrong = [key for key, value in recorded.items() if not _is_number(value)]
        wrong += [key for key in recorded if key != "kl" and not key.removeprefix(_SCALE).isdecimal()]
        if wrong:
            raise ArtifactError(
                f"metric kl: what was recorded for prompt {sample.prompt_id} is damaged: "
                f"{wrong[0]} is {recorded[wrong[0]]!r}",
                "remove the run's folder forced, and run the command again",
            )
        return Score(sample.prompt_id, sample.index, recorded.pop("kl"), parts=recorded)

    def summarise(
        self, scores: Sequence[Score], baseline: Sequence[Score] | None = None, bootstrap: Bootstrap = DEFAULT
    ) -> list[Value]:
        """Return the mean over images (headline), and the mean of each target scale.

        Raises:
            ValueError: no scores, or they are not of the same scales.
        """
        prompts = [s.prompt_id for s in scores]
        values = [mean_value("", scores, baseline, bootstrap)]
        if any(s.parts.keys() != scores[0].parts.keys() for s in scores):
            raise ValueError("the images were recorded with different scales")
        for part in sorted(scores[0].parts, key=lambda name: int(name.removeprefix(_SCALE))):
            interval = bootstrap_interval([s.parts[part] for s in scores], prompts, bootstrap=bootstrap)
            values.append(Value.of(part.removeprefix("kl_"), interval))
        return values


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
