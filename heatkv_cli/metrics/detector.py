"""GenEval's object detector on today's libraries: Mask2Former (Swin-S) in transformers, mmdet's steps around it.

transformers' own processor and post-processing are not used: they score at another resolution, let masks cover one
another, drop everything below 0.5 and give no boxes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from heatkv_cli.errors import ArtifactError
from heatkv_cli.metrics.base import Image
from heatkv_cli.metrics.decisions import Box
from heatkv_cli.metrics.mmdet import to_transformers
from heatkv_cli.metrics.weights import WeightsFile, load_exactly, package, read_checkpoint

NAMES: tuple[str, ...] = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow",
    "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee",
    "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
    "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple",
    "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch",
    "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote",
    "computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock",
    "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
"""COCO's 80 things in COCO's order under GenEval's names; detectors, which name some otherwise, are mapped by index."""
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
SHORT, LONG, MULTIPLE = 800, 1333, 32
MAX_INSTANCES = 100

DETECTORS = {
    "mmdet-swin-s": WeightsFile(
        "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth",
        "download.openmmlab.com/mmdetection/v2.0/mask2former/mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco/",
        licence="Apache-2.0",
    ),
    "meta-swin-s": WeightsFile(
        "mask2former-swin-small-coco-instance.safetensors",
        "huggingface.co/facebook/mask2former-swin-small-coco-instance (model.safetensors)",
        "facebook/mask2former-swin-small-coco-instance",
        "model.safetensors",
        "MIT",
    ),
}
"""``mmdet-swin-s`` is GenEval's own; ``meta-swin-s`` is another training run of the same network: other numbers."""


@dataclass(frozen=True)
class Instance:
    """One detected object.

    Attributes:
        label: index into ``NAMES``.
        score: class probability times the mean of the mask's sigmoid inside the mask, in [0, 1].
        box: (x0, y0, x1, y1) in pixels around the mask, maximal edges exclusive.
        mask: (H, W).
    """

    label: int
    score: float
    box: Box
    mask: NDArray[np.bool_]


def resized(height: int, width: int) -> tuple[int, int]:
    """Size at which a picture is looked at: as large as fits both 1333 x 800 and 800 x 1333.

    >>> resized(1024, 1024), resized(256, 1024)
    ((800, 800), (333, 1333))
    """
    scale = min(LONG / max(height, width), SHORT / min(height, width))
    return int(height * scale + 0.5), int(width * scale + 0.5)


def prepare(image: Image, size: tuple[int, int]) -> Tensor:
    """The network's input: bilinear resize without antialias, ImageNet's mean and deviation, zeros to multiples of 32.

    Args:
        image: (H, W, 3), 8 bit.
        size: (height, width) after the resize.

    Returns:
        (1, 3, H', W') float32.

    Differs: mmdet resizes 8-bit pictures in fixed point (OpenCV); ours are rounded to 8 bit, which may be off by one.
    """
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    pixels = F.interpolate(pixels, size, mode="bilinear", align_corners=False).round()
    pixels = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    below, right = (-side % MULTIPLE for side in size)
    return F.pad(pixels, (0, right, 0, below))


