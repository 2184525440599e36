"""KL per bit against the full cache, teacher-forced: the attention error alone, without the chaos of sampling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from heatkv_cli.errors import ArtifactError
from heatkv_cli.metrics.base import Kind, Pass, Sample, Score, Value, paired_difference
from heatkv_cli.metrics.intervals import bootstrap_interval


@dataclass(frozen=True)
class KLPerBit:
    """KL(full || method) per bit in nats, mean over all bits of all tokens of target scales 1..K-1.

    Rule: the forced pass feeds the full run's bits at every scale through the ordinary cache path and compares the
    logits that sampling uses (after guidance, tau = 1, before top-k and top-p). Variants give each target scale.

    Args:
        resamples, confidence, seed: of the bootstrap over prompts.

    Source: design of this toolkit (specs/methods.md 1.8 e).
    """

    resamples: int = 10_000
    confidence: float = 0.95
    seed: int = 0
    name: ClassVar[str] = "kl"
    version: ClassVar[str] = "1"
    unit: ClassVar[str] = "nats per bit"
    higher_is_better: ClassVar[bool] = False
    kind: ClassVar[Kind] = "paired"
    needs: ClassVar[Pass] = "forced"

    def score(self, sample: Sample) -> Score:
        """The recorded KL of one image.

        Raises:
            ArtifactError: the pass recorded none.
        """
        if "kl" not in sample.recorded:
            raise ArtifactError(f"metric kl: nothing was recorded for prompt {sample.prompt_id}", "run it again")
        parts = {key: value for key, value in sample.recorded.items() if key.startswith("kl_s")}
        return Score(sample.prompt_id, sample.index, sample.recorded["kl"], parts=parts)

    def summarise(self, scores: Sequence[Score], baseline: Sequence[Score] | None = None) -> list[Value]:
        """Mean over images (headline), and the mean of each target scale.

        Raises:
            ValueError: no scores.
        """
        bootstrap = {"resamples": self.resamples, "confidence": self.confidence, "seed": self.seed}
        prompts = [s.prompt_id for s in scores]
        difference = paired_difference(scores, baseline, **bootstrap)  # type: ignore[arg-type]
        values = [Value.of("", bootstrap_interval([s.value for s in scores], prompts, **bootstrap), difference)]  # type: ignore[arg-type]
        for part in sorted(scores[0].parts, key=lambda name: int(name.removeprefix("kl_s"))):
            interval = bootstrap_interval([s.parts[part] for s in scores], prompts, **bootstrap)  # type: ignore[arg-type]
            values.append(Value.of(part.removeprefix("kl_"), interval))
        return values
