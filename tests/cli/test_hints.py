"""Every hint that tells people to type something: what it says is typed here.

Hints are found in the source, so that a new one is tested without being listed; what an f-string fills in has an
example below. Hints of configuration errors are also tried where they belong: after typing them the error is gone.
"""

from __future__ import annotations

import ast
import itertools
import re
import shlex
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest
import typer

import heatkv_cli
from heatkv_cli.cli.app import app
from heatkv_cli.cli.stages import _next_command
from heatkv_cli.config import choices, compose
from heatkv_cli.config.groups import conf_dir
from heatkv_cli.errors import Errors, HeatKVError

ROOT = Path(heatkv_cli.__file__).parent
EXAMPLES = {
    "MOST_RESAMPLES": "100",
    "MOST_SAMPLES": "100",
    "batch // 2": "4",
    "cfg.budget.override": "budget=0.1",
    "cfg.method.name": "heatkv",
    "cfg.model.name": "tiny",
    "decimal": "0.1",
    "float(found.rho or 0)": "0.7",
    "float(ratio / 100)": "0.1",
    "found[0]": "features/abc",
    "geometry.model": "tiny",
    "instead": "",
    "known": "1M",
    "max(count, 2)": "8",
    "max(number, 2)": "8",
    "metric.spec.name": "fid",
    "model": "infinity-2b",
    "max(1, round(10 * self._timeout))": "60",
    "self._key": "metric.hps_v21",
    "official.py key": "metric.hps_v21",
    "model.name": "infinity-2b",
    "others[0]": "infinity-2b",
    "root.parent": "features",
    "run.model.default_benchmark": "natural",
    "self.geometry.model": "tiny",
    "self.name": "geneval",
    "self.spec.name": "image_reward",
    "self.text": "0.1",
    "smallest": "21/6425",
    "str(rho).strip()": "0.7",
    "what": "infinity-2b",
    "compose.py name": "full",
    "hps.py name": "metric.hps_v21",
    "preflight.py name": "fid",
    "calibration.py make_hint('calibration', self.geometry.model)": "heatkv calibrate --model tiny",
    "stages.py following": "heatkv build-schedule",
}
"""What stands in for an expression of an f-string, of all files or of one; others become the sign §."""

WORDS = {
    "model=NAME": "model=tiny",
    "--plugin mine.py method=mine:Latest": "method=full",
    "method=module:Class": "method=full",
    "method=STEM:Class": "method=full",
    "method=NAME": "method=full",
    "metric=NAME": "metric=kl",
    "benchmark=NAME": "benchmark=geneval",
    "key=value": "seed=0",
    "DIGEST": "0" * 64,
    "FRACTION": "0.1",
    "{model}": "tiny",
}
"""What stands in for a word that hints leave to the reader; the names of files stay, for no file need be there."""

_OVERRIDE = re.compile(r"(?<![\w.'\"/{-])([a-z_]+(?:\.[a-z_0-9§]+)*)=([^\s;()'\"]+)")
_NAMES = "ls|doctor|models|download|calibrate|build-schedule|generate|eval|bench|score"
_COMMAND = re.compile(rf"heatkv ((?:{_NAMES})\b[^`]*)")
_OPTION = re.compile(r"(?<![\w-])(--[a-z][a-z-]+)")


def hints() -> Iterator[tuple[str, str]]:
    """Yield (place, text) of every string in the package that may be a hint: no docstring, no message."""
    for path in sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "report" / "hack.py"):  # names of rows
        tree = ast.parse(path.read_text(encoding="utf-8"))
        skipped: set[int] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):  # a docstring
                skipped.add(id(node.value))
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Error") and node.args:
                skipped |= {id(part) for part in ast.walk(node.args[0])}
            if isinstance(node, ast.Assign) and "_HELP" in ast.unparse(node.targets[0]):
                skipped |= {id(part) for part in ast.walk(node)}
            if id(node) in skipped:
                continue
            if isinstance(node, ast.JoinedStr):
                skipped |= {id(part) for part in ast.walk(node)}
                text = "".join(_filled(part, path.name) for part in node.values)
                if not text.startswith("+"):  # Hydra's own, not for people
                    yield f"{path.name}:{node.lineno}", text
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield f"{path.name}:{node.lineno}", node.value


def _filled(part: ast.expr, file: str) -> str:
    if isinstance(part, ast.Constant):
        return str(part.value)
    assert isinstance(part, ast.FormattedValue)
    expression = ast.unparse(part.value)
    return EXAMPLES.get(f"{file} {expression}", EXAMPLES.get(expression, "§"))


