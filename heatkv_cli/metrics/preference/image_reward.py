"""ImageReward: a reward model of human preference, for a picture and its prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from heatkv_cli.errors import ArtifactError, ConfigError, SetupError, did_you_mean
from heatkv_cli.metrics.base import Sample, Score, Spec
from heatkv_cli.metrics.clip.input import cropped
from heatkv_cli.metrics.networks import loaded, ready
from heatkv_cli.metrics.parameters import aside, parameter
from heatkv_cli.metrics.pictures import read_image
from heatkv_cli.metrics.preference.blip import RewardNet, Sizes
from heatkv_cli.metrics.preference.judge import Judge, Scorer
from heatkv_cli.metrics.scores import Pixels
from heatkv_cli.metrics.weights import Lack, NetworkFile, Wanted, find_weights, load_exactly, package, read_state

MAX_TOKENS = 35
_REPOSITORY, _COMMIT = "zai-org/ImageReward", "5736be03b2652728fb87788c9797b0570450ab72"
_SOURCE = f"https://huggingface.co/{_REPOSITORY}"
CHECKPOINT = NetworkFile(
    "ImageReward.pt", _SOURCE, _REPOSITORY, "ImageReward.pt", "Apache-2.0", _COMMIT, bytes=1_790_000_000
)
"""No digest of it is published; its size is rounded to three digits."""
MED_CONFIG = NetworkFile("med_config.json", _SOURCE, _REPOSITORY, "med_config.json", "Apache-2.0", _COMMIT)
VOCABULARY = NetworkFile(
    "bert-base-uncased-vocab.txt",
    "https://huggingface.co/google-bert/bert-base-uncased (vocab.txt)",
    "google-bert/bert-base-uncased",
    "vocab.txt",
    "Apache-2.0",
    "86b5e0934494bd15c9632b12f734a8a67f723594",
    ("07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",),
    231_508,
)
GOLDEN_PROMPT = "a painting of an ocean with clouds and birds, day time, low depth field effect"
GOLDEN = (0.58, 0.27, -1.41, -2.03)
"""Rewards of ``EXAMPLES`` for ``GOLDEN_PROMPT``, as the ImageReward repository prints them."""
EXAMPLES = tuple(
    NetworkFile(f"image-reward-{i}.webp", f"https://github.com/zai-org/ImageReward (assets/images/{i}.webp)")
    for i in range(1, 5)
)
UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")
"""Keys of the checkpoint that no reward depends on: projections of BLIP's pre-training, and 0, 1, 2, ..."""


def tokenizer_of(vocabulary: Path) -> Any:
    """Return BERT's tokenizer, lower case, cut and padded to 35 tokens.

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
        device: device of the network.
        sizes: sizes of the network.

    Raises:
        SetupError: the package tokenizers or the device is missing.
        ArtifactError: a file is not the network's.
    """

    def __init__(self, path: Path, vocabulary: Path, device: str, sizes: Sizes) -> None:
        self.versions: Mapping[str, str] = {}
        self._tokenizer = tokenizer_of(vocabulary)
        with torch.device("meta"):
            net = RewardNet(sizes)
        net.to_empty(device="cpu")
        load_exactly(net, {key: value for key, value in read_state(path).items() if not key.startswith(UNUSED)}, path)
        if (size := self._tokenizer.get_vocab_size()) != sizes.vocabulary:
            raise ArtifactError(
                f"{vocabulary} has {size} tokens, the network {sizes.vocabulary}", "use that of bert-base-uncased"
            )
        self._net, self._size, self._device = ready(net.float(), device), sizes.image, device

    @torch.inference_mode()
    def __call__(self, images: Sequence[Pixels], prompts: Sequence[str]) -> list[float]:
        """Return the rewards of pictures with their prompts."""
        encoded = self._tokenizer.encode_batch(list(prompts))
        tokens = torch.tensor([e.ids for e in encoded], device=self._device)
        mask = torch.tensor([e.attention_mask for e in encoded], device=self._device, dtype=torch.bool)
        pixels = torch.stack([cropped(image, self._size) for image in images]).to(self._device)
        return [float(reward) for reward in self._net(pixels, tokens, mask).cpu()]


