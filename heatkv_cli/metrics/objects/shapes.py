"""The shapes score: is the picture of tiny's world what its prompt asks for, by GenEval's rules and an exact detector.

Also holds the palette of that world, from which ``scripts/shapes_world.py`` draws. The detector is right on every
picture of a scene (tests); on generated pictures it never abstains: every coloured blob is one of the three shapes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from heatkv_cli.metrics.base import ImageMetric, Sample, Score, Spec, Value
from heatkv_cli.metrics.intervals import DEFAULT, Bootstrap, mean_value
from heatkv_cli.metrics.objects.decisions import TASKS, Detection, Rules, decide, judged_by
from heatkv_cli.metrics.parameters import parameter
from heatkv_cli.metrics.scores import Pixels, image_of

PALETTE: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.12, 0.12),
    "green": (0.13, 0.65, 0.20),
    "blue": (0.15, 0.25, 0.90),
    "yellow": (0.95, 0.85, 0.10),
    "purple": (0.60, 0.15, 0.75),
    "orange": (1.00, 0.50, 0.05),
}
"""Object colours, RGB in [0, 1]."""
GROUNDS: dict[str, tuple[float, float, float]] = {
    "white": (0.97, 0.97, 0.97),
    "gray": (0.60, 0.60, 0.62),
    "black": (0.06, 0.06, 0.08),
}
"""Colours of the flat background, RGB in [0, 1]; none has a chroma, by which objects are told from it."""
SHAPES: tuple[str, ...] = ("circle", "square", "triangle")
ORDER = "position_order"

_COLOUR_NAMES = list(PALETTE)
_COLOURS = np.array(list(PALETTE.values()))


def detect(image: Pixels, min_chroma: float = 0.28, min_area: float = 0.012) -> list[Detection]:
    """Return the objects of a picture.

    Rule: pixels whose largest and smallest channel differ by more than ``min_chroma`` are foreground; its
    4-connected components above ``min_area`` are the objects. Colour: the palette colour nearest to most of the
    pixels. Shape: the template, stretched to the component's bounding box, with the largest IoU, which is the score.

    Args:
        image: (H, W, 3), 8 bit.
        min_chroma: smallest chroma of an object, in [0, 1].
        min_area: share of the picture's area.
    """
    rgb = image.astype(np.float64) / 255
    labels, number = ndimage.label(rgb.max(2) - rgb.min(2) > min_chroma)
    nearest = ((rgb[:, :, None] - _COLOURS) ** 2).sum(3).argmin(2)
    found: list[Detection] = []
    for label, (rows, columns) in enumerate(ndimage.find_objects(labels, number), start=1):
        mask = labels[rows, columns] == label
        if mask.sum() < min_area * labels.size:
            continue
        overlaps = [_iou(mask, template) for template in _templates(*mask.shape)]
        best = int(np.argmax(overlaps))
        votes = np.bincount(nearest[rows, columns][mask], minlength=len(_COLOURS))
        box = (float(columns.start), float(rows.start), float(columns.stop), float(rows.stop))
        found.append(Detection(SHAPES[best], box, overlaps[best], _COLOUR_NAMES[int(votes.argmax())]))
    return found


def _templates(height: int, width: int) -> list[NDArray[np.bool_]]:
    """Each of ``SHAPES`` filling a (height, width) box."""
    y = (np.arange(height)[:, None] + 0.5) / height
    x = (np.arange(width)[None] + 0.5) / width
    circle = (x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.25
    return [circle, np.ones((height, width), dtype=np.bool_), np.abs(x - 0.5) * 2 < y]


def _iou(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    return float((a & b).sum() / (a | b).sum())


@dataclass(frozen=True)
class ShapesScore(ImageMetric):
    """Share of pictures that show what was asked, unweighted mean over GenEval's six tasks.

    Rule: ``decisions.decide`` on ``detect``. The interval resamples prompts within tasks. Variants give the accuracy
    of each task; with a short ``--limit`` the mean is over the tasks that occur, and ``extra['tasks']`` counts them.

    Differs: ``strict`` (default) also wants exactly as many objects as were asked for, in every task, where GenEval
    ignores surplus objects of a class nobody excluded; counting and attribution name colours and positions are
    between coloured objects; detector thresholds are 0, since this detector has no false alarms to filter.

    Args:
        strict: see above.
        threshold: see ``decisions.Rules``, as are the next five.
        counting_threshold: likewise.
        max_objects: likewise.
        nms_threshold: likewise.
        position_threshold: likewise.
        direction_threshold: likewise.
        min_chroma: see ``detect``.
        min_area: see ``detect``.
    """

    SPEC: ClassVar[Spec] = Spec("shapes", "1", "fraction", higher_is_better=True, kind="prompt")

    strict: bool = parameter(True)
    threshold: float = parameter(0.0, least=0, most=1)
    counting_threshold: float = parameter(0.0, least=0, most=1)
    max_objects: int = parameter(16, least=1)
    nms_threshold: float = parameter(1.0, above=0, most=1)
    position_threshold: float = parameter(0.1, least=0, most=1)
    direction_threshold: float = parameter(0.5, least=0, most=1)
    min_chroma: float = parameter(0.28, least=0, most=1)
    min_area: float = parameter(0.012, least=0, most=1)

    @property
    def rules(self) -> Rules:
        """Constants of the judgement."""
        return Rules(
            threshold=self.threshold,
            counting_threshold=self.counting_threshold,
            max_objects=self.max_objects,
            nms_threshold=self.nms_threshold,
            position_threshold=self.position_threshold,
            direction_threshold=self.direction_threshold,
            strict=self.strict,
        )

    def check_prompt(self, prompt_id: str, meta: Mapping[str, Any]) -> None:
        """Check that the prompt says what its picture should show.

        Raises:
            ConfigError: it has no usable ``tag`` and ``include``.
        """
        judged_by(self.spec.name, prompt_id, meta, "use benchmark=shapes, or leave shapes out of the metrics")

    def score(self, sample: Sample) -> Score:
        """Return 1 if the picture shows what was asked, else 0; the note says what is wrong.

        Raises:
            ConfigError: as ``check_prompt``.
            ArtifactError: the sample has no image.
        """
        self.check_prompt(sample.prompt_id, sample.meta)
        metadata = sample.meta
        detections = detect(image_of(f"metric {self.spec.name}", sample), self.min_chroma, self.min_area)
        decision = decide(detections, metadata, self.rules)
        parts = {}
        if any("position" in group for group in metadata["include"]):
            anywhere = [{k: v for k, v in group.items() if k != "position"} for group in metadata["include"]]
            if decide(detections, {**metadata, "include": anywhere}, self.rules).correct:
                parts[ORDER] = float(decision.correct)
        return Score(sample.prompt_id, sample.index, float(decision.correct), metadata["tag"], parts, decision.reason)

    def self_check(self) -> str:
        """Return '' where a red square on white is found, as the only object; else what is wrong."""
        picture = np.full((64, 64, 3), 247, np.uint8)
        picture[16:40, 20:44] = [round(255 * level) for level in PALETTE["red"]]
        found = detect(picture, self.min_chroma, self.min_area)
        fine = found == [Detection("square", (20, 16, 44, 40), 1.0, "red")]
        return "" if fine else f"on a picture of a red square it sees {found}"

    def summarise(
        self, scores: Sequence[Score], baseline: Sequence[Score] | None = None, bootstrap: Bootstrap = DEFAULT
    ) -> list[Value]:
        """Return the mean over tasks (headline), the accuracy of each task, and the order of positions.

        `position_order` is the share of right positions among the pictures that have the right objects: 0.25 to 0.5
        by chance, whatever the objects are like.

        Raises:
            ValueError: no scores.
        """
        tasks = [task for task in TASKS if any(s.stratum == task for s in scores)]
        tasks += sorted({s.stratum for s in scores} - set(tasks))
        placed = [replace(s, value=s.parts[ORDER]) for s in scores if ORDER in s.parts]

        def value(variant: str, chosen: Sequence[Score], against: Sequence[Score] | None) -> Value:
            return mean_value(variant, chosen, against, bootstrap, stratified=True)

        headline = mean_value("", scores, baseline, bootstrap, stratified=True, extra={"tasks": len(tasks)})
        by_task = [value(task, [s for s in scores if s.stratum == task], baseline) for task in tasks]
        return [headline, *by_task, *([value(ORDER, placed, None)] if placed else [])]
