"""Every mistake: one clear message, a fix, the documented exit code, and no traceback."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from heatkv_cli import cli
from heatkv_cli.errors import (
    ArtifactError,
    BudgetError,
    ConfigError,
    ConfigErrors,
    HeatKVError,
    MemoryLimitError,
    PartialResultError,
    SetupError,
    did_you_mean,
)

Capture = pytest.CaptureFixture[str]


def check(capsys: Capture, arguments: list[str], code: int, *expected: str) -> str:
    """Run a command that must fail; return what it said."""
    assert cli.run(arguments) == code
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert said.count("error: ") >= 1
    assert said.count("fix: ") >= 1
    for words in expected:
        assert words in said, said
    return said


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["method=heatkvv"], ["unknown method 'heatkvv'", "did you mean 'heatkv'?", "available: "]),
        (["--method", "heatkvv"], ["unknown method 'heatkvv'", "did you mean 'heatkv'?"]),
        (["model=tinny"], ["unknown model 'tinny'", "did you mean 'tiny'?"]),
        (["metric=kl,psrn"], ["unknown metric 'psrn'", "did you mean 'psnr'?"]),
        (["experiment=dmo"], ["unknown experiment 'dmo'", "did you mean 'demo'?"]),
        (["budgte=0.1"], ["unknown key 'budgte'", "did you mean 'budget'?"]),
        (["method=streaming", "method.snk=3"], ["unknown key 'method.snk' of method=streaming", "'method.sink'"]),
        (["runtime.thread=1"], ["unknown key 'runtime.thread'", "did you mean 'runtime.threads'?"]),
        (["method.name=other"], ["'method.name' cannot be set"]),
        (["budget=0"], ["budget", "0", "nothing would be kept"]),
        (["budget=1.5"], ["budget", "1.5", "budget=0.015"]),
        (["budget=-0.1"], ["budget", "-0.1"]),
        (["budget=abc"], ["budget", "abc", "not a number"]),
        (["budget="], ["budget"]),
        (["rho=1"], ["rho", "1"]),
        (["budget=0.1", "rho=0.7"], ["budget and rho are both given"]),
        (["method=full", "budget=0.1"], ["method=full has no budget", "leave the budget away"]),
        (["seed=x"], ["seed is 'x'", "a whole number"]),
        (["seed_mode=papr"], ["seed_mode is 'papr'", "'paper'"]),
        (["seed_mode=paper"], ["runtime.batch_size=1"]),
        (["--limit", "0"], ["limit is 0", "limit=all"]),
        (["--limit", "some"], ["limit is 'some'", "limit=all"]),
        (["--shard", "4/4"], ["shard is '4/4'", "shard=0/4"]),
        (["runtime.batch_size=0"], ["runtime.batch_size is 0"]),
        (["runtime.attention=flash"], ["runtime.attention is 'flash'", "'grouped'"]),
        (["model.sampling.tau=[1,2]"], ["model.sampling.tau has 2 values", "one per scale: 8"]),
        (["model.sampling.tau=0"], ["model.sampling.tau is 0", "0.001 to 1000"]),
        (["model.sampling.tau=nan"], ["model.sampling.tau is nan"]),
        (["model.sampling.cfg=inf"], ["model.sampling.cfg is inf"]),
        (["model.sampling.top_k=-1"], ["model.sampling.top_k is -1", "0 is off"]),
        (["model.sampling.top_p=1.5"], ["model.sampling.top_p is 1.5"]),
        (["model.sampling.guide_layers=[1]"], ["model.sampling.guide_layers is (1,)", "-1 to -8"]),
        (["model.sampling.guide_layers=[0,-9]"], ["model.sampling.guide_layers is (0, -9)"]),
        (["model.sampling.guide_layers=[]"], ["model.sampling.guide_layers is ()", "cfg=1 is off"]),
        (["model=infinity-2b", "model.resolution=2M"], ["has no resolution '2M'", "0.25M"]),
        (["model=infinity-2b", "aspect_ratio=1.49"], ["ratio 1.49", "the nearest is 1.5"]),
        (["model=infinity-2b", "aspect_ratio=16:9"], ["model.aspect_ratio is '16:9'", "a number"]),
        (["aspect_ratio=1.5"], ["model=tiny has no aspect_ratio", "infinity-8b-512"]),
        (["preset=infer"], ["model=tiny has no preset", "infinity-2b"]),
        (["force_resolution=true"], ["model=tiny has no force_resolution"]),
        (["resolution=1M"], ["model=tiny has no resolution '1M'", "80px"]),
        (["resolution=80px", "model.resolution=80px"], ["resolution and model.resolution are both given"]),
        (["model=infinity-8b", "preset=infr"], ["has no preset 'infr'", "did you mean 'infer'?"]),
        (["model=infinity-8b", "model.presets={}"], ["'model.presets' cannot be set"]),
        (
            ["model=infinity-2b", "resolution=0.25M"],
            ["trained at 1M", "model=infinity-8b-512", "force_resolution=true"],
        ),
        (["heatkv"], ["'heatkv' is not an override", "key=value"]),
        (["~method"], ["not removed"]),
        (["method=[full,heatkv]"], ["one name"]),
        (["method=full", "--method", "heatkv"], ["method is given twice"]),
        (["benchmark=prompts"], ["'benchmark.file' has no value"]),
        (["x={"], ["cannot read the override"]),
        (["seed=range(0,0)"], ["nothing to run"]),
    ],
    ids=lambda item: " ".join(item) if isinstance(item, list) and "=" in "".join(item) else None,
)
def test_configuration(arguments: list[str], expected: list[str], capsys: Capture) -> None:
    check(capsys, ["eval", *arguments], 2, *expected)


@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=["run", "dry-run"])
def test_methods_and_metrics_are_built_before_any_work(more: list[str], tmp_path: Path, capsys: Capture) -> None:
    arguments = ["method=snapkv", "method.window=x", "method.obs=middle", "seed=y", "metric.psnr.data_range=wide"]
    said = check(capsys, ["eval", *arguments, "--out", str(tmp_path / "out"), *more], 2)
    for words in ("method.window is 'x'", "method.obs is 'middle'", "seed is 'y'", "metric.psnr.data_range is 'wide'"):
        assert words in said
    assert said.count("error: ") == 4
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("method=cake method.gamma=inf", "method.gamma is inf"),
        ("metric=psnr metric.psnr.data_range=inf", "metric.psnr.data_range is inf"),
        ("metric=psnr metric.psnr.data_range=0", "metric.psnr.data_range is 0"),
        ("metric=ssim metric.ssim.batch_size=-1", "metric.ssim.batch_size is -1"),
        ("bootstrap.resamples=0", "bootstrap.resamples is 0"),
        ("bootstrap.confidence=2", "bootstrap.confidence is 2"),
        ("bootstrap.seed=-1", "bootstrap.seed is -1"),
        ("model.params.width=nan", "model.params.width is nan"),
        ("model.params.tokenizer.nosuch=3", "unknown key 'model.params.tokenizer.nosuch'"),
        ("model.params.tokenizer.bits=abc", "model.params.tokenizer.bits"),
        ("model.params.tokenizer=null", "is a group of keys"),
        ("metric=kl metric.kl=1", "kl has no parameters"),
        ("model.sampling.cfg=1e39", "model.sampling.cfg is 1e+39"),
        ("model.num_layers=1000000", "model.num_layers is 1000000"),
        ("memory=1e999GB", "memory is '1e999GB'"),
        ("seed_mode=paper runtime.batch_size=1 seed=18446744073709551616", "seed is 18446744073709551616"),
        ("runtime.threads=2147483648", "runtime.threads is 2147483648"),
        ("runtime.threads=1000000000", "runtime.threads is 1000000000"),
        ("seed=range(0,3,0)", "must not be zero"),
        *((f"{key}={'9' * 5000}", key) for key in ("limit", "budget", "rho", "seed", "memory", "contact_sheet")),
        (f"shard=0/{'9' * 5000}", "shard"),
        ("~nosuch", "keys can be set"),
        *((f"{key}={'a' * 300}", "too long") for key in ("schedule", "calibration", "orders")),
        (f"benchmark=prompts benchmark.file={'a' * 300}", "too long"),
        ("model=infinity-2b model.resolutions=os._exit model.aspect_ratio=7", "'model.resolutions' cannot be set"),
        ("model.params._target_=os._exit", "unknown key 'model.params._target_'"),
        ("method.target=os._exit", "unknown key 'method.target'"),
        ("method=HeatKV", "did you mean 'heatkv'?"),
        ("model.dtype=bfloat16", "a bundled model computes in float32"),
        ("model=infinity-2b benchmark=shapes", "means nothing"),
    ],
    ids=lambda text: text[:60],
)
def test_values_that_no_run_can_have(arguments: str, expected: str, capsys: Capture) -> None:
    code = 3 if "benchmark.file" in arguments else 2
    said = check(capsys, ["eval", "--dry-run", *arguments.split()], code, expected)
    assert max(map(len, said.splitlines())) < 1500  # a value of 5,000 digits is cut


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        ("method=snapkv schedule=/nonexistent", 2, "schedule=/nonexistent is not read by method snapkv"),
        ("method=snapkv calibration=/nonexistent", 2, "calibration=/nonexistent is not read"),
        ("method=snapkv orders=/nonexistent", 2, "orders=/nonexistent is not read"),
        ("method=random orders=/nonexistent", 2, "orders=/nonexistent is not read by method random"),
        ("method=heatkv orders=/a schedule=/b", 2, "orders=/a is not read by method heatkv beside schedule"),
        ("method=heatkv calibration=/a orders=/b", 2, "calibration=/a is not read by method heatkv beside orders"),
        ("method=heatkv text=/nonexistent", 2, "text=/nonexistent is not read by model tiny"),
        ("method=snapkv weights=/nonexistent", 2, "weights=/nonexistent is not a folder"),
        ("method=heatkv schedule=/nonexistent", 4, "/nonexistent"),
        ("method=heatkv orders=/nonexistent", 4, "/nonexistent"),
        ("method=hack calibration=/nonexistent", 4, "/nonexistent"),
    ],
)
def test_files_that_are_not_there_or_not_read(
    arguments: str, code: int, expected: str, tmp_path: Path, capsys: Capture
) -> None:
    for command in ("generate", "eval"):
        words = [*arguments.split(), "budget=0.5", "--limit", "2", "--out", str(tmp_path)]
        check(capsys, [command, *words], code, expected)
    assert not (tmp_path / "images").exists()


@pytest.mark.parametrize(
    ("option", "key"), [("--seed", "seed=0"), ("--device", "runtime=gpu"), ("--prompts", "prompts")]
)
def test_keys_taken_for_options(option: str, key: str, capsys: Capture) -> None:
    check(capsys, ["eval", option, "1"], 2, key)


def test_usage_errors_are_json_too(capsys: Capture) -> None:
    assert cli.run(["eval", "--nosuch", "--json"]) == 2
    document = json.loads(capsys.readouterr().out)
    assert (document["status"], document["exit_code"]) == ("error", 2)


def test_a_file_that_is_not_there_is_named_as_typed(capsys: Capture) -> None:
    check(capsys, ["eval", "benchmark=prompts", "benchmark.file=nope.txt"], 3, "there is no nope.txt")


def test_all_errors_at_once(capsys: Capture) -> None:
    said = check(
        capsys, ["eval", "method=heatkvv", "model=tny", "metric=psrn", "budgte=1", "budget=1.5", "limit=no"], 2
    )
    for words in ("heatkvv", "tny", "psrn", "budgte", "1.5", "'no'"):
        assert words in said
    assert said.count("error: ") == said.count("fix: ") == 6


def test_one_mistake_in_a_sweep_is_said_once(capsys: Capture) -> None:
    said = check(capsys, ["eval", "method=streaming,heatkv,random", "budget=0.2,0.1", "limit=no"], 2)
    assert said.count("error: ") == 1


@pytest.mark.parametrize("arguments", [["eval", "--budgett", "0.1"], ["evl"], ["eval", "--limit"], ["--nothing"]])
def test_usage(arguments: list[str], capsys: Capture) -> None:
    check(capsys, arguments, 2)


def test_unknown_list(capsys: Capture) -> None:
    check(capsys, ["ls", "method5"], 2, "did you mean 'methods'?")


def test_unwritable_output(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "file").touch()
    check(capsys, ["generate", "--out", str(tmp_path / "file" / "runs")], 3, "cannot write to", "--out DIR")


def test_unreadable_prompts(tmp_path: Path, capsys: Capture) -> None:
    missing = tmp_path / "prompts.txt"
    check(capsys, ["eval", "benchmark=prompts", f"benchmark.file={missing}", "--dry-run"], 3, str(missing))


def test_weights_that_are_not_there(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HEATKV_WEIGHTS_DIR", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "/no/cache")
    fix = "heatkv download infinity-2b, or put it into a folder named by --weights DIR or HEATKV_WEIGHTS_DIR"
    said = check(capsys, ["eval", "model=infinity-2b", "--dry-run"], 3, fix, "looked at /no/cache/models--Foundation")
    assert said.count("error: ") == 3  # transformer, tokenizer, text encoder


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Let every stage raise an error, or return a document."""

    def install(outcome: Any) -> None:
        def run(plan: Any, console: Any) -> dict[str, Any]:
            if isinstance(outcome, BaseException):
                raise outcome
            result: dict[str, Any] = outcome
            return result

        monkeypatch.setattr("heatkv_cli.library.run_stage", run)

    return install


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (HeatKVError("what", "do"), 1),
        (ConfigError("what", "do"), 2),
        (BudgetError("what", "do"), 2),
        (SetupError("what", "do"), 3),
        (ArtifactError("what", "do"), 4),
        (MemoryLimitError("what", "do"), 5),
        (PartialResultError("what", "do"), 6),
    ],
)
def test_exit_codes(error: HeatKVError, code: int, stage: Any, tmp_path: Path, capsys: Capture) -> None:
    stage(error)
    assert cli.run(["eval", "--out", str(tmp_path), "--json"]) == code
    captured = capsys.readouterr()
    assert captured.err == "error: what\nfix: do\n"
    document = json.loads(captured.out)
    assert document["exit_code"] == code
    assert document["errors"] == [{"error": "what", "fix": "do"}]


