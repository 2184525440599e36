"""Metric interface, intervals, PSNR and the shapes score's arithmetic, against independent computations."""

from __future__ import annotations

import math

import numpy as np
import pytest

from heatkv_cli.errors import ArtifactError, ConfigError
from heatkv_cli.metrics.base import ImageMetric, Sample, Score, SetMetric, Spec, Value
from heatkv_cli.metrics.intervals import Bootstrap, bootstrap_interval, paired_difference, paired_interval
from heatkv_cli.metrics.objects.shapes import ShapesScore
from heatkv_cli.metrics.pixels import PSNR, compute_psnr

RNG = np.random.default_rng(3)
FEW = Bootstrap(2000)


def picture(seed: int, side: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


# ---- intervals


def test_interval_agrees_with_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    values = RNG.exponential(size=60)
    ours = bootstrap_interval(values, bootstrap=Bootstrap(20_000))
    theirs = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1))
    assert ours.mean == pytest.approx(values.mean(), rel=2 * 60 * 2.0**-53)  # 60 positive numbers, twice
    assert ours.stderr == pytest.approx(theirs.standard_error, rel=0.03)
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs.confidence_interval), abs=0.02)
    assert ours.n == 60


def test_stderr_agrees_with_the_closed_form() -> None:
    values = RNG.normal(size=400)
    assert bootstrap_interval(values).stderr == pytest.approx(values.std() / 20, rel=0.03)


def test_samples_of_one_prompt_are_drawn_together() -> None:
    values = RNG.normal(size=100)
    copies = bootstrap_interval(np.repeat(values, 4), np.repeat(np.arange(100), 4), bootstrap=Bootstrap(4000))
    singles = bootstrap_interval(values, bootstrap=Bootstrap(4000))
    assert copies.mean == pytest.approx(singles.mean)
    assert copies.stderr == pytest.approx(singles.stderr, rel=0.06)
    careless = bootstrap_interval(np.repeat(values, 4), bootstrap=Bootstrap(4000))
    assert careless.stderr < 0.6 * copies.stderr


def test_uneven_prompts_are_weighted_by_their_images() -> None:
    interval = bootstrap_interval([1.0, 1.0, 1.0, 5.0], ["a", "a", "a", "b"], bootstrap=Bootstrap(4000))
    assert interval.mean == 2.0
    assert (interval.low, interval.high) == (1.0, 5.0)


def test_strata_count_alike_and_are_resampled_apart() -> None:
    values = np.concatenate([RNG.normal(0, 1, 300), RNG.normal(5, 2, 50)])
    strata = ["x"] * 300 + ["y"] * 50
    interval = bootstrap_interval(values, strata=strata)
    assert interval.mean == pytest.approx((values[:300].mean() + values[300:].mean()) / 2)
    closed = math.sqrt(values[:300].var() / 300 + values[300:].var() / 50) / 2
    assert interval.stderr == pytest.approx(closed, rel=0.03)


def test_same_arguments_same_interval_and_confidence_widens() -> None:
    values = RNG.normal(size=30)
    assert bootstrap_interval(values, bootstrap=FEW) == bootstrap_interval(values, bootstrap=FEW)
    assert bootstrap_interval(values, bootstrap=FEW) != bootstrap_interval(values, bootstrap=Bootstrap(2000, seed=1))
    narrow, wide = (bootstrap_interval(values, bootstrap=Bootstrap(2000, c)) for c in (0.5, 0.99))
    assert wide.low < narrow.low < narrow.mean < narrow.high < wide.high


def test_coverage_is_near_the_confidence() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for i in range(300):
        interval = bootstrap_interval(rng.normal(size=40), bootstrap=Bootstrap(400, seed=i))
        hits += interval.low <= 0 <= interval.high
    assert 0.89 <= hits / 300 <= 0.98


def test_one_prompt_has_no_interval() -> None:
    for interval in (
        bootstrap_interval([2.0]),
        bootstrap_interval([1.0, 3.0], ["a", "a"]),
        bootstrap_interval([1.0, 2.0, 3.0], strata=["x", "x", "y"]),
    ):
        assert math.isfinite(interval.mean)
        assert all(math.isnan(x) for x in (interval.stderr, interval.low, interval.high))