@dataclass(frozen=True)
class ImageReward(Judge):
    """Standardised reward (about -2 to 2) of picture and prompt, mean over all pictures.

    Args:
        vocabulary: path of bert-base-uncased's, looked for like weights; where it is nowhere, the official back end
            lets its package fetch it from the hub, at a fixed commit.
        med_config: the checkpoint's ``med_config.json``, for the official back end.
        sizes: sizes of a network that is not the released one (fields of ``blip.Sizes``); for the native back end.

    Source: Xu et al., arXiv 2304.05977; package image-reward 1.5 (``ImageReward.score``).

    Raises:
        ConfigError: ``sizes`` are of no network.
    """

    SPEC: ClassVar[Spec] = Spec("image_reward", "1", "standardised reward", higher_is_better=True, kind="prompt")
    PACKAGE: ClassVar[str] = "image-reward"

    vocabulary: str | None = aside(None)
    med_config: str | None = aside(None)
    sizes: Mapping[str, int] | None = parameter(None)

    def __post_init__(self) -> None:
        """Check all parameters."""
        super().__post_init__()
        names = [each.name for each in dataclasses.fields(Sizes)]
        for key, value in (self.sizes or {}).items():
            if key not in names:
                raise ConfigError(f"metric.{self.spec.name}.sizes has no key '{key}'", did_you_mean(key, names))
            if type(value) is not int or value < 1:
                raise ConfigError(
                    f"metric.{self.spec.name}.sizes.{key} is {value!r}", "it must be a whole number of at least 1"
                )
        if self.is_official and self.sizes:
            raise ConfigError(
                f"metric.{self.spec.name}.sizes does nothing with backend=official", "the package knows its own sizes"
            )
        if wrong := self._sizes.wrong():
            raise ConfigError(f"metric.{self.spec.name}.sizes: {wrong}", "correct the sizes, or leave them away")

    @property
    def _sizes(self) -> Sizes:
        return Sizes(**(self.sizes or {}))

    @property
    def checkpoint(self) -> NetworkFile:
        """The released checkpoint."""
        return CHECKPOINT

    @property
    def network(self) -> str:
        """ImageReward."""
        return "image-reward"

    def network_bytes(self) -> int:
        """Return the bytes of the network's weights."""
        with torch.device("meta"):
            return sum(4 * weight.numel() for weight in RewardNet(self._sizes).parameters())

    def packages(self) -> tuple[tuple[str, str], ...]:
        """Return tokenizers; the official back end has packages of its own."""
        return () if self.is_official else (("tokenizers", "image-reward"),)

    def lacks(self) -> list[Lack]:
        """Return also vocabulary or configuration where the back end needs it and it is missing."""
        lack = (self._med_config if self.is_official else self._vocabulary).lack()
        return [*super().lacks(), *([lack] if lack else [])]

    def identity(self) -> dict[str, Any]:
        """Return also the digests of vocabulary and configuration, as far as the back end reads them."""
        if not self.is_official:
            return {**super().identity(), "vocabulary": self._vocabulary.digest}
        found = self._vocabulary_if_any()
        own = {"vocabulary": None if found is None else self._vocabulary.digest}
        return {**super().identity(), **own, "med_config": self._med_config.digest}

    @property
    def _vocabulary(self) -> Wanted:
        return Wanted(VOCABULARY, self.vocabulary, self.weights_folder)

    @property
    def _med_config(self) -> Wanted:
        return Wanted(MED_CONFIG, self.med_config, self.weights_folder)

    def _vocabulary_if_any(self) -> str | None:
        try:
            return str(self._vocabulary.verified().absolute())
        except SetupError:
            if self.vocabulary:
                raise
            return None

    def _native(self) -> Scorer:
        path, vocabulary = self.files()[0].verified(), self._vocabulary.verified()
        key = (self.network, self.digest(), self._vocabulary.digest, self._sizes, self.device)
        return loaded(key, lambda: NativeScorer(path, vocabulary, self.device, self._sizes))

    def _options(self) -> dict[str, Any]:
        return {"med_config": str(self._med_config.path.absolute()), "vocab": self._vocabulary_if_any()}

    def score_batch(self, samples: Sequence[Sample]) -> list[Score]:
        """Return the reward of each picture.

        Raises:
            ArtifactError: a sample has no image, or a file is not what it should be.
            SetupError: weights, a package or the official back end are missing.
        """
        rewards, note = self.numbers(samples)
        return [Score(s.prompt_id, s.index, reward, note=note) for s, reward in zip(samples, rewards, strict=True)]

    def self_check(self) -> str:
        """Score the official example pictures; return '' where they come out as published, else what is wrong.

        Raises:
            SetupError: pictures, weights or packages are missing.
        """
        images = [read_image(find_weights(file, folder=self.weights_folder)) for file in EXAMPLES]
        found = self.scorer()(images, [GOLDEN_PROMPT] * len(images))
        if all(abs(a - b) < 0.02 for a, b in zip(found, GOLDEN, strict=True)):
            return ""
        return f"the example pictures score {[round(x, 2) for x in found]}, published {list(GOLDEN)}"
