"""The cases whose files are wrong: what a user names, what earlier commands left, what lies about in caches."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from bad_words import ONE
from campaign_world import CLEAN, OUT
from case import EITHER, HARMLESS, PARTIAL, REFUSED, Case
from damage import Damage

NO_FILE = (
    "a folder",
    "a pipe",
    "gone",
    "a link to nothing",
    "a link to itself",
    "a link to /dev/zero",
    "a link to /dev/full",
    "a link to /dev/null",
    "a link to /proc/self/mem",
)
NO_DATA = ("empty", "one byte", "garbage", "zeros", "a page of HTML", "a git-lfs pointer", "a gzip file", "a picture")
LIES = ("a header of 2**60 bytes", "a header of 2**63 bytes", "a header of 2**64-1 bytes", "a tensor of 2**60 numbers")
CODE = ("a pickle with code", "a torch file with code", "a zip file of nothing")
NO_JSON = (
    *("deep JSON", "deep JSON objects", "a JSON number", "a JSON text", "JSON null", "JSON NaN", "JSON of 1e400"),
    *("a JSON list of nothing", "a JSON object of nothing", "a JSON number of 10,000 digits", "UTF-16", "another end"),
    *("text that is not UTF-8", "NUL characters"),
)
CHANCE = ("cut short", "a bit flipped", "a bit of the first 100 bytes flipped", "longer by some bytes")


@dataclass(frozen=True)
class Kind:
    """A kind of file, and a command that reads one.

    Args:
        name: of the kind.
        path: of the file, below the folder of the case.
        argv: the command; it works while the file is sound.
        refused: ways that must be refused.
        either: ways that are refused, or do not matter.
        harmless: ways that must not matter: what is kept is made again.
        chances: draws of each way of `CHANCE`, and what is expected of them.
        chance: what is expected of those.
        codes: of errors.
        errors: how many may be told.
    """

    name: str
    path: str
    argv: tuple[str, ...]
    refused: tuple[str, ...] = (*NO_FILE, *NO_DATA)
    either: tuple[str, ...] = ()
    harmless: tuple[str, ...] = ()
    chances: int = 6
    chance: str = EITHER
    codes: tuple[int, ...] = (2, 3, 4, 5, 6)
    errors: int = 1
    env: tuple[tuple[str, str], ...] = field(default=())


PROMPTS = ("generate", "method=full", "benchmark=prompts", *ONE, *OUT)
NO_TEXT = tuple(way for way in NO_DATA if way not in ("a page of HTML", "a git-lfs pointer"))
DRY = ("eval", "metric=kl", "--dry-run", *OUT)
BY_HASH = ("schedule",)
SAFETENSORS = (*NO_FILE, *NO_DATA, *LIES, *CODE, "deep JSON", "a JSON object of nothing")
RUN = "out/images/tiny-streaming-*"
FULL = "out/images/tiny-full-*"
LPIPS = ("score", "--images", "@files@/pictures", "--reference", "@files@/reference", "metric=lpips")
INFINITY = ("generate", "model=infinity-2b", "--weights", "@files@/weights", "model.weights.verify=false", "--yes")


def _official(name: str, file: str) -> Kind:
    argv = (
        "generate",
        "benchmark=prompts",
        "method=full",
        f"benchmark.format={name}",
        f"benchmark.file=@files@/{file}",
    )
    ways = (*NO_FILE, *NO_TEXT, "a page of HTML", *(way for way in NO_JSON if way != "NUL characters"))
    path = file if file.endswith(".json") else f"{file}/photo.json"
    return Kind(f"list of {name}", f"files/{path}", (*argv, *ONE, *OUT), ways, chances=0)


NAMED = (
    Kind(
        "calibration",
        "files/calibration.safetensors",
        ("build-schedule", "budget=0.1", "calibration=@files@/calibration.safetensors", *OUT),
        SAFETENSORS,
        chances=10,
    ),
    Kind(
        "schedule",
        "files/schedule.safetensors",
        ("generate", "budget=0.1", "schedule=@files@/schedule.safetensors", *ONE, *OUT),
        SAFETENSORS,
        chances=10,
    ),
    Kind(
        "orders",
        "files/orders.json",
        ("build-schedule", "budget=0.1", "--orders", "@files@/orders.json", *OUT),
        (*NO_FILE, *NO_DATA, *NO_JSON, "a row twice"),
    ),
    Kind(
        "prompts as txt",
        "files/prompts.txt",
        (*PROMPTS, "benchmark.file=@files@/prompts.txt"),
        (*NO_FILE, *(way for way in NO_TEXT if way != "zeros"), "text that is not UTF-8", "UTF-16"),
        harmless=("a byte-order mark",),
        chances=0,
    ),
    Kind(
        "prompts as jsonl",
        "files/prompts.jsonl",
        (*PROMPTS, "benchmark.file=@files@/prompts.jsonl"),
        (*NO_FILE, *NO_DATA, *NO_JSON, "a row twice"),
        harmless=("a byte-order mark", "carriage returns"),
        chances=0,
    ),
    Kind(
        "prompts as csv",
        "files/prompts.csv",
        (*PROMPTS, "benchmark.file=@files@/prompts.csv"),
        (*NO_FILE, *NO_TEXT, "a row twice", "semicolons", "tabs", "another end", "text that is not UTF-8", "UTF-16"),
        harmless=("a byte-order mark",),
        chances=0,
    ),
    Kind(
        "prompts of score",
        "files/prompts.jsonl",
        ("score", "--images", "@files@/pictures", "--prompts", "@files@/prompts.jsonl", "metric=clip_score", *OUT),
        (*NO_FILE, *NO_DATA, *NO_JSON, "a row twice"),
        chances=0,
    ),
    _official("coco-captions", "coco-captions.json"),
    _official("image-reward", "image-reward.json"),
    _official("mjhq", "mjhq.json"),
    _official("hpdv2", "hpdv2"),
    Kind(
        "rewrites",
        "files/rewrites.json",
        (*PROMPTS, "benchmark.file=@files@/prompts.txt", "benchmark.rewrites=@files@/rewrites.json"),
        (*NO_FILE, *NO_TEXT, *NO_JSON),
        chances=0,
    ),
    Kind(
        "weights of a model, pth",
        "files/weights/infinity_2b_reg.pth",
        (*INFINITY, *OUT),
        SAFETENSORS,
        chance=REFUSED,
        errors=9,
    ),
    Kind(
        "weights of a tokenizer",
        "files/weights/infinity_vae_d32reg.pth",
        (*INFINITY, *OUT),
        SAFETENSORS,
        chance=REFUSED,
        errors=9,
    ),
    Kind(
        "weights of an encoder",
        "files/weights/flan-t5-xl",
        (*INFINITY, *OUT),
        (*NO_FILE[1:], *NO_DATA[:3]),
        chances=0,
        errors=9,
    ),
    Kind(
        "weights of a metric, pth",
        "files/weights/plain.pth",
        (*LPIPS, "metric.lpips.weights=@files@/weights/plain.pth", *OUT),
        (*SAFETENSORS, "an array of objects with code"),
        chance=REFUSED,
        codes=(3, 4, 6),
    ),
    Kind(
        "weights of a metric, safetensors",
        "files/weights/plain.safetensors",
        (*LPIPS, "metric.lpips.weights=@files@/weights/plain.safetensors", *OUT),
        SAFETENSORS,
        chance=REFUSED,
        codes=(3, 4, 6),
    ),
    Kind(
        "statistics",
        "files/statistics.npz",
        (*CLEAN["fd"][:3], *CLEAN["fd"][5:], "metric.fd_efficientnet_lite0.reference=@files@/statistics.npz"),
        (*NO_FILE, *NO_DATA, *CODE, "an array of objects with code", "a zip bomb", "an array of 2**40 rows"),
        chances=10,
        codes=(3, 4, 5, 6),
    ),
)
"""Files that a user names."""

_REMADE = tuple(way for way in NO_FILE if way != "a folder")
_ABSENT = ("gone", "a link to nothing", "a link to itself")
_UNREADABLE = tuple(way for way in SAFETENSORS if way not in _ABSENT)
LEFT = (
    Kind(
        "calibration left",
        "out/calibration/*/calibration.safetensors",
        CLEAN["schedule"],
        _UNREADABLE,
        _ABSENT,
        chances=10,
    ),
    Kind(
        "record of a calibration", "out/calibration/*/meta.json", CLEAN["schedule"], (), (*NO_FILE, *NO_DATA, *NO_JSON)
    ),
    Kind("schedule left", "out/schedules/*/schedule.safetensors", CLEAN["schedule"], (), SAFETENSORS, chances=8),
    Kind("record of a schedule", "out/schedules/*/meta.json", CLEAN["schedule"], (), (*NO_FILE, *NO_DATA, *NO_JSON)),
    Kind(
        "picture left", f"{RUN}/free/*.png", CLEAN["eval"], (), ("a folder",), (*_REMADE, *NO_DATA[:6]), chance=HARMLESS
    ),
    Kind("picture of full left", f"{FULL}/free/*.png", CLEAN["eval"], (), ("a folder",), NO_DATA[:6], chance=HARMLESS),
    Kind("trace left", f"{FULL}/free/*.safetensors", CLEAN["eval"], (), ("a folder", *LIES), _REMADE, chance=HARMLESS),
    Kind("manifest", f"{RUN}/free/manifest.jsonl", CLEAN["eval"], (), (*NO_FILE, *NO_DATA, *NO_JSON, "a row twice")),
    Kind("manifest of full", f"{FULL}/free/manifest.jsonl", CLEAN["eval"], (), (*NO_FILE, *NO_DATA, *NO_JSON)),
    Kind(
        "manifest of forced",
        f"{RUN}/forced/manifest.jsonl",
        CLEAN["eval"],
        (),
        (*NO_FILE, *NO_DATA, *NO_JSON),
        chances=16,
    ),
    Kind("record of a run", f"{RUN}/meta.json", CLEAN["eval"], (), (*NO_FILE, *NO_DATA, *NO_JSON)),
    Kind("log of a run", f"{RUN}/run.log", CLEAN["eval"], (), (), NO_FILE, chances=0),
    Kind("scores of a run", f"{RUN}/scores.jsonl", CLEAN["eval"], (), (*NO_FILE, *NO_DATA, *NO_JSON)),
    Kind(
        "scores of a metric", f"{RUN}/scores/psnr-*/manifest.jsonl", CLEAN["eval"], (), (*NO_FILE, *NO_DATA, *NO_JSON)
    ),
    Kind("scores of kl", f"{RUN}/scores/kl-*/manifest.jsonl", CLEAN["eval"], (), ("a row twice",), chances=12),
    Kind("contact sheet", "out/contact-sheet.png", CLEAN["eval"], (), NO_FILE, NO_DATA, chances=0),
    Kind(
        "results",
        "out/results.csv",
        CLEAN["eval"],
        tuple(way for way in NO_FILE if way not in ("gone", "a link to nothing"))
        + ("one byte", "garbage", "zeros", "a page of HTML", "a git-lfs pointer", "a gzip file", "semicolons", "tabs")
        + ("UTF-16", "text that is not UTF-8", "another end", "deep JSON", "a JSON number"),
        ("gone", "a link to nothing", "a row twice", "NUL characters"),
        ("a byte-order mark", "carriage returns", "empty"),
        chances=10,
    ),
    Kind(
        "results of score",
        "out/score/results.csv",
        CLEAN["score"],
        ("a folder", "a pipe", "a link to /dev/zero", "one byte", "garbage", "zeros", "semicolons", "tabs", "UTF-16"),
        ("a row twice",),
        ("a byte-order mark", "gone", "empty"),
    ),
    Kind(
        "record of a score", "out/score/score-pictures-*/meta.json", CLEAN["score"], (), (*NO_FILE, *NO_DATA, *NO_JSON)
    ),
    Kind(
        "scores of score",
        "out/score/score-pictures-*/scores/psnr-*/manifest.jsonl",
        CLEAN["score"],
        (),
        (*NO_FILE, *NO_DATA, *NO_JSON),
    ),
    Kind(
        "features",
        "out/score/score-pictures-*/features/*/*.npy",
        CLEAN["fd"],
        (),
        ("a folder", "an array of 2**40 rows", "an array of objects with code"),
        (*_REMADE, *NO_DATA),
        chances=12,
    ),
    Kind(
        "list of features",
        "out/score/score-pictures-*/features/*/manifest.jsonl",
        CLEAN["fd"],
        (),
        (*NO_FILE, *NO_DATA, *NO_JSON),
    ),
    Kind(
        "statistics left",
        "out/references/*/*.npz",
        CLEAN["fd"],
        (),
        (*NO_FILE, *NO_DATA, *CODE, "a zip bomb"),
        chances=8,
    ),
    Kind(
        "record of a bench",
        "out/bench/*/meta.json",
        CLEAN["bench"],
        (),
        (*NO_FILE, *NO_DATA[:4], *NO_JSON[:6]),
        chances=2,
    ),
    Kind("table of a bench", "out/bench/*/bench.csv", CLEAN["bench"], (), NO_FILE[:4], NO_DATA[:3], chances=0),
)
"""Files that earlier commands left, which later ones read or replace."""


def files(draw: random.Random) -> Iterator[Case]:
    """Every kind of file, in every way that it can be wrong."""
    for kind in (*NAMED, *LEFT):
        ways = [(way, 0, REFUSED) for way in kind.refused] + [(way, 0, EITHER) for way in kind.either]
        ways += [(way, 0, HARMLESS) for way in kind.harmless]
        ways += [(draw.choice(CHANCE), draw.randrange(10**6), kind.chance) for _ in range(kind.chances)]
        for way, seed, expect in ways:
            argv = (*kind.argv, "--json") if draw.random() < 0.5 else kind.argv
            yield Case(
                f"file: {kind.name}",
                f"{kind.name} is {way}",
                argv,
                (Damage(kind.path, way, seed),),
                kind.env,
                expect,
                kind.codes,
                kind.argv,
                errors=kind.errors,
            )


# ----------------------------------------------------------------------------------------------------------- pictures


def pictures(draw: random.Random) -> Iterator[Case]:
    """One picture of several is wrong: the others are measured, and the outcome says which one was not."""
    for folder, command in (("pictures", "score"), ("reference", "score"), ("formats", "formats")):
        names = {
            "pictures": ["00001.png"],
            "reference": ["00002.png"],
            "formats": ["png.png", "jpg.jpg", "webp.webp", "bmp.bmp"],
        }[folder]
        for name in names:
            path = f"files/{folder}/{name}"
            ways: list[tuple[str, int]] = [(way, 0) for way in (*NO_FILE, *NO_DATA, "a giant picture") if way != "gone"]
            ways += [("cut short", draw.randrange(10**6)) for _ in range(4)]
            for way, seed in ways:
                yield _one_of_many(command, path, way, seed, PARTIAL, draw)
        for _ in range(12 if folder != "formats" else 0):  # formats without checksums cannot tell
            path = f"files/{folder}/{names[0]}"
            yield _one_of_many(command, path, "a bit flipped", draw.randrange(10**6), EITHER, draw)


def _one_of_many(command: str, path: str, way: str, seed: int, expect: str, draw: random.Random) -> Case:
    argv = (*CLEAN[command], "--json") if draw.random() < 0.5 else CLEAN[command]
    return Case(
        "file: picture",
        f"{path} is {way}",
        argv,
        (Damage(path, way, seed),),
        expect=expect,
        codes=(6,),
        clean=CLEAN[command],
        clean_damages=(Damage(path, "gone"),),
    )


FAMILIES = (files, pictures)
