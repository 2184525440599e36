"""eval: the order of work. Passes first, then judges, one in memory at a time; numbers are written as they come.

Model by model:

1. all passes of all its runs; what needs no network is measured as soon as a run's passes end;
2. the model is let go, and metrics with networks follow, network by network, over all its runs.

A metric that lacks weights, a package or images, and a run that fails in a sweep, are rows with a status and a reason;
the others go on. Whatever ends the command, the table of what is known is printed.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from heatkv_cli.config import Plan, RunConfig
from heatkv_cli.console import Console
from heatkv_cli.errors import ArtifactError, HeatKVError
from heatkv_cli.metrics import networks
from heatkv_cli.metrics.base import Metric, SetMetric
from heatkv_cli.pipeline import rows as tables
from heatkv_cli.pipeline.calibrate import calibrate_all
from heatkv_cli.pipeline.contact_sheet import write_contact_sheet
from heatkv_cli.pipeline.generate import tell_infeasible
from heatkv_cli.pipeline.image_folder import reference_of
from heatkv_cli.pipeline.measure import Measured, incomplete, measure, statistics_of
from heatkv_cli.pipeline.passes import Models, run_forced, run_pass
from heatkv_cli.pipeline.samples import items_of_pass
from heatkv_cli.pipeline.traces import are_stored
from heatkv_cli.planning.job import FORCED, FREE, Job
from heatkv_cli.planning.preflight import preflight
from heatkv_cli.planning.resolver import Resolver
from heatkv_cli.results import RunFolder


@dataclass
class Evaluated:
    """A run with its numbers, as far as they are known.

    Args:
        job: the run.
        full: the run it is compared with; None for that one itself.
        costs: bytes, tokens and seconds, the median over batches; empty where this shard has no images.
        made: images that recorded them; fewer than asked for where other shards make the others.
        measured: outcome of each metric so far.
        error: why the run failed; None where it did not.
    """

    job: Job
    full: Evaluated | None
    costs: dict[str, float] = field(default_factory=dict)
    made: int = 0
    measured: dict[str, Measured] = field(default_factory=dict)
    error: HeatKVError | None = None

    @property
    def metrics(self) -> dict[str, Metric]:
        """The metrics that mean something for this run: nothing compares the full run with itself."""
        return {
            name: metric
            for name, metric in self.job.metrics.items()
            if self.full is not None or not against_full(metric)
        }

    @property
    def is_noise_floor(self) -> bool:
        """Whether this is the reference method once more, with other arithmetic."""
        return self.job.cfg.is_reference and self.full is not None


def against_full(metric: Metric) -> bool:
    """Return whether the number only means something beside the full run's images."""
    return metric.spec.kind == "paired" or (isinstance(metric, SetMetric) and metric.reference == "full")


def run(plan: Plan, ui: Console) -> dict[str, Any]:
    """Make what is missing for every run of the plan, compute its metrics, write results, print the table.

    Raises:
        HeatKVError: nothing that was asked for can exist, or the only run failed.
    """
    resolver = Resolver()
    ready = preflight(plan, resolver)
    ready.check(plan)
    for point in ready.infeasible:
        tell_infeasible(point, ui)
    for lack in ready.lacking:
        ui.warn(f"{lack.metric} will be skipped: {lack.what}; {lack.fix}")
    calibrate_all(ready.calibrations, resolver, ui)
    runs, shown = _runs(plan, ready.feasible(plan.runs), resolver)
    everything = [item for same_model in runs for item in same_model]
    path = plan.first.out / "results.csv"
    table = tables.Table(plan, path, ready.infeasible)
    tables.announce(everything, ui)
    table.begin()
    try:
        for same_model in runs:
            _make(same_model, plan, table, ui)
            _judge(same_model, table, ui)
    finally:  # also on Ctrl-C: what is known is shown
        table.show(shown, ui)
    sheet = _contact_sheet(plan, shown, ui)
    ui.wrote(path)
    failed = [{"run_id": item.job.run_id, "reason": item.error.message} for item in everything if item.error]
    return {
        "status": "partial" if ready.infeasible or failed else "done",
        "path": str(path.absolute()),
        "contact_sheet": str(sheet.absolute()) if sheet else None,
        "runs": [tables.summary(item) for item in shown],
        **incomplete([(item.job.run_id, item.measured) for item in everything], ui),
        "infeasible": [point.report for point in ready.infeasible],
        "failed": failed,
    }


