"""Everything that the user sees: results on stdout, the rest on stderr, and all of it in run.log.

The only file that knows rich. Colour and bars appear on a terminal alone (and never with NO_COLOR); elsewhere there
are plain lines. With `--json` stdout carries exactly one JSON document.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from heatkv_cli import interrupts
from heatkv_cli.errors import Errors, HeatKVError, MemoryLimitError, SetupError
from heatkv_cli.interrupts import INTERRUPTED

if TYPE_CHECKING:
    from rich.console import Console as RichConsole

SCHEMA = 1
"""Version of the JSON documents; grows when a key changes its meaning."""

QUIET_SECONDS = 30.0
"""Time between two progress lines where there is no terminal."""

_STYLES = {logging.DEBUG: "dim", logging.INFO: "", logging.WARNING: "yellow", logging.ERROR: "red"}
_LOGGER = logging.getLogger("heatkv")


@dataclass
class Outcome:
    """Facts about a running command, and how it ended.

    Args:
        again: the command line that goes on with this work.
        folder: folder where a trace may be written; None until that is known.
        code: exit code.
    """

    again: str
    folder: Path | None = None
    code: int = 0


class Console:
    """The one way out: lines, tables, progress, the JSON document.

    Args:
        as_json: tables are not printed; `result` prints the document.
        quiet: only results, warnings and errors.
        verbose: also details, and what libraries of ours log at debug level.
        debug: the command shows tracebacks; recorded here for whoever asks.
    """

    def __init__(
        self, *, as_json: bool = False, quiet: bool = False, verbose: bool = False, debug: bool = False
    ) -> None:
        self.as_json = as_json
        self.quiet = quiet
        self.verbose = verbose
        self.debug = debug
        self.log_path: Path | None = None
        self.began = time.monotonic()
        self.written: list[Path] = []
        self._answered = False
        self._err = _rich(sys.stderr)
        _LOGGER.setLevel(logging.DEBUG)
        _LOGGER.propagate = False
        _LOGGER.handlers.clear()
        level = logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO
        _LOGGER.addHandler(_Screen(self._err, level))

    @property
    def elapsed(self) -> float:
        """Seconds since the command began."""
        return time.monotonic() - self.began

    def log_to(self, folder: Path) -> None:
        """Also write everything, details included, to `run.log` in a folder."""
        path = (folder / "run.log").absolute()
        if path == self.log_path:
            return
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        except OSError as error:  # a link, a folder, a full disk: the work matters more than its log
            self.warn(f"no log: cannot write {path}: {error.strerror or error}")
            self.log_path = path
            return
        self._log(path, descriptor)

    def _log(self, path: Path, descriptor: int) -> None:
        for handler in [item for item in _LOGGER.handlers if isinstance(item, _File)]:
            _LOGGER.removeHandler(handler)
            handler.close()
        handler = _File(os.fdopen(descriptor, "a", encoding="utf-8", errors="backslashreplace"))
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        _LOGGER.addHandler(handler)
        self.log_path = path

    def say(self, text: str) -> None:
        """A line about what is going on."""
        _LOGGER.info(text)

    def detail(self, text: str) -> None:
        """A line for `-v` and run.log."""
        _LOGGER.debug(text)

    def warn(self, text: str) -> None:
        """A line that `-q` does not silence."""
        _LOGGER.warning(f"warning: {text}")

    def wrote(self, path: Path) -> None:
        """Say where the outcome is and how long it took."""
        self.written.append(path.absolute())
        self.say(f"wrote {path.absolute()} ({duration(self.elapsed)})")

    def next(self, command: str) -> None:
        """Say what to type next; the last line of a command."""
        self.say(f"next: {command}")

    def error(self, error: HeatKVError) -> None:
        """Say what is wrong and what to do: a pair of lines per error."""
        for one in error.errors if isinstance(error, Errors) else (error,):
            _LOGGER.error(f"error: {one.message}")
            if one.hint:
                _LOGGER.error(f"fix: {one.hint}")

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str = "") -> None:
        """Print a table to stdout (nothing with `--json`); numbers are set flush right."""
        if self.as_json:
            return
        head, *body = align(columns, rows)
        bold = [title, head] if title else [head]
        with _readers():
            out = _rich(sys.stdout)
            for line in bold:
                out.print(printable(line), style="bold", markup=False, highlight=False, soft_wrap=True)
            for line in body:
                out.print(printable(line), markup=False, highlight=False, soft_wrap=True)
            sys.stdout.flush()

    def text(self, text: str) -> None:
        """Print a text that is the outcome of a command to stdout (nothing with `--json`)."""
        if not self.as_json:
            with _readers():
                sys.stdout.write(printable(text))
                sys.stdout.flush()

    def result(self, document: Mapping[str, Any]) -> None:
        """Print the JSON document of a command, when it was asked for; the first one is the only one."""
        if self.as_json and not self._answered:
            self._answered = True
            text = json.dumps(_strict({"schema": SCHEMA, **document}), indent=2, allow_nan=False)
            with _readers():
                sys.stdout.write(text + "\n")
                sys.stdout.flush()

    @contextlib.contextmanager
    def guard(self, again: str) -> Iterator[Outcome]:
        """Turn whatever goes wrong inside into messages, a JSON document and an exit code.

        Args:
            again: the command, until the body knows it better (`outcome.again`).
        """
        outcome = Outcome(again)
        try:
            yield outcome
        except KeyboardInterrupt:
            self._interrupted(outcome)
        except Exception as error:
            if self.debug:
                traceback.print_exc()
            known = _known(error)
            if interrupts.seen() and not isinstance(error, HeatKVError):
                self._interrupted(outcome)  # somebody made an error of their own of it
            elif known is None:
                self._bug(error, outcome)
            else:
                self.error(known)
                parts = known.errors if isinstance(known, Errors) else (known,)
                self._fail(outcome, known.exit_code, [{"error": part.message, "fix": part.hint} for part in parts])

    def _interrupted(self, outcome: Outcome) -> None:
        self.warn("interrupted; what was finished is kept")
        self.say(f"next: {outcome.again}")
        self._fail(outcome, INTERRUPTED, [{"error": "interrupted", "fix": outcome.again}])

    def _fail(self, outcome: Outcome, code: int, errors: list[dict[str, str]]) -> None:
        outcome.code = code
        self.failed(code, errors)

    def failed(self, code: int, errors: list[dict[str, str]]) -> None:
        """Print the JSON document of a command that failed; a stdout that cannot be written to is told, no more."""
        try:
            self.result({"status": "error", "exit_code": code, "errors": errors})
        except SetupError as error:
            self.error(error)

    def _bug(self, error: Exception, outcome: Outcome) -> None:
        """Three lines on the screen, the trace in run.log."""
        if self.log_path is None and outcome.folder is not None and outcome.folder.is_dir():
            self.log_to(outcome.folder)
        if not any(isinstance(handler, _File) for handler in _LOGGER.handlers):
            with contextlib.suppress(OSError):  # a file of our own: never through a link that others have laid
                descriptor, name = tempfile.mkstemp(prefix="heatkv-", suffix=".log")
                self._log(Path(name), descriptor)
        what = f"unexpected {type(error).__name__}: {error}".splitlines()[0]
        fix = "report it with the output of: heatkv doctor --json"
        self.error(HeatKVError(what, fix))
        self.detail(traceback.format_exc())
        self.warn(f"the trace is in {self.log_path}" if self.log_path else "add --debug to see the trace")
        self._fail(outcome, 1, [{"error": what, "fix": fix}])

    @contextlib.contextmanager
    def progress(self, label: str, total: int, unit: str = "img") -> Iterator[Progress]:
        """Show how far a stage is: a bar on a terminal, elsewhere a line every 30 s.

        Args:
            label: the work in words, with method and budget.
            total: number of units.
            unit: name of the unit, such as `img`.
        """
        if self.quiet or not self._err.is_terminal:
            yield Progress(self, label, total, unit)
            return
        from rich import progress as bars

        columns = (
            bars.TextColumn("{task.description}", markup=False),
            bars.BarColumn(),
            bars.MofNCompleteColumn(),
            bars.TextColumn("{task.fields[note]}", markup=False),
            bars.TimeRemainingColumn(),
        )
        with bars.Progress(*columns, console=self._err, transient=True) as bar:
            task = bar.add_task(label, total=total, note="")
            yield Progress(self, label, total, unit, lambda done, note: bar.update(task, completed=done, note=note))


class Progress:
    """Progress of one stage; `advance` after each batch."""

    def __init__(self, console: Console, label: str, total: int, unit: str, draw: Any = None) -> None:
        self._console, self._label, self._total, self._unit, self._draw = console, label, total, unit, draw
        self._done = 0
        self._began = self._last = time.monotonic()

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count units that are done; `note` is shown beside the rate (resident KV bytes, say)."""
        interrupts.check()
        self._done += count
        now = time.monotonic()
        rate = self._done / max(now - self._began, 1e-9)
        shown = f"{rate:.2f} {self._unit}/s" + (f", {note}" if note else "")
        if self._draw is not None:
            self._draw(self._done, shown)
        elif now - self._last >= QUIET_SECONDS:
            self._last = now
            left = duration((self._total - self._done) / rate)
            self._console.say(f"{self._label}: {self._done}/{self._total}, {shown}, {left} left")


