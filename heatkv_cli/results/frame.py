"""Results as pandas tables: `results.csv` with typed columns, and the scores of images.

The only file of this package that meets pandas, and only inside its functions: writing a row must not pay for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heatkv_cli.errors import ArtifactError, SetupError
from heatkv_cli.results.files import load_json, read_regular
from heatkv_cli.results.lines import SCORE_FIELDS, parse_lines
from heatkv_cli.results.tables import RESULT_COLUMNS, read_csv, read_results

if TYPE_CHECKING:
    from pandas import DataFrame, Series

INTEGERS = ("seed", "batch_size", "n", "asked", "total")
FLAGS = ("git_dirty", "higher_is_better")
FLOATS = (
    *("rho", "value", "stderr", "low", "high", "beta_live", "beta_alloc", "beta_work", "beta_meta"),
    *("attended_tokens", "attended_ratio", "seconds_per_image"),
)
SCORE_COLUMNS = ("run_id", "metric", "image_id", "value", "stratum")


def read(*paths: Path | str) -> DataFrame:
    """Return the rows of results files, one below the other.

    Every column of `results.csv` is there, also where an older file lacks it. Numbers are floats (NaN for an empty
    cell), counts are nullable integers, flags are nullable booleans, and texts are texts ("" for an empty cell).
    `method_args` is the parsed `method_args_json`. A further column holds floats where all of its cells are numbers,
    else texts.

    Args:
        paths: results files, at least one.

    Raises:
        SetupError: there is no such file.
        ArtifactError: heatkv did not write the file, or a cell is not of its column's type.
    """
    import pandas as pd

    return pd.concat([_typed(Path(path)) for path in paths], ignore_index=True)


def read_table(path: Path | str, numbers: tuple[str, ...], texts: tuple[str, ...]) -> DataFrame:
    """Return the rows of another CSV file of heatkv's: the columns `numbers` as floats, all others as texts.

    Args:
        path: the file.
        numbers: columns that must be there and hold numbers or nothing.
        texts: columns that must be there.

    Raises:
        SetupError: there is no such file.
        ArtifactError: a column is missing, or a cell of `numbers` is no number.
    """
    import pandas as pd

    path = _existing(Path(path))
    table = pd.DataFrame(read_csv(path), dtype=object)
    if missing := [name for name in (*numbers, *texts) if name not in table]:
        raise ArtifactError(f"{path} has no column {', '.join(missing)}", "check that it is the file you mean")
    return table.assign(**{name: _parsed(path, table[name], _number, float) for name in numbers})


def scores(out: Path | str) -> DataFrame:
    """Return the scores of the images of all runs in a folder.

    Args:
        out: the folder that `heatkv eval` wrote to.

    Returns:
        One row per run, image and metric, with the columns `run_id`, `metric`, `image_id`, `value` and `stratum`;
        within a run in the order of its file.

    Raises:
        ArtifactError: a line of a `scores.jsonl` is damaged.
    """
    import pandas as pd

    rows = [
        (path.parent.name, row["metric"], row["image_id"], float(row["value"]), row["stratum"])
        for path in sorted((Path(out) / "images").glob("*/scores.jsonl"))
        for row in parse_lines(path, read_regular(path), SCORE_FIELDS)
    ]
    return pd.DataFrame(rows, columns=list(SCORE_COLUMNS)).astype({"value": float})


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise SetupError(f"there is no file {path}", "check the path; `heatkv eval` writes results.csv below --out DIR")
    return path


def _typed(path: Path) -> DataFrame:
    import pandas as pd

    header, rows = read_results(_existing(path))
    columns = list(dict.fromkeys((*RESULT_COLUMNS, *header)))
    table = pd.DataFrame(list(rows.values()), columns=columns, dtype=object).fillna("")
    typed: dict[str, Series] = {name: _parsed(path, table[name], _number, float) for name in FLOATS}
    typed |= {name: _parsed(path, table[name], _whole, "Int64") for name in INTEGERS}
    typed |= {name: _parsed(path, table[name], _flag, "boolean") for name in FLAGS}
    typed["method_args_json"] = _parsed(path, table["method_args_json"], _mapping, object)
    for name in (name for name in header if name not in RESULT_COLUMNS):
        with contextlib.suppress(ArtifactError):  # a column of texts
            typed[name] = _parsed(path, table[name], _number, float)
    return table.assign(**typed).rename(columns={"method_args_json": "method_args"})


def _parsed(path: Path, cells: Series, parse: Callable[[str], Any], kind: Any) -> Series:
    """Return what `parse` makes of each cell, as a column of the type `kind`; an error names file, row and column."""
    import pandas as pd

    values = []
    for number, text in enumerate(cells, start=2):
        try:
            values.append(parse(text))
        except (ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"{path}: row {number} has {text!r} as {cells.name}", "correct the cell") from error
    return pd.Series(values, index=cells.index, dtype=kind)


def _number(text: str) -> float:
    return float(text or "nan")


def _whole(text: str) -> int | None:
    """Return a count; a spreadsheet may have written 8 as 8.0."""
    if text and not float(text).is_integer():
        raise ValueError(f"{text} is not a whole number")
    return int(float(text)) if text else None


def _flag(text: str) -> bool | None:
    return {"": None, "true": True, "false": False}[text.lower()]


def _mapping(text: str) -> dict[str, Any]:
    return dict(load_json(text or "{}"))
