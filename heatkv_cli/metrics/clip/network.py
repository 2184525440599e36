"""CLIP networks through open_clip: built by name, filled with the weights of one file. Nothing is fetched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from heatkv_cli.errors import ArtifactError, ConfigError, HeatKVError, SetupError, did_you_mean
from heatkv_cli.metrics.networks import loaded, ready
from heatkv_cli.metrics.weights import NetworkFile, Wanted, load_exactly, package, read_state

OPENAI_ARCH = "ViT-L-14-quickgelu"
_ARCHIVE = "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"
_TIMM = "9ce2e8a8ebfff3793d7d375ad6d3c35cb9aebf3de7ace0fc7308accab7cd207e"
TIMM = NetworkFile(
    "open_clip_model.safetensors",
    "https://huggingface.co/timm/vit_large_patch14_clip_224.openai",
    "timm/vit_large_patch14_clip_224.openai",
    "open_clip_model.safetensors",
    "MIT",
    "18d0535469bb561bf468d76c1d73aa35156c922b",
    (_TIMM,),
    1_710_000_000,
)
"""OpenAI's ViT-L/14 under open_clip's names; its size is rounded to three digits."""
OPENAI = NetworkFile(
    "ViT-L-14.pt",
    f"https://openaipublic.azureedge.net/clip/models/{_ARCHIVE}/ViT-L-14.pt, or "
    "https://huggingface.co/timm/vit_large_patch14_clip_224.openai (open_clip_model.safetensors)",
    TIMM.repository,
    TIMM.remote,
    "MIT",
    TIMM.revision,
    (_ARCHIVE, _TIMM),
    932_768_134,
)
"""The same weights as OpenAI's archive, or else from the hub."""
PARAMETERS = {"ViT-L-14": 427_616_513, OPENAI_ARCH: 427_616_513, "ViT-H-14": 986_109_441}
"""Numbers in the architectures that metrics use by default."""
_NUMBERS = frozenset({"input_resolution", "context_length", "vocab_size"})
"""Entries of OpenAI's archives that are no weights."""


@dataclass(frozen=True)
class Clip:
    """A CLIP network with what belongs to it.

    Attributes:
        network: open_clip's module.
        preprocess: a Pillow picture to the network's input, as open_clip's evaluation does it.
        tokenizer: texts to (n, context length) tokens, cut where they are too long.
    """

    network: Any
    preprocess: Any
    tokenizer: Any

    @property
    def size(self) -> int:
        """Side of the input."""
        return int(self.network.visual.image_size[0])


def clip_bytes(arch: str, wanted: Wanted) -> int:
    """Return the bytes of a network in float32; of an architecture that is not listed, those of its file.

    Raises:
        SetupError: the file is asked, and is missing.
    """
    return 4 * PARAMETERS[arch] if arch in PARAMETERS else wanted.path.stat().st_size


def load_clip(arch: str, wanted: Wanted, device: str, *, option: str, extra: str, quick_gelu: bool | None) -> Clip:
    """Return a network with its weights, in float32.

    Args:
        arch: open_clip's name of the architecture.
        wanted: the file of weights.
        device: device of the network.
        option: the key that names the architecture, for messages.
        extra: that brings open_clip.
        quick_gelu: the activation with which the weights were trained; None is not checked. OpenAI's weights load into
            a network with the other one without a word, and give other numbers.

    Raises:
        SetupError: open_clip or the weights are missing, or open_clip cannot build the network.
        ConfigError: open_clip does not know the architecture.
        ArtifactError: the weights do not fit, or the activation is the other one.
    """
    path = wanted.verified()

    def load() -> Clip:
        open_clip = package("open_clip", extra)
        _check_arch(open_clip, arch, option)
        state = {key: value for key, value in read_state(path).items() if key not in _NUMBERS}
        network, preprocess, tokenizer = _build(open_clip, arch, option)
        if quick_gelu is not None:
            _check_activation(network, arch, option, quick_gelu, extra)
        load_exactly(network, state, path)
        return Clip(ready(network, device), preprocess, tokenizer)

    return loaded(("clip", arch, wanted.digest, quick_gelu, device), load)


def _check_arch(open_clip: Any, arch: str, option: str) -> None:
    known = open_clip.list_models()
    if arch not in known:  # a name with a colon would be looked for on the hub
        raise ConfigError(f"{option} is {arch!r}, which open_clip does not know", did_you_mean(arch, known))


def _build(open_clip: Any, arch: str, option: str) -> tuple[Any, Any, Any]:
    try:
        network, _, preprocess = open_clip.create_model_and_transforms(arch, pretrained=None, precision="fp32")
        tokenizer = open_clip.get_tokenizer(arch)
    except HeatKVError:
        raise
    except Exception as error:  # some architectures need further packages, or a text tower from the hub
        reason = " ".join(str(error).split())[:300]
        raise SetupError(f"open_clip cannot build {arch}: {reason}", f"choose another {option}") from error
    if not isinstance(tokenizer, open_clip.SimpleTokenizer):
        raise ConfigError(f"{option} is {arch!r}, whose tokenizer is not CLIP's", f"choose another {option}")
    return network, preprocess, tokenizer


def _check_activation(network: Any, arch: str, option: str, wanted: bool, extra: str) -> None:
    quick = package("open_clip.transformer", extra).QuickGELU
    for side, blocks in (("visual", network.visual), ("text", network.transformer)):
        found = any(isinstance(module, quick) for module in blocks.modules())
        if found != wanted:
            wrong = "has no QuickGELU" if wanted else "has QuickGELU instead of GELU"
            name = arch.removesuffix("-quickgelu") + ("-quickgelu" if wanted else "")
            raise ArtifactError(
                f"the {side} tower of {arch} {wrong}, with which its weights were trained", f"set {option}={name}"
            )
