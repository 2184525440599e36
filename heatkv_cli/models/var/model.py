"""VAR with its tokenizer: the scale-by-scale loop from classes to pictures.

Source: FoundationVision/VAR, `autoregressive_infer_cfg`; behaviour checked against golden vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from heatkv_cli.core.scales import Geometry
from heatkv_cli.core.timeline import at_scale
from heatkv_cli.errors import ConfigError
from heatkv_cli.models.base import Cache, Item, Trace
from heatkv_cli.models.var.sampling import Sampling, draw, filter_logits, guide, smooth, token_kl
from heatkv_cli.models.var.tokenizer import Tokenizer, shrink, tokens
from heatkv_cli.models.var.transformer import Var

CLASS = "class_index"
"""Field of a prompt's line that names its class."""


class VarModel:
    """A loaded VAR at one resolution, as an `ImageModel`; what it draws from is a class.

    Args:
        geometry: layers, heads, head dim and scales.
        transformer, tokenizer: the two networks.
    """

    def __init__(self, geometry: Geometry, transformer: Var, tokenizer: Tokenizer):
        self.geometry, self.transformer, self.tokenizer = geometry, transformer, tokenizer
        self.positions = transformer.positions().detach()

    def prepare(self, items: Sequence[Item], root: Path) -> None:
        """Check that every item says its class: there is no text to encode.

        Raises:
            ConfigError: an item has no class, or one that the model does not know.
        """
        self.encode(items)

    def encode(self, items: Sequence[Item]) -> Tensor:
        """Return the classes int64 (B,), which items say as `class_index`: a whole number, or the digits of one.

        Raises:
            ConfigError: as `prepare`.
        """
        return torch.tensor([self._class(item) for item in items], device=self.positions.device)

    def _class(self, item: Item) -> int:
        count, given = self.transformer.config.classes, item.meta.get(CLASS)
        if isinstance(given, (int, str)) and str(given).isdecimal() and int(given) < count:
            return int(given)
        raise ConfigError(
            f"model {self.geometry.model} draws classes, and prompt {item.id} "
            + (f"has no {CLASS}" if given is None else f"has the {CLASS} {given!r}"),
            f"take a benchmark of its classes; a list of one's own says {CLASS} for each prompt, 0 to {count - 1}",
        )

    def rows(self, batch: int, sampling: Sampling) -> int:
        """See `ImageModel.rows`."""
        return batch * (2 if sampling.guided else 1)

    @torch.no_grad()
    def generate(
        self,
        condition: Tensor,
        sampling: Sampling,
        cache: Cache,
        generators: Sequence[torch.Generator] | None,
        forced: Sequence[Tensor | None] = (),
    ) -> Trace:
        """See `ImageModel.generate`; `Trace.logits` are (B, N, V), `Trace.codes` (B, N).

        A forced scale is never smoothed: what was forced decides the next input.

        Raises:
            ValueError: no generators although a scale is not forced.
        """
        schedule, net, pixels = self.geometry.schedule, self.transformer, self.tokenizer
        batch, scales, sizes = len(condition), schedule.num_scales, schedule.sizes
        null = torch.full_like(condition, net.config.classes)
        cond = net.condition(torch.cat((condition, null)) if sampling.guided else condition)
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
        return Trace(tuple(codes_of), tuple(logits_of), latent)

    def _choose(
        self, logits: Tensor, sampling: Sampling, scale: int, generators: Sequence[torch.Generator] | None
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

    def divergence(self, full: Sequence[Tensor], other: Sequence[Tensor]) -> dict[str, float]:
        """Return KL(full || other) per token in nats, see `token_kl`."""
        return token_kl(full, other)

    def decode(self, latent: Tensor) -> Tensor:
        """Latents (B, Z, H, W) -> RGB uint8 (B, height, width, 3)."""
        # some at a time: at 512 x 512 the decoder holds a gigabyte an image
        at_once = max(1, 256 * 256 // (latent.shape[-2] * latent.shape[-1] * self.tokenizer.config.stride**2))
        return torch.cat([self.tokenizer.decode_uint8(part) for part in latent.split(at_once)])
