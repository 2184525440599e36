"""The commands that turn results into tables: report table, compare, hack, published."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from heatkv_cli.cli.app import app
from heatkv_cli.cli.options import Debug, Json

if TYPE_CHECKING:
    from pandas import DataFrame

    from heatkv_cli.console import Console

report = typer.Typer(
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
app.add_typer(report, name="report")


@report.callback(invoke_without_command=True)
def root(ctx: typer.Context) -> None:
    """Make tables of results: wide, compared, beside print.

    \b
    Examples:
      heatkv report table runs/results.csv
      heatkv report compare --base heatkv
    """
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


Results = Annotated[Path, typer.Argument(metavar="RESULTS", help="A results.csv.", show_default=False)]
Compared = Annotated[
    Path, typer.Argument(metavar="COMPARED", help="What `report compare --to` wrote.", show_default=False)
]
To = Annotated[Optional[Path], typer.Option("--to", help="File to write; else stdout.", metavar="FILE")]
Folder = Annotated[
    Optional[Path], typer.Option("--out", "-o", help="Folder that `heatkv eval` wrote to.", metavar="DIR")
]


@report.command("table")
def table(
    files: Annotated[list[Path], typer.Argument(metavar="RESULTS...", help="results.csv files.", show_default=False)],
    compared: Annotated[
        Optional[Path],
        typer.Option(
            "--compared", help="What `report compare --to` wrote: differences beside the rest.", metavar="FILE"
        ),
    ] = None,
    variants: Annotated[
        Optional[str], typer.Option("--variants", help="Break one metric down instead.", metavar="METRIC")
    ] = None,
    to: To = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write wide tables: a line per run.

    \b
    Examples:
      heatkv report table runs/results.csv
      heatkv report table runs/results.csv --variants shapes
      heatkv report table runs/results.csv --compared compared.csv --to table.md
    """
    command = _command("table", *files, compared=compared, variants=variants, to=to)

    def make(console: Console) -> dict[str, Any]:
        from heatkv_cli.report import tables
        from heatkv_cli.results import read

        differences = _compared(compared) if compared else None
        found = {path: read(path) for path in files}
        made = {p: tables.parts(t, variants) if variants else tables.wide(t, differences) for p, t in found.items()}
        pages = []
        for path, lines in made.items():
            commands = [*found[path]["command"], *(differences["command"] if differences is not None else ())]
            end = [tables.made_by([*commands, *([command] if path == files[-1] else [])])] if to else []
            pages += [tables.markdown(lines.columns, lines.to_numpy()), *end]
        _page(console, to, "\n".join(pages))
        records = [{"file": path, "rows": _records(lines)} for path, lines in made.items()]
        return {"tables": records}

    _run(command, make, as_json, debug)