def test_paired_interval_is_that_of_the_differences() -> None:
    a = RNG.normal(size=50)
    b = a + 0.1 + 0.01 * RNG.normal(size=50)
    paired = paired_interval(a, b, bootstrap=FEW)
    assert paired.mean == pytest.approx((a - b).mean())
    assert paired.high < 0 < paired.stderr < 0.01


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"values": []}, "non-empty"),
        ({"values": [1.0, math.inf]}, "finite"),
        ({"values": [1.0, 2.0], "groups": ["a"]}, "1 groups"),
        ({"values": [1.0, 2.0], "strata": ["a"]}, "1 strata"),
    ],
)
def test_unusable_values_are_errors(arguments: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        bootstrap_interval(**arguments)
    with pytest.raises(ValueError, match="differ in number"):
        paired_interval([1.0], [1.0, 2.0])


# ---- PSNR

PSNR_ERROR = 8 * 100 * 2.0**-52
"""Squares of whole numbers add up exactly; what rounds is a division, two logarithms and sums of at most 100 dB."""


def test_psnr_agrees_with_scikit_image_and_the_formula() -> None:
    for seed in range(5):
        a, b = picture(seed), picture(seed + 100)
        ours = compute_psnr(a, b, 255.0)
        mse = sum((int(x) - int(y)) ** 2 for x, y in zip(a.ravel(), b.ravel(), strict=True)) / a.size
        assert ours == pytest.approx(20 * math.log10(255) - 10 * math.log10(mse), abs=PSNR_ERROR)
        metrics = pytest.importorskip("skimage.metrics")
        assert ours == pytest.approx(metrics.peak_signal_noise_ratio(b, a, data_range=255), abs=PSNR_ERROR)
    assert compute_psnr(a, b, 1.0) == pytest.approx(ours - 20 * math.log10(255), abs=PSNR_ERROR)


def test_psnr_of_one_step_and_of_identical_images() -> None:
    a = np.zeros((4, 4, 3), np.uint8)
    assert compute_psnr(a, a + np.uint8(1), 255.0) == pytest.approx(48.1308, abs=1e-4)
    assert compute_psnr(a, a.copy(), 255.0) == math.inf


def test_psnr_summary_is_the_mean_over_finite_values() -> None:
    scores = [Score(f"p{i}", 0, v) for i, v in enumerate([20.0, 30.0, math.inf, 25.0])]
    headline, median = PSNR().summarise(scores, bootstrap=FEW)
    assert headline.value == 25 and headline.n == 4 and headline.low < 25 < headline.high
    assert headline.extra == {"identical": 1, "finite": 3}
    assert (median.variant, median.value) == ("median", 27.5)


def test_psnr_of_a_run_identical_to_full_is_infinite_and_says_so() -> None:
    headline, median = PSNR().summarise([Score("a", 0, math.inf), Score("b", 0, math.inf)])
    assert headline.value == median.value == math.inf
    assert math.isnan(headline.stderr) and headline.extra["identical"] == 2
    with pytest.raises(ValueError, match="no scores"):
        PSNR().summarise([])


def test_psnr_compares_two_runs_image_by_image() -> None:
    run = [Score("a", 0, 20.0), Score("b", 0, math.inf), Score("c", 0, 31.0), Score("d", 0, 1.0), Score("a", 1, 5.0)]
    base = [Score("c", 0, 30.0), Score("a", 0, 18.0), Score("b", 0, 10.0), Score("e", 0, 10.0)]
    extra = PSNR().summarise(run, base, FEW)[0].extra
    assert extra["difference"] == 1.5 and extra["difference_n"] == 2
    assert extra["difference_low"] == 1 and extra["difference_high"] == 2
    assert paired_difference(run, [Score("z", 0, 1.0)], Bootstrap(10)) == {}


def test_psnr_names_what_is_missing() -> None:
    image = picture(0)
    with pytest.raises(ArtifactError, match="psnr_layout: prompt p7 has no reference"):
        PSNR("layout", name="psnr_layout").score(Sample("p7", image=image))
    with pytest.raises(ArtifactError, match="no image"):
        PSNR().score(Sample("p7", reference=image))
    with pytest.raises(ArtifactError, match=r"\(16, 16, 3\).*\(8, 8, 3\)"):
        PSNR().score(Sample("p7", image=image, reference=picture(0, 8)))
    score = PSNR().score(Sample("p7", image=image, reference=picture(1), index=2))
    assert (score.prompt_id, score.index) == ("p7", 2) and 5 < score.value < 12


# ---- shapes score


def test_shapes_headline_is_the_unweighted_mean_over_tasks() -> None:
    scores = [Score(f"c{i}", 0, float(i < 9), stratum="counting") for i in range(10)]
    scores += [Score(f"p{i}", 0, float(i < 1), stratum="position") for i in range(2)]
    headline, *tasks = ShapesScore().summarise(scores, bootstrap=FEW)
    assert headline.value == pytest.approx((0.9 + 0.5) / 2) and headline.n == 12
    assert headline.extra == {"tasks": 2}
    assert [(v.variant, v.value, v.n) for v in tasks] == [("counting", 0.9, 10), ("position", 0.5, 2)]
    assert tasks[0].stderr == pytest.approx(math.sqrt(0.9 * 0.1 / 10), rel=0.05)


def test_shapes_difference_to_the_full_run_is_stratified() -> None:
    keys = [(f"c{i}", "counting") for i in range(8)] + [(f"p{i}", "position") for i in range(2)]
    base = [Score(key, 0, 1.0, stratum=task) for key, task in keys]
    run = [Score(key, 0, float(task == "counting"), stratum=task) for key, task in keys]
    headline, counting, position = ShapesScore().summarise(run, base, FEW)
    assert headline.extra["difference"] == -0.5
    assert (counting.extra["difference"], position.extra["difference"]) == (0.0, -1.0)


def test_shapes_needs_geneval_metadata_and_an_image() -> None:
    with pytest.raises(ConfigError, match="prompt q1 has no 'tag'") as caught:
        ShapesScore().score(Sample("q1", "a cat", {}, image=picture(0)))
    assert "benchmark=shapes" in caught.value.hint
    meta = {"tag": "single_object", "include": [{"class": "circle", "count": 1}]}
    with pytest.raises(ArtifactError, match="no image"):
        ShapesScore().score(Sample("q1", meta=meta))


# ---- interface


class Total:
    """Additive statistics in five lines."""

    def __init__(self) -> None:
        self.total, self.n = 0.0, 0

    def add(self, index: list[int], features: np.ndarray) -> None:
        self.total, self.n = self.total + float(features.sum()), self.n + len(index)

    def merge(self, other: Total) -> None:
        self.total, self.n = self.total + other.total, self.n + other.n


class MeanBrightness(SetMetric):
    """A set metric in a dozen lines: the interface is enough for one."""

    SPEC = Spec("brightness", "1", "", True, "set")

    @property
    def extractor(self) -> MeanBrightness:
        return self

    def __call__(self, images: list[np.ndarray]) -> np.ndarray:
        return np.array([[image.mean()] for image in images], np.float32)

    def statistics(self) -> Total:
        return Total()

    def compute(self, images: Total, reference: None = None) -> list[Value]:
        return [Value("", images.total / images.n, math.nan, math.nan, math.nan, images.n)]


def test_metrics_are_told_apart_by_their_interface() -> None:
    for metric in (PSNR(), PSNR("layout", name="psnr_layout"), ShapesScore()):
        assert isinstance(metric, ImageMetric) and not isinstance(metric, SetMetric)
    assert isinstance(MeanBrightness(), SetMetric) and not isinstance(MeanBrightness(), ImageMetric)
    assert (PSNR().spec.kind, ShapesScore().spec.kind) == ("paired", "prompt")


def test_set_metric_shards_merge_to_the_whole() -> None:
    metric, pictures = MeanBrightness(), [picture(i) for i in range(6)]
    whole, first, second = metric.statistics(), metric.statistics(), metric.statistics()
    whole.add(list(range(6)), metric(pictures))
    first.add([0, 1], metric(pictures[:2]))
    second.add([2, 3, 4, 5], metric(pictures[2:]))
    first.merge(second)
    assert metric.compute(first)[0].value == pytest.approx(metric.compute(whole)[0].value)
    assert metric.compute(whole)[0].value == pytest.approx(np.mean(pictures), rel=1e-6)