class _Screen(logging.Handler):
    """Log records as lines on stderr."""

    def __init__(self, err: RichConsole, level: int) -> None:
        super().__init__(level)
        self._err = err

    def emit(self, record: logging.LogRecord) -> None:
        style = _STYLES.get(record.levelno, "")
        with contextlib.suppress(ValueError, OSError):  # the stream was closed: whoever read it is done with it
            text = printable(record.getMessage())
            self._err.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


class _File(logging.StreamHandler[TextIO]):
    """run.log; a disk that is full costs lines, never the work."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Say nothing."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one line of the log, without characters that drive a terminal."""
        return printable(super().format(record))

    def close(self) -> None:
        """Close the file too."""
        super().close()
        with contextlib.suppress(OSError):
            self.stream.close()


def _known(error: Exception) -> HeatKVError | None:
    """Return the part of an error that the user can understand; None for a bug of ours."""
    if isinstance(error, HeatKVError):
        return error
    if isinstance(error, MemoryError):
        return MemoryLimitError("out of memory", "free some, or lower runtime.batch_size")
    if isinstance(error, OSError) and error.filename is not None:
        return SetupError(f"{error.filename}: {error.strerror or error}", "check the file, its rights and the disk")
    return None


@contextlib.contextmanager
def _readers() -> Iterator[None]:
    """Writing to stdout: a reader that has seen enough is fine, a full disk is an error."""
    try:
        yield
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123 - until the process ends
    except OSError as error:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123
        raise SetupError(f"cannot write to stdout: {error.strerror or error}", "free the disk") from error


