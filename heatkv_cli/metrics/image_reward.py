"""ImageReward: a reward model of human preference, for a picture and its prompt.

Two back ends give the same number: ``native`` runs the checkpoint in ``metrics/blip.py``; ``official`` asks the package
image-reward in a Python of its own (``metrics/official.py``), for which see the README.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from heatkv_cli.errors import ArtifactError, ConfigError, SetupError
from heatkv_cli.metrics.base import Image, Kind, Pass, Sample, Score, Value, image_of
from heatkv_cli.metrics.blip import RewardNet, Sizes
from heatkv_cli.metrics.clip_input import cropped, read_picture
from heatkv_cli.metrics.hps import Scorer, versions_of
from heatkv_cli.metrics.official import OfficialScorer
from heatkv_cli.metrics.summary import Bootstrap, mean_value
from heatkv_cli.metrics.weights import WeightsFile, find_weights, load_exactly, package, read_checkpoint, weights_sha256

MAX_TOKENS = 35
CHECKPOINT = WeightsFile(
    "ImageReward.pt", "huggingface.co/zai-org/ImageReward", "zai-org/ImageReward", "ImageReward.pt", "Apache-2.0"
)
MED_CONFIG = WeightsFile(
    "med_config.json", "huggingface.co/zai-org/ImageReward", "zai-org/ImageReward", "med_config.json", "Apache-2.0"
)
VOCABULARY = WeightsFile(
    "bert-base-uncased-vocab.txt",
    "huggingface.co/google-bert/bert-base-uncased (vocab.txt)",
    "google-bert/bert-base-uncased",
    "vocab.txt",
    "Apache-2.0",
)
GOLDEN_PROMPT = "a painting of an ocean with clouds and birds, day time, low depth field effect"
GOLDEN = (0.58, 0.27, -1.41, -2.03)
"""Rewards of ``EXAMPLES`` for ``GOLDEN_PROMPT``, as the ImageReward repository prints them."""
EXAMPLES = tuple(
    WeightsFile(f"image-reward-{i}.webp", f"github.com/zai-org/ImageReward (assets/images/{i}.webp)")
    for i in range(1, 5)
)
UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")
"""Keys of the checkpoint that no reward depends on: projections of BLIP's pre-training, and 0, 1, 2, ..."""


def tokenizer_of(vocabulary: Path) -> Any:
    """BERT's tokenizer, lower case, cut and padded to 35 tokens.

    Raises:
        SetupError: the package tokenizers is not installed.
        ArtifactError: the file is no BERT vocabulary.
    """
    tokenizer = package("tokenizers", "image-reward").BertWordPieceTokenizer(str(vocabulary), lowercase=True)
    pad = tokenizer.token_to_id("[PAD]")
    if pad is None or tokenizer.token_to_id("[CLS]") is None:
        raise ArtifactError(f"{vocabulary} is no BERT vocabulary: it has no [PAD] or [CLS]", "fetch it again")
    # The official tokenizer is given these two; they get the next numbers and never stand in a prompt.
    tokenizer.add_special_tokens(["[DEC]", "[ENC]"])
    tokenizer.enable_truncation(MAX_TOKENS)
    tokenizer.enable_padding(length=MAX_TOKENS, pad_id=pad)
    return tokenizer


class NativeScorer:
    """ImageReward's checkpoint in our own network.

    Args:
        path: the official checkpoint, a state dict; every key is used or known to be without effect.
        vocabulary: BERT's, uncased.
        device: of the network.
        sizes: of the network.

    Raises:
        SetupError, ArtifactError: as ``tokenizer_of`` and ``load_exactly``.
    """

    def __init__(self, path: Path, vocabulary: Path, device: str, sizes: Sizes) -> None:
        self._tokenizer = tokenizer_of(vocabulary)
        with torch.device("meta"):
            net = RewardNet(sizes)
        net.to_empty(device="cpu")
        state = {key: value for key, value in read_checkpoint(path).items() if not key.startswith(UNUSED)}
        load_exactly(net, state, path)
        if (size := self._tokenizer.get_vocab_size()) != sizes.vocabulary:
            raise ArtifactError(
                f"{vocabulary} has {size} tokens, the network {sizes.vocabulary}", "use that of bert-base-uncased"
            )
        self._net, self._size, self._device = net.float().to(device).eval(), sizes.image, device

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image], prompts: Sequence[str]) -> list[float]:
        """Rewards of pictures with their prompts."""
        encoded = self._tokenizer.encode_batch(list(prompts))
        tokens = torch.tensor([e.ids for e in encoded], device=self._device)
        mask = torch.tensor([e.attention_mask for e in encoded], device=self._device, dtype=torch.bool)
        pixels = torch.stack([cropped(image, self._size) for image in images]).to(self._device)
        return [float(reward) for reward in self._net(pixels, tokens, mask).cpu()]


