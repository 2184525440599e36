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

from heatkv_cli.errors import ArtifactError, ConfigError
from heatkv_cli.metrics.networks import ready
from heatkv_cli.metrics.objects.decisions import Box
from heatkv_cli.metrics.objects.mmdet import to_transformers
from heatkv_cli.metrics.scores import Pixels
from heatkv_cli.metrics.weights import NetworkFile, load_exactly, package, read_state

NAMES: tuple[str, ...] = (
    "person",
    "bicycle",
    "car",
    "motorcycle",
    "airplane",
    "bus",
    "train",
    "truck",
    "boat",
    "traffic light",
    "fire hydrant",
    "stop sign",
    "parking meter",
    "bench",
    "bird",
    "cat",
    "dog",
    "horse",
    "sheep",
    "cow",
    "elephant",
    "bear",
    "zebra",
    "giraffe",
    "backpack",
    "umbrella",
    "handbag",
    "tie",
    "suitcase",
    "frisbee",
    "skis",
    "snowboard",
    "sports ball",
    "kite",
    "baseball bat",
    "baseball glove",
    "skateboard",
    "surfboard",
    "tennis racket",
    "bottle",
    "wine glass",
    "cup",
    "fork",
    "knife",
    "spoon",
    "bowl",
    "banana",
    "apple",
    "sandwich",
    "orange",
    "broccoli",
    "carrot",
    "hot dog",
    "pizza",
    "donut",
    "cake",
    "chair",
    "couch",
    "potted plant",
    "bed",
    "dining table",
    "toilet",
    "tv",
    "laptop",
    "computer mouse",
    "tv remote",
    "computer keyboard",
    "cell phone",
    "microwave",
    "oven",
    "toaster",
    "sink",
    "refrigerator",
    "book",
    "clock",
    "vase",
    "scissors",
    "teddy bear",
    "hair drier",
    "toothbrush",
)
"""COCO's 80 things in COCO's order under GenEval's names; detectors, which name some otherwise, are mapped by index."""
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
SHORT, LONG, MULTIPLE = 800, 1333, 32
MAX_INSTANCES = 100

_MMDET = "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco"
_META = "facebook/mask2former-swin-small-coco-instance"
DETECTORS = {
    "mmdet-swin-s": NetworkFile(
        f"{_MMDET}_20220504_001756-743b7d99.pth",
        f"https://download.openmmlab.com/mmdetection/v2.0/mask2former/{_MMDET}/",
        licence="Apache-2.0",
        sha256=("743b7d99015f1224c6d57fd4b14d04b15cc8ec72ae7ee7831e7c71d8873b7a54",),
    ),
    "meta-swin-s": NetworkFile(
        "mask2former-swin-small-coco-instance.safetensors",
        f"https://huggingface.co/{_META} (model.safetensors)",
        _META,
        "model.safetensors",
        "MIT",
    ),
}
"""``mmdet-swin-s`` is GenEval's own; ``meta-swin-s`` is another training run of the same network: other numbers.

No digest of Meta's file is known here: safetensors hold no code, every key has to fit, the self-test has to pass.
"""
PARAMETERS = 68_741_083
"""Numbers in Mask2Former with Swin-S."""


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
    """Return the size at which a picture is looked at: as large as fits both 1333 x 800 and 800 x 1333.

    >>> resized(1024, 1024), resized(256, 1024)
    ((800, 800), (333, 1333))
    """
    scale = min(LONG / max(height, width), SHORT / min(height, width))
    return int(height * scale + 0.5), int(width * scale + 0.5)


def prepare(image: Pixels, size: tuple[int, int]) -> Tensor:
    """Return the network's input.

    Rule: bilinear resize without antialias, ImageNet's mean and deviation, zeros to multiples of 32.

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
    classes: Tensor,
    masks: Tensor,
    padded: tuple[int, int],
    looked: tuple[int, int],
    original: tuple[int, int],
    min_score: float = 0.0,
) -> list[Instance]:
    """Return the objects in the network's output for one picture, as mmdet finds them.

    Rule: softmax over classes, "nothing" dropped; the 100 best pairs of query and class; mask logits bilinearly to the
    padded input, its padding cut off, then to the original size; the mask is where they are positive.

    Args:
        classes: (Q, 81) logits, "nothing" last.
        masks: (Q, h, w) logits.
        padded: (height, width) of the input with padding.
        looked: without.
        original: size of the picture.
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
        device: device of the network; always float32 without TF32, since scores fell on some GPUs otherwise
            (GenEval issue 15).
        config: sizes of the network as keyword arguments of transformers' ``Mask2FormerConfig``, ``backbone_config``
            those of ``SwinConfig``; None is Swin-S.

    Raises:
        SetupError: transformers is not installed, or there is no such device.
        ConfigError: the sizes are of no network.
        ArtifactError: the weights are not this network's.
    """

    def __init__(self, path: Path, device: str = "cpu", config: dict[str, Any] | None = None) -> None:
        net = _build(dict(config or {}))
        state = read_state(path)
        if any(key.startswith("panoptic_head.") for key in state):
            state = to_transformers(state, path)
        own = net.state_dict()
        place = {_today(key): key for key in own}  # checkpoint and installed library may have names of different days
        state = {place.get(_today(key), key): value for key, value in state.items() if not _DERIVED.fullmatch(key)}
        # The loss's class weights and a norm behind the last stage take no part in detection; mmdet has neither.
        state = {key: own[key] for name, key in place.items() if _IDLE.match(name) or _DERIVED.fullmatch(key)} | state
        load_exactly(net, state, path)
        self._net, self._device = ready(net.float(), device), device

    @torch.inference_mode()
    def __call__(self, image: Pixels, min_score: float = 0.0) -> list[Instance]:
        """Return the objects of one (H, W, 3) 8-bit picture, most confident first.

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


def _build(sizes: dict[str, Any]) -> Any:
    transformers: Any = package("transformers", "geneval")
    swin = {"embed_dim": 96, "depths": [2, 2, 18, 2], "num_heads": [3, 6, 12, 24], "window_size": 7}
    try:
        swin |= dict(sizes.pop("backbone_config", {}))
        backbone = transformers.SwinConfig(**swin, out_features=[f"stage{i}" for i in (1, 2, 3, 4)])
        config = transformers.Mask2FormerConfig(backbone_config=backbone, num_labels=len(NAMES), **sizes)
        return transformers.Mask2FormerForUniversalSegmentation(config)
    except (TypeError, ValueError, KeyError, RuntimeError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"detector_config makes no network: {reason}", "correct it, or leave it away") from error


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
    """Return the name in transformers 5 of a Swin key of transformers 4; any other key as it is."""
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