def overrides(text: str) -> list[str]:
    """Return the `key=value` of a text; not those that only a run fills in, which are typed below."""
    found = [f"{key}={value.rstrip('.,:')}" for key, value in _OVERRIDE.findall(_exemplary(text))]
    found = [override for override in found if "§" not in override and not override.endswith("=")]
    if "benchmark=prompts" in found:  # the one list that needs a file
        found = [override for override in found if override not in ("benchmark=prompts", "benchmark.file=FILE")]
        assert "benchmark=prompts benchmark.file=FILE" in text
    return found


def _exemplary(text: str) -> str:
    for word, example in WORDS.items():
        text = text.replace(word, example)
    return text


@lru_cache(maxsize=1)
def contexts() -> tuple[tuple[str, ...], ...]:
    """Return choices beside which a key may exist: of a model, a method, a metric, a benchmark."""
    models = [[f"model={name}"] for name in choices("model")]
    methods = [[f"method={name}", "budget=0.1"] for name in choices("method") if name != "full"]
    metrics = [[f"metric={name}"] for name in choices("metric")]
    others = [["benchmark=geneval"], ["runtime.batch_size=1"], ["model=infinity-2b", "resolution=0.25M"]]
    return ((), *map(tuple, models + methods + metrics + others))


@lru_cache(maxsize=512)
def accepted(override: str) -> bool:
    """Return whether compose takes an override, beside some choice; files that are missing do not matter."""
    return any(not wrong([*context, override]) for context in contexts() if not _same_key(context, override))


def _same_key(context: tuple[str, ...], override: str) -> bool:
    keys = {item.partition("=")[0] for item in context}
    key = override.partition("=")[0]
    return key in keys or (key == "rho" and "budget" in keys)


def wrong(arguments: list[str], command: str = "eval") -> list[HeatKVError]:
    """Return what compose says against a command line."""
    try:
        compose(arguments, command=command, dry_run=True)
    except Errors as errors:
        return list(errors.errors)
    except HeatKVError as error:
        return [error]
    return []


HINTS = sorted(set(hints()))
TYPED = sorted({(override, place) for place, text in HINTS for override in overrides(text)})
COMMANDS = sorted({(found[0], place) for place, text in HINTS for found in [_COMMAND.findall(text)] if found})


def test_hints_are_found() -> None:
    texts = " ".join(text for _, text in HINTS)
    for words in ("limit=all takes all", "heatkv download infinity-2b", "runtime.batch_size=4", "--weights DIR"):
        assert words in texts
    assert len(TYPED) > 60
    assert len(COMMANDS) > 10


@pytest.mark.parametrize(("override", "place"), TYPED, ids=lambda item: item)
def test_an_override_of_a_hint_is_taken(override: str, place: str) -> None:
    assert accepted(override), f"{place}: {wrong([override])}"


@pytest.mark.parametrize(("words", "place"), COMMANDS, ids=lambda item: item)
def test_a_command_of_a_hint_is_taken(words: str, place: str) -> None:
    tokens = shlex.split(re.split(r"[;,'(]| or ", _exemplary(words))[0])
    for end in range(len(tokens), 0, -1):  # prose may follow; it has no dashes and no equals signs
        if parses(tokens[:end]) and not any("=" in word or word.startswith("-") for word in tokens[end:]):
            return
    pytest.fail(f"{place}: heatkv {words}")


def parses(tokens: list[str]) -> bool:
    """Return whether Typer takes a command line, and compose what it hands on."""
    group = typer.main.get_command(app)
    command = group.get_command(typer.Context(group), tokens[0])  # type: ignore[attr-defined]
    try:
        parameters = command.make_context(tokens[0], tokens[1:]).params
    except Exception as error:
        assert hasattr(error, "format_message"), error
        return False
    given = [f"{key}={value}" for key in ("model", "method", "budget") if (value := parameters.get(key))]
    known = {"ls": parameters.get("what"), "models": parameters.get("model"), "download": parameters.get("what")}
    name = known.get(tokens[0])
    if tokens[0] == "ls" and name is not None:
        return name in ("methods", "models", "benchmarks", "metrics", "experiments", "runs")
    if name is not None:
        given.append(name if "=" in name else f"model={name}")
    return not wrong([*given, *(parameters.get("overrides") or [])], command=tokens[0])


def test_options_of_hints_exist() -> None:
    group = typer.main.get_command(app)
    commands = list(group.commands.values())  # type: ignore[attr-defined]
    commands += [below for command in commands for below in getattr(command, "commands", {}).values()]
    known = {name for command in commands for parameter in command.params for name in parameter.opts}
    known |= {"--help", "--version", "--porcelain"}  # of the group, and of git
    told = {(option, place) for place, text in HINTS if "pip install" not in text for option in _OPTION.findall(text)}
    assert {item for item in told if item[0] not in known} == set()


