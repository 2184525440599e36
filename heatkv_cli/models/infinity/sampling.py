"""How Infinity draws its bits, and how far the distributions of two runs are apart.

Source: FoundationVision/Infinity @ 4c27bbb, `sample_with_top_k_top_p_also_inplace_modifying_logits_`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import softplus

from heatkv_cli.core.timeline import staged
from heatkv_cli.errors import ConfigError, raise_all
from heatkv_cli.models.parts import drop_tail

PerScale = float | tuple[float, ...]
"""One number for all scales, or one per scale."""

LARGEST = 1000.0
"""Guidance or temperature beyond it is a slip."""


@dataclass(frozen=True)
class Sampling:
    """Every knob that decides which bit is drawn; names as in the upstream flags.

    Args:
        cfg: guidance strength w in w * cond + (1 - w) * uncond; 1 is no guidance.
        tau: temperature that divides the logits.
        top_k: 0 is off, 1 is greedy; a bit has two values, so more removes nothing.
        top_p: drop the rarer value of a bit whose probability is at most 1 - top_p; 0 is off.
        guide_layers: where guidance acts, upstream's `cfg_insertion_layer`: 0 on the logits, -n on the output of the
            n-th layer from the end.
    """

    cfg: PerScale = 1.0
    tau: PerScale = 1.0
    top_k: int = 0
    top_p: float = 0.0
    guide_layers: tuple[int, ...] = (0,)

    @property
    def guided(self) -> bool:
        """Whether guidance rows are in the batch: where any scale uses them, all do."""
        return any(w != 1 for w in _listed(self.cfg))

    def spelled(self, num_scales: int, num_layers: int) -> Self:
        """See `models.base.Sampling.spelled`."""
        errors = [
            ConfigError(f"model.sampling.{key} has {len(values)} values", f"one value, or one per scale: {num_scales}")
            for key, values in (("cfg", self.cfg), ("tau", self.tau))
            if isinstance(values, tuple) and len(values) != num_scales
        ]
        errors += [
            ConfigError(f"model.sampling.{key} is {getattr(self, key)!r}", hint)
            for key, (good, hint) in self._ranges(num_layers).items()
            if not good
        ]
        raise_all(errors)
        cfg, tau = (values if isinstance(values, tuple) else (values,) * num_scales for values in (self.cfg, self.tau))
        return replace(self, cfg=cfg, tau=tau)

    def _ranges(self, depth: int) -> dict[str, tuple[bool, str]]:
        """Fields, whether their values make sense, and what does."""
        return {
            "cfg": (
                all(abs(w) <= LARGEST for w in _listed(self.cfg)),
                f"guidance is a number up to {LARGEST:g}; model.sampling.cfg=1 is off",
            ),
            "tau": (
                all(1 / LARGEST <= t <= LARGEST for t in _listed(self.tau)),
                f"logits are divided by it: {1 / LARGEST:g} to {LARGEST:g}; model.sampling.top_k=1 is greedy",
            ),
            "top_k": (0 <= self.top_k <= 10**6, "0 is off, 1 is greedy"),
            "top_p": (0 <= self.top_p <= 1, "0 is off, else the share of probability that is kept, up to 1"),
            "guide_layers": (
                bool(self.guide_layers) and all(-depth <= layer <= 0 for layer in self.guide_layers),
                f"0 guides the logits, -1 to -{depth} that layer's output, from the end; model.sampling.cfg=1 is off",
            ),
        }

    def strengths(self) -> Iterator[tuple[float, float]]:
        """Return (cfg, tau) of each scale, of a sampling that is spelled out."""
        return zip(_listed(self.cfg), _listed(self.tau), strict=True)

    def at(self, scales: Sequence[int]) -> Self:
        """See `models.base.Sampling.at`."""
        cfg, tau = (tuple(_listed(values)[s] for s in scales) for values in (self.cfg, self.tau))
        return replace(self, cfg=cfg, tau=tau)


def _listed(values: PerScale) -> tuple[float, ...]:
    return values if isinstance(values, tuple) else (values,)


def filter_logits(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Remove values by top-k, then top-p; logits (..., 2)."""
    if top_k == 1:
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True), -torch.inf)
    return drop_tail(logits, top_p)


@staged("sampling")
def draw_bits(logits: Tensor, top_k: int, top_p: float, generators: Sequence[torch.Generator]) -> Tensor:
    """One bit for every pair of logits.

    Each image draws from its own generator, in the order token, bit, value, so that a draw depends on the seed of the
    image and on nothing else. With one generator this is `torch.multinomial` as upstream calls it at batch 1.
    Generators are on the host and the device does not wait for them to be asked: it is still busy with the blocks
    while the host draws (20 ms in all for a 1024 x 1024 image of the 2B model).

    Args:
        logits: (B, N, bits, 2).
        top_k, top_p: see `Sampling`.
        generators: B CPU generators.

    Returns:
        uint8 (B, N, bits).
    """
    noise = torch.stack([torch.empty(logits.shape[1:]).exponential_(generator=g) for g in generators])
    probability = filter_logits(logits, top_k, top_p).softmax(-1)
    return (probability / noise.to(logits.device, non_blocking=True)).argmax(-1).to(torch.uint8)


def bit_kl(full: Sequence[Tensor], other: Sequence[Tensor]) -> dict[str, float]:
    """KL(full || other) per bit in nats, from logit differences of one image; scale 0 sees no history and is left out.

    Args:
        full, other: per scale (1, N, bits), bit 1 minus bit 0.

    Returns:
        `kl`, the mean over all bits of scales 1..K-1, and `kl_s{t}` for each of them.
    """
    each, total, count = {}, 0.0, 0
    for t, (a, b) in enumerate(zip(full, other, strict=True)):
        if t == 0:
            continue
        a, b = a.double().cpu(), b.double().cpu()
        kl = torch.sigmoid(a) * (a - b) + softplus(b) - softplus(a)
        each[f"kl_s{t}"] = kl.mean().item()
        total, count = total + kl.sum().item(), count + kl.numel()
    return {"kl": total / count, **each}
