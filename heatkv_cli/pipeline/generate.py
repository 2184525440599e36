"""generate: the images of every run of a plan, and the tree that a benchmark's own scorer reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from heatkv_cli.benchmarks.base import PromptItem
from heatkv_cli.benchmarks.trees import Picture
from heatkv_cli.config import Plan
from heatkv_cli.console import Console
from heatkv_cli.errors import HeatKVError
from heatkv_cli.pipeline.calibrate import calibrate_all
from heatkv_cli.pipeline.passes import Models, run_pass
from heatkv_cli.planning.job import FREE, Infeasible, Job
from heatkv_cli.planning.preflight import preflight
from heatkv_cli.planning.resolver import Resolver
from heatkv_cli.results import RunFolder


def run(plan: Plan, ui: Console) -> dict[str, Any]:
    """Make the images of every run of the plan; in a sweep, what cannot exist or fails is left out, and told.

    For a benchmark with a scorer of its own, images are also laid out as that scorer reads them (`benchmarks.trees`).

    Raises:
        HeatKVError: nothing that was asked for can exist, or the only run failed.
    """
    resolver = Resolver()
    ready = preflight(plan, resolver)
    ready.check(plan)
    for point in ready.infeasible:
        tell_infeasible(point, ui)
    calibrate_all(ready.calibrations, resolver, ui)
    jobs = [resolver.job(cfg) for cfg in ready.feasible(plan.runs)]
    lists = [_checked_list(job) for job in jobs]
    reports, failed, models = [], [], Models()
    for job, prompts in zip(jobs, lists, strict=True):
        try:
            run_pass(job, FREE, models, ui)
        except HeatKVError as error:
            if len(plan.runs) == 1:
                raise
            ui.error(error)
            failed.append({"run_id": job.run_id, "reason": error.message})
            continue
        report = {"run_id": job.run_id, "path": str((job.folder / FREE).absolute()), "images": len(job.shown)}
        ui.wrote(job.folder / FREE)
        if job.layout:
            tree = job.folder / job.cfg.benchmark.name
            job.layout.write(_pictures(job), prompts, tree)
            report["tree"] = str(tree.absolute())
            ui.wrote(tree)
        reports.append(report)
    return {
        "status": "partial" if ready.infeasible or failed else "done",
        **(reports[0] if reports else {}),
        "runs": reports,
        "infeasible": [point.report for point in ready.infeasible],
        "failed": failed,
    }


def tell_infeasible(point: Infeasible, ui: Console) -> None:
    """Say that a point of a sweep is left out, and why."""
    ui.warn(f"left out: {point.error.message}")


def _checked_list(job: Job) -> Sequence[PromptItem]:
    """Return the whole list of a benchmark with a tree of its own, which must fit into it; else nothing."""
    if job.layout is None:
        return ()
    items = job.inputs.prompts.items
    job.layout.check(items, job.inputs.samples)
    return items


def _pictures(job: Job) -> list[Picture]:
    """Return the images of a run that are there, as its benchmark's tree takes them; others are another shard's."""
    folder = RunFolder.reading(job.folder / FREE)
    rows = ((image, folder.row(image.image_id)) for image in job.shown)
    return [Picture(image.item, image.sample, folder.path / row["file"]) for image, row in rows if row is not None]
