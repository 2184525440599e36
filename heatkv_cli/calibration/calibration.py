"""The calibration: attention statistics of a full-cache run, from which every calibrated method starts.

One run yields the S-CAS of HeatKV and the statistics of the other calibrated methods; the file serves every budget.

Source: arXiv 2605.14877; the formula is checked against arm-research/heatkv @ 96dc288.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from heatkv_cli.calibration.artifact_file import (
    content_sha256,
    damaged,
    expect_tensor,
    geometry_from,
    geometry_header,
    library_versions,
    make_hint,
    mismatch,
    read_artifact,
    write_artifact,
)
from heatkv_cli.core.scales import Geometry
from heatkv_cli.errors import ArtifactError, HeatKVError

SLACK = 1e-3
"""Distance by which rounding may carry a mean of attention past its bounds."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """Attention statistics of a full-cache run over a few prompts: what every calibrated method starts from.

    P prompts, L layers, H heads, K scales; conditional row only. Values of target scale 0, which has no history, and
    of sources not before their target may be NaN; infinities are refused.

    Args:
        geometry: shape of the cache that was measured.
        prompts_sha256: digest of the prompts in order; seeds: one per prompt.
        scas: float64 (P, L, H, K, K), [.., source, target]: attention mass on the source scale, summed over its
            tokens, mean over the queries of the target scale; NaN where the source is not before the target.
        variance: (P, L, H), variance of the final scale's attention columns (HACK).
        asi: (P, L, K), attention selectivity (ScaleKV).
        entropy: (P, L, H, K), mean entropy of attention rows in nats (MEDA).
        history_mass: (P, L, H, K), attention mass on everything before the current scale.
        sampling: cfg, tau, top_k, top_p of the runs.
        versions: versions of the libraries that measured it.
        weights_sha256: digest of the model's weights.
        stability: rank statistics of the orders that follow from it, for the record.

    Raises:
        ArtifactError: shapes that do not fit, or scores that are not finite.
    """

    geometry: Geometry
    prompts_sha256: str
    seeds: tuple[int, ...]
    scas: Tensor = field(repr=False)
    variance: Tensor = field(repr=False)
    asi: Tensor = field(repr=False)
    entropy: Tensor = field(repr=False)
    history_mass: Tensor = field(repr=False)
    sampling: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=library_versions)
    weights_sha256: str = ""
    stability: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.seeds:
            raise ArtifactError("calibration has no prompts", make_hint("calibration", self.geometry.model))
        if not all(type(seed) is int for seed in self.seeds):
            raise ArtifactError("calibration has seeds that are no whole numbers", make_hint("calibration"))
        P, K, L, H = len(self.seeds), self.geometry.num_scales, self.geometry.num_layers, self.geometry.num_heads
        expect_tensor("scas", self.scas, (P, L, H, K, K), torch.float64)
        expect_tensor("variance", self.variance, (P, L, H))
        expect_tensor("asi", self.asi, (P, L, K))
        expect_tensor("entropy", self.entropy, (P, L, H, K))
        expect_tensor("history_mass", self.history_mass, (P, L, H, K))
        for name in ("variance", "asi", "entropy", "history_mass"):
            if not getattr(self, name).is_floating_point():
                raise ArtifactError(f"calibration: {name} is {getattr(self, name).dtype}", make_hint("calibration"))
        for source in self.geometry.sources:
            self._within(f"S-CAS of source scale {source}", self.scas[:, :, :, source, source + 1 :], 1 + SLACK)
        self._within("variance", self.variance, torch.finfo(torch.float32).max)
        self._within("asi", self.asi[..., 1:], torch.finfo(torch.float32).max)
        longest = math.log(self.geometry.schedule.num_tokens)
        self._within("entropy", self.entropy[..., 1:], longest + SLACK)
        self._within("history_mass", self.history_mass[..., 1:], 1 + SLACK)

    def _within(self, name: str, values: Tensor, most: float) -> None:
        """Check statistics; ArtifactError names the first that is not finite, negative or too large."""
        bad = (~((values >= -SLACK) & (values <= most))).nonzero()  # NaN compares as false
        if len(bad):
            prompt, layer = bad[0, :2].tolist()
            kind = "outside its range" if bool(values.isfinite().all()) else "not finite"
            raise ArtifactError(
                f"calibration: {name} is {kind} at {len(bad)} of {values.numel()} places, "
                f"first for prompt {prompt}, layer {layer}",
                f"calibrate in float32: {make_hint('calibration', self.geometry.model)} model.dtype=float32",
            )

    def prompt_scores(self) -> Tensor:
        """Return the S-CAS of each prompt, float64 (P, num_sources, L, H): mean over all later targets."""
        shape = (len(self.seeds), len(self.geometry.sources), self.geometry.num_layers, self.geometry.num_heads)
        scores = torch.empty(shape, dtype=torch.float64)
        for index, source in enumerate(self.geometry.sources):
            scores[:, index] = self.scas[..., source, source + 1 :].mean(-1)
        return scores

    def scores(self, prompts: Sequence[int] | None = None) -> Tensor:
        """Return the S-CAS, float64 (num_sources, L, H), source scales S..K-2.

        1 / (|P| (K-1-s)) * the sum over prompts and over all targets t > s, the last scale included.

        Args:
            prompts: indices of the prompts to use; None for all.
        """
        scores = self.prompt_scores()
        return (scores if prompts is None else scores[list(prompts)]).mean(0)

    @cached_property
    def sha256(self) -> str:
        """Hash of the measurement: geometry, prompts, seeds, sampling, weights and tensors; not of the versions."""
        return content_sha256(self._identity(), self._tensors())

    def _identity(self) -> dict[str, Any]:
        return {
            "geometry": geometry_header(self.geometry),
            "prompts_sha256": self.prompts_sha256,
            "seeds": self.seeds,
            "sampling": dict(self.sampling),
            "weights_sha256": self.weights_sha256,
        }

    def _tensors(self) -> dict[str, Tensor]:
        names = ("scas", "variance", "asi", "entropy", "history_mass")
        return {name: getattr(self, name) for name in names}

    def check(self, geometry: Geometry, where: str = "") -> None:
        """Check that the calibration was made for this model and resolution (`Orders.at` for another resolution).

        Raises:
            ArtifactError: it was not; names both. `where` names the file.
        """
        if self.geometry.differences(geometry):
            raise mismatch("calibration", self.geometry, geometry, where)

    def save(self, path: Path | str) -> None:
        """Write the calibration atomically. Raises ArtifactError when the file cannot be written."""
        header = {**self._identity(), "versions": dict(self.versions), "stability": dict(self.stability)}
        write_artifact(path, "calibration", header, self._tensors())

    @classmethod
    def load(cls, path: Path | str, geometry: Geometry | None = None) -> Calibration:
        """Read a calibration, and check it against `geometry` if given.

        Raises:
            ArtifactError: missing, damaged, of another version, made for another model, or with non-finite scores.
        """
        header, tensors = read_artifact(path, "calibration")
        try:
            fields = {name: header[name] for name in ("prompts_sha256", "sampling", "versions", "weights_sha256")}
            fields |= {name: tensors[name] for name in ("scas", "variance", "asi", "entropy", "history_mass")}
            for name, kind in (
                ("prompts_sha256", str),
                ("weights_sha256", str),
                ("sampling", dict),
                ("versions", dict),
            ):
                if not isinstance(header[name], kind):
                    raise TypeError(f"{name} is {header[name]!r}")
            calibration = cls(
                geometry=geometry_from(header["geometry"]),
                seeds=tuple(header["seeds"]),
                stability=header["stability"],
                **fields,
            )
        except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError, HeatKVError) as error:
            raise damaged(path, "calibration", error) from error
        if geometry is not None:
            calibration.check(geometry, str(path))
        return calibration