@report.command("compare")
def compare(
    out: Folder = None,
    base: Annotated[str, typer.Option("--base", help="The variant that others are compared with.")] = "heatkv",
    against: Annotated[
        str, typer.Option("--against", help="Other variants, a comma list; else all.", metavar="NAME,...")
    ] = "",
    metrics: Annotated[str, typer.Option("--metrics", help="A comma list; else all.", metavar="NAME,...")] = "",
    to: To = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare one method with the others on the same images.

    A difference is base minus other at the same budget, image by image, with a 95 % interval. Methods go by name and
    whatever they were given beside their defaults ('hack merge=false'). Where one ran with several seeds (random),
    seeds are resampled as well as prompts.

    \b
    Examples:
      heatkv report compare                                 # of ./runs, or --out DIR
      heatkv report compare --base hack --metrics kl,shapes --to compared.csv
    """
    folder = _folder(out)
    command = _command("compare", out=folder, base=base, against=against, metrics=metrics, to=to)

    def make(console: Console) -> dict[str, Any]:
        from heatkv_cli.report.compare import COLUMNS, comparisons
        from heatkv_cli.report.variants import load_runs, point

        runs, scores = load_runs(folder)
        rows = comparisons(runs, scores, base, _words(against), _words(metrics))
        shown = ["metric", "other", "difference", "low", "high", "seeds", "pairs", "better"]
        points = map(point, rows["budget"], rows["rho"])
        lines = [[at, *row] for at, row in zip(points, rows[shown].itertuples(index=False), strict=True)]
        console.table(["at", "metric", f"{base} -", *shown[2:]], lines)
        if to:
            on_rho = (
                rows["rho"].astype(object).where(rows["rho"].notna(), None)
            )  # an empty cell; a difference may be nan
            _csv(console, to, rows.assign(rho=on_rho, command=command), COLUMNS)
        return {"rows": _records(rows)}

    _run(command, make, as_json, debug)


@report.command("hack")
def hack(results: Results, compared: Compared, to: To = None, as_json: Json = False, debug: Debug = False) -> None:
    """Put HACK's ablations beside the published ones.

    Tables 4, 5 and 6 of arXiv 2504.09261. A difference is hack as it is minus the ablation, on the same images.

    \b
    Examples:
      heatkv eval experiment=hack-ablations-tiny --out runs/hack
      heatkv report compare --out runs/hack --base hack --to compared.csv
      heatkv report hack runs/hack/results.csv compared.csv --to hack.md
    """
    command = _command("hack", results, compared, to=to)

    def make(console: Console) -> dict[str, Any]:
        from heatkv_cli.report.hack import page
        from heatkv_cli.report.tables import made_by
        from heatkv_cli.results import read

        rows, differences = read(results), _compared(compared)
        text = page(rows, differences)
        end = made_by([*rows["command"], *differences["command"], command])
        _page(console, to, f"{text}\n{end}")
        return {"text": text}

    _run(command, make, as_json, debug)


@report.command("published")
def published(
    out: Annotated[
        Optional[list[Path]],
        typer.Option("--out", "-o", help="Folder that `heatkv eval` wrote to; repeat it.", metavar="DIR"),
    ] = None,
    to: Annotated[
        Optional[Path], typer.Option("--to", help="CSV and markdown file to write, without endings.", metavar="NAME")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare orders of methods with print.

    \b
    Examples:
      heatkv report published --out runs/methods --out runs/hack-axis --to published-order

    Orders by KL per bit and by PSNR stand beside every published order of three or more methods, with Kendall's tau-b
    and the pairs that are reversed.
    """
    folders = [*map(_folder, out)] if out else [_folder(None)]
    command = _command("published", out=folders, to=to)

    def make(console: Console) -> dict[str, Any]:
        from heatkv_cli.report.published import COLUMNS, orders, page, published_rows
        from heatkv_cli.report.tables import made_by
        from heatkv_cli.report.variants import load_runs

        rows = orders(published_rows(), *load_runs(*folders))
        text = page(rows)
        if to:
            _csv(console, to.with_suffix(".csv"), rows.assign(command=command), COLUMNS)
        _page(console, to.with_suffix(".md") if to else None, f"{text}\n{made_by([command])}" if to else text)
        return {"rows": _records(rows)}

    _run(command, make, as_json, debug)


def _run(command: str, make: Callable[[Console], dict[str, Any]], as_json: bool, debug: bool) -> None:
    """Make one table, say what was written, and end with its exit code."""
    from heatkv_cli.console import Console

    console = Console(as_json=as_json, debug=debug)
    with console.guard(command) as outcome:
        document = make(console)
        console.result({"status": "done", "command": command, "written": console.written, **document})
    raise typer.Exit(outcome.code)


def _command(name: str, *words: object, **options: object) -> str:
    """Return the command line that makes a table again; options without a value are left out."""
    given = [
        text
        for key, value in options.items()
        for one in (value if isinstance(value, list) else [value])
        if one
        for text in (f"--{key}", str(one))
    ]
    return shlex.join(["heatkv", "report", name, *map(str, words), *given])


def _folder(out: Path | None) -> Path:
    return (out or Path(os.environ.get("HEATKV_OUT") or "runs")).expanduser()


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _compared(path: Path) -> DataFrame:
    from heatkv_cli.report.compare import COLUMNS, NUMBERS
    from heatkv_cli.results import read_table

    return read_table(path, NUMBERS, COLUMNS)


def _page(console: Console, to: Path | None, text: str) -> None:
    """Write a page of markdown, or print it."""
    from heatkv_cli.results import write_file

    if to is None:
        console.text(text)
        return
    write_file(to, text.encode())
    console.wrote(to)


def _csv(console: Console, to: Path, rows: DataFrame, columns: tuple[str, ...]) -> None:
    from heatkv_cli.results import encode_rows, write_file

    head = dict(zip(columns, columns, strict=True))
    write_file(to, encode_rows([head, *_records(rows)], columns))
    console.wrote(to)


def _records(rows: DataFrame) -> list[dict[str, Any]]:
    return [{str(key): value for key, value in row.items()} for row in rows.to_dict("records")]
