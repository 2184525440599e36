"""The cases whose words are wrong: keys and values of the config, sweeps, options, commands."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import typer
from campaign_world import OUT
from case import CONTROL, HARMLESS, LONG, Case
from damage import MARKER
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from heatkv_cli.cli.app import app

CONF = Path(__file__).resolve().parents[2] / "conf"

# ------------------------------------------------------------------------------------------------- keys of the config


@dataclass(frozen=True)
class Leaf:
    """A key of the composed config, its value, and what has to be chosen so that it is there."""

    key: str
    value: Any
    chosen: tuple[str, ...] = ()


def names_of(group: str) -> list[str]:
    """The files of a group."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def _composed(*chosen: str) -> dict[str, Any]:
    GlobalHydra.instance().clear()
    lists = ("benchmark=shapes", "benchmark@calibration_prompts=shapes-calibration-a")
    lists += ("benchmark@calibration_check=shapes-calibration-b",)
    mine = {word.partition("=")[0] for word in chosen}
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        found = compose("config", overrides=[*(word for word in lists if word.partition("=")[0] not in mine), *chosen])
    plain = OmegaConf.to_container(found, resolve=False)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _walk(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from _walk(item, f"{key}.{name}" if key else str(name))
    else:
        yield key, value


@cache
def leaves() -> tuple[Leaf, ...]:
    """Every key that any choice of files brings, each once."""
    found: dict[tuple[str, str], Leaf] = {}

    def add(below: str, composed: dict[str, Any], *chosen: str) -> None:
        for key, value in _walk(composed):
            if key == below or key.startswith(f"{below}.") or not below:
                owner = chosen[0] if chosen else ""
                found.setdefault((key, owner), Leaf(key, value, chosen))

    add("", _composed())
    for group in ("model", "method", "benchmark", "runtime"):
        for name in names_of(group):
            if f"{group}={name}" not in ("model=tiny", "benchmark=shapes"):
                add(group, _composed(f"{group}={name}"), f"{group}={name}")
    for name in names_of("metric"):
        add("metric", _composed(f"+metric@metric.{name}={name}"), f"metric={name}")
    return tuple(leaf for leaf in found.values() if leaf.key not in ("metric", "out"))


WHOLE = re.compile(
    r"seed|batch|thread|num_|_scales|splits|neighbours|images|objects|resamples|sheet|count|limit|repeats"
)
"""Names of whole numbers; of others a default of 1 does not say whether 1.5 would do."""


def _wrong_values(key: str, value: Any) -> dict[str, str]:
    """Texts that no key with a value like this one can have, by what is wrong with them."""
    whole = {"a fraction": "1.5", "huge": "9223372036854775808", "astronomical": str(10**30)}
    whole = whole if WHOLE.search(key.rpartition(".")[2]) else {}
    number = {
        "a word": "abc",
        "nan": "nan",
        "inf": "inf",
        "-inf": "-inf",
        "1e400": "1e400",
        "-1e400": "-1e400",
        "true": "true",
        "empty": "",
        "a quoted number": '"1"',
        "5,000 digits": "9" * LONG,
        "a date": "2026-01-01",
        "hexadecimal": "0x10",
    }
    nested = {"a mapping": "{a:1}", "a mapping of mappings": "{a:{b:{c:1}}}"}
    if isinstance(value, bool):
        return {**nested, **number, "a number": "2", "a list": "[]", "yes": "yes"} | {"true": "1"}
    if isinstance(value, int):
        return {**nested, **number, "a list": "[]", **whole}
    if isinstance(value, float):
        return {**nested, **number, "a list": "[]"}
    if isinstance(value, str):
        return {**nested, "a list of lists": "[[[1]]]", "a list": "[]"}
    if isinstance(value, list):
        texts = any(isinstance(item, str) for item in value)
        return nested | ({} if texts else {"a word": "abc", "a list of words": "[a]", "a list of nan": "[nan]"})
    return {**nested, "a list of lists": "[[[1]]]"}


def commands_for(leaf: Leaf, draw: random.Random) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """A command that composes a leaf's config: its words before and after the overrides."""
    score = ("score", "--images", "@files@/pictures", "--reference", "@files@/reference")
    some = [("eval", "--dry-run"), ("eval",), ("generate",), ("calibrate",), ("bench",), ("doctor",), score]
    if leaf.key.startswith("metric."):
        some = [("eval",), ("eval", "--dry-run"), score]
    elif leaf.key.startswith("benchmark.") or leaf.key == "limit":  # calibrate has its own meaning of both
        some = [("eval",), ("generate", "--dry-run"), ("generate",)]
    first, *rest = draw.choice(some)
    chosen = leaf.chosen
    if "benchmark=prompts" in chosen and leaf.key != "benchmark.file":
        chosen += ("benchmark.file=@files@/prompts.txt",)
    if first == "score" and not any(word.startswith("metric=") for word in chosen):
        chosen += ("metric=psnr",)
    if first == "calibrate":
        chosen = tuple(word for word in chosen if not word.startswith(("method=", "benchmark=")))
        if chosen != leaf.chosen:
            first, chosen = "generate", leaf.chosen
    return (first, *rest, *chosen), _json(OUT, draw)


def _json(words: tuple[str, ...], draw: random.Random) -> tuple[str, ...]:
    return (*words, "--json") if draw.random() < 0.5 else words


CONFIG = (2, 3)
"""Codes of what is wrong with a value: configuration, or a path that cannot be."""


def config_values(draw: random.Random) -> Iterator[Case]:
    """Every key, each with some values that it cannot have."""
    for leaf in leaves():
        if leaf.key.endswith("version"):  # any text or number is one
            wrong = {"a mapping": "{a:1}", "a list": "[1]"}
        else:
            wrong = _wrong_values(leaf.key, leaf.value)
        if leaf.key in ("budget", "rho", "memory", "seed_mode", "shard"):
            wrong.pop("a quoted number", None)
        for what in draw.sample(sorted(wrong), min(3, len(wrong))):
            before, after = commands_for(leaf, draw)
            argv = (*before, f"{leaf.key}={wrong[what]}", *after)
            yield Case("config: wrong value", f"{leaf.key} is {what}", argv, codes=CONFIG)


def config_texts(draw: random.Random) -> Iterator[Case]:
    """Numbers and switches in place of which stands a text with control characters, or a very long one."""
    plain = [leaf for leaf in leaves() if isinstance(leaf.value, (bool, int, float))]
    groups = [Leaf(key, "") for key in ("model", "method", "benchmark", "runtime", "reference", "experiment", "metric")]
    for leaf in (*draw.sample(plain, 40), *groups * 3):
        before, after = commands_for(leaf, draw)
        text = draw.choice(CONTROL)
        quoted = '"' + text + '"' if draw.random() < 0.5 else text
        argv = (*before, f"{leaf.key}={quoted}", *after)
        yield Case("config: control characters", f"{leaf.key} is {text!r}", argv, codes=CONFIG)
        argv = (*before, f"{leaf.key}={draw.choice('xé') * LONG}", *after)
        yield Case("config: long value", f"{leaf.key} has {LONG} characters", argv, codes=CONFIG)


INTERPOLATIONS = (
    "${nosuchkey}",
    "${oc.env:HEATKV_NOT_SET}",
    "${oc.env:PATH}",
    "${hydra:runtime.cwd}",
    "${nosuchresolver:1}",
    "${oc.decode:nan}",
    "${model}",
    "${.nothing}",
    "${KEY}",
    "${",
    "${${${seed}}}",
    "${oc.create:{a:1}}",
)
"""Texts that OmegaConf would compute; KEY is the key itself."""


def interpolations(draw: random.Random) -> Iterator[Case]:
    """Values that refer to what is not there, to themselves, or to what does not fit."""
    for leaf in draw.sample(leaves(), 80):
        if not isinstance(leaf.value, (bool, int, float)):
            continue
        before, after = commands_for(leaf, draw)
        for text in draw.sample(INTERPOLATIONS, 3):
            typed = text.replace("KEY", leaf.key)
            argv = (*before, f"{leaf.key}={typed}", *after)
            yield Case("config: interpolation", f"{leaf.key} is {typed}", argv, codes=CONFIG)


def targets(draw: random.Random) -> Iterator[Case]:
    """Values that name code: none of it may run."""
    touch = f"touch @place@/{MARKER}"
    nodes = sorted({(leaf.key.rpartition(".")[0], leaf.chosen) for leaf in leaves() if "." in leaf.key})
    codes = {
        "os.system": f'{{_target_:os.system,command:"{touch}"}}',
        "pathlib.Path.touch": f'{{_target_:pathlib.Path.touch,self:"@place@/{MARKER}"}}',
        "builtins.open": f'{{_target_:builtins.open,file:"@place@/{MARKER}",mode:w}}',
        "builtins.exec": f"{{_target_:builtins.exec,_args_:[\"open('@place@/{MARKER}','w')\"]}}",
    }
    for leaf in draw.sample(leaves(), 60):
        name = draw.choice(sorted(codes))
        before, after = commands_for(leaf, draw)
        argv = (*before, f"{leaf.key}={codes[name]}", *after)
        yield Case("config: code", f"{leaf.key} is a call of {name}", argv, codes=CONFIG)
    for node, chosen in draw.sample(nodes, min(60, len(nodes))):
        before, after = commands_for(Leaf(f"{node}.x", "", chosen), draw)
        for sign in ("", "+", "++"):
            argv = (*before, f"{sign}{node}._target_={draw.choice(sorted(codes))}", *after)
            yield Case("config: code", f"{sign}{node}._target_ names code", argv, codes=CONFIG)
    for key in ("model.resolutions", "model.sketch", "model.params.tokenizer", "metric.kl", "method"):
        before, after = commands_for(Leaf(key, ""), draw)
        for value in ("os._exit", "sys.exit", "os.system", codes["os.system"]):
            yield Case("config: code", f"{key} is {value}", (*before, f"{key}={value}", *after), codes=CONFIG)


def keys(draw: random.Random) -> Iterator[Case]:
    """Keys that are not there, taken away, moved, given twice, or below a single value."""
    for leaf in draw.sample(leaves(), 60):
        before, after = commands_for(leaf, draw)
        key, twice = leaf.key, f"{leaf.key}=1"
        wrong = {
            "unknown": (f"{key}x=1",),
            "in capitals": (f"{key.upper()}=1",),
            "below a value": (f"{key}.nothing=1",),
            "appended and unknown": (f"+{key}x=1",),
            "taken away": (f"~{key}",),
            "taken away with a value": (f"~{key}=1",),
            "of a package": (f"{key}@other=1",),
            "given twice": (twice, twice),
            "with a blank": (f"{key} =1",),
            "begins with a point": (f".{key}=1",),
            "ends with a point": (f"{key}.=1",),
            "with two points": (f"{key.replace('.', '..')}..a=1",),
            "without a value": (key,),
            "long": (f"{key}.{'x' * LONG}=1",),
            "with a control character": (f"{key}\x1b[0m=1",),
            "of no name": ("=1",),
            "of Hydra": (draw.choice(("hydra.run.dir=@place@/x", "hydra/launcher=basic", "hydra.job.chdir=true")),),
        }
        for what in draw.sample(sorted(wrong), 3):
            errors = 2 if what == "given twice" else 1  # for many keys 1 is wrong too
            yield Case("config: key", f"{key} {what}", (*before, *wrong[what], *after), codes=CONFIG, errors=errors)


# ------------------------------------------------------------------------------------------------------------- sweeps

ONE = ("--limit", "1", "runtime.batch_size=1")
SINKS = ("generate", "method=sinks", *ONE)


def sweeps(draw: random.Random) -> Iterator[Case]:
    """Comma lists and ranges with blanks, doubles, nothing in them, or too much."""
    wrong = {
        "a blank entry": "1,,2",
        "a blank first entry": ",1",
        "a blank last entry": "1,",
        "only commas": ",,,",
        "an empty range": "range(0,0)",
        "a range without steps": "range(0,3,0)",
        "a range of 10**9": f"range(0,{10**9})",
        "an endless range": "range(0,inf)",
        "a range of nothing": "range()",
        "an open choice": "choice(1,2",
        "a choice of nothing": "choice()",
        "an interval": "interval(0,1)",
        "a glob": "glob(*)",
        "a word among numbers": "1,abc",
        "nan among numbers": "1,nan",
        "a mapping among numbers": "1,{a:1}",
        "20,000 values": ",".join(map(str, range(20_000))),
        "deep brackets": "[" * 3000 + "]" * 3000,
        "deep calls": "sort(" * 500 + "1" + ")" * 500,
        "deep mappings": "{a:" * 1000 + "1" + "}" * 1000,
        "an unknown function": "nosuch(1,2)",
        "a cast of nothing": "int(abc)",
        "an open quote": "'1",
        "an open bracket": "[1,2",
    }
    for key in ("seed", "budget", "rho", "method.window", "runtime.batch_size", "model.sampling.cfg", "limit"):
        chosen = ("method=snapkv",) if key.startswith("method") else ()
        for what, value in wrong.items():
            if key in ("budget", "rho") and value == "interval(0,1)":
                continue
            command = draw.choice((("generate",), ("eval", "--dry-run"), ("eval",)))
            argv = (*command, *chosen, f"{key}={value}", *_json(OUT, draw))
            yield Case("sweep", f"{key} is {what}", argv, codes=CONFIG)
    for words in (
        ("limit=8,16",),
        ("out=@out@/a,@out@/b",),
        ("shard=0/2,1/2",),
        ("noise_floor=attention,batch",),
        ("runtime.threads=1,2",),
        ("contact_sheet=1,2",),
        ("bootstrap.seed=0,1",),
        ("metric=kl,kl",),
        ("metric=kl,nosuch",),
        ("model=tiny,tinny",),
        ("method=full,nosuch",),
        ("experiment=demo,methods-tiny",),
        ("experiment=demo", "experiment=demo"),
        ("benchmark=shapes,nosuch",),
        ("benchmark=shapes,natural-64",),
        ("runtime=cpu,nosuch",),
        ("weights=random,@files@/weights",),
    ):
        argv = ("eval", *words, *(() if words[0].startswith("out") else OUT))
        yield Case("sweep", f"{words} has no points, or none that can be", argv, codes=CONFIG, errors=2)
    same = {
        "budget=0.1,0.1": "budget=0.1",
        "budget=choice(0.1,0.1)": "budget=0.1",
        "budget=1e-1": "budget=0.1",
        "budget=1/10": "budget=0.1",
        "budget='0.1'": "budget=0.1",
        "budget=sort(0.1)": "budget=0.1",
        "seed=0,0 budget=0.1": "budget=0.1",
        "seed=range(0,1) budget=0.1": "budget=0.1",
        "method=sinks budget=0.1 contact_sheet=0": "budget=0.1",
        "++seed=0 budget=0.1": "budget=0.1",
        "+seed=0 budget=0.1": "budget=0.1",
        "bootstrap.seed=3 budget=0.1": "budget=0.1",
    }
    for odd, sound in same.items():
        words = tuple(odd.split())
        base = ("generate", *ONE) if any(word.startswith("method=") for word in words) else SINKS
        yield Case(
            "sweep: the same",
            f"{odd} says {sound}",
            (*base, *words, *OUT),
            expect=HARMLESS,
            clean=(*SINKS, sound, *OUT),
        )


# ------------------------------------------------------------------------------------------------- words of the shell


def _commands() -> dict[str, Any]:
    """The commands by name, as Typer gives them to the shell."""
    found: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    return dict(sorted(found.items()))


SOUND: dict[str, tuple[str, ...]] = {
    "score": ("score", "metric=psnr"),
    "download": ("download", "tiny"),
    "ls": ("ls", "methods"),
    "models": ("models", "tiny"),
}
"""Words a command needs beside the options that are tried."""

PICTURES = {"--images": "@files@/pictures", "--reference": "@files@/reference"}
FREE_TEXT = ("--out", "--weights")
"""Options for which any text is a folder's name."""


def options(draw: random.Random) -> Iterator[Case]:
    """Every option of every command: without its value, with a wrong one, given twice, misspelt."""
    for name, command in _commands().items():
        base = SOUND.get(name, (name,))
        for parameter in command.params:
            option = next((word for word in parameter.opts if word.startswith("--")), "")
            if not option or option == "--help":
                continue
            rest = tuple(word for pair in PICTURES.items() if name == "score" and pair[0] != option for word in pair)
            words = (*base, *rest)
            wrong: dict[str, tuple[str, ...]] = {"misspelt": (f"{option}x",)}
            if getattr(parameter, "is_flag", False):
                wrong |= {"with a value": (f"{option}=maybe",), "with a number": (f"{option}=1",)}
            else:
                long, bad = "x" * LONG, draw.choice(CONTROL)
                wrong |= {"without a value": (option,), "empty": (option, "")}
                wrong |= {"very long": (option, long), "a mapping": (option, "{a:1}"), "twice": (option, "a") * 2}
                if option not in FREE_TEXT:
                    wrong |= {"nonsense": (option, "nonsense"), "control": (option, bad), "nan": (option, "nan")}
                    wrong |= {"a list": (option, "[1]"), "negative": (option, "-1")}
                if option == "--out" or (option == "--weights" and name in ("download", "models")):
                    wrong.pop("a mapping")  # a folder may be called so
            for what, typed in wrong.items():
                argv = (*words, *typed, *(() if option == "--out" else OUT if _takes_out(command) else ()))
                if what == "without a value":
                    argv = (*words, *typed)
                yield Case("option", f"{name} {option} {what}", argv, codes=(2, 3, 4))


def _takes_out(command: Any) -> bool:
    return any("--out" in parameter.opts for parameter in command.params)


def words(draw: random.Random) -> Iterator[Case]:
    """Commands and arguments that are not there, or too many."""
    wrong = [("evl",), ("eval", "x"), ("nosuch", "--json"), ("--json", "nosuch"), ("--nosuch",)]
    wrong += [("ls", "methodss"), ("ls", "methods", "models"), ("ls", ""), ("ls", "\x1b[31m"), ("ls", "x" * LONG)]
    wrong += [
        ("ls", "methods", "--stale"),
        ("ls", "runs", "--remove"),
        ("ls", "--remove"),
        ("ls", "methods", "--out", "a"),
    ]
    wrong += [("download",), ("download", "nosuch"), ("download", "benchmark=nosuch"), ("download", "method=full")]
    wrong += [("download", "tiny", "--images"), ("download", "benchmark=shapes", "--images")]
    wrong += [
        ("download", "a=b=c"),
        ("download", "="),
        ("download", "benchmark="),
        ("download", ""),
        ("download", "../x"),
    ]
    wrong += [("download", "benchmark=../../x"), ("download", "model=" + "x" * LONG), ("download", "\x1b[31m")]
    wrong += [
        ("models", "nosuch"),
        ("models", ""),
        ("models", "tiny", "tiny"),
        ("models", "../tiny"),
        ("models", "x/y"),
    ]
    wrong += [("doctor", "nosuch"), ("doctor", "--model", "nosuch"), ("doctor", "seed=x"), ("doctor", "out=")]
    wrong += [("score",), ("score", "metric=psnr"), ("score", "--images", "@files@/nosuch", "metric=psnr")]
    wrong += [("score", "--images", "@files@/pictures"), ("score", "--images", "@files@/pictures", "metric=kl")]
    wrong += [
        ("score", "--images", "@files@/pictures", "metric=psnr"),
        ("score", "--images", "@files@", "metric=psnr,nosuch"),
    ]
    wrong += [("score", "--images", "@files@/pictures", "metric=clip_score")]
    wrong += [("score", "--images", "@files@/hpdv2", "--reference", "@files@/reference", "metric=psnr")]
    wrong += [("bench", "model=tiny,infinity-2b"), ("bench", "runtime.batch_size=1,2"), ("bench", "weights=random")]
    wrong += [("build-schedule", "method=snapkv", "budget=0.1"), ("build-schedule", "budget=0.0001")]
    wrong += [
        ("build-schedule", "method=full"),
        ("generate", "method=full", "budget=0.1"),
        ("eval", "budget=0.1", "rho=0.7"),
    ]
    wrong += [("generate", "method=snapkv", "schedule=@files@/schedule.safetensors")]
    wrong += [("generate", "method=sinks", "orders=@files@/orders.json")]
    wrong += [("generate", "method=h2o", "calibration=@files@/calibration.safetensors")]
    wrong += [("generate", "method=random", "schedule=@files@/schedule.safetensors", "budget=0.1")]
    wrong += [("generate", "budget=0.2", "schedule=@files@/schedule.safetensors")]
    wrong += [("generate", "seed_mode=paper"), ("eval", "noise_floor=batch", "runtime.batch_size=1")]
    wrong += [("generate", "runtime=gpu"), ("eval", "runtime=gpu", "runtime.device_index=99")]
    wrong += [("generate", "model=infinity-2b", "benchmark=shapes"), ("generate", "benchmark=prompts")]
    wrong += [("generate", "model=infinity-2b", "resolution=0.25M"), ("generate", "preset=infer")]
    wrong += [
        ("generate", "method=[full,heatkv]"),
        ("generate", "model=tiny.yaml"),
        ("generate", "model=../model/tiny"),
    ]
    wrong += [("eval", "metric=kl", "metric.psnr.data_range=1"), ("eval", "metric=")]
    wrong += [("eval", "metric=geneval", "benchmark=shapes"), ("eval", "metric=shapes", "benchmark=natural")]
    for argv in wrong:
        out = OUT if argv[0] in ("eval", "generate", "score", "bench", "build-schedule") else ()
        yield Case("words", " ".join(argv)[:80], (*argv, *out), errors=3)


FAMILIES = (config_values, config_texts, interpolations, targets, keys, sweeps, options, words)
