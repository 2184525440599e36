"""GenEval: does the picture show the objects, numbers, colours and places that its prompt asks for?

Detector (``detector.py``), colours (``colours.py``) and judgement (``decisions.py``, shared with the shapes score).
Detections are kept as lines of JSON, from which everything can be judged again without a network.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from heatkv_cli.errors import ArtifactError, ConfigError, SetupError
from heatkv_cli.metrics.base import ImageMetric, Networked, Sample, Score, Spec, Value
from heatkv_cli.metrics.clip.network import OPENAI, OPENAI_ARCH, clip_bytes, load_clip
from heatkv_cli.metrics.intervals import DEFAULT, Bootstrap, by_stratum, mean_value
from heatkv_cli.metrics.networks import loaded
from heatkv_cli.metrics.objects.colours import ColourNamer
from heatkv_cli.metrics.objects.decisions import TASKS, Detection, Rules, decide, judged_by
from heatkv_cli.metrics.objects.detector import DETECTORS, NAMES, PARAMETERS, Detector, Instance
from heatkv_cli.metrics.parameters import aside, parameter
from heatkv_cli.metrics.pictures import read_image
from heatkv_cli.metrics.scores import Pixels, image_of
from heatkv_cli.metrics.weights import Wanted
from heatkv_cli.results import write_file

KNOWN = Path(__file__).resolve().parents[2] / "assets" / "known-cat.jpg"
"""One cat, and nothing else; chelsea of scikit-image (public domain, CC0)."""


@dataclass(frozen=True)
class GenEval(Networked, ImageMetric):
    """Share of pictures that are right, unweighted mean over GenEval's six tasks.

    Rule: ``decisions.decide`` with GenEval's constants on what the detector finds; the colours of the objects of a
    class that has an asked colour are determined. The interval resamples prompts within tasks. Variants give each
    task, ``images`` the mean over pictures and ``prompts`` the share of prompts with a right picture.

    Args:
        detector: ``mmdet-swin-s`` is GenEval's own. ``meta-swin-s`` is the same network from another training run: its
            numbers are near, but not GenEval's.
        detector_weights: file of the detector; None for the usual places.
        clip_weights: file of CLIP; None for the usual places.
        detections: file for what was found, one line of JSON per picture; lines that are there already are not
            computed again. None keeps it beside the run's scores.
        self_test: first look at a known picture, and refuse to go on if the detector or the colours fail on it.
        threshold: see ``decisions.Rules``, as are the next four.
        counting_threshold: likewise.
        max_objects: likewise.
        nms_threshold: likewise.
        position_threshold: likewise.
        min_score: less certain objects are not even written down; at most both thresholds.
        clip_arch: open_clip's name of the network that names colours.
        detector_config: sizes of another detector, see ``Detector``.

    Source: Ghosh et al., arXiv 2310.11513; djghosh13/geneval at af4902f, ``evaluation/evaluate_images.py`` and
        ``summary_scores.py``.
    Differs: runs without mmdet, so the resized picture may be off by one level; objects of equal score are ordered by
        query, there by numpy's sort.

    Raises:
        ConfigError: ``min_score`` would hide what a threshold asks for.
    """

    SPEC: ClassVar[Spec] = Spec("geneval", "1", "fraction", higher_is_better=True, kind="prompt")

    detector: Literal["mmdet-swin-s", "meta-swin-s"] = parameter("mmdet-swin-s")
    detector_weights: str | None = aside(None)
    clip_weights: str | None = aside(None)
    detections: str | None = aside(None)
    self_test: bool = aside(True)
    threshold: float = parameter(0.3, least=0, most=1)
    counting_threshold: float = parameter(0.9, least=0, most=1)
    max_objects: int = parameter(16, least=1)
    nms_threshold: float = parameter(1.0, above=0, most=1)
    position_threshold: float = parameter(0.1, least=0, most=1)
    min_score: float = aside(0.05, least=0, most=1)
    clip_arch: str = parameter(OPENAI_ARCH)
    detector_config: Mapping[str, Any] | None = parameter(None)

    def __post_init__(self) -> None:
        """Check all parameters."""
        super().__post_init__()
        if self.min_score > min(self.threshold, self.counting_threshold):
            raise ConfigError(
                f"metric geneval: min_score {self.min_score} is above a threshold", "metric.geneval.min_score=0.05"
            )

    @property
    def network(self) -> str:
        """Detector and CLIP."""
        return f"geneval-{self.detector}"

    def network_bytes(self) -> int:
        """Return the bytes of both networks; raises SetupError where the size is that of a missing file."""
        detector, clip = self.files()
        own = 4 * PARAMETERS if self.detector_config is None else detector.path.stat().st_size
        return own + clip_bytes(self.clip_arch, clip)

    def packages(self) -> tuple[tuple[str, str], ...]:
        """Return transformers, which has the detector, and open_clip."""
        return (("transformers", "geneval"), ("open_clip", "geneval"))

    def files(self) -> tuple[Wanted, ...]:
        """Return the files of detector and CLIP."""
        detector = Wanted(DETECTORS[self.detector], self.detector_weights, self.weights_folder)
        return detector, Wanted(OPENAI, self.clip_weights, self.weights_folder)

    def digest(self) -> str:
        """Return one digest for both files; where they are missing, that of the detections which are there already.

        Raises:
            SetupError: files are missing, and there are no detections of one origin.
        """
        try:
            return super().digest()
        except SetupError:
            origins = {record["weights_sha256"] for record in self._known.values()}
            if len(origins) != 1:
                raise
            return str(origins.pop())

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

    def writing_to(self, folder: Path, shard: tuple[int, int]) -> GenEval:
        """Return the same metric with a file for its detections, unless the configuration names one."""
        path = folder / "detections" / f"{shard[0]}-of-{shard[1]}.jsonl"
        return self if self.detections else replace(self, detections=str(path))

    def _eyes(self) -> tuple[Detector, ColourNamer]:
        """Return the networks.

        Raises:
            SetupError: files or packages are missing.
            ArtifactError: a file does not fit, or the self-test failed.
        """
        detector, clip = self.files()
        path, config = detector.verified(), None if self.detector_config is None else dict(self.detector_config)
        key = ("geneval", super().digest(), json.dumps(config), self.clip_arch, self.device)
        eyes = loaded(key, lambda: (Detector(path, self.device, config), self._colours(clip)))
        if self.self_test and (wrong := loaded((*key, "self-test"), lambda: check(*eyes))):
            raise ArtifactError(
                f"metric geneval refuses to judge: {wrong}",
                "check the weights with 'heatkv doctor'; metric.geneval.self_test=false goes on all the same",
            )
        return eyes

    def _colours(self, wanted: Wanted) -> ColourNamer:
        option = "metric.geneval.clip_arch"
        clip = load_clip(self.clip_arch, wanted, self.device, option=option, extra="geneval", quick_gelu=True)
        return ColourNamer(clip, self.device)

    @cached_property
    def _known(self) -> dict[tuple[str, int], dict[str, Any]]:
        return read_detections(Path(self.detections)) if self.detections else {}

    def self_check(self) -> str:
        """Look at the known picture; return '' where all is well, else what is wrong.

        Raises:
            SetupError: weights or packages are missing.
        """
        return check(*replace(self, self_test=False)._eyes())

    def check_prompt(self, prompt_id: str, meta: Mapping[str, Any]) -> None:
        """Check that the prompt says what its picture should show, in the detector's words.

        Raises:
            ConfigError: it has no usable ``tag`` and ``include``, or asks for a class the detector does not know.
        """
        judged_by(self.spec.name, prompt_id, meta, "use benchmark=geneval, or leave geneval out of the metrics")
        groups = [*meta["include"], *meta.get("exclude", ())]
        if unknown := {group["class"] for group in groups} - set(NAMES):
            raise ConfigError(
                f"metric geneval: prompt {prompt_id} asks for {', '.join(sorted(unknown))}, which the detector "
                "does not know",
                "classes are COCO's 80 under GenEval's names",
            )

    def score(self, sample: Sample) -> Score:
        """Return 1 if the picture shows what was asked, else 0; the note says what is wrong.

        Raises:
            ConfigError: as ``check_prompt``.
            ArtifactError: the sample has no image and nothing was written down for it, or the self-test failed.
            SetupError: weights or packages are missing.
        """
        self.check_prompt(sample.prompt_id, sample.meta)
        return self.judge(self._record(sample))

    def judge(self, record: Mapping[str, Any]) -> Score:
        """Return the score of one line of detections, by this metric's constants.

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
        """Return the objects of the picture: as written down, or as the networks see them."""
        metadata = {key: sample.meta[key] for key in ("tag", "include", "exclude") if key in sample.meta}
        expected = {"weights_sha256": self.digest(), "metadata": json.loads(json.dumps(metadata))}
        if sample.image is not None:
            expected["image_sha256"] = hashlib.sha256(np.ascontiguousarray(sample.image).tobytes()).hexdigest()
        known = self._known.get((sample.prompt_id, sample.index))
        same = known is not None and all(known.get(key) == value for key, value in expected.items())
        if known is not None and same and known["min_score"] <= self.min_score and known["most"] >= self.max_objects:
            return known
        image = image_of(self.spec.name, sample)
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

    def _look(self, image: Pixels, metadata: Mapping[str, Any]) -> list[dict[str, Any]]:
        detector, name_colours = self._eyes()
        found = detector(image, self.min_score)
        coloured: dict[int, str] = {}
        for name in dict.fromkeys(group["class"] for group in metadata["include"] if "color" in group):
            chosen = [i for i, instance in enumerate(found) if NAMES[instance.label] == name][: self.max_objects]
            colours = name_colours(image, [found[i] for i in chosen], name)
            coloured |= dict(zip(chosen, colours, strict=True))
        return [_plain(instance, coloured.get(i)) for i, instance in enumerate(found)]

    def summarise(
        self, scores: Sequence[Score], baseline: Sequence[Score] | None = None, bootstrap: Bootstrap = DEFAULT
    ) -> list[Value]:
        """Return the mean over tasks (headline), each task, pictures and prompts.

        With a short ``--limit`` the mean is over the tasks that occur, and ``extra['tasks']`` counts them.

        Raises:
            ValueError: no scores.
        """
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
    """Return an object as it is written down; numbers in full, so that judging again is the same."""
    plain = {"class": NAMES[instance.label], "score": instance.score, "box": list(instance.box)}
    return plain if colour is None else {**plain, "colour": colour}