def _runs(
    plan: Plan, feasible: Sequence[RunConfig], resolver: Resolver
) -> tuple[list[list[Evaluated]], list[Evaluated]]:
    """Return every run once, model by model, references before what is compared with them; and those asked for."""
    found: dict[str, Evaluated] = {}

    def once(job: Job, full: Evaluated | None) -> Evaluated:
        return found.setdefault(job.run_id, Evaluated(job, full))

    shown: dict[str, Evaluated] = {}
    for cfg in feasible:
        job, reference = resolver.job(cfg), resolver.job(cfg.as_reference())
        full = once(reference, None)
        shown[job.run_id] = full if job.run_id == reference.run_id else once(job, full)
    if plan.first.noise_floor is not None:
        first = next(iter(shown.values()))
        floor = _noise_floor(plan, first, resolver)
        shown[floor.run_id] = once(floor, first.full or first)
    by_model: dict[str, list[Evaluated]] = {}
    for item in found.values():
        by_model.setdefault(f"{item.job.cfg.model.name} {item.job.inputs.weights_sha256}", []).append(item)
    return list(by_model.values()), list(shown.values())


def _noise_floor(plan: Plan, first: Evaluated, resolver: Resolver) -> Job:
    """Return the full run once more with other arithmetic: the noise floor of all differences."""
    cfg = (first.full or first).job.cfg
    other = {"attention": "masked"} if plan.first.noise_floor == "attention" else {"batch_size": 1}
    return resolver.job(replace(cfg, runtime=replace(cfg.runtime, **other)))  # type: ignore[arg-type]


def _make(runs: Sequence[Evaluated], plan: Plan, table: tables.Table, ui: Console) -> None:
    """Run all passes and the metrics that need no network, then let the model go."""
    models = Models()
    waiting: dict[str, list[Evaluated]] = {}  # by reference: runs whose distributions are compared batch by batch
    for item in runs:
        try:
            _pass_all(item, models, ui)
        except HeatKVError as error:
            _fail(item, error, plan, table, ui)
            continue
        table.costs(item)
        if item.full is None or not _forced(item):
            _finish(item, table, ui)
        elif are_stored(item.full.job):
            _force([item], models, plan, table, ui)
        else:
            waiting.setdefault(item.full.job.run_id, []).append(item)
    for group in waiting.values():
        _force(group, models, plan, table, ui)
    models.release()


def _fail(item: Evaluated, error: HeatKVError, plan: Plan, table: tables.Table, ui: Console) -> None:
    """Note a run that failed, or raise where it is the only one."""
    if len(plan.runs) == 1:
        raise error
    item.error = error
    ui.error(error)
    table.failed(item)
    held: BaseException | None = error
    while held is not None:  # the frames behind an error hold the model and the batch that failed
        held.__traceback__ = None
        held = held.__cause__ or held.__context__


def _pass_all(item: Evaluated, models: Models, ui: Console) -> None:
    """Run the passes that make pictures."""
    full = item.full
    if full is not None and full.error is not None:
        raise ArtifactError(f"the run it is compared with failed: {full.error.message}", full.error.hint)
    needed = dict.fromkeys((FREE, *(metric.spec.needs for metric in item.metrics.values())))
    for kind in (kind for kind in needed if kind != FORCED):
        run_pass(item.job, kind, models, ui, None if kind == FREE or full is None else full.job)
    item.costs, item.made = _costs(item.job)


def _forced(item: Evaluated) -> bool:
    return any(metric.spec.needs == FORCED for metric in item.metrics.values())


def _force(items: Sequence[Evaluated], models: Models, plan: Plan, table: tables.Table, ui: Console) -> None:
    """Run the forced pass of runs with one reference."""
    full = items[0].full
    assert full is not None  # the reference itself is compared with nothing
    failed = run_forced([item.job for item in items], full.job, models, ui)
    for item in items:
        if item.job.run_id in failed:
            _fail(item, failed[item.job.run_id], plan, table, ui)
        else:
            _finish(item, table, ui)


