"""GenEval's detector: mmdet's weights under transformers, sizes, masks, boxes and scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from heatkv_cli.errors import ArtifactError
from heatkv_cli.metrics.objects.detector import NAMES, Detector, instances, prepare, resized
from heatkv_cli.metrics.objects.mmdet import to_transformers

pytest.importorskip("transformers", reason="transformers (extra geneval) is not installed")
import mmdet_literal as literal


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("detector") / "mask2former.pth"
    torch.save({"meta": {"CLASSES": ("person",), "epoch": 50}, "state_dict": literal.random_mmdet().state_dict()}, path)
    return path


@pytest.mark.parametrize("size", [(128, 160), (96, 96), (192, 128)])
def test_converted_weights_give_what_mmdets_network_gives(checkpoint: Path, size: tuple[int, int]) -> None:
    pixels = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))
    detector = Detector(checkpoint, config=literal.CONFIG)
    with torch.no_grad():
        classes, masks = literal.random_mmdet()(pixels)
        output = detector._net(pixel_values=pixels)
    assert output.masks_queries_logits.shape == masks.shape == (1, 7, size[0] // 4, size[1] // 4)
    torch.testing.assert_close(output.class_queries_logits, classes, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(output.masks_queries_logits, masks, atol=1e-3, rtol=1e-3)
    assert classes.std() > 0.1 and masks.std() > 0.1


def test_every_key_is_consumed_and_none_is_invented(checkpoint: Path, tmp_path: Path) -> None:
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert len(to_transformers(state, checkpoint)) > 100
    with pytest.raises(ArtifactError, match=r"key panoptic_head\.mystery is none of mmdet's"):
        to_transformers({**state, "panoptic_head.mystery": torch.zeros(1)}, checkpoint)
    for key in list(state)[::17]:
        if "relative_position_index" in key:
            continue
        torch.save({"state_dict": {k: v for k, v in state.items() if k != key}}, tmp_path / "part.pth")
        with pytest.raises(ArtifactError, match="missing"):
            Detector(tmp_path / "part.pth", config=literal.CONFIG)


def test_names_are_cocos_by_index() -> None:
    assert len(NAMES) == len(set(NAMES)) == 80
    places = {"person": 0, "traffic light": 9, "cat": 15, "computer mouse": 64, "tv remote": 65, "toothbrush": 79}
    assert {name: NAMES.index(name) for name in places} == places


@pytest.mark.parametrize(
    ("size", "expected"),
    [((1024, 1024), (800, 800)), ((256, 256), (800, 800)), ((512, 1024), (667, 1333)), ((480, 640), (800, 1067))],
)
def test_size_looked_at(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert resized(*size) == expected


def test_input_is_resized_normalised_and_padded_in_this_order() -> None:
    image = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    pixels = prepare(image, (45, 75))
    assert pixels.shape == (1, 3, 64, 96)
    assert (pixels[..., 45:, :] == 0).all() and (pixels[..., 75:] == 0).all()
    restored = pixels[0, :, :45, :75] * torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)
    restored += torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)
    # Pixel (0, 0) lies at -0.17 in the picture: its corner. Pixel (1, 1) lies at 0.5: the mean of four.
    assert restored[:, 0, 0].round().tolist() == image[0, 0].tolist()
    expected = image[:2, :2].astype(float).mean((0, 1))
    assert np.abs(restored[:, 1, 1].numpy() - expected).max() <= 0.51


def brute(classes: torch.Tensor, masks: torch.Tensor, padded, looked, original):
    """All pairs, no shortcuts: as the rule is written."""
    probabilities = F.softmax(classes.double(), 1)[:, :-1]
    pairs = sorted(((float(p), q, c) for q, row in enumerate(probabilities) for c, p in enumerate(row)), reverse=True)
    big = F.interpolate(masks[None], padded, mode="bilinear", align_corners=False)[:, :, : looked[0], : looked[1]]
    big = F.interpolate(big, original, mode="bilinear", align_corners=False)[0]
    found = []
    for p, q, c in pairs[:100]:
        inside = np.argwhere(big[q].numpy() > 0)
        if len(inside):
            sigmoid = 1 / (1 + np.exp(-big[q].double().numpy()))
            (y0, x0), (y1, x1) = inside.min(0), inside.max(0) + 1
            found.append((p * np.mean([sigmoid[y, x] for y, x in inside]), c, (x0, y0, x1, y1)))
    return sorted(found, reverse=True)


def test_instances_against_brute_force() -> None:
    generator = torch.Generator().manual_seed(3)
    classes = 3 * torch.randn(9, 81, generator=generator)
    masks = F.avg_pool2d(20 * torch.randn(1, 9, 16, 16, generator=generator), 5, 1, 2)[0] - 1
    masks[4] = -1  # a query without a pixel
    sizes = (64, 64), (60, 52), (31, 27)
    expected = brute(classes, masks, *sizes)
    found = instances(classes, masks, *sizes)
    assert len(found) == len(expected) < 100
    np.testing.assert_allclose([i.score for i in found], [e[0] for e in expected], rtol=1e-4)
    assert [(i.label, i.box) for i in found] == [(c, box) for _, c, box in expected]
    for instance in found:
        x0, y0, x1, y1 = map(int, instance.box)
        assert instance.mask.shape == (31, 27) and instance.mask[y0:y1, x0:x1].sum() == instance.mask.sum()
    some = instances(classes, masks, *sizes, min_score=0.2)
    assert [i.score for i in some] == [i.score for i in found if i.score >= 0.2] and 0 < len(some) < len(found)


def test_weights_that_are_not_finite_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    state["backbone.norm2.weight"][0] = torch.nan
    torch.save({"state_dict": state}, tmp_path / "nan.pth")
    with pytest.raises(ArtifactError, match="not finite"):
        Detector(tmp_path / "nan.pth", config=literal.CONFIG)(np.zeros((8, 8, 3), np.uint8))
