"""VAR behind the contract of `models/base.py`: everything about that contract is in this file.

The contract speaks of bits and of prompts as text. Codes take the place of bits, a class is named by its index or its
name, and guidance w per scale stands for VAR's ramp (w = 1 + t). A trace holds no logits: their divergence is not that
of bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from heatkv_cli.core.scales import Geometry
from heatkv_cli.errors import ConfigError, did_you_mean
from heatkv_cli.models import base
from heatkv_cli.models.var.load import Dtype, load, networks
from heatkv_cli.models.var.model import VarModel
from heatkv_cli.models.var.sampling import VarSampling
from heatkv_cli.models.var.tokenizer import TokenizerConfig

TOLERANCE = 1e-6  # of decimals in a YAML


class VarImageModel:
    """A loaded VAR as an `ImageModel`.

    Args:
        model: the networks.
        names: of the classes; None: a prompt is the index of its class.
    """

    def __init__(self, model: VarModel, names: tuple[str, ...] | None = None):
        self.model, self.geometry, self.names = model, model.geometry, names

    def prepare(self, prompts: Sequence[str], root: Path) -> None:
        """Nothing: a class costs nothing."""

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Names or indices of classes -> int64 (B,).

        Raises:
            ConfigError: no such class.
        """
        return torch.tensor([self._class(p) for p in prompts], device=self.model.positions.device)

    def _class(self, prompt: str) -> int:
        count = self.model.transformer.config.classes
        if self.names is not None and prompt in self.names:
            return self.names.index(prompt)
        if prompt.isdecimal() and int(prompt) < count:
            return int(prompt)
        raise ConfigError(
            f"{self.geometry.model} has no class {prompt!r}",
            f"its classes are 0 to {count - 1}"
            if self.names is None or prompt.isdecimal()
            else did_you_mean(prompt, self.names),
        )

    def rows(self, batch: int, sampling: base.Sampling) -> int:
        """See `ImageModel.rows`."""
        return batch * (2 if sampling.guided else 1)

    def generate(
        self,
        condition: Tensor,
        sampling: base.Sampling,
        cache: base.Cache,
        generators: Sequence[torch.Generator] | None,
        forced: Sequence[Tensor | None] = (),
    ) -> base.Trace:
        """See `ImageModel.generate`.

        Raises:
            ConfigError: knobs that VAR does not have, or KL per bit was asked for.
        """
        if generators is None:
            raise ConfigError(
                f"{self.geometry.model} draws codes, not bits: there is no KL per bit", "metrics=[psnr,psnr_layout]"
            )
        trace = self.model.generate(condition, _sampling(sampling), cache, generators, forced)
        return base.Trace(trace.codes, (), trace.latent)

    def decode(self, latent: Tensor) -> Tensor:
        """See `ImageModel.decode`."""
        return self.model.decode(latent)


def _sampling(sampling: base.Sampling) -> VarSampling:
    strongest, scales = sampling.cfg[-1] - 1, len(sampling.cfg)
    for ramp in (True, False):
        made = VarSampling(strongest, ramp, sampling.top_k, sampling.top_p)
        wanted = [1 + made.guidance(s, scales) for s in range(scales)]
        if all(abs(a - b) < TOLERANCE for a, b in zip(wanted, sampling.cfg, strict=True)):
            break
    else:
        raise ConfigError(
            f"cfg {list(sampling.cfg)} is neither constant nor a ramp from 1 on", "model.sampling.cfg=1.5 is constant"
        )
    if any(tau != 1 for tau in sampling.tau) or sampling.guide_layers != (0,):
        raise ConfigError("VAR has no tau and no guidance inside its layers", "model.sampling.tau=1")
    return made


def load_model(
    geometry: Geometry,
    files: Mapping[str, Path],
    device: str,
    width: int,
    tokenizer: TokenizerConfig,
    classes: int = 1000,
    shared: bool = False,
    l2_norm: bool = True,
    dtype: Dtype = "float32",
    names: tuple[str, ...] | None = None,
) -> VarImageModel:
    """What `_target_` names; arguments as in `load`, and `names` of the classes."""
    return VarImageModel(load(geometry, files, device, width, tokenizer, classes, shared, l2_norm, dtype), names)


def sketch(
    geometry: Geometry,
    width: int,
    tokenizer: TokenizerConfig,
    classes: int = 1000,
    shared: bool = False,
    l2_norm: bool = True,
    dtype: Dtype = "float32",
    names: tuple[str, ...] | None = None,
) -> base.Sketch:
    """The model without weights, for byte plans; what `sketch` names."""
    net, pixels = networks(geometry, width, classes, shared, l2_norm, tokenizer)
    net.blocks.to(getattr(torch, dtype))  # as `load_transformer` fills them
    for part in (net, pixels):
        part.eval().requires_grad_(False)
    model = VarImageModel(VarModel(geometry, net, pixels), names)
    return base.Sketch(
        model,
        {"transformer": net, "tokenizer": pixels},
        lambda batch: torch.zeros(batch, dtype=torch.int64, device="meta"),
        0,
    )
