"""Infinity of real dimensions without files: weights from a seed, for measuring bytes and time.

They enter through the functions that real checkpoints enter through, tensor by tensor, so dtypes and memory are those
of a loaded model. Time and bytes do not depend on what weights say; pictures do, and are noise.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from heatkv_cli.core.scales import Geometry
from heatkv_cli.models.infinity.checkpoint import load_tokenizer, load_transformer, shapes_of
from heatkv_cli.models.infinity.containers import Entry, Shape
from heatkv_cli.models.infinity.model import InfinityModel
from heatkv_cli.models.infinity.tokenizer import Tokenizer, TokenizerConfig
from heatkv_cli.models.infinity.transformer import Infinity, InfinityConfig

TEXT_TOKENS = 64
"""Tokens of every prompt, a long caption's."""

_NOWHERE = Path("random weights")


class RandomText:
    """A text encoder's place: features drawn from the prompt's own seed, as many tokens for each."""

    def __init__(self, channels: int, tokens: int):
        self.channels, self.tokens = channels, tokens

    def prepare(self, prompts: Sequence[str], root: Path) -> None:
        """Nothing: there is no encoder to run ahead."""

    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """One (tokens, channels) tensor a prompt."""
        return [torch.randn(self.tokens, self.channels, generator=_generator(prompt)) for prompt in prompts]


def random_model(
    geometry: Geometry,
    config: InfinityConfig,
    shape: TokenizerConfig,
    dtype: torch.dtype,
    device: str,
    rope_base: tuple[int, int],
    rope_mode: int,
) -> InfinityModel:
    """A model whose activations stay finite and whose bits are not constant.

    Args:
        geometry: layers, heads, head dim and scales.
        config, shape: of transformer and tokenizer.
        dtype: of the transformer's blocks; everything else is float32.
        device: where it runs.
        rope_base, rope_mode: see `rope_table`.
    """
    with torch.device("meta"):
        net, pixels = Infinity(config), Tokenizer(shape)
    load_transformer(_NOWHERE, random_entries(net), net, dtype, device)
    load_tokenizer(_NOWHERE, random_entries(pixels), pixels, device)
    text = RandomText(config.text_channels, min(TEXT_TOKENS, config.text_length))
    return InfinityModel(geometry, net, pixels, text, rope_base, rope_mode)


def random_entries(net: nn.Module) -> dict[str, Entry]:
    """A checkpoint of a network: every tensor is drawn when it is read, from a seed that is its name."""
    return {name: Entry(shape, _drawn(name, shape)) for name, shape in shapes_of(net).items()}


def _drawn(name: str, shape: Shape) -> Callable[[], Tensor]:
    """Matrices keep the size of what they multiply, norms and biases change little; temperatures as before training."""

    def read() -> Tensor:
        if name.endswith("scale_mul_1H11"):
            return torch.full(shape, math.log(4.0))
        if name.endswith("zero_k_bias"):
            return torch.zeros(shape)
        matrix = len(shape) > 1
        inputs = math.prod(shape[1:]) if name.endswith("weight") and matrix else shape[-1]
        bound = math.sqrt(3 / inputs) if matrix else 0.02  # uniform within it: standard deviation 1 / sqrt(inputs)
        drawn = torch.empty(shape).uniform_(-bound, bound, generator=_generator(name))
        return drawn + 1 if name.endswith("weight") and not matrix else drawn

    return read


def _generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big"))
