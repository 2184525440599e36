"""Infinity without weights: the networks on the meta device, which has shapes and no memory. For byte plans."""

from __future__ import annotations

from typing import Any, Literal

import torch

from heatkv_cli.core.scales import Geometry
from heatkv_cli.models.base import Sketch
from heatkv_cli.models.infinity.load import check_width
from heatkv_cli.models.infinity.model import InfinityModel
from heatkv_cli.models.infinity.random_weights import TEXT_TOKENS
from heatkv_cli.models.infinity.text_t5 import Precision
from heatkv_cli.models.infinity.tokenizer import Tokenizer, TokenizerParams
from heatkv_cli.models.infinity.transformer import Infinity, InfinityConfig, Text


def sketch(
    geometry: Geometry,
    dtype: Literal["float32", "bfloat16", "float16"],
    width: int,
    block_chunks: int,
    text_channels: int,
    rope_base: tuple[int, int],
    rope_mode: int,
    tokenizer: TokenizerParams,
    text_length: int = TEXT_TOKENS,
    t5_dtype: Precision | None = None,
    **_: Any,
) -> Sketch:
    """The shape of a loaded model; arguments as in `load_official` and `load_bundled`.

    The bundled model's word encoder (a megabyte) is left out: its vocabulary stands in its file alone.
    """
    check_width(geometry, width)
    shape, codes = tokenizer.shape, tokenizer.codes
    config = InfinityConfig(
        geometry.num_layers, width, geometry.num_heads, block_chunks, codes, text_channels, text_length
    )
    with torch.device("meta"):
        net, pixels = Infinity(config), Tokenizer(shape)
    net.block_chunks.to(getattr(torch, dtype))  # as `load_transformer` fills them
    for part in (net, pixels):
        part.eval().requires_grad_(False)
    model = InfinityModel(geometry, net, pixels, None, (rope_base[0], rope_base[1]), rope_mode)

    def condition(batch: int) -> Text:
        return Text.pack([torch.empty(min(TEXT_TOKENS, text_length), text_channels, device="meta")] * batch)

    return Sketch(
        model, {"transformer": net, "tokenizer": pixels}, condition, 0 if t5_dtype is None else t5_bytes(t5_dtype)
    )


def t5_bytes(precision: Precision) -> int:
    """Bytes of Flan-T5-XL's encoder as transformers loads it: in float16 the `wo` matrices stay float32.

    Source: config of google/flan-t5-xl: 24 layers of width 2048, 32 heads of 64, gated FFN of 5120, 32128 words.
    """
    layers, width, heads, hidden, words, buckets = 24, 2048, 32, 5120, 32128, 32
    outputs = layers * hidden * width
    others = words * width + layers * (4 * width * width + 2 * hidden * width + 2 * width) + buckets * heads + width
    size = {"float32": 4, "bfloat16": 2, "float16": 2}[precision]
    return others * size + outputs * (4 if precision == "float16" else size)
