"""Calibration and Schedule on disk: round trips, and every way in which a file can be wrong."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from heatkv_cli.calibration.calibration import Calibration
from heatkv_cli.core.budget import Budget
from heatkv_cli.core.scales import Geometry, ScaleSchedule
from heatkv_cli.errors import ArtifactError
from heatkv_cli.methods.heatkv.orders import calibrated_orders, random_orders
from heatkv_cli.methods.heatkv.schedule import Schedule
from heatkv_cli.methods.heatkv.scheduler import removal_schedule

TOY = Geometry("toy", 3, 4, 8, ScaleSchedule.squares((1, 2, 3, 4, 5)), 1)
OTHER = Geometry("big", 5, 4, 8, ScaleSchedule.squares((1, 2, 3, 4, 5)), 1)
LARGER = replace(TOY, schedule=ScaleSchedule.squares((1, 2, 3, 4, 6)))


def calibration(prompts: int = 3, geometry: Geometry = TOY, **changes: Any) -> Calibration:
    P, L, H, K = prompts, geometry.num_layers, geometry.num_heads, geometry.num_scales
    random = torch.Generator().manual_seed(0)
    scas = torch.rand(P, L, H, K, K, dtype=torch.float64, generator=random)
    scas[..., ~torch.ones(K, K).triu(1).bool()] = float("nan")  # only a source before its target
    fields: dict[str, Any] = {
        "geometry": geometry,
        "prompts_sha256": "ab" * 32,
        "seeds": tuple(range(P)),
        "scas": scas,
        "variance": torch.rand(P, L, H, generator=random),
        "asi": torch.rand(P, L, K, generator=random),
        "entropy": torch.rand(P, L, H, K, generator=random),
        "history_mass": torch.rand(P, L, H, K, generator=random),
        "sampling": {"cfg": 3.0, "top_k": 900},
        "stability": {"tau": [0.5, None]},
    }
    return Calibration(**{**fields, **changes})


def schedule(budget: str = "3/20", geometry: Geometry = TOY) -> Schedule:
    return removal_schedule(geometry, Budget.parse(budget), random_orders(geometry, 2))


MAKE: dict[str, Callable[[], Calibration | Schedule]] = {"calibration": calibration, "schedule": schedule}
KINDS: dict[str, type[Calibration] | type[Schedule]] = {"calibration": Calibration, "schedule": Schedule}
kinds = pytest.mark.parametrize("kind", list(KINDS))


def edit_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite the JSON header of an artifact, tensors untouched."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    outer = json.loads(raw[8 : 8 + length])
    inner = json.loads(outer["__metadata__"]["heatkv"])
    changed = change(inner)
    outer["__metadata__"]["heatkv"] = json.dumps(inner if changed is None else changed)
    text = json.dumps(outer).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def test_s_cas_by_hand() -> None:
    measured = calibration(2)
    for index, source in enumerate(TOY.sources):
        for layer in range(3):
            for head in range(4):
                masses = [float(measured.scas[p, layer, head, source, t]) for p in (0, 1) for t in range(source + 1, 5)]
                expected = sum(masses) / (2 * (5 - 1 - source))
                # At most eight positive numbers in double precision, whatever the order: 8 additions and a division.
                assert float(measured.scores()[index, layer, head]) == pytest.approx(expected, rel=18 * 2.0**-53)
    assert torch.equal(measured.scores([1]), measured.prompt_scores()[1])


def test_orders_are_ascending_s_cas() -> None:
    measured = calibration()
    orders = calibrated_orders(measured)
    for index in range(3):
        scores = measured.scores()[index]
        expected = sorted((float(scores[layer, head]), head, layer) for layer in range(3) for head in range(4))
        assert orders.order[index].tolist() == [[head, layer] for _, head, layer in expected]
    assert (orders.name, orders.source_sha256) == ("s-cas", measured.sha256)
    assert calibrated_orders(measured, [0]).sha256 != orders.sha256


def test_calibration_round_trip(tmp_path: Path) -> None:
    measured, path = calibration(), tmp_path / "new" / "calibration.safetensors"
    measured.save(path)
    loaded = Calibration.load(path, TOY)
    for name in ("scas", "variance", "asi", "entropy", "history_mass"):
        assert torch.equal(getattr(loaded, name).nan_to_num(-1), getattr(measured, name).nan_to_num(-1))
    for name in ("geometry", "prompts_sha256", "seeds", "sampling", "versions", "stability", "weights_sha256"):
        assert getattr(loaded, name) == getattr(measured, name)
    assert loaded.sha256 == measured.sha256 == replace(measured, versions={}, stability={}).sha256
    assert loaded.sha256 != replace(measured, seeds=(7, 8, 9)).sha256
    assert {"heatkv", "torch", "python"} <= set(loaded.versions)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]  # nothing temporary is left


def test_tensors_that_share_memory_are_saved(tmp_path: Path) -> None:
    entropy = calibration().entropy
    calibration(entropy=entropy, history_mass=entropy).save(tmp_path / "c.safetensors")
    assert torch.equal(Calibration.load(tmp_path / "c.safetensors").history_mass, entropy)


@pytest.mark.parametrize("budget", ["3/20", "1"])  # with early activations, and empty
def test_schedule_round_trip(tmp_path: Path, budget: str) -> None:
    built, path = schedule(budget), tmp_path / "schedule.safetensors"
    built.save(path)
    loaded = Schedule.load(path, TOY)
    assert torch.equal(loaded.first_absent, built.first_absent)
    assert torch.equal(loaded.early, built.early)
    for name in ("geometry", "budget", "counts", "order", "order_sha256", "calibrated_on", "method", "versions"):
        assert getattr(loaded, name) == getattr(built, name)
    for name in ("scheduled_peak_tokens", "physical_peak_tokens", "calibration_sha256", "sha256"):
        assert getattr(loaded, name) == getattr(built, name)
    assert loaded.table() == built.table()
    assert (budget == "1") == (not len(loaded.early))


def test_schedule_hash_depends_on_what_is_removed() -> None:
    assert schedule().sha256 == schedule(geometry=replace(TOY, dtype_bytes=2)).sha256
    assert len({schedule().sha256, schedule("1/2").sha256, schedule(geometry=LARGER).sha256}) == 3


def test_a_rho_budget_survives(tmp_path: Path) -> None:
    budget = Budget.from_rho("0.8", TOY.schedule)
    removal_schedule(TOY, budget, random_orders(TOY, 2)).save(tmp_path / "s.safetensors")
    assert Schedule.load(tmp_path / "s.safetensors").budget == budget


def test_table_by_hand() -> None:
    toy = Geometry("toy", 2, 2, 8, ScaleSchedule.squares((1, 2, 3, 4)), 1)
    rows = removal_schedule(toy, Budget.parse("0.5"), random_orders(toy, 0)).table()
    assert [row["tokens"] for row in rows] == [1, 4, 9, 16]
    assert [row["full_tokens"] for row in rows] == [0, 1, 5, 14]
    assert [row["count"] for row in rows] == [0, 0, 0, 3]
    assert [row["removed_atoms"] for row in rows] == [0, 0, 0, 6]
    assert [row["held_tokens"] for row in rows] == [0, 4, 20, 4 * 14 - 3 * 13]
    assert rows[3]["fraction"] == 17 / 56


@kinds
def test_missing_files(tmp_path: Path, kind: str) -> None:
    with pytest.raises(ArtifactError, match="does not exist") as error:
        KINDS[kind].load(tmp_path / "none.safetensors")
    assert "heatkv" in error.value.hint
    with pytest.raises(ArtifactError, match="is a folder"):
        KINDS[kind].load(tmp_path)


@kinds
@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_truncated_files(tmp_path: Path, kind: str, keep: int) -> None:
    path = tmp_path / "file.safetensors"
    MAKE[kind]().save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match=r"file\.safetensors cannot be read: it is truncated") as error:
        KINDS[kind].load(path)
    assert error.value.hint.startswith("delete it and make it again: heatkv ")


@kinds
def test_foreign_files(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"w": torch.zeros(2)}, path)
    with pytest.raises(ArtifactError, match="heatkv did not write it"):
        KINDS[kind].load(path)
    path.write_text("not tensors at all", encoding="utf-8")
    with pytest.raises(ArtifactError, match="no safetensors file"):
        KINDS[kind].load(path)
    (other,) = set(KINDS) - {kind}
    MAKE[other]().save(path)
    with pytest.raises(ArtifactError, match=f"is a {other}, expected a {kind}"):
        KINDS[kind].load(path)


@kinds
@pytest.mark.parametrize(("version", "fix"), [(3, "update heatkv"), (1, "make it again"), (None, "make it again")])
def test_other_format_versions(tmp_path: Path, kind: str, version: int | None, fix: str) -> None:
    path = tmp_path / "file.safetensors"
    MAKE[kind]().save(path)
    edit_header(path, lambda header: header.update(format_version=version))
    with pytest.raises(ArtifactError, match=f"has format version {version}, this heatkv .* reads version 2") as error:
        KINDS[kind].load(path)
    assert fix in error.value.hint


@kinds
@pytest.mark.parametrize(
    "change",
    [
        lambda header: header.pop("geometry") and None,
        lambda header: header["geometry"].update(num_heads=0),
        lambda header: header["geometry"].update(num_heads=7),
        lambda header: header["geometry"].update(colour="red"),
        lambda header: header.update(seeds=None, counts=None),
        lambda header: [header],
    ],
)
def test_damaged_headers(tmp_path: Path, kind: str, change: Callable[[dict[str, Any]], Any]) -> None:
    path = tmp_path / "file.safetensors"
    MAKE[kind]().save(path)
    edit_header(path, change)
    with pytest.raises(ArtifactError, match=r"file\.safetensors") as error:
        KINDS[kind].load(path)
    assert error.value.hint


@kinds
def test_another_model_names_both(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "file.safetensors"
    MAKE[kind]().save(path)
    with pytest.raises(ArtifactError, match=r"was made for toy \(3 x 4 heads.*but the run is big \(5 x 4") as error:
        KINDS[kind].load(path, OTHER)
    assert str(path) in error.value.message
    assert "--model big" in error.value.hint
    with pytest.raises(ArtifactError, match="differ in scales 5 scales up to 5x5 / 5 scales up to 6x6"):
        KINDS[kind].load(path, LARGER)
    KINDS[kind].load(path, replace(TOY, dtype_bytes=2))  # the number format is not part of a plan


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite(tmp_path: Path, value: float) -> None:
    measured = calibration()
    path = tmp_path / "file.safetensors"
    measured.scas[1, 2, 0, 1, 4] = value  # behind the checks, as a damaged file would have it
    measured.save(path)
    with pytest.raises(ArtifactError, match=r"S-CAS of source scale 1 is not finite .* prompt 1, layer 2") as error:
        Calibration.load(path)
    assert str(path) in error.value.message
    assert "float32" in error.value.hint
    for name in ("variance", "asi", "entropy", "history_mass"):
        tensor = getattr(calibration(), name).clone()
        tensor[0, 1, ..., -1] = value
        with pytest.raises(ArtifactError, match=f"{name} is not finite"):
            calibration(**{name: tensor})


def test_values_without_history_may_be_missing() -> None:
    entropy = calibration().entropy.clone()
    entropy[..., 0] = float("nan")
    calibration(entropy=entropy)


def test_tensors_that_do_not_fit() -> None:
    with pytest.raises(ArtifactError, match=r"scas is torch.float32, expected torch.float64"):
        calibration(scas=calibration().scas.float())
    with pytest.raises(ArtifactError, match=r"asi has shape \(3, 3\), expected \(3, 3, 5\)"):
        calibration(asi=torch.zeros(3, 3))
    with pytest.raises(ArtifactError, match="no prompts"):
        calibration(prompts=0)


def test_schedules_that_contradict_themselves() -> None:
    built = schedule()
    for source, value in [(0, 3), (4, 4), (2, 2), (2, 0)]:  # a sink, the last scale, before its first use
        wrong = built.first_absent.clone()
        wrong[source, 0, 0] = value
        with pytest.raises(ArtifactError, match="removes an atom of a sink or the last scale, or before"):
            replace(built, first_absent=wrong)
    assert len(built.early)
    for column, value in [(0, 1), (1, 2), (2, 9), (4, -1)]:
        early = built.early.clone()
        early[0, column] = value
        with pytest.raises(ArtifactError, match="contradict"):
            replace(built, early=early)
    with pytest.raises(ArtifactError, match="2 counts, expected 5"):
        replace(built, counts=(0, 0))


@kinds
def test_a_failed_write_leaves_the_old_file(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.safetensors"
    MAKE[kind]().save(path)
    before = path.read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("heatkv_cli.calibration.artifact_file.os.fsync", fail)
    with pytest.raises(ArtifactError, match=r"cannot be written: .*No space left"):
        MAKE[kind]().save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
