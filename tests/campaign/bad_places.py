"""The cases whose surroundings are wrong: variables, folders to write to, streams, and the program's own YAML files."""

from __future__ import annotations

import random
from collections.abc import Iterator

from bad_files import NO_FILE
from bad_words import ONE, SINKS
from campaign_world import CLEAN, OUT
from case import EITHER, FULL, HARMLESS, LONG, Case
from damage import Damage

SMALL = (*SINKS, "budget=0.1")
"""A command that makes one picture."""

VARIABLES = {
    "HEATKV_OUT": ("/dev/null", "/proc/x", "x" * LONG, "/dev/full/x", "@files@/prompts.txt", "@files@/prompts.txt/x"),
    "HEATKV_WEIGHTS_DIR": ("/nonexistent", "/dev/null", "x" * LONG, "@files@/" + "y" * 300),
    "HEATKV_DATA": ("x" * LONG, "@files@/" + "y" * 300, "/dev/null", "@files@/prompts.txt"),
    "HF_HOME": ("x" * LONG, "/dev/null"),
}
"""Variables that commands read, each with values that cannot be what it says."""

INDIFFERENT = {
    "COLUMNS": ("-1", "0", "abc", "1", "9" * 30),
    "LINES": ("abc",),
    "TERM": ("", "nosuch", "dumb", "\x1b[31m"),
    "NO_COLOR": ("1", ""),
    "FORCE_COLOR": ("", "0"),
    "PYTHONWARNINGS": ("error", "nosuch"),
    "TMPDIR": ("/nonexistent", "x" * 300),
    "HOME": ("/nonexistent", "", "/dev/null"),
    "XDG_CACHE_HOME": ("/dev/null", "x" * LONG),
    "TORCH_HOME": ("/dev/null", "x" * LONG),
    "HEATKV_OUT": ("", "x" * LONG, "/dev/null", "${seed}", "${oc.env:HOME}", "a,b", "[1]", "\x1b[31m", "{a:1}"),
    "HEATKV_WEIGHTS_DIR": ("",),
    "HEATKV_DATA": ("", "/dev/null", "x" * LONG, "\x1b[31m"),
    "HF_HUB_CACHE": ("", "/dev/null", "x" * LONG),
    "USER": ("",),
    "GIT_DIR": ("/nonexistent",),
    "GIT_CONFIG_COUNT": ("abc",),
    "MPLBACKEND": ("nosuch",),
    "HYDRA_FULL_ERROR": ("1",),
    "OC_CAUSE": ("1",),
}
"""Variables that cannot change what a command with --out and the bundled model makes."""


def variables(draw: random.Random) -> Iterator[Case]:
    """Variables of the environment that hold nonsense."""
    commands = {
        "HEATKV_OUT": SMALL,
        "HEATKV_WEIGHTS_DIR": ("generate", "model=infinity-2b", "--yes", *OUT),
        "HEATKV_DATA": ("generate", "method=full", "benchmark=geneval", *ONE, *OUT),
        "HF_HOME": ("generate", "model=infinity-2b", "--yes", *OUT),
    }
    for name, values in VARIABLES.items():
        for value in values:
            for argv in (commands[name], (*commands[name], "--json")):
                yield Case("environment", f"{name}={value[:50]!r}", argv, env=((name, value),), errors=9)
    for name, values in INDIFFERENT.items():
        for value in values:
            argv = (*SMALL, *OUT, *(("--json",) if draw.random() < 0.5 else ()))
            clean = (*SMALL, *OUT)
            yield Case("environment", f"{name}={value[:50]!r}", argv, (), ((name, value),), HARMLESS, clean=clean)


