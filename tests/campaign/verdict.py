"""What must hold of a command that met something wrong; the judge knows nothing of the program's own checks."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bad_words import CONF
from case import EITHER, FULL, HARMLESS, PARTIAL, REFUSED, Case
from damage import MARKER
from kept import lasting
from sandbox import Outcome, Sandbox

README = Path(__file__).resolve().parents[2] / "README.md"
MOST_BYTES = 3 * 2**30
"""Memory that no refusal needs; a warm process has 0.6 GB to begin with."""

ABORTED = ("Traceback", "Logging error", "Fatal Python error", "Exception ignored", "core dumped", "Segmentation")
REPORTS = ("doctor", "models")
"""Commands whose outcome says what is missing; it is no error of theirs."""

LAUNCHED = {"git", "uname"}
"""Programs that may be started: they tell which code and machine this is."""

VOLATILE = {"seconds", "command", "path", "next", "run_id", "costs", "contact_sheet", "figures", "incomplete", "table"}
VOLATILE |= {"images", "load_seconds", "text_seconds", "calibrations", "reason", "stability"}
NUMBERS = ("metric", "variant", "value", "low", "high", "n", "asked")

Tree = dict[str, str]
Clean = dict[str, Any]


def documented() -> set[int]:
    """Exit codes that the README names for errors of users."""
    (line,) = re.findall(r"^Exit codes: (.+)$", README.read_text(encoding="utf-8"), re.MULTILINE)
    named = {int(code) for code in re.findall(r"(\d+) ", line)}
    return named - {0, 1, 130}


def snapshot(folder: Path) -> Tree:
    """What is in a folder: kinds and contents by path; no pipe or device is opened."""
    found = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        name = str(path.relative_to(folder)).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        if stat.S_ISLNK(mode):
            found[name] = f"link to {path.readlink()}"
        elif stat.S_ISREG(mode):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = f"kind {stat.S_IFMT(mode)}"
    return found


class Judge:
    """Runs cases, and says what is wrong with how they end.

    Args:
        sandbox: with a world in it.
    """

    def __init__(self, sandbox: Sandbox) -> None:
        self.sandbox = sandbox
        self.codes = documented()
        self._clean: dict[Any, Clean] = {}

    def judge(self, case: Case) -> list[str]:
        """Return everything that is wrong; nothing where all holds."""
        clean = [] if case.expect == REFUSED else self._references(case)
        box = self.sandbox
        box.lay_out()
        if case.conf:
            shutil.copytree(CONF, box.place / "files" / "conf")
        for damage in case.damages:
            damage.apply(box.place)
        before = snapshot(box.place)
        streams = {"stdout": case.stdout, "stderr": case.stderr}
        ended = box.run(case.argv, env=dict(case.env), conf=case.conf, **streams)
        after = snapshot(box.place)
        wrong = [*self._always(case, ended), *_elsewhere(before, after)]
        if case.expect == REFUSED:
            return [*wrong, *self._refused(case, ended, before, after)]
        if case.expect == EITHER and ended.code != 0 and not (ended.code == 6 and case.clean_damages):
            return [*wrong, *self._refused(case, ended, before, after)]
        found = self._facts(case, ended)
        if case.expect == FULL:
            found |= {"code": 0, "document": clean[-1]["document"]}
            wrong += self._told(case, ended) if ended.code in case.codes else [f"exit code {ended.code}"]
        same = [each for each in clean if not _differences(case, each, found)]
        if not same:
            wrong += _differences(case, clean[-1], found)
        if case.expect == PARTIAL:
            wrong += self._told(case, ended)
        return wrong

    # ------------------------------------------------------------------------------------------------- sound commands

    def _references(self, case: Case) -> list[Clean]:
        """How the sound command ends, and, where a part may be missing, how it ends without."""
        found = [] if case.expect == PARTIAL else [self._reference(case, ())]
        return found + ([self._reference(case, case.clean_damages)] if case.clean_damages else [])

    def _reference(self, case: Case, damages: tuple[Any, ...]) -> Clean:
        argv = (case.clean or case.argv) + (("--json",) if "--json" in case.argv and "--json" not in case.clean else ())
        key = (argv, damages)
        if key not in self._clean:
            self.sandbox.lay_out()
            for damage in damages:
                damage.apply(self.sandbox.place)
            ended = self.sandbox.run(argv, timeout=120)
            assert ended.code in (0, 6), f"the sound command {argv} fails: {ended.stderr}"
            self._clean[key] = self._facts(case, ended)
        return self._clean[key]

    def _facts(self, case: Case, ended: Outcome) -> Clean:
        """What a command made: its code, its pictures, its numbers, its document."""
        out = self.sandbox.place / "out"
        pictures = {
            (path.name, hashlib.sha256(path.read_bytes()).hexdigest())
            for path in out.rglob("*.png")
            if path.is_file()
            and not path.is_symlink()
            and "calibration" not in path.parts  # a link's end may not be read
        }
        document = _document(ended.stdout) if "--json" in case.argv and not case.stdout else None
        return {"code": ended.code, "pictures": pictures, "rows": set(_rows(out)), "document": _lasting(document)}

    # --------------------------------------------------------------------------------------------------- what must hold

    def _always(self, case: Case, ended: Outcome) -> Iterator[str]:
        """What holds of every command."""
        if ended.code is None:
            yield f"ended by signal {ended.signal}" if ended.signal else f"no end within {ended.seconds:.0f} s"
        elif ended.code not in self.codes | {0}:
            yield f"exit code {ended.code}"
        for words in ABORTED:
            if words in ended.stderr:
                yield f"stderr has {words}"
        for name, text in (("stdout", ended.stdout), ("stderr", ended.stderr)):
            if odd := {sign for sign in text if (ord(sign) < 32 and sign not in "\n\t") or 127 <= ord(sign) < 160}:
                yield f"{name} has control characters {odd}"
        if ended.bytes > MOST_BYTES:
            yield f"took {ended.bytes / 2**30:.1f} GB"
        if (self.sandbox.place / MARKER).exists():
            yield "code of the input ran"
        if beyond := [f"{what} {where}" for what, where in ended.events if self._beyond(what, where)]:
            yield f"{len(beyond)} things done outside of --out: {beyond[:3]}"
        if "--json" in case.argv and not case.stdout and ended.code is not None:
            try:
                document = _document(ended.stdout)
            except ValueError as error:
                yield f"no JSON document on stdout: {error}"
                return
            if document.get("exit_code", ended.code) != ended.code:
                yield f"the document says exit code {document['exit_code']}, the process {ended.code}"

    def _beyond(self, what: str, where: str) -> bool:
        """Whether an event reaches beyond the folder of results."""
        if what.startswith("socket"):
            return True
        if what.startswith(("subprocess", "os.system", "os.exec", "os.posix", "pty")):
            return Path(where).name not in LAUNCHED
        if what == "os.mkdir" and not Path(where).is_dir():
            return False  # it was tried, and could not be
        out = str(self.sandbox.place / "out")
        return (
            where != out
            and not where.startswith((f"{out}/", "/dev/", "/proc/", "/sys/"))
            and where not in ("/proc", "/sys")
        )

    def _refused(self, case: Case, ended: Outcome, before: Tree, after: Tree) -> Iterator[str]:
        """What holds of a refusal."""
        if ended.code == 0:
            yield "accepted"
        elif ended.code not in (*case.codes, None):
            yield f"exit code {ended.code}, not one of {case.codes}"
        yield from self._told(case, ended)
        for name, was in before.items():
            if after.get(name) != was and not name.endswith("run.log") and self._lost(case, name):
                yield f"changed {name}: {was[:20]} -> {after.get(name, 'gone')[:20]}"
        if made := [name for name in after if name not in before and name.endswith(".png")]:
            yield f"made {made[:3]}"
        known = set(_rows(self.sandbox.world / "out"))
        rows = [row for row in set(_rows(self.sandbox.place / "out")) - known if row[NUMBERS.index("value")]]
        if rows and not any(damage.path.endswith("results.csv") for damage in case.damages):
            yield f"wrote the numbers {sorted(rows)[:3]}"

    def _lost(self, case: Case, name: str) -> bool:
        """Whether a file that changed holds less than before, times left out; a sweep writes what is known at once."""
        old, new = self.sandbox.world / name, self.sandbox.place / name
        if name.endswith("results.csv") and not any(damage.path.endswith("results.csv") for damage in case.damages):
            return not set(_rows(old.parent)) <= set(_rows(new.parent))
        if name.endswith("meta.json") and new.is_file() and old.is_file():
            try:
                return _record(old) != _record(new)
            except ValueError:
                return True
        return True

    def _told(self, case: Case, ended: Outcome) -> Iterator[str]:
        """The form of an error: what, and what to do; one for one mistake; in the document too."""
        if case.stderr or ended.code is None:
            return
        errors = _errors(ended.stderr)
        if ended.code == 6:
            if "warning: " not in ended.stderr and not errors:
                yield "nothing was said of what is missing"
        elif not errors and case.argv[0] not in REPORTS:
            yield f"no error was told: {ended.stderr[-300:]!r}"
        yield from (f"no fix for: {what}" for what, fix in errors if not fix.strip())
        if len(errors) > case.errors:
            yield f"{len(errors)} errors for one mistake: {[what[:100] for what, _ in errors]}"
        if "--json" not in case.argv or case.stdout:
            return
        try:
            document = _document(ended.stdout)
        except ValueError:
            return
        listed = document.get("errors") or document.get("missing") or []
        listed = [_spelled(entry["error"].splitlines()[0]) for entry in listed]
        if ended.code != 6 and case.argv[0] not in REPORTS and listed != [_spelled(what) for what, _ in errors]:
            yield f"the document lists {listed}, stderr says {errors}"
        if ended.code == 6 and not any(document.get(key) for key in ("incomplete", "failed", "infeasible", "lacking")):
            yield "the document does not say what is missing"


def _spelled(text: str) -> str:
    """A text without the signs that a terminal must not see, and without the ways to spell them."""
    return re.sub(r"\\+(x[0-9a-f]{2}|u[0-9a-f]{4}|n|t)|[^ -~]", "?", text)


def _record(path: Path) -> Any:
    """A record without times and without the list of who wrote it."""
    found = lasting(json.loads(path.read_bytes()))
    return {
        key: value for key, value in found.items() if key not in ("starts", "finished_utc", "status", "environment")
    }


def _errors(said: str) -> list[tuple[str, str]]:
    """(what, fix) of every error on stderr."""
    found: list[tuple[str, str]] = []
    for line in said.splitlines():
        if line.startswith("error: "):
            found.append((line.removeprefix("error: "), ""))
        elif line.startswith("fix: ") and found and not found[-1][1]:
            found[-1] = (found[-1][0], line.removeprefix("fix: "))
    return found


def _document(text: str) -> dict[str, Any]:
    """The one strict JSON document of a stdout."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    document = json.loads(text, parse_constant=refuse)
    if not isinstance(document, dict):
        raise ValueError("it is no object")
    return document