def read_detections(path: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """Return the lines of a detections file by prompt and picture; the last one counts.

    Half a line at the end, of an interrupted run, is cut off.

    Raises:
        ArtifactError: a line is not JSON, or not of this form.
    """
    if not path.is_file():
        return {}
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        write_file(path, whole)
    found = {}
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            record = json.loads(line.decode("utf-8"))
            _check_record(record)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ArtifactError(f"{path}, line {number} is no detection: {error}", "remove that line") from error
        found[record["prompt_id"], record["index"]] = record
    return found


def _check_record(record: Any) -> None:
    """Check the form of a line.

    Raises:
        ValueError, KeyError, TypeError: it has another one.
    """
    types = {"prompt_id": str, "index": int, "weights_sha256": str, "image_sha256": str, "most": int}
    for key, kind in {**types, "metadata": dict, "objects": list, "min_score": (int, float)}.items():
        if not isinstance(record[key], kind):  # type: ignore[arg-type]
            raise TypeError(f"{key} is {record[key]!r}")
    for each in record["objects"]:
        numbers = [each["score"], *each["box"]]
        if len(numbers) != 5 or not all(isinstance(x, (int, float)) and math.isfinite(x) for x in numbers):
            raise TypeError(f"an object has the score and box {numbers}")
        if not isinstance(each["class"], str):
            raise TypeError(f"an object has the class {each['class']!r}")


def rescore(path: Path, metric: GenEval) -> list[Score]:
    """Return the scores of all pictures of a detections file, in its order, by a metric's constants without a network.

    Raises:
        ArtifactError, ConfigError: as ``read_detections`` and ``GenEval.judge``.
    """
    return [metric.judge(record) for record in read_detections(path).values()]


def check(detector: Detector, name_colours: ColourNamer) -> str:
    """Return '' where the networks see what is on a known picture, else what is wrong.

    One cat has to be found with more certainty than anything else; and plain red, green and blue have to be named.
    """
    found = [(NAMES[i.label], i.score) for i in detector(read_image(KNOWN), 0.05)]
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