def outputs(draw: random.Random) -> Iterator[Case]:
    """Folders that cannot be written to."""
    places = ["@files@/prompts.txt", "@files@/prompts.txt/below", "/dev/null", "/dev/full", "/dev/null/x", "/proc/x"]
    places += [
        "/sys/x",
        "/proc/self/x",
        "x" * LONG,
        "@files@/" + "y" * 256,
        "",
        "@files@/link",
        "@files@/loop",
        "/proc/1",
    ]
    commands = [SMALL, ("calibrate",), ("build-schedule", "budget=0.1"), CLEAN["eval"][:-2], CLEAN["bench"][:-2]]
    commands += [CLEAN["score"][:-2], (*CLEAN["eval"][:-2], "--dry-run")]
    for place in places:
        damages = {
            "@files@/link": (Damage("files/link", "a link to nothing"),),
            "@files@/loop": (Damage("files/loop", "a link to itself"),),
        }.get(place, ())
        for argv in commands:
            words = ("--out", place) if draw.random() < 0.5 or not place else (f"out={place}",)
            json = ("--json",) if draw.random() < 0.5 else ()
            yield Case("output", f"out is {place[:60]!r}", (*argv, *words, *json), damages)
    for what in ("schedules", "images", "bench", "score", "calibration"):
        command = {
            "schedules": "schedule",
            "images": "eval",
            "bench": "bench",
            "score": "score",
            "calibration": "calibrate",
        }
        for way in (
            "empty",
            "a pipe",
            "a link to nothing",
            "a link to itself",
            "a link to /dev/full",
            "a link to /dev/null",
        ):
            argv = CLEAN[command[what]]
            yield Case("output", f"out/{what} is {way}", argv, (Damage(f"out/{what}", way),), errors=2)
    for lock, command in (
        ("out/.results.csv.lock", "eval"),
        ("out/images/tiny-streaming-*/.meta.lock", "eval"),
        ("out/images/tiny-streaming-*/free/.lock", "eval"),
        ("out/images/tiny-streaming-*/.scores.jsonl.lock", "eval"),
        ("out/schedules/*/.meta.lock", "schedule"),
        ("out/score/.results.csv.lock", "score"),
    ):
        for way in ("a folder", "a pipe", "a link to itself", "a link to /dev/full", "garbage", "a link to /dev/zero"):
            expect = HARMLESS if way == "garbage" else EITHER
            yield Case(
                "output: lock", f"{lock} is {way}", CLEAN[command], (Damage(lock, way),), expect=expect, errors=2
            )


def streams(draw: random.Random) -> Iterator[Case]:
    """A stdout or stderr that is full."""
    commands = {"ls": ("ls", "methods"), "version": ("--version", "--json"), "models": ("models", "tiny")}
    commands |= {
        "schedule": CLEAN["schedule"],
        "score": CLEAN["score"],
        "eval": CLEAN["eval"],
        "dry": (*SMALL, "--dry-run"),
    }
    for name, argv in commands.items():
        for json in ((), ("--json",)):
            if name == "version" and not json:
                continue
            words = (*argv, *json)
            codes = (3,)
            yield Case(
                "stream", f"{name}: stdout is full", words, stdout="/dev/full", codes=codes, expect=FULL, clean=words
            )
            yield Case("stream", f"{name}: stderr is full", words, stderr="/dev/full", expect=HARMLESS, clean=words)
    for argv in (("eval", "budget=7", *OUT), ("evl",), ("ls", "nosuch"), ("generate", "--nosuch")):
        yield Case("stream", "an error, and stderr is full", argv, stderr="/dev/full", codes=(2, 3))
        yield Case(
            "stream", "an error, and stdout is full", (*argv, "--json"), stdout="/dev/full", codes=(2, 3), errors=2
        )


def conf(draw: random.Random) -> Iterator[Case]:
    """YAML files of the program that somebody has spoilt."""
    files = {
        "config.yaml": SMALL,
        "method/sinks.yaml": SMALL,
        "model/tiny.yaml": SMALL,
        "benchmark/shapes.yaml": SMALL,
        "runtime/auto.yaml": SMALL,
        "metric/kl.yaml": CLEAN["eval"][:-2],
        "experiment/demo.yaml": ("eval", "experiment=demo", "limit=1"),
    }
    ways = (
        *NO_FILE,
        "garbage",
        "zeros",
        "UTF-16",
        "text that is not UTF-8",
        "a JSON number",
        "a JSON text",
        "JSON NaN",
    )
    ways += (
        "a JSON list of nothing",
        "deep JSON",
        "deep JSON objects",
        "NUL characters",
        "a picture",
        "a page of HTML",
    )
    ways += (
        "YAML with code",
        "YAML with a call",
        "YAML that is cut",
        "a YAML bomb",
        "YAML with a tab",
        "an unknown key",
        "a _target_ with code",
        "a cycle",
    )
    for path, argv in files.items():
        for way in ways:
            if path.startswith("experiment") and way in ("a _target_ with code", "a cycle"):
                continue
            words = (*argv, *OUT, *(("--json",) if draw.random() < 0.5 else ()))
            errors = 9 if way == "an unknown key" else 3
            yield Case(
                "conf", f"{path} is {way}", words, (Damage(f"files/conf/{path}", way),), conf=True, errors=errors
            )


def caches(draw: random.Random) -> Iterator[Case]:
    """What other programs left in the hub's cache."""
    place = "home/.cache/huggingface/hub/models--FoundationVision--Infinity"
    for argv in (
        ("generate", "model=infinity-2b", "--yes", *OUT),
        ("models", "infinity-2b"),
        ("doctor", "--model", "infinity-2b", *OUT),
        ("download", "infinity-2b"),
    ):
        for way in ("garbage", "a folder", "a pipe", "a link to itself", "empty", "zeros", "a link to /dev/zero"):
            damage = Damage(f"{place}/refs/main", way)
            yield Case("cache", f"the hub's reference is {way}", argv, (damage,), codes=(3, 4), errors=9)


FAMILIES = (variables, outputs, streams, conf, caches)