MISTAKES = [
    "limit=0",
    "limit=some",
    "shard=4/4",
    "memory=lots",
    "budget=10",
    "budget=0",
    "budget=abc",
    "rho=1",
    "seed=x",
    "repeats=0",
    "warmup=-1",
    "contact_sheet=-1",
    "runtime.batch_size=0",
    "runtime.threads=0",
    "runtime.threads=99999",
    "model.sampling.cfg=inf",
    "model.sampling.tau=0",
    "model.sampling.top_k=-1",
    "model.sampling.top_p=2",
    "model.sampling.guide_layers=[1]",
    "noise_floor=batch runtime.batch_size=1",
    "seed_mode=paper",
    "bootstrap.resamples=0",
    "bootstrap.confidence=2",
    "bootstrap.seed=-1",
    "benchmark.samples_per_prompt=0",
    "metric=shapes metric.shapes.resamples=10",
    "metric=psnr metric.psnr.data_range=0",
    "model=infinity-2b benchmark=shapes",
    "metric=ssim metric.ssim.data_range=nan",
    "model=infinity-2b resolution=0.25M",
    "model=infinity-2b aspect_ratio=1.49",
    "metric=fid metric.fid.min_images=0",
    "metric=geneval metric.geneval.min_score=2",
    "method=HeatKV",
    "method=heatkvv",
    "method=full budget=0.1",
    "method=cake method.gamma=inf",
    "method=snapkv method.window=0",
    "runtime.attentoin=grouped",
    "metric=hps_v21 metric.hps_v21.amp=true",
    "metric=image_reward metric.image_reward.backend=official",
]


@pytest.mark.parametrize("typed", MISTAKES)
def test_typing_the_hint_mends_the_mistake(typed: str) -> None:
    """The hint is typed in place of one wrong word, or beside all words."""
    words = typed.split()
    errors = wrong(words)
    assert errors, typed
    for error in errors:
        for fix in (*overrides(error.hint), *_meant(words, error)):
            beside = [word for word in words if word.partition("=")[0] != fix.partition("=")[0]]
            ways = [
                [*some, fix]
                for n in range(max(0, len(words) - 2), len(beside) + 1)
                for some in itertools.combinations(beside, n)
            ]
            assert any(not wrong(way) for way in ways), f"{fix}: {wrong(ways[0])}"


def _meant(words: list[str], error: HeatKVError) -> list[str]:
    """Return what a 'did you mean' makes of a word: another key, or another value of the same key."""
    near = re.search(r"did you mean '([^']+)'", error.hint)
    if near is None:
        return []
    if "unknown key" in error.message:
        return [
            f"{near[1]}={word.partition('=')[2]}" for word in words if f"'{word.partition('=')[0]}'" in error.message
        ]
    return [f"{word.partition('=')[0]}={near[1]}" for word in words if word in error.message]


LAUNCHES = sorted(
    (line.removeprefix("# heatkv "), path.name)
    for path in conf_dir().rglob("*.yaml")
    for line in path.read_text(encoding="utf-8").splitlines()
    if line.startswith("# heatkv ")
)


@pytest.mark.parametrize(("words", "place"), LAUNCHES, ids=lambda item: item)
def test_the_launch_line_of_a_yaml_file_is_taken(words: str, place: str) -> None:
    assert parses(shlex.split(words, comments=True)), f"{place}: heatkv {words}"


@pytest.mark.parametrize(
    ("typed", "following"),
    [
        ("calibrate", "build-schedule budget=0.1"),
        ("calibrate method=hack", "generate method=hack budget=0.1"),
        ("calibrate method=full", "generate method=full"),
        ("calibrate method=heatkv budget=0.2", "build-schedule method=heatkv budget=0.2"),
        (
            "calibrate benchmark=shapes-calibration-b",
            "build-schedule calibration_prompts=shapes-calibration-b budget=0.1",
        ),
        ("build-schedule budget=0.2", "generate budget=0.2"),
        ("generate method=sinks budget=0.2", "eval method=sinks budget=0.2"),
    ],
)
def test_the_next_command_can_be_typed(typed: str, following: str) -> None:
    command, *words = typed.split()
    told = _next_command(compose(words, command=command))
    assert told == f"heatkv {following}"
    after, *words = following.split()
    plan = compose(words, command=after)
    assert after != "build-schedule" or all(run.method.object.plan_type is not None for run in plan.runs)
