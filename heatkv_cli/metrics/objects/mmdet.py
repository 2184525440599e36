"""mmdet's Mask2Former checkpoints under the names that transformers uses; the architecture is the same.

Three tensors differ in more than their names: Swin's q, k, v are one projection in mmdet; so are those of the decoder's
self-attention; and where Swin merges 2 x 2 patches, mmdet has the channels outermost and transformers the patches, in
the order (0, 0), (1, 0), (0, 1), (1, 1).

Source: open-mmlab/mmdetection 2.x (``backbones/swin.py``, ``plugins/msdeformattn_pixel_decoder.py``,
``dense_heads/mask2former_head.py``); names of transformers 5.23.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from heatkv_cli.errors import ArtifactError

_SWIN = "model.pixel_level_module.encoder."
_PIXELS = "model.pixel_level_module.decoder."
_DECODER = "model.transformer_module."
_BLOCK = _SWIN + r"swin.encoder.layers.\1.blocks.\2."
_LAYER = _DECODER + r"decoder.layers.\1."
_WB = r"(weight|bias)"

_RULES: tuple[tuple[str, str], ...] = (
    (rf"backbone\.patch_embed\.projection\.{_WB}", _SWIN + r"swin.embeddings.patch_embeddings.projection.\1"),
    (rf"backbone\.patch_embed\.norm\.{_WB}", _SWIN + r"swin.embeddings.norm.\1"),
    (r"backbone\.stages\.(\d+)\.blocks\.(\d+)\.norm1\.(.+)", _BLOCK + r"layernorm_before.\3"),
    (r"backbone\.stages\.(\d+)\.blocks\.(\d+)\.norm2\.(.+)", _BLOCK + r"layernorm_after.\3"),
    (
        r"backbone\.stages\.(\d+)\.blocks\.(\d+)\.attn\.w_msa\.relative_position_bias_table",
        _BLOCK + "attention.relative_position_bias.relative_position_bias_table",
    ),
    (r"backbone\.stages\.(\d+)\.blocks\.(\d+)\.attn\.w_msa\.qkv\.(.+)", _BLOCK + r"attention.{qkv}_proj.\3"),
    (r"backbone\.stages\.(\d+)\.blocks\.(\d+)\.attn\.w_msa\.proj\.(.+)", _BLOCK + r"attention.o_proj.\3"),
    (r"backbone\.stages\.(\d+)\.blocks\.(\d+)\.ffn\.layers\.0\.0\.(.+)", _BLOCK + r"mlp.fc1.\3"),
    (r"backbone\.stages\.(\d+)\.blocks\.(\d+)\.ffn\.layers\.1\.(.+)", _BLOCK + r"mlp.fc2.\3"),
    (
        r"backbone\.stages\.(\d+)\.downsample\.(norm|reduction)\.(.+)",
        _SWIN + r"swin.encoder.layers.\1.downsample.\2.\3",
    ),
    (rf"backbone\.norm(\d)\.{_WB}", _SWIN + r"hidden_states_norms.stage{\1+1}.\2"),
    (rf"panoptic_head\.pixel_decoder\.input_convs\.(\d)\.conv\.{_WB}", _PIXELS + r"input_projections.\1.0.\2"),
    (rf"panoptic_head\.pixel_decoder\.input_convs\.(\d)\.gn\.{_WB}", _PIXELS + r"input_projections.\1.1.\2"),
    (
        r"panoptic_head\.pixel_decoder\.encoder\.layers\.(\d+)\.attentions\.0\.(.+)",
        _PIXELS + r"encoder.layers.\1.self_attn.\2",
    ),
    (
        r"panoptic_head\.pixel_decoder\.encoder\.layers\.(\d+)\.ffns\.0\.layers\.0\.0\.(.+)",
        _PIXELS + r"encoder.layers.\1.fc1.\2",
    ),
    (
        r"panoptic_head\.pixel_decoder\.encoder\.layers\.(\d+)\.ffns\.0\.layers\.1\.(.+)",
        _PIXELS + r"encoder.layers.\1.fc2.\2",
    ),
    (
        r"panoptic_head\.pixel_decoder\.encoder\.layers\.(\d+)\.norms\.0\.(.+)",
        _PIXELS + r"encoder.layers.\1.self_attn_layer_norm.\2",
    ),
    (
        r"panoptic_head\.pixel_decoder\.encoder\.layers\.(\d+)\.norms\.1\.(.+)",
        _PIXELS + r"encoder.layers.\1.final_layer_norm.\2",
    ),
    (r"panoptic_head\.pixel_decoder\.level_encoding\.weight", _PIXELS + "level_embed"),
    (r"panoptic_head\.pixel_decoder\.lateral_convs\.0\.conv\.weight", _PIXELS + "adapter_1.0.weight"),
    (rf"panoptic_head\.pixel_decoder\.lateral_convs\.0\.gn\.{_WB}", _PIXELS + r"adapter_1.1.\1"),
    (r"panoptic_head\.pixel_decoder\.output_convs\.0\.conv\.weight", _PIXELS + "layer_1.0.weight"),
    (rf"panoptic_head\.pixel_decoder\.output_convs\.0\.gn\.{_WB}", _PIXELS + r"layer_1.1.\1"),
    (rf"panoptic_head\.pixel_decoder\.mask_feature\.{_WB}", _PIXELS + r"mask_projection.\1"),
    (
        r"panoptic_head\.transformer_decoder\.layers\.(\d+)\.attentions\.0\.attn\.(.+)",
        _LAYER + r"cross_attn.\2",
    ),
    (
        rf"panoptic_head\.transformer_decoder\.layers\.(\d+)\.attentions\.1\.attn\.in_proj_{_WB}",
        _LAYER + r"self_attn.{qkv}_proj.\2",
    ),
    (
        rf"panoptic_head\.transformer_decoder\.layers\.(\d+)\.attentions\.1\.attn\.out_proj\.{_WB}",
        _LAYER + r"self_attn.out_proj.\2",
    ),
    (r"panoptic_head\.transformer_decoder\.layers\.(\d+)\.ffns\.0\.layers\.0\.0\.(.+)", _LAYER + r"fc1.\2"),
    (r"panoptic_head\.transformer_decoder\.layers\.(\d+)\.ffns\.0\.layers\.1\.(.+)", _LAYER + r"fc2.\2"),
    (r"panoptic_head\.transformer_decoder\.layers\.(\d+)\.norms\.0\.(.+)", _LAYER + r"cross_attn_layer_norm.\2"),
    (r"panoptic_head\.transformer_decoder\.layers\.(\d+)\.norms\.1\.(.+)", _LAYER + r"self_attn_layer_norm.\2"),
    (r"panoptic_head\.transformer_decoder\.layers\.(\d+)\.norms\.2\.(.+)", _LAYER + r"final_layer_norm.\2"),
    (rf"panoptic_head\.transformer_decoder\.post_norm\.{_WB}", _DECODER + r"decoder.layernorm.\1"),
    (r"panoptic_head\.query_embed\.weight", _DECODER + "queries_embedder.weight"),
    (r"panoptic_head\.query_feat\.weight", _DECODER + "queries_features.weight"),
    (r"panoptic_head\.level_embed\.weight", _DECODER + "level_embed.weight"),
    (rf"panoptic_head\.cls_embed\.{_WB}", r"class_predictor.\1"),
    (
        rf"panoptic_head\.mask_embed\.(\d)\.{_WB}",
        _DECODER + r"decoder.mask_predictor.mask_embedder.{\1/2}.0.\2",
    ),
)
_COMPILED = tuple((re.compile(pattern), target) for pattern, target in _RULES)
_DROPPED = re.compile(r".*\.relative_position_index")
"""Buffers that both libraries compute."""


def to_transformers(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return the state dict of transformers' ``Mask2FormerForUniversalSegmentation`` from mmdet's.

    Args:
        state: mmdet's, without the prefix of a data-parallel wrapper.
        path: path for messages.

    Raises:
        ArtifactError: a key that is none of mmdet's Mask2Former with Swin.
    """
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        if _DROPPED.fullmatch(key):
            continue
        target = _target(key)
        if target is None:
            raise ArtifactError(
                f"{path}: key {key} is none of mmdet's Mask2Former with Swin",
                "is it mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco?",
            )
        if "{qkv}" in target:
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                found[target.replace("{qkv}", letter)] = part
        elif ".downsample." in target:
            found[target] = _patches_outermost(value)
        else:
            found[target] = value
    return found


def _target(key: str) -> str | None:
    for pattern, target in _COMPILED:
        match = pattern.fullmatch(key)
        if match:
            # Modules are counted from 1 in one place, and without the activations between them in another.
            target = target.replace(r"{\1+1}", str(int(match[1]) + 1) if r"{\1+1}" in target else "")
            target = target.replace(r"{\1/2}", str(int(match[1]) // 2) if r"{\1/2}" in target else "")
            return match.expand(target)
    return None


def _patches_outermost(value: Tensor) -> Tensor:
    """(..., 4 C) with index c * 4 + patch, patches row by row -> patch * C + c, patches column by column."""
    return value.unflatten(-1, (-1, 4)).transpose(-1, -2)[..., [0, 2, 1, 3], :].flatten(-2)
