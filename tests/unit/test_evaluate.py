"""The order of work of `eval`, with models and metrics that only say when they are used.

Folders, traces, rows and the memory of networks are the real ones. A run paints its number into its images (and records
it where a pass makes none), so that a metric knows whose images it is given. Every event also notes which models and
networks are in memory, and which rows results.csv holds, at that moment.
"""

from __future__ import annotations

import csv
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from heatkv_cli.config import MetricConfig, Plan, compose
from heatkv_cli.console import Console
from heatkv_cli.errors import ArtifactError
from heatkv_cli.metrics import networks
from heatkv_cli.metrics.base import ImageMetric, Metric, Sample, Score, Spec
from heatkv_cli.models.base import Trace
from heatkv_cli.pipeline import evaluate, passes, traces
from heatkv_cli.planning.preflight import Ready

MODELS, METHODS = ("tiny", "infinity-2b"), ("full", "streaming", "window")
RUNS = [(model, method) for model in MODELS for method in METHODS]
BATCHES = ("first", "second")
AT_ONCE = {"plain": False, "outline": True, "bits": True}
"""Metrics without a network, in the order asked for, and whether they compare with the full run."""
JUDGES = {"deep": ("one", False), "round": ("two", False), "sharp": ("one", True)}
"""Metrics with one: its name, and whether they compare with the full run."""

Event = tuple[str, ...]


class Thing:
    """Something large, a model or a network."""


@dataclass
class Model(Thing):
    name: str

    def prepare(self, items: object, root: Path) -> None:
        pass

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        return latent.to(torch.uint8)[:, None, None, :].expand(-1, 2, 2, 3)

    def divergence(self, full: Sequence[torch.Tensor], logits: Sequence[torch.Tensor]) -> dict[str, float]:
        assert int(full[0]) % len(METHODS) == 0, "beside the full run of the same model"
        return {"run": float(logits[0])}


@dataclass
class Diary:
    """What happened, in order."""

    out: Path
    events: list[Event] = field(default_factory=list)
    memory: list[set[str]] = field(default_factory=list)  # at each event
    rows: list[set[Event]] = field(default_factory=list)  # at each event
    stop: Callable[[Event], None] = lambda event: None
    things: dict[str, weakref.ref[Thing]] = field(default_factory=dict)

    def note(self, *event: str) -> None:
        if self.events[-1:] != [event]:  # an image more is no event
            self.memory.append({name for name, thing in self.things.items() if thing() is not None})
            self.rows.append(self.written())
            self.events.append(event)
        self.stop(event)

    def born(self, name: str, thing: Thing) -> Thing:
        self.things[name] = weakref.ref(thing)
        return thing

    def written(self, status: str = "ok") -> set[Event]:
        """(metric, model, method) of the rows on disk."""
        path = self.out / "results.csv"
        if not path.exists():
            return set()
        with path.open(newline="") as f:
            found = [row for row in csv.DictReader(f) if row["status"] == status]
        return {(row["metric"], row["model"], row["method"]) for row in found if row["metric"] in AT_ONCE | JUDGES}

    def before(self, i: int) -> set[Event]:
        """(metric, model, method) that were measured before an event."""
        return {event[1:] for event in self.events[:i] if event[0] == "score"} - {self.events[i][1:]}


def metric(diary: Diary, name: str, network: str = "", paired: bool = False, needs: str = "free") -> Metric:
    @dataclass(frozen=True)
    class Fake(ImageMetric):
        SPEC = Spec(name, "1", "", True, "paired" if paired else "prompt", needs)  # type: ignore[arg-type]

        @property
        def network(self) -> str:
            return network

        def score_batch(self, samples: Sequence[Sample]) -> list[Score]:
            judge = networks.loaded(("fake", network), lambda: diary.born(network, Thing())) if network else None
            for sample in samples:
                whose = int(sample.recorded["run"] if sample.image is None else sample.image[0, 0, 0])
                diary.note("score", name, *RUNS[whose])
            del judge
            return [Score(sample.prompt_id, sample.index, 1.0) for sample in samples]

    return Fake()


