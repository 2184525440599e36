"""What a model is to the rest of the program: prompts in, images out, every self-attention through a cache.

A model knows `cache.attend` and `cache.end_step` and nothing of methods, budgets or metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from heatkv_cli.core.scales import Geometry


class Attend(Protocol):
    """What a block asks for; a KV cache while generating, attention over the whole sequence in training."""

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        softmax_scale: float,
    ) -> Tensor:
        """Attention of the current scale's q over the layer's history and the current k, v; all (B, H, N, D)."""
        ...


class Cache(Attend, Protocol):
    """The seam, seen from the model."""

    def end_step(self) -> None:
        """All layers have processed the current scale."""
        ...


class Sampling(Protocol):
    """How a family draws its codes: a frozen dataclass beside the model, whose fields are the keys of `model.sampling`.

    A field may hold one value for all scales, or one per scale.
    """

    @property
    def guided(self) -> bool:
        """Whether guidance rows are in the batch: where any scale uses them, all do."""
        ...

    def spelled(self, num_scales: int, num_layers: int) -> Self:
        """Return the same with one value per scale.

        Raises:
            ConfigErrors: values out of range, or too few of them; each error names its key below `model.sampling`.
        """
        ...

    def at(self, scales: Sequence[int]) -> Self:
        """Return the spelled sampling of a model that has these scales alone."""
        ...


class Item(Protocol):
    """What an image is made from: an entry of a benchmark's list."""

    @property
    def id(self) -> str:
        """Its name."""
        ...

    @property
    def prompt(self) -> str:
        """A caption."""
        ...

    @property
    def meta(self) -> Mapping[str, Any]:
        """All else that its line says: a class index, for models that take one."""
        ...


@dataclass(frozen=True)
class Trace:
    """What one generation decided.

    Args:
        codes: per scale integers (B, ...) in the family's layout; forced on another run, they make the same image.
        logits: per scale float32 (B, N, ...): what the codes were drawn from, after guidance and before temperature,
            top-k and top-p, in the family's form; `ImageModel.divergence` compares those of two runs.
        latent: (B, d, H, W), what `ImageModel.decode` takes.
    """

    codes: tuple[Tensor, ...]
    logits: tuple[Tensor, ...]
    latent: Tensor


class ImageModel(Protocol):
    """A loaded model at one resolution."""

    geometry: Geometry

    def prepare(self, items: Sequence[Item], root: Path) -> None:
        """Do what is costly about text; called with all items of a run before its first image.

        A large text encoder is loaded, run and freed; the features are kept below `root` for this run and later ones.
        A cheap one does nothing.

        Raises:
            SetupError: the text encoder is needed and not there.
        """
        ...

    def encode(self, items: Sequence[Item]) -> Any:
        """Return what `generate` takes as condition."""
        ...

    def rows(self, batch: int, sampling: Any) -> int:
        """Return the batch rows in the transformer for `batch` images, guidance rows included."""
        ...

    def generate(
        self,
        condition: Any,
        sampling: Any,
        cache: Cache,
        generators: Sequence[torch.Generator] | None,
        forced: Sequence[Tensor | None] = (),
    ) -> Trace:
        """Draw the codes of all scales through `cache`; where `forced` holds codes for a scale, those are used instead.

        Args:
            condition: from `encode`.
            sampling: the family's own, spelled.
            cache: for every self-attention.
            generators: one an image, or None where every scale is forced. Forced scales consume random numbers too.
            forced: codes per scale as in `Trace`, or None.
        """
        ...

    def divergence(self, full: Sequence[Tensor], other: Sequence[Tensor]) -> dict[str, float]:
        """Return the KL divergence KL(full || other) in nats, for the logits of one image under the same codes.

        Args:
            full, other: as `Trace.logits`, with one row.

        Returns:
            `kl`: the mean over all bits or tokens that are drawn with a history; `kl_s{t}`: that of one scale.
        """
        ...

    def decode(self, latent: Tensor) -> Tensor:
        """Return RGB uint8 (B, height, width, 3)."""
        ...


@dataclass(frozen=True)
class Sketch:
    """A model's shape without its memory; `sketch` in conf/model names the function that makes it.

    Args:
        model: on the meta device: runs, and computes nothing.
        networks: its networks by name; together they are all the weights that stay in memory.
        condition: batch -> what `encode` would return for as many prompts.
        encoder_bytes: of a text encoder that is loaded, run and freed before the first image; 0 where there is none.
    """

    model: ImageModel
    networks: Mapping[str, nn.Module]
    condition: Callable[[int], Any]
    encoder_bytes: int