def printable(text: str) -> str:
    r"""Return a text without what would drive a terminal: control characters and lone surrogates are spelled out.

    >>> printable("a\x1b[2Jb")
    'a\\x1b[2Jb'
    """
    clean = "".join(sign if sign in "\n\t" or not _is_control(sign) else f"\\x{ord(sign):02x}" for sign in text)
    return clean.encode("utf-8", "backslashreplace").decode()


def _is_control(sign: str) -> bool:
    return ord(sign) < 32 or 127 <= ord(sign) < 160


def _rich(stream: TextIO) -> RichConsole:
    from rich.console import Console as RichConsole

    return RichConsole(file=stream, emoji=False)


def align(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Return header and rows as lines of equal columns, two blanks apart.

    >>> align(["method", "kl"], [["full", 0.0], ["heatkv", 0.25]])
    ['method    kl', 'full       0', 'heatkv  0.25']
    """
    texts = [[show(value) for value in row] for row in rows]
    right = [bool(rows) and all(_is_number(row[i]) for row in rows) for i in range(len(columns))]
    widths = [max(len(name), *(len(row[i]) for row in texts), 0) for i, name in enumerate(columns)]
    lines = []
    for line in (list(columns), *texts):
        cells = [
            text.rjust(width) if flush else text.ljust(width)
            for text, width, flush in zip(line, widths, right, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def show(value: Any) -> str:
    """Return a value for a table: four significant digits, a dash where there is no number."""
    if value is None or value != value:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def size_text(count: float) -> str:
    """Return bytes in words, in powers of 1000.

    >>> size_text(512), size_text(8_820_000_000)
    ('512 B', '8.82 GB')
    """
    power = 0
    while count >= 1000 and power < 4:
        count, power = count / 1000, power + 1
    return f"{count:.3g} {('B', 'KB', 'MB', 'GB', 'TB')[power]}"


def duration(seconds: float) -> str:
    """Return a time in words.

    >>> duration(4.21), duration(75), duration(3700)
    ('4.2 s', '1 min 15 s', '1 h 01 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _strict(value: Any) -> Any:
    """Return plain values that strict JSON can hold: no NaN, infinities as texts, paths as texts."""
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return str(value) if isinstance(value, Path) else value