@pytest.fixture
def diary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Diary]:
    diary = Diary(tmp_path)

    def load_model(cfg: Any, files: object) -> Thing:
        diary.note("load", cfg.model.name)
        return diary.born(cfg.model.name, Model(cfg.model.name))

    def make_batch(
        job: Any, model: Model, batch: passes.Batch, forced: Sequence[Any], generators: Any, watch: bool = False
    ) -> passes.Made:
        assert model.name == job.cfg.model.name
        kind = "forced" if generators is None else "layout" if forced else "free"
        diary.note(kind, model.name, job.cfg.method.name, BATCHES[job.batches.index(tuple(batch))])
        number = torch.full((len(batch), 1), float(RUNS.index((model.name, job.cfg.method.name))))
        return passes.Made(Trace((number.int(),), (number,), number), {"beta_live": 0.5}, {"batch": batch[0].image_id})

    monkeypatch.setattr(passes, "load_model", load_model)
    monkeypatch.setattr(passes, "make_batch", make_batch)
    monkeypatch.setattr(evaluate, "preflight", lambda plan, resolver: Ready())
    yield diary
    networks.release()


def plan_of(diary: Diary) -> Plan:
    """Two models, their full runs not asked for; judges before what needs no network."""
    metrics = [metric(diary, name, network, paired) for name, (network, paired) in JUDGES.items()]
    needs = {"plain": "free", "outline": "layout", "bits": "forced"}
    metrics += [metric(diary, name, "", paired, needs[name]) for name, paired in AT_ONCE.items()]
    leaves = tuple(MetricConfig(each.spec.name, "fake", object=each) for each in metrics)
    prompts = diary.out / "prompts.txt"
    prompts.write_text("a red circle\na blue square\na green circle\na white square\n")
    words = [f"model={','.join(MODELS)}", f"method={','.join(METHODS[1:])}", "budget=0.5", "weights=random", "limit=3"]
    words += ["benchmark=prompts", f"benchmark.file={prompts}", "runtime.batch_size=2", "contact_sheet=0"]
    words += [f"out={diary.out}"]
    plan = compose(words, command="eval")
    return replace(plan, runs=tuple(replace(run, metrics=leaves) for run in plan.runs))