def _finish(item: Evaluated, table: tables.Table, ui: Console) -> None:
    """Measure everything that needs no network."""
    for name, metric in item.metrics.items():
        if not metric.network:
            _measure(item, name, metric, table, ui)
    tables.tell(item, ui)


def _judge(runs: Sequence[Evaluated], table: tables.Table, ui: Console) -> None:
    """Measure metrics with networks over all runs, one network in memory at a time."""
    wanted = {(metric.network, name): None for item in runs for name, metric in item.metrics.items() if metric.network}
    for network in dict.fromkeys(network for network, _ in wanted):
        for name in (name for other, name in wanted if other == network):
            for item in runs:
                if item.error is None and name in item.metrics:
                    _measure(item, name, item.metrics[name], table, ui)
        networks.release()


def _measure(item: Evaluated, name: str, metric: Metric, table: tables.Table, ui: Console) -> None:
    """Measure one metric of one run, and write it at once."""
    job, full = item.job, item.full
    beside = full.job if full is not None and metric.spec.kind == "paired" and metric.spec.needs != FORCED else None
    item.measured[name] = measure(
        metric,
        items_of_pass(job, metric.spec.needs, beside),
        job.folder,
        ui,
        bootstrap=job.cfg.bootstrap,
        baseline=full.measured[name].scores if full and name in full.measured else None,
        reference=_reference(metric, item, ui),
        shard=job.cfg.shard,
        asked=len(job.shown),
    )
    table.measured(item, name)


def _reference(metric: Metric, item: Evaluated, ui: Console) -> Callable[[SetMetric], Any] | None:
    """Return a function that gives a set metric the statistics of its reference."""
    if not isinstance(metric, SetMetric) or metric.reference is None:
        return None
    if metric.reference != "full":
        return reference_of(Path(metric.reference).expanduser(), item.job.cfg.out, ui)
    if item.full is None:
        return None
    full = item.full.job
    return partial(_full_statistics, full, ui)


def _full_statistics(full: Job, ui: Console, metric: SetMetric) -> Any:
    return statistics_of(metric, items_of_pass(full, FREE, None), full.folder / "features", ui, {}, full.cfg.shard)


def _costs(job: Job) -> tuple[dict[str, float], int]:
    """Return the median over the batches that recorded a number, and the images of these batches that are asked for.

    Bytes and tokens are the same in all batches. The first one alone knows beta_work, and the others the time; one
    batch alone has no time.
    """
    folder = RunFolder.reading(job.folder / FREE)
    rows = [row for image in job.shown if (row := folder.row(image.image_id))]
    recorded = [row["numbers"] or {} for row in {row["batch"]: row for row in rows}.values()]
    if not recorded:
        return {}, 0
    try:
        known: dict[str, list[float]] = defaultdict(list)
        for key, value in (item for numbers in recorded for item in numbers.items()):
            known[key].append(float(value))
        return {key: statistics.median(values) for key, values in known.items()}, len(rows)
    except (TypeError, ValueError) as error:
        raise ArtifactError(
            f"{folder.manifest}: the recorded numbers were changed ({error})", f"remove {folder.path}"
        ) from error


def _contact_sheet(plan: Plan, shown: Sequence[Evaluated], ui: Console) -> Path | None:
    """Write the first benchmark's pictures, prompts in columns and runs in rows; return the file."""
    columns = plan.first.contact_sheet
    same = [item for item in shown if item.error is None and item.job.cfg.benchmark == shown[0].job.cfg.benchmark]
    if not columns or not same:
        return None
    path = plan.first.out / "contact-sheet.png"
    labelled = [(tables.label(item), item.job.folder / FREE) for item in same]
    images = same[0].job.images[: min(columns, *(len(item.job.shown) for item in same))]
    try:
        write_contact_sheet(path, labelled, images)
    except OSError as error:
        ui.warn(f"no contact sheet: {error.strerror or error}")
        return None
    ui.wrote(path)
    return path