@dataclass(frozen=True)
class ImageReward:
    """Standardised reward (about -2 to 2) of picture and prompt, mean over all pictures.

    Args:
        backend: ``native`` or ``official``.
        weights: checkpoint; None looks as ``metrics/weights.py`` says.
        vocabulary: of bert-base-uncased, looked for likewise; the official back end lets its package fetch it from the
            hub where it is nowhere else.
        med_config: the checkpoint's ``med_config.json``, for the official back end.
        python: the Python that has image-reward, for the official back end.
        timeout: seconds the official back end may take to start, and for each picture.
        batch_size: pictures per pass through the network.
        device: where the network runs.
        weights_folder: the first of the places where files are looked for.
        sizes: of the network, where it is not the released one (fields of ``blip.Sizes``).
        resamples, confidence, seed: of the bootstrap over prompts.

    Source: Xu et al., arXiv 2304.05977; package image-reward 1.5 (``ImageReward.score``).
    """

    backend: Literal["native", "official"] = "native"
    weights: str | None = None
    vocabulary: str | None = None
    med_config: str | None = None
    python: str | None = None
    timeout: float = 600.0
    batch_size: int = 16
    device: str = "cpu"
    weights_folder: Path | None = None
    sizes: Mapping[str, int] | None = None
    resamples: int = 10_000
    confidence: float = 0.95
    seed: int = 0
    name: ClassVar[str] = "image_reward"
    version: ClassVar[str] = "1"
    unit: ClassVar[str] = "standardised reward"
    higher_is_better: ClassVar[bool] = True
    kind: ClassVar[Kind] = "prompt"
    needs: ClassVar[Pass] = "free"

    @property
    def settings(self) -> str:
        """What else decides the number, for result rows."""
        return self.backend

    @cached_property
    def checkpoint(self) -> Path:
        """The weights file.

        Raises:
            SetupError: it is missing.
        """
        return find_weights(CHECKPOINT, self.weights, self.weights_folder)

    @property
    def weights_sha256(self) -> str:
        """Digest of the weights file; raises as ``checkpoint``."""
        return weights_sha256(self.checkpoint)

    @cached_property
    def _scorer(self) -> Scorer:
        if self.backend == "native":
            vocabulary = find_weights(VOCABULARY, self.vocabulary, self.weights_folder)
            return NativeScorer(self.checkpoint, vocabulary, self.device, Sizes(**(self.sizes or {})))
        if self.python is None:
            raise ConfigError(
                "metric image_reward: backend=official needs the Python that has image-reward",
                "set metric.image_reward.python=/path/to/venv/bin/python",
            )
        options = {
            "checkpoint": str(self.checkpoint.absolute()),
            "med_config": str(find_weights(MED_CONFIG, self.med_config, self.weights_folder).absolute()),
            "vocab": self._vocabulary_if_any(),
            "device": self.device,
        }
        return OfficialScorer("image-reward", self.python, options, self.timeout)

    def _vocabulary_if_any(self) -> str | None:
        try:
            return str(find_weights(VOCABULARY, self.vocabulary, self.weights_folder).absolute())
        except SetupError:
            if self.vocabulary:
                raise
            return None

    def score(self, sample: Sample) -> Score:
        """Reward of one picture; raises as ``score_batch``."""
        return self.score_batch([sample])[0]

    def score_batch(self, samples: Sequence[Sample]) -> list[Score]:
        """Reward of each picture.

        Raises:
            ArtifactError: a sample has no image, or a file is not what it should be.
            SetupError: weights, a package or the official back end are missing.
        """
        images = [image_of(self.name, sample) for sample in samples]
        rewards = self._scorer(images, [sample.prompt for sample in samples])
        note = versions_of(self._scorer)
        return [Score(s.prompt_id, s.index, reward, note=note) for s, reward in zip(samples, rewards, strict=True)]

    def summarise(self, scores: Sequence[Score], baseline: Sequence[Score] | None = None) -> list[Value]:
        """Mean over all pictures.

        Raises:
            ValueError: no scores.
        """
        bootstrap = Bootstrap(self.resamples, self.confidence, self.seed)
        return [mean_value("", scores, baseline, bootstrap)]

    def self_check(self) -> str:
        """Score the official example pictures; returns '' where they come out as published, else what is wrong.

        Raises:
            SetupError: pictures, weights or packages are missing.
        """
        images = [read_picture(find_weights(file, folder=self.weights_folder)) for file in EXAMPLES]
        found = self._scorer(images, [GOLDEN_PROMPT] * len(images))
        if all(abs(a - b) < 0.02 for a, b in zip(found, GOLDEN, strict=True)):
            return ""
        return f"the example pictures score {[round(x, 2) for x in found]}, published {list(GOLDEN)}"
