"""What a model is to the rest of the program: prompts in, images out, every self-attention through a cache.

A model knows `cache.attend` and `cache.end_scale` and nothing of methods, budgets or metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

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

    def end_scale(self) -> None:
        """All layers have processed the current scale."""
        ...


@dataclass(frozen=True)
class Sampling:
    """Every knob that decides which bit is drawn.

    Args:
        cfg: guidance per scale; 1 is off. Guided logits are cfg * cond + (1 - cfg) * uncond.
        tau: temperature per scale; logits are divided by it.
        top_k: 1 is greedy; a bit has two values, so 0 and everything from 2 on changes nothing.
        top_p: drop the rarer value of a bit whose probability is at most 1 - top_p; 0 is off.
        guide_layers: where guidance acts, upstream's `cfg_insertion_layer`: 0 on the logits, -n on the output of the
            n-th layer from the end.
    """

    cfg: tuple[float, ...]
    tau: tuple[float, ...]
    top_k: int = 0
    top_p: float = 0.0
    guide_layers: tuple[int, ...] = (0,)

    @property
    def guided(self) -> bool:
        """Whether guidance rows are in the batch: if any scale uses them, all do."""
        return any(c != 1 for c in self.cfg)


@dataclass(frozen=True)
class Trace:
    """What one generation decided.

    Shapes: bits: per scale uint8 (B, h, w, d) in latent layout; logits: per scale float32 (B, N, token_bits), the
    difference (bit 1 minus bit 0) after guidance and before temperature, top-k and top-p; latent: (B, d, H, W).
    """

    bits: tuple[Tensor, ...]
    logits: tuple[Tensor, ...]
    latent: Tensor


class ImageModel(Protocol):
    """A loaded model at one resolution."""

    geometry: Geometry

    def prepare(self, prompts: Sequence[str], root: Path) -> None:
        """Called with all prompts of a run before its first image: whatever is costly about text happens here.

        A large text encoder is loaded, run and freed; the features are kept below `root` for this run and later ones.
        A cheap one does nothing.

        Raises:
            SetupError: the text encoder is needed and not there.
        """
        ...

    def encode(self, prompts: Sequence[str]) -> Any:
        """Prompts -> whatever `generate` takes as condition."""
        ...

    def rows(self, batch: int, sampling: Sampling) -> int:
        """Batch rows in the transformer for `batch` images, guidance rows included."""
        ...

    def generate(
        self,
        condition: Any,
        sampling: Sampling,
        cache: Cache,
        generators: Sequence[torch.Generator] | None,
        forced: Sequence[Tensor | None] = (),
    ) -> Trace:
        """Draw the bits of all scales through `cache`; where `forced` holds bits for a scale, those are used instead.

        `generators`: one an image, or None when every scale is forced. Forced scales consume random numbers as usual.
        """
        ...

    def decode(self, latent: Tensor) -> Tensor:
        """Latents -> RGB uint8 (B, height, width, 3)."""
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
