"""How VAR draws its codes, and how far the distributions of two runs are apart.

Source: FoundationVision/VAR, `sample_with_top_k_top_p_` and `gumbel_softmax_with_rng` (`models/helpers.py`), and their
use in `autoregressive_infer_cfg`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from heatkv_cli.core.timeline import staged
from heatkv_cli.errors import ConfigError, raise_all
from heatkv_cli.models.parts import drop_tail

PerScale = float | tuple[float, ...]
"""One number for all scales, or one per scale."""

LARGEST = 1000.0
"""Guidance beyond it is a slip."""


@dataclass(frozen=True)
class Sampling:
    """Every knob that decides which index is drawn.

    Args:
        cfg: guidance t; logits are (1 + t) * cond - t * uncond. 0 is off.
        ramp: t grows from 0 at the first scale to `cfg` at the last, in proportion to the scale's index, as upstream
            does; else it is `cfg` at every scale, or each scale's own.
        top_k: keep the k largest logits and those equal to the k-th; 1 is greedy, 0 is off.
        top_p: drop the rarest indices whose probabilities, summed upwards, are at most 1 - top_p; 0 is off.
        more_smooth: the next scale reads a mixture of codes (Gumbel softmax) instead of the code that was drawn.
            For looks: it is not a sample of the model, and its codes alone do not make the same image again.
    """

    cfg: PerScale = 1.5
    ramp: bool = True
    top_k: int = 900
    top_p: float = 0.96
    more_smooth: bool = False

    @property
    def guided(self) -> bool:
        """Whether guidance rows are in the batch."""
        return any(t != 0 for t in _listed(self.cfg))

    def guidance(self, scale: int, scales: int) -> float:
        """t of a scale."""
        if isinstance(self.cfg, tuple):
            return self.cfg[scale]
        return self.cfg * scale / (scales - 1) if self.ramp else self.cfg

    def spelled(self, num_scales: int, num_layers: int) -> Self:
        """See `models.base.Sampling.spelled`; the ramp becomes one value per scale."""
        each = isinstance(self.cfg, tuple)
        wrong = {
            "cfg": (
                all(0 <= t <= LARGEST for t in _listed(self.cfg)) and len(_listed(self.cfg)) in (1, num_scales),
                f"0 (off) to {LARGEST:g}, one value, or one per scale: {num_scales}",
            ),
            "ramp": (not (each and self.ramp), "a ramp has one cfg, that of its last scale: model.sampling.ramp=false"),
            "top_k": (0 <= self.top_k <= 10**6, "0 is off, 1 is greedy"),
            "top_p": (0 <= self.top_p <= 1, "0 is off, else the share of probability that is kept, up to 1"),
        }
        raise_all(
            [
                ConfigError(f"model.sampling.{key} is {getattr(self, key)!r}", hint)
                for key, (good, hint) in wrong.items()
                if not good
            ]
        )
        one = replace(self, cfg=self.cfg[0]) if isinstance(self.cfg, tuple) and len(self.cfg) == 1 else self
        return replace(one, cfg=tuple(one.guidance(s, num_scales) for s in range(num_scales)), ramp=False)

    def at(self, scales: Sequence[int]) -> Self:
        """See `models.base.Sampling.at`."""
        return replace(self, cfg=tuple(_listed(self.cfg)[s] for s in scales))


def _listed(values: PerScale) -> tuple[float, ...]:
    return values if isinstance(values, tuple) else (values,)


def guide(logits: Tensor, t: float) -> Tensor:
    """Logits (2B, N, V), rows [cond | uncond] -> guided (B, N, V)."""
    yes, no = logits.chunk(2)
    return (1 + t) * yes - t * no


def filter_logits(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Remove indices by top-k, then top-p: their logits (..., V) become -inf."""
    if top_k > 0:
        kth = logits.topk(min(top_k, logits.shape[-1]), -1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    return drop_tail(logits, top_p)


def _exponential(shape: Sequence[int], generators: Sequence[torch.Generator], device: torch.device) -> Tensor:
    """Noise (B, N, V), each image's from its own generator."""
    noise = torch.stack([torch.empty(tuple(shape)).exponential_(generator=g) for g in generators])
    return noise.to(device, non_blocking=True)


@staged("sampling")
def draw(logits: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """One index a token.

    Each image draws from its own generator, in the order token, index, so that a draw depends on the seed of the image
    and on nothing else. With one generator this is `torch.multinomial` as upstream calls it at batch 1.

    Args:
        logits: (B, N, V), filtered.
        generators: B CPU generators.

    Returns:
        int64 (B, N).
    """
    return (logits.softmax(-1) / _exponential(logits.shape[1:], generators, logits.device)).argmax(-1)


@staged("sampling")
def smooth(logits: Tensor, codebook: Tensor, scale: int, scales: int, generators: Sequence[torch.Generator]) -> Tensor:
    """Mixtures of codes by Gumbel softmax, sharper from scale to scale; the noise is drawn after that of `draw`.

    Args:
        logits: (B, N, V), filtered: what was removed has no weight.
        codebook: (V, Z).
        scale, scales: k and K.
        generators: B CPU generators.

    Returns:
        (B, N, Z).
    """
    ratio = scale / (scales - 1)
    temperature = max(0.27 * (1 - 0.95 * ratio), 0.005)
    gumbel = -_exponential(logits.shape[1:], generators, logits.device).log()
    return ((logits * (1 + ratio) + gumbel) / temperature).softmax(-1) @ codebook


def token_kl(full: Sequence[Tensor], other: Sequence[Tensor]) -> dict[str, float]:
    """KL(full || other) per token in nats, from logits of one image; scale 0 sees no history and is left out.

    Args:
        full, other: per scale (1, N, V), before top-k and top-p: after them the divergence would be infinite.

    Returns:
        `kl`, the mean over all tokens of scales 1..K-1, and `kl_s{t}` for each of them.
    """
    each, total, count = {}, 0.0, 0
    for t, pair in enumerate(zip(full, other, strict=True)):
        if t == 0:
            continue
        p, q = (logits.double().cpu().log_softmax(-1) for logits in pair)
        kl = (p.exp() * (p - q)).sum(-1)
        each[f"kl_s{t}"] = kl.mean().item()
        total, count = total + kl.sum().item(), count + kl.numel()
    return {"kl": total / count, **each}
