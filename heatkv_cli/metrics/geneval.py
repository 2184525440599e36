"""GenEval: does the picture show the objects, numbers, colours and places that its prompt asks for?

Detector (``detector.py``), colours (``colours.py``) and judgement (``decisions.py``, shared with the shapes score).
What was detected is kept as lines of JSON, from which everything can be judged again without a network.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from heatkv_cli.errors import ArtifactError, ConfigError, HeatKVError, SetupError
from heatkv_cli.metrics.base import Image, Kind, Pass, Sample, Score, Value, image_of
from heatkv_cli.metrics.clip_input import read_picture
from heatkv_cli.metrics.colours import CHECKPOINT, ColourNamer
from heatkv_cli.metrics.decisions import TASKS, Detection, Rules, decide
from heatkv_cli.metrics.detector import DETECTORS, NAMES, Detector, Instance
from heatkv_cli.metrics.summary import Bootstrap, by_stratum, mean_value
from heatkv_cli.metrics.weights import find_weights, weights_sha256
from heatkv_cli.results import write_file

KNOWN = Path(__file__).resolve().parent.parent / "assets" / "known-cat.jpg"
"""One cat, and nothing else; chelsea of scikit-image (public domain, CC0)."""


@dataclass(frozen=True)
class GenEval:
    """Share of pictures that are right, unweighted mean over GenEval's six tasks.

    Rule: ``decisions.decide`` with GenEval's constants on what the detector finds; the colours of the objects of a
    class that has an asked colour are determined. The interval resamples prompts within tasks. Variants give each
    task, ``images`` the mean over pictures and ``prompts`` the share of prompts with a right picture.

    Args:
        detector: ``mmdet-swin-s`` is GenEval's own. ``meta-swin-s`` is the same network from another training run: its
            numbers are near, but not GenEval's.
        detector_weights, clip_weights: files; None looks as ``metrics/weights.py`` says.
        detections: file for what was found, one line of JSON per picture; lines that are there already are not
            computed again. None keeps nothing.
        self_test: first look at a known picture, and refuse to go on if the detector or the colours fail on it.
        threshold, counting_threshold, max_objects, nms_threshold, position_threshold: constants of ``decisions.Rules``.
        min_score: what is less certain is not even written down; below both thresholds.
        clip_arch, detector_config: other networks, see ``ColourNamer`` and ``Detector``.
        device: where the networks run, in float32.
        weights_folder: the first of the places where files are looked for.
        resamples, confidence, seed: of the bootstrap.

    Source: Ghosh et al., arXiv 2310.11513; djghosh13/geneval at af4902f, ``evaluation/evaluate_images.py`` and
        ``summary_scores.py``.
    Differs: runs without mmdet, so the resized picture may be off by one level; objects of equal score are ordered by
        query, there by numpy's sort.
    """

    detector: Literal["mmdet-swin-s", "meta-swin-s"] = "mmdet-swin-s"
    detector_weights: str | None = None
    clip_weights: str | None = None
    detections: str | None = None
    self_test: bool = True
    threshold: float = 0.3
    counting_threshold: float = 0.9
    max_objects: int = 16
    nms_threshold: float = 1.0
    position_threshold: float = 0.1
    min_score: float = 0.05
    clip_arch: str = "ViT-L-14-quickgelu"
    detector_config: Mapping[str, Any] | None = None
    device: str = "cpu"
    weights_folder: Path | None = None
    resamples: int = 10_000
    confidence: float = 0.95
    seed: int = 0
    name: ClassVar[str] = "geneval"
    version: ClassVar[str] = "1"
    unit: ClassVar[str] = "fraction"
    higher_is_better: ClassVar[bool] = True
    kind: ClassVar[Kind] = "prompt"
    needs: ClassVar[Pass] = "free"

    def __post_init__(self) -> None:
        """Check the constants.

        Raises:
            ConfigError: ``min_score`` would hide what a threshold asks for.
        """
        if self.min_score > min(self.threshold, self.counting_threshold):
            raise ConfigError(
                f"metric geneval: min_score {self.min_score} is above a threshold", "metric.geneval.min_score=0.05"
            )

    @property
    def settings(self) -> str:
        """What else decides the number, for result rows."""
        return f"{self.detector} {self.clip_arch}"

    @property
    def rules(self) -> Rules:
        """Constants of the judgement."""
        return Rules(
            threshold=self.threshold,
            counting_threshold=self.counting_threshold,
            max_objects=self.max_objects,
            nms_threshold=self.nms_threshold,
            position_threshold=self.position_threshold,
        )

    @cached_property
    def weights(self) -> tuple[Path, Path]:
        """Files of detector and CLIP.

        Raises:
            SetupError: one is missing.
        """
        found = find_weights(DETECTORS[self.detector], self.detector_weights, self.weights_folder)
        return found, find_weights(CHECKPOINT, self.clip_weights, self.weights_folder)

    @cached_property
    def weights_sha256(self) -> str:
        """One digest for both files; where they are missing, that of the detections which are there already.

        Raises:
            SetupError: files are missing, and there are no detections of one origin.
        """
        try:
            lines = [weights_sha256(path) for path in self.weights]
        except SetupError:
            origins = {record["weights_sha256"] for record in self._known.values()}
            if len(origins) != 1:
                raise
            return str(origins.pop())
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def writing_to(self, path: Path) -> GenEval:
        """The same metric with ``path`` for its detections, unless the configuration names a file."""
        return self if self.detections else replace(self, detections=str(path))

    @cached_property
    def _opened(self) -> tuple[Detector, ColourNamer] | HeatKVError:
        """The networks, or why they are of no use: found out once, and not for every picture."""
        try:
            detector, clip = self.weights
            config = None if self.detector_config is None else dict(self.detector_config)
            eyes = Detector(detector, self.device, config), ColourNamer(clip, self.clip_arch, self.device)
        except HeatKVError as error:
            return error
        if self.self_test and (wrong := check(*eyes)):
            return ArtifactError(
                f"metric geneval refuses to judge: {wrong}",
                "check the weights with 'heatkv doctor'; metric.geneval.self_test=false goes on all the same",
            )
        return eyes

    @property
    def _eyes(self) -> tuple[Detector, ColourNamer]:
        if isinstance(self._opened, HeatKVError):
            raise self._opened
        return self._opened

    @cached_property
    def _known(self) -> dict[tuple[str, int], dict[str, Any]]:
        return read_detections(Path(self.detections)) if self.detections else {}

    def self_check(self) -> str:
        """Look at the known picture; returns '' where all is well, else what is wrong.

        Raises:
            SetupError: weights or packages are missing.
        """
        return check(*replace(self, self_test=False)._eyes)

    def score(self, sample: Sample) -> Score:
        """1 if the picture shows what was asked, else 0; the note says what is wrong.

        Raises:
            ConfigError: the prompt has no usable ``tag`` and ``include``.
            ArtifactError: the sample has no image and nothing was written down for it, or the self-test failed.
            SetupError: weights or packages are missing.
        """
        if "tag" not in sample.meta or not sample.meta.get("include"):
            raise ConfigError(
                f"metric geneval: prompt {sample.prompt_id} has no 'tag' and 'include' to be judged by",
                "use benchmark=geneval, or leave geneval out of the metrics",
            )
        groups = [*sample.meta["include"], *sample.meta.get("exclude", ())]
        if unknown := {str(group["class"]) for group in groups} - set(NAMES):
            raise ConfigError(
                f"metric geneval: prompt {sample.prompt_id} asks for {', '.join(sorted(unknown))}, which the detector "
                "does not know",
                "classes are COCO's 80 under GenEval's names",
            )
        return self.judge(self._record(sample))

    def judge(self, record: Mapping[str, Any]) -> Score:
        """Score of one line of detections, by this metric's constants.

        Raises:
            ConfigError: the prompt's metadata cannot be judged by.
        """
        objects = [Detection(o["class"], tuple(o["box"]), o["score"], o.get("colour")) for o in record["objects"]]
        try:
            decision = decide(objects, record["metadata"], self.rules)
        except (KeyError, ValueError) as error:
            raise ConfigError(f"metric geneval: prompt {record['prompt_id']}: {error}", "correct the list") from error
        task = str(record["metadata"]["tag"])
        return Score(record["prompt_id"], record["index"], float(decision.correct), task, note=decision.reason)

    def _record(self, sample: Sample) -> dict[str, Any]:
        """What is in the picture: as written down, or as the networks see it."""
        metadata = {key: sample.meta[key] for key in ("tag", "include", "exclude") if key in sample.meta}
        expected = {"weights_sha256": self.weights_sha256, "metadata": json.loads(json.dumps(metadata))}
        if sample.image is not None:
            expected["image_sha256"] = hashlib.sha256(np.ascontiguousarray(sample.image).tobytes()).hexdigest()
        known = self._known.get((sample.prompt_id, sample.index))
        same = known is not None and all(known.get(key) == value for key, value in expected.items())
        if known is not None and same and known["min_score"] <= self.min_score and known["most"] >= self.max_objects:
            return known
        image = image_of(self.name, sample)
        record = {"prompt_id": sample.prompt_id, "index": sample.index, "size": list(image.shape[:2])}
        record |= {
            "detector": self.detector,
            "clip": self.clip_arch,
            "min_score": self.min_score,
            "most": self.max_objects,
            **expected,
            "objects": self._look(image, metadata),
        }
        if self.detections:
            path = Path(self.detections)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, sort_keys=True) + "\n")
            self._known[sample.prompt_id, sample.index] = record
        return record

    def _look(self, image: Image, metadata: Mapping[str, Any]) -> list[dict[str, Any]]:
        detector, name_colours = self._eyes
        found = detector(image, self.min_score)
        coloured: dict[int, str] = {}
        for name in dict.fromkeys(group["class"] for group in metadata["include"] if "color" in group):
            chosen = [i for i, instance in enumerate(found) if NAMES[instance.label] == name][: self.max_objects]
            colours = name_colours(image, [found[i] for i in chosen], name)
            coloured |= dict(zip(chosen, colours, strict=True))
        return [_plain(instance, coloured.get(i)) for i, instance in enumerate(found)]

    def summarise(self, scores: Sequence[Score], baseline: Sequence[Score] | None = None) -> list[Value]:
        """Mean over tasks (headline), each task, pictures and prompts.

        With a short ``--limit`` the mean is over the tasks that occur, and ``extra['tasks']`` counts them.

        Raises:
            ValueError: no scores.
        """
        bootstrap = Bootstrap(self.resamples, self.confidence, self.seed)
        tasks = by_stratum(scores, baseline, bootstrap, TASKS)
        best: dict[str, list[Score]] = defaultdict(list)
        for score in scores:
            best[score.prompt_id].append(score)
        prompts = [replace(found[0], index=0, value=max(s.value for s in found)) for found in best.values()]
        return [
            mean_value("", scores, baseline, bootstrap, stratified=True, extra={"tasks": len(tasks)}),
            *tasks,
            mean_value("images", scores, baseline, bootstrap),
            mean_value("prompts", prompts, None, bootstrap),
        ]


def _plain(instance: Instance, colour: str | None) -> dict[str, Any]:
    """An object as it is written down; numbers in full, so that judging again is the same."""
    plain = {"class": NAMES[instance.label], "score": instance.score, "box": list(instance.box)}
    return plain if colour is None else {**plain, "colour": colour}


def read_detections(path: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """Lines of a detections file by prompt and picture; the last one counts. Half a line at the end is cut off.

    Raises:
        ArtifactError: a line is not JSON, or not of this form.
    """
    if not path.is_file():
        return {}
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:  # an interrupted run
        write_file(path, whole)
    found = {}
    for number, line in enumerate(whole.decode("utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
            found[record["prompt_id"], record["index"]] = record
        except (ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"{path}, line {number} is no detection: {error}", "remove that line") from error
    return found


def rescore(path: Path, metric: GenEval) -> list[Score]:
    """Scores of all pictures of a detections file by a metric's constants, in the file's order; no network is loaded.

    Raises:
        ArtifactError, ConfigError: as ``read_detections`` and ``GenEval.judge``.
    """
    return [metric.judge(record) for record in read_detections(path).values()]


def check(detector: Detector, name_colours: ColourNamer) -> str:
    """Whether the networks see what is on a known picture: '' if so, else what is wrong.

    One cat has to be found with more certainty than anything else; and plain red, green and blue have to be named.
    """
    found = [(NAMES[i.label], i.score) for i in detector(read_picture(KNOWN), 0.05)]
    cats = [score for name, score in found if name == "cat" and score > 0.5]
    if len(cats) != 1 or found[0][0] != "cat":
        seen = ", ".join(f"{name} {score:.2f}" for name, score in found[:4]) or "nothing"
        return f"on a picture of one cat the detector sees {seen}"
    plain = {"red": (200, 20, 20), "green": (20, 150, 20), "blue": (20, 40, 200)}
    for colour, rgb in plain.items():
        square = np.full((64, 64, 3), rgb, np.uint8)
        named = name_colours(square, [Instance(0, 1.0, (0, 0, 64, 64), np.ones((64, 64), np.bool_))], "square")[0]
        if named != colour:
            return f"a {colour} square is called {named}"
    return ""