def _lasting(value: Any) -> Any:
    """A document without what differs from run to run."""
    if isinstance(value, Mapping):
        if "load_seconds" in value:  # a bench: its numbers are times
            return None
        return {key: _lasting(item) for key, item in value.items() if key not in VOLATILE}
    return [_lasting(item) for item in value] if isinstance(value, list) else value


def _rows(out: Path) -> Iterator[tuple[str, ...]]:
    """The numbers of all results files in a folder or below, times left out."""
    for path in (out / "results.csv", out / "score" / "results.csv"):
        if not path.is_file() or path.stat().st_size > 2**24:
            continue
        text = path.read_bytes().decode("utf-8-sig", "replace")
        try:
            for row in csv.DictReader(io.StringIO(text, newline="")):
                if not str(row.get("metric")).endswith("_share"):
                    yield tuple(str(row.get(name) or "") for name in NUMBERS)
        except csv.Error:
            continue


def _elsewhere(before: Tree, after: Tree) -> Iterator[str]:
    """Files that changed or came outside the folder of results."""
    names = [name for name in sorted(before.keys() | after.keys()) if name != "out" and not name.startswith("out/")]
    if other := [name for name in names if before.get(name) != after.get(name)]:
        yield f"{len(other)} files changed outside of --out: {other[:3]}"