def test_interrupt_says_how_to_go_on(stage: Any, tmp_path: Path, capsys: Capture) -> None:
    stage(KeyboardInterrupt())
    assert cli.run(["eval", "method=heatkv", "budget=0.1", "--out", str(tmp_path)]) == 130
    said = capsys.readouterr().err
    assert f"next: heatkv eval out={tmp_path} method=heatkv budget=0.1" in said
    assert "Traceback" not in said


def test_interrupt_before_anything_is_known(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("heatkv_cli.config.compose", interrupt)
    assert cli.run(["eval", "method=heatkv", "--out", str(tmp_path)]) == 130
    assert f"next: heatkv eval --out={tmp_path} method=heatkv" in capsys.readouterr().err


def test_bug_leaves_a_trace_in_the_log(stage: Any, tmp_path: Path, capsys: Capture) -> None:
    stage(RuntimeError("odd"))
    assert cli.run(["eval", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 3
    assert "error: unexpected RuntimeError: odd" in said
    assert "heatkv doctor --json" in said
    assert "Traceback" not in said
    assert "Traceback" in (tmp_path / "run.log").read_text()


def test_debug_shows_the_trace(stage: Any, tmp_path: Path, capsys: Capture) -> None:
    stage(RuntimeError("odd"))
    assert cli.run(["eval", "--out", str(tmp_path), "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_success_prints_one_document_and_the_next_command(stage: Any, tmp_path: Path, capsys: Capture) -> None:
    stage({"path": str(tmp_path / "results.csv"), "best": float("inf"), "unknown": float("nan")})
    assert cli.run(["eval", "--out", str(tmp_path), "--json"]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out, parse_constant=pytest.fail)
    assert document["status"] == "done"
    assert document["path"] == str(tmp_path / "results.csv")
    assert (document["best"], document["unknown"]) == ("inf", None)
    assert captured.err.splitlines()[-1] == f"next: {document['next']}"


@pytest.mark.parametrize(
    ("given", "following"),
    [
        ("calibrate runtime.batch_size=2", "build-schedule runtime.batch_size=2 budget=0.1"),
        ("calibrate budget=0.2", "build-schedule budget=0.2"),
        ("calibrate experiment=demo", "eval experiment=demo"),
        ("build-schedule method=random rho=0.5", "generate method=random rho=0.5"),
        ("generate method=h2o budget=0.2,0.1", "eval method=h2o budget=0.2,0.1"),
        ("eval experiment=demo --out made", "report table made/results.csv"),
    ],
)
def test_the_next_stage_is_for_the_same_choices(
    given: str, following: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Capture
) -> None:
    monkeypatch.setattr("heatkv_cli.library.run_stage", lambda plan, ui: {"status": "done"})
    monkeypatch.chdir(tmp_path)
    assert cli.run(given.split()) == 0
    assert capsys.readouterr().err.splitlines()[-1] == f"next: heatkv {following}"


def test_dry_run_touches_nothing(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "runs"
    cli.run(["eval", "experiment=demo", "--out", str(out), "--dry-run", "--json"])
    document = json.loads(capsys.readouterr().out)
    assert not out.exists()
    assert document["status"] == "planned"
    kept = {
        (run["method"]["name"], run["budget"]): run["kv_budget_bytes"] / run["kv_full_bytes"]
        for run in document["runs"]
    }
    assert kept["full", "1"] == 1
    for planned in document["runs"]:
        lines = {line["batch"]: line for line in planned["byte_plan"]["batches"]}
        assert lines[8]["kv"] == 8 * lines[1]["kv"] <= planned["kv_budget_bytes"]
        assert lines[8]["total"] >= lines[8]["weights"] + lines[8]["kv"] + lines[8]["transient"]
    assert 0.0995 < kept["heatkv", "0.1"] <= 0.1


def test_quiet_and_no_color(stage: Any, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    stage({"path": str(tmp_path)})
    assert cli.run(["eval", "--out", str(tmp_path), "-q"]) == 0
    assert capsys.readouterr() == ("", "")


def test_hints() -> None:
    assert did_you_mean("heatkvv", ["full", "heatkv"]) == "did you mean 'heatkv'? available: full, heatkv"
    assert did_you_mean("zzz", ["full", "heatkv"]) == "available: full, heatkv"
    assert did_you_mean("zzz", []) == "nothing is available"


def test_several_errors_are_one() -> None:
    both = ConfigErrors([ConfigError("a", "x"), ConfigError("b")])
    assert (both.message, both.hint, both.exit_code) == ("a\nb", "x", 2)
    with pytest.raises(ValueError, match="at least one"):
        ConfigErrors([])
