"""VAR with its tokenizer: the scale-by-scale loop from classes to pictures.

Source: FoundationVision/VAR, `autoregressive_infer_cfg`; behaviour checked against golden vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from heatkv_cli.core.scales import Geometry
from heatkv_cli.core.timeline import at_scale
from heatkv_cli.models.base import Cache
from heatkv_cli.models.var.sampling import VarSampling, draw, filter_logits, guide, smooth
from heatkv_cli.models.var.tokenizer import Tokenizer, shrink, tokens
from heatkv_cli.models.var.transformer import Var


@dataclass(frozen=True)
class VarTrace:
    """What one generation decided.

    Shapes: codes: per scale int64 (B, N); logits: per scale float32 (B, N, V), after guidance and before top-k and
    top-p; latent: (B, Z, H, W).
    """

    codes: tuple[Tensor, ...]
    logits: tuple[Tensor, ...]
    latent: Tensor


class VarModel:
    """A loaded VAR at one resolution.

    Args:
        geometry: layers, heads, head dim and scales.
        transformer, tokenizer: the two networks.
    """

    def __init__(self, geometry: Geometry, transformer: Var, tokenizer: Tokenizer):
        self.geometry, self.transformer, self.tokenizer = geometry, transformer, tokenizer
        self.positions = transformer.positions().detach()

    def rows(self, batch: int, sampling: VarSampling) -> int:
        """Batch rows in the transformer for `batch` images, guidance rows included."""
        return batch * (2 if sampling.guided else 1)

    @torch.no_grad()
    def generate(
        self,
        classes: Tensor,
        sampling: VarSampling,
        cache: Cache,
        generators: Sequence[torch.Generator] | None,
        forced: Sequence[Tensor | None] = (),
    ) -> VarTrace:
        """Draw the codes of all scales through `cache`.

        Args:
            classes: int64 (B,).
            sampling: guidance, filters, smoothing.
            cache: where attention happens.
            generators: one an image, or None when every scale is forced.
            forced: per scale the codes (B, N) that are used instead of drawn ones, or None. Forced scales consume
                random numbers as usual, and are never smoothed: what was forced decides the next input.

        Raises:
            ValueError: no generators although a scale is not forced.
        """
        schedule, net, pixels = self.geometry.schedule, self.transformer, self.tokenizer
        batch, scales, sizes = len(classes), schedule.num_scales, schedule.sizes
        null = torch.full_like(classes, net.config.classes)
        cond = net.condition(torch.cat((classes, null)) if sampling.guided else classes)
        codebook, places = pixels.quantize.embedding.weight, self.positions
        latent = torch.zeros(batch, codebook.shape[1], *sizes[-1], device=places.device)
        x, codes_of, logits_of = net.start(cond, places[:, : schedule.offsets[1]]), [], []
        for s, size in enumerate(sizes):
            at_scale(s)
            hidden = net.run(x, cond, cache)
            cache.end_step()
            logits = net.logits(hidden, cond)
            if sampling.guided:
                logits = guide(logits, sampling.guidance(s, scales))
            logits_of.append(logits)
            fixed = forced[s] if s < len(forced) else None
            codes, mixed = self._choose(logits, sampling, s, generators)
            if fixed is not None:
                codes, mixed = fixed.to(places.device, torch.int64, non_blocking=True), None
            if codes is None:
                raise ValueError(f"scale {s} is not forced and there are no generators to draw it with")
            codes_of.append(codes)
            chosen = codebook[codes] if mixed is None else mixed
            latent = latent + pixels.quantize.contribution(
                chosen.transpose(1, 2).unflatten(2, size), s, scales, sizes[-1]
            )
            if s + 1 < scales:
                places_of = places[:, schedule.offsets[s + 1] : schedule.offsets[s + 2]]
                x = net.embed(tokens(shrink(latent, sizes[s + 1])), places_of).repeat(len(cond.sos) // batch, 1, 1)
        at_scale(None)
        return VarTrace(tuple(codes_of), tuple(logits_of), latent)

    def _choose(
        self, logits: Tensor, sampling: VarSampling, scale: int, generators: Sequence[torch.Generator] | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The codes (B, N) of a scale, and the mixtures (B, N, Z) that take their place, if any."""
        if generators is None:
            return None, None
        kept = filter_logits(logits, sampling.top_k, sampling.top_p)
        codes = draw(kept, generators)
        if not sampling.more_smooth:
            return codes, None
        codebook = self.tokenizer.quantize.embedding.weight
        return codes, smooth(kept, codebook, scale, self.geometry.num_scales, generators)

    def decode(self, latent: Tensor) -> Tensor:
        """Latents (B, Z, H, W) -> RGB uint8 (B, height, width, 3)."""
        # some at a time: at 512 x 512 the decoder holds a gigabyte an image
        at_once = max(1, 256 * 256 // (latent.shape[-2] * latent.shape[-1] * self.tokenizer.config.stride**2))
        return torch.cat([self.tokenizer.decode_uint8(part) for part in latent.split(at_once)])
