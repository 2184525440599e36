"""From bit logits to bits.

Source: FoundationVision/Infinity @ 4c27bbb, `sample_with_top_k_top_p_also_inplace_modifying_logits_`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from heatkv_cli.core.timeline import staged


def filter_logits(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Remove values by top-k, then top-p; logits (..., 2)."""
    if top_k == 1:
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True), -torch.inf)
    if top_p > 0:
        ordered, index = logits.sort(dim=-1)
        drop = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
        drop[..., -1] = False
        logits = logits.masked_fill(drop.scatter(-1, index, drop), -torch.inf)
    return logits


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