def instances(
    classes: Tensor, masks: Tensor, padded: tuple[int, int], looked: tuple[int, int], original: tuple[int, int],
    min_score: float = 0.0,
) -> list[Instance]:  # fmt: skip
    """Objects from the network's output for one picture, as mmdet finds them.

    Rule: softmax over classes, "nothing" dropped; the 100 best pairs of query and class; mask logits bilinearly to the
    padded input, its padding cut off, then to the original size; the mask is where they are positive.

    Args:
        classes: (Q, 81) logits, "nothing" last.
        masks: (Q, h, w) logits.
        padded: (height, width) of the input with padding.
        looked: without.
        original: of the picture.
        min_score: objects with a lower score are left out.

    Returns:
        Most confident first; objects without a pixel are left out.
    """
    number = classes.shape[1] - 1
    best, pairs = classes.softmax(1)[:, :-1].flatten().topk(min(MAX_INSTANCES, len(classes) * number))
    pairs = pairs[best >= min_score]  # a score is at most its class probability: spares most masks the enlarging
    found = []
    for pair, probability in zip(pairs.tolist(), best.tolist(), strict=False):
        mask = masks[None, None, pair // number]
        mask = F.interpolate(mask, padded, mode="bilinear", align_corners=False)[..., : looked[0], : looked[1]]
        mask = F.interpolate(mask, original, mode="bilinear", align_corners=False)[0, 0]
        inside = mask > 0
        rows, columns = inside.any(1).nonzero(), inside.any(0).nonzero()
        if not len(rows):
            continue
        score = probability * float(mask[inside].sigmoid().sum() / (inside.sum() + 1e-6))
        if score < min_score:
            continue
        edges = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        x0, y0, x1, y1 = (float(edge) for edge in edges)
        found.append(Instance(pair % number, score, (x0, y0, x1, y1), inside.cpu().numpy()))
    return sorted(found, key=lambda instance: -instance.score)


class Detector:
    """Mask2Former with its weights.

    Args:
        path: mmdet's ``.pth``, or ``.safetensors`` under transformers' names.
        device: where it runs; always float32 without TF32, since scores fell on some GPUs otherwise (GenEval issue 15).
        config: sizes of the network as keyword arguments of transformers' ``Mask2FormerConfig``, ``backbone_config``
            those of ``SwinConfig``; None is Swin-S.

    Raises:
        SetupError: transformers is not installed.
        ArtifactError: the weights are not this network's.
    """

    def __init__(self, path: Path, device: str = "cpu", config: dict[str, Any] | None = None) -> None:
        transformers: Any = package("transformers", "geneval")
        sizes = dict(config or {})
        swin = {"embed_dim": 96, "depths": [2, 2, 18, 2], "num_heads": [3, 6, 12, 24], "window_size": 7}
        swin |= dict(sizes.pop("backbone_config", {}))
        backbone = transformers.SwinConfig(**swin, out_features=[f"stage{i}" for i in (1, 2, 3, 4)])
        net = transformers.Mask2FormerForUniversalSegmentation(
            transformers.Mask2FormerConfig(backbone_config=backbone, num_labels=len(NAMES), **sizes)
        )
        content = read_checkpoint(path)
        state = content.get("state_dict", content)
        if any(key.startswith("panoptic_head.") for key in state):
            state = to_transformers(state, path)
        own = net.state_dict()
        place = {_today(key): key for key in own}  # checkpoint and installed library may have names of different days
        state = {place.get(_today(key), key): value for key, value in state.items() if not _DERIVED.fullmatch(key)}
        # The loss's class weights and a norm behind the last stage take no part in detection; mmdet has neither.
        state = {key: own[key] for name, key in place.items() if _IDLE.match(name) or _DERIVED.fullmatch(key)} | state
        load_exactly(net, state, path)
        self._net, self._device = net.float().to(device).eval(), device

    @torch.inference_mode()
    def __call__(self, image: Image, min_score: float = 0.0) -> list[Instance]:
        """Objects of one (H, W, 3) 8-bit picture, most confident first.

        Raises:
            ArtifactError: the network gives numbers that are not finite.
        """
        height, width = image.shape[:2]
        looked = resized(height, width)
        pixels = prepare(image, looked).to(self._device)
        with _full_precision():
            output = self._net(pixel_values=pixels)
        classes, masks = output.class_queries_logits[0].float(), output.masks_queries_logits[0].float()
        if not (classes.isfinite().all() and masks.isfinite().all()):
            raise ArtifactError("the detector gives numbers that are not finite", "are its weights whole?")
        return instances(classes, masks, (pixels.shape[2], pixels.shape[3]), looked, (height, width), min_score)


_DERIVED = re.compile(r".*\.relative_position_index")
_IDLE = re.compile(r"criterion\.|model\.pixel_level_module\.encoder\.swin\.layernorm\.")
_RENAMED = (
    (r"(model\.pixel_level_module\.encoder\.)(embeddings|encoder|layernorm)\.", r"\1swin.\2."),
    (
        r"\.attention\.self\.relative_position_bias_table",
        ".attention.relative_position_bias.relative_position_bias_table",
    ),
    (r"\.attention\.self\.(q|k|v)(?:uery|ey|alue)\.", r".attention.\1_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
)


def _today(key: str) -> str:
    """A Swin key of transformers 4 under its name in transformers 5; any other as it is."""
    for pattern, target in _RENAMED:
        key = re.sub(pattern, target, key)
    return key


@contextmanager
def _full_precision() -> Iterator[None]:
    """float32 means float32 here, whatever the process has allowed."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