def _differences(case: Case, clean: Clean, found: Clean) -> list[str]:
    """How the outcome of a command differs from that of the sound one."""
    wrong = [
        f"{key} differs: {_short(found[key])}, of the sound command {_short(clean[key])}"
        for key in ("code", "document")
        if found[key] != clean[key]
    ]
    if case.expect == PARTIAL or (
        found["code"] == 6 and case.clean_damages
    ):  # what cannot be read was asked for all the same
        return wrong + _fewer(clean, found)
    if missing := clean["pictures"] - found["pictures"]:
        wrong.append(f"pictures differ: {sorted(missing)[:3]}")
    strange = found["rows"] - clean["rows"]
    if any(damage.path.endswith("results.csv") for damage in case.damages):
        strange = set()  # rows of a file that somebody changed stay as they are
    if case.expect != HARMLESS or case.damages:
        missing = clean["rows"] - found["rows"]
        if missing and not any(damage.path.endswith("results.csv") for damage in case.damages):
            wrong.append(f"rows are missing: {sorted(missing)[:3]}")
    if strange:
        wrong.append(f"rows that the sound command does not write: {sorted(strange)[:3]}")
    return wrong


def _fewer(clean: Clean, found: Clean) -> list[str]:
    """How the numbers of a command that lost a part differ from those of the sound one without it."""
    numbers = [{row[: NUMBERS.index("asked")] for row in each["rows"]} for each in (clean, found)]
    strange = numbers[1] - numbers[0]
    return [f"rows that the sound command does not write: {sorted(strange)[:3]}"] if strange else []


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 300 else f"{text[:300]}..."
