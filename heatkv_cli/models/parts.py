"""Parts that model families share: layers of a modulated transformer, the shape of a tokenizer, nucleus sampling."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heatkv_cli.core.timeline import staged
from heatkv_cli.errors import ConfigError

NORM_EPS = 1e-6


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """Linear layer in `dtype` (None: that of the weight), whatever its numbers come in."""
    dtype = dtype or weight.dtype
    return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """LayerNorm without weights, in float32, then scale and shift."""
    return F.layer_norm(x.float(), x.shape[-1:], eps=NORM_EPS) * (1 + scale) + shift


class FeedForward(nn.Module):
    """Two linear layers with GELU between, in the dtype of their weights."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    @staged("ffn")
    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(linear(x, self.fc1.weight, self.fc1.bias), approximate="tanh")
        return linear(y, self.fc2.weight, self.fc2.bias)


class Pyramid:
    """Shape of a tokenizer's convolutions: every level but one halves the side; base of a dataclass of its numbers."""

    base_channels: int
    multipliers: tuple[int, ...]
    stem: int

    @property
    def stride(self) -> int:
        """Pixels per latent position."""
        return self.stem * 2 ** (len(self.multipliers) - 1)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(self.base_channels * m for m in self.multipliers)

    def check(self, family: str, others: Mapping[str, bool]) -> None:
        """Check the numbers.

        Args:
            family: whose tokenizer it is, for the message.
            others: for each number of the family's own, by name, whether it is wrong.

        Raises:
            ConfigError: a number that no tokenizer can have.
        """
        wrong = {
            **others,
            "base_channels": not 1 <= self.base_channels <= 8192,
            "multipliers": not 1 <= len(self.multipliers) <= 8 or not all(1 <= m <= 64 for m in self.multipliers),
            "stem": not 1 <= self.stem <= 64,
        }
        for name, bad in wrong.items():
            if bad:
                raise ConfigError(
                    f"{family}'s tokenizer: {name} is {getattr(self, name)}", f"change model.params.tokenizer.{name}"
                )


def drop_tail(logits: Tensor, top_p: float) -> Tensor:
    """Remove the rarest values (..., V), of which the sum of probabilities is at most 1 - top_p; never the likeliest.

    Their logits become -inf; `top_p` 0 removes nothing.
    """
    if top_p <= 0:
        return logits
    ordered, index = logits.sort(dim=-1)
    drop = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
    drop[..., -1] = False
    return logits.masked_fill(drop.scatter(-1, index, drop), -torch.inf)
