"""Infinity as an `ImageModel`: text encoder, transformer and tokenizer, and the scale-by-scale loop.

Source: FoundationVision/Infinity @ 4c27bbb, `autoregressive_infer_cfg`; behaviour checked against golden vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from heatkv_cli.core.scales import Geometry
from heatkv_cli.core.timeline import at_scale
from heatkv_cli.models.base import Cache, Item, Trace
from heatkv_cli.models.infinity.rope import rope_table
from heatkv_cli.models.infinity.sampling import Sampling, bit_kl, draw_bits
from heatkv_cli.models.infinity.tokenizer import Tokenizer, resize
from heatkv_cli.models.infinity.transformer import Conditioning, Infinity, Text


class TextEncoder(Protocol):
    """Prompts -> one (L_i, Ct) tensor of features a prompt."""

    def prepare(self, prompts: Sequence[str], root: Path) -> None: ...

    def encode(self, prompts: Sequence[str]) -> list[Tensor]: ...


class InfinityModel:
    """A loaded Infinity at one resolution.

    Args:
        geometry: layers, heads, head dim and scales; its sizes are those of the transformer's tokens.
        transformer, tokenizer, text: the three networks.
        rope_base: grid all positions are stretched to.
        rope_mode: see `rope_table`.
    """

    def __init__(
        self,
        geometry: Geometry,
        transformer: Infinity,
        tokenizer: Tokenizer,
        text: TextEncoder | None,
        rope_base: tuple[int, int],
        rope_mode: int = 2,
    ):
        self.geometry, self.transformer, self.tokenizer, self.text = geometry, transformer, tokenizer, text
        self.codes = transformer.config.codes
        table = rope_table(geometry.head_dim, geometry.schedule.sizes, rope_base, rope_mode)
        self.rope = table.to(transformer.pos_start.device)

    def prepare(self, items: Sequence[Item], root: Path) -> None:
        """See `ImageModel.prepare`."""
        self._encoder.prepare([item.prompt for item in items], root)

    def encode(self, items: Sequence[Item]) -> Text:
        """Return the text features of the conditional rows, float32."""
        rows = self._encoder.encode([item.prompt for item in items])
        return Text.pack([row.to(self.rope.device, torch.float32, non_blocking=True) for row in rows])

    @property
    def _encoder(self) -> TextEncoder:
        if self.text is None:
            raise ValueError("this model was built without a text encoder: pass `Text` features instead of prompts")
        return self.text

    def rows(self, batch: int, sampling: Sampling) -> int:
        return batch * (2 if sampling.guided else 1)

    def _condition(self, text: Text, sampling: Sampling, negative: Text | None) -> Conditioning:
        rows = [row[:n] for row, n in zip(text.features, text.lengths, strict=True)]
        if sampling.guided:
            other = text if negative is None else negative
            rows += (
                self.transformer.unconditional(text)
                if negative is None
                else [row[:n] for row, n in zip(other.features, other.lengths, strict=True)]
            )
        return self.transformer.condition(Text.pack(rows))

    @torch.no_grad()
    def generate(
        self,
        condition: Text,
        sampling: Sampling,
        cache: Cache,
        generators: Sequence[torch.Generator] | None,
        forced: Sequence[Tensor | None] = (),
        negative: Text | None = None,
    ) -> Trace:
        """See `ImageModel.generate`. `negative`: text features that take the place of the learned unconditional text.

        Raises:
            ValueError: no generators although a scale is not forced, or a sampling that is not spelled out.
        """
        schedule, batch = self.geometry.schedule, len(condition.lengths)
        cond = self._condition(condition, sampling, negative)
        depth = self.geometry.num_layers
        latent_size = self.codes.grid(schedule.sizes[-1])
        latent = torch.zeros(batch, self.codes.bits, *latent_size, device=self.rope.device)
        x, bits_of, logits_of = self.transformer.start(cond), [], []
        for s, (size, (cfg, tau)) in enumerate(zip(schedule.sizes, sampling.strengths(), strict=True)):
            at_scale(s)
            guide = {depth + n: cfg for n in sampling.guide_layers if n < 0} if cfg != 1 else None
            rope = self.rope[:, schedule.offsets[s] : schedule.offsets[s + 1]]
            hidden = self.transformer.blocks(x, s, cond, rope, cache, guide)
            cache.end_step()
            if cfg != 1 and 0 in sampling.guide_layers:
                yes, no = self.transformer.logits(hidden, cond).chunk(2)
                logits = cfg * yes + (1 - cfg) * no
            else:
                logits = self.transformer.logits(hidden[:batch], cond)
            logits_of.append(logits[..., 1] - logits[..., 0])
            fixed = forced[s] if s < len(forced) else None
            if generators is not None:
                drawn = draw_bits(logits / tau, sampling.top_k, sampling.top_p, generators)
                bits = self.codes.to_grid(drawn, size)
            if fixed is not None:
                bits = fixed.to(x.device, non_blocking=True)
            elif generators is None:
                raise ValueError(f"scale {s} is not forced and there are no generators to draw it with")
            bits_of.append(bits)
            latent = latent + resize(self.codes.embed(bits), latent_size)
            if s + 1 < schedule.num_scales:
                tokens = self.codes.to_tokens(resize(latent, self.codes.grid(schedule.sizes[s + 1])))
                x = self.transformer.embed(tokens).repeat(len(cond.sos) // batch, 1, 1)
        at_scale(None)
        return Trace(tuple(bits_of), tuple(logits_of), latent)

    def divergence(self, full: Sequence[Tensor], other: Sequence[Tensor]) -> dict[str, float]:
        """Return KL(full || other) per bit in nats, see `bit_kl`."""
        return bit_kl(full, other)

    def decode(self, latent: Tensor) -> Tensor:
        """Latents (B, d, H, W) -> RGB uint8 (B, height, width, 3).

        Differs: upstream decodes under bfloat16 autocast, here it is float32; pixels differ by a few levels.
        """
        # one by one: at 1024 x 1024 the decoder holds 3 GB an image, more than all scales together
        return torch.cat([self.tokenizer.decode_uint8(image) for image in latent.split(1)])