class Quiet(Console):
    """A console that keeps the tables it is shown."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.tables: list[list[Sequence[Any]]] = []

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str = "") -> None:
        self.tables.append(list(rows))


def passes_of(kind: str, model: str, method: str) -> list[Event]:
    return [(kind, model, method, batch) for batch in BATCHES]


def at_once(model: str, method: str) -> list[Event]:
    return [("score", name, model, method) for name, paired in AT_ONCE.items() if method != "full" or not paired]


def work(model: str, methods: Sequence[str], stored: bool) -> list[Event]:
    """What is done for a model, in words: passes run by run, each with what needs no network; then judge by judge.

    Distributions that were not stored are compared after all other passes, batch by batch, the full run's made once.
    """
    others = [method for method in methods if method != "full"]
    done: list[Event] = [("load", model), *passes_of("free", model, "full"), *at_once(model, "full")]
    for method in others:
        done += passes_of("free", model, method) + passes_of("layout", model, method)
        if stored:
            done += passes_of("forced", model, method) + at_once(model, method)
    if not stored:
        done += [("forced", model, method, batch) for batch in BATCHES for method in methods]
        done += [event for method in others for event in at_once(model, method)]
    for name in ("deep", "sharp", "round"):  # the network `one` has two metrics
        done += [("score", name, model, method) for method in methods if name != "sharp" or method != "full"]
    return done


def check_moments(diary: Diary) -> None:
    """Memory and rows at every event."""
    for i, event in enumerate(diary.events):
        kind, name = event[:2]
        mine = {name} if kind in ("free", "layout", "forced") else set()
        mine |= {JUDGES[name][0]} if kind == "score" and name in JUDGES else set()
        model = {event[2]} if kind == "score" and name in AT_ONCE else set()
        assert diary.memory[i] == mine | model, event
        assert diary.rows[i] - {event[1:]} == diary.before(i), event


@pytest.mark.parametrize("stored", [True, False], ids=["stored", "made again"])
def test_passes_then_judges_model_by_model(stored: bool, diary: Diary, monkeypatch: pytest.MonkeyPatch) -> None:
    if not stored:
        monkeypatch.setattr(traces, "STORED", 0)
    ui = Quiet()
    report = evaluate.run(plan_of(diary), ui)
    assert diary.events == [event for model in MODELS for event in work(model, METHODS, stored)]
    check_moments(diary)
    assert diary.written() == {event[1:] for event in diary.events if event[0] == "score"}
    assert report["status"] == "done" and len(ui.tables) == 2


@pytest.mark.parametrize("kind", ["free", "layout", "forced"])
@pytest.mark.parametrize("stored", [True, False], ids=["stored", "made again"])
def test_a_run_that_fails_leaves_the_others(
    stored: bool, kind: str, diary: Diary, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not stored:
        monkeypatch.setattr(traces, "STORED", 0)

    def stop(event: Event) -> None:
        if event == (kind, "tiny", "streaming", "second"):
            with passes.memory_errors(2):  # two errors, one behind the other
                raise MemoryError

    diary.stop = stop
    report = evaluate.run(plan_of(diary), Quiet())
    whole = [event for model in MODELS for event in work(model, METHODS, stored)]
    broken = ("tiny", "streaming")
    at = whole.index((kind, *broken, "second"))
    later = [event for event in whole[at + 1 :] if event[1:3] != broken and event[2:] != broken]
    assert diary.events == whole[: at + 1] + later
    check_moments(diary)
    assert diary.written("failed") == {(name, *broken) for name in AT_ONCE | JUDGES}
    (failed,) = report["failed"]
    assert failed["reason"] == "out of host memory with batch size 2" and report["status"] == "partial"


def test_without_its_full_run_nothing_of_a_model_is_made(diary: Diary) -> None:
    def stop(event: Event) -> None:
        if event == ("free", "tiny", "full", "first"):
            raise ArtifactError("broken", "mend it")

    diary.stop = stop
    report = evaluate.run(plan_of(diary), Quiet())
    assert diary.events == [("load", "tiny"), ("free", "tiny", "full", "first"), *work("infinity-2b", METHODS, True)]
    check_moments(diary)
    assert len(report["failed"]) == 3
    assert {row[1:] for row in diary.written("failed")} == {("tiny", method) for method in METHODS}


@pytest.mark.parametrize(
    "moment",
    [
        ("free", "tiny", "window", "second"),
        ("forced", "infinity-2b", "streaming", "first"),
        ("score", "deep", "tiny", "streaming"),
    ],
    ids=lambda moment: moment[0],
)
def test_ctrl_c_loses_the_row_in_work_alone(moment: Event, diary: Diary) -> None:
    def stop(event: Event) -> None:
        if event == moment:
            raise KeyboardInterrupt

    diary.stop = stop
    ui, whole = Quiet(), [event for model in MODELS for event in work(model, METHODS, True)]
    with pytest.raises(KeyboardInterrupt):
        evaluate.run(plan_of(diary), ui)
    at = whole.index(moment)
    assert diary.events == whole[: at + 1]
    check_moments(diary)
    assert diary.written() == diary.before(at)
    assert ui.tables, "what is known is shown"

    again = Diary(diary.out)
    diary.__dict__.update(again.__dict__)  # the fakes hold the first one
    networks.release()
    evaluate.run(plan_of(diary), Quiet())
    made = [event for event in whole if event[0] in ("free", "layout", "forced")]
    rest = [event for event in made if whole.index(event) >= at]
    assert [event for event in diary.events if event[0] in ("free", "layout", "forced")] == rest
    assert diary.written() == {event[1:] for event in whole if event[0] == "score"}
