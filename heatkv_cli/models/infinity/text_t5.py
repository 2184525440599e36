"""Flan-T5's encoder, through transformers: the text features of the official Infinity models."""

from __future__ import annotations

import gc
import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor

from heatkv_cli.errors import ArtifactError, SetupError
from heatkv_cli.results import load_json

Precision = Literal["float16", "bfloat16", "float32"]

INSTALL = "pip install 'heatkv[t5]'"

PERSONS = (
    "man",
    "woman",
    "men",
    "women",
    "boy",
    "girl",
    "child",
    "person",
    "human",
    "adult",
    "teenager",
    "employee",
    "employer",
    "worker",
    "mother",
    "father",
    "sister",
    "brother",
    "grandmother",
    "grandfather",
    "son",
    "daughter",
)
FACES = ". very smooth faces, good looking faces, face to the camera, perfect facial features"


def positive_text(prompt: str) -> str:
    """The prompt, with a wish for good faces where it speaks of a person.

    A word counts wherever its letters stand in that case: "mango" and "season" are persons, "Man" is none.

    Source: FoundationVision/Infinity @ 4c27bbb, `tools/run_infinity.py` (`aug_with_positive_prompt`): words and
    sentence are data that images depend on.
    """
    return prompt + FACES if any(word in prompt for word in PERSONS) else prompt


class T5Encoder:
    """Prompts -> one (L_i, channels) tensor a prompt, L_i counting the end-of-text token.

    The folder is checked at once; the network is read when the first prompt comes, and freed by `release`.

    Precision changes images, so it is a setting. `float16` is what upstream's notebooks and evaluation scripts run
    (transformers keeps the `wo` matrices in float32 then); `tools/run_infinity.py` wraps T5 in a bfloat16 autocast,
    which `bfloat16` comes near to but does not repeat; `float32` is the most exact. Features differ by 1e-3 to 1e-2.

    Args:
        folder: a Hugging Face folder (config, tokenizer, weights).
        channels: width the transformer reads.
        max_length: tokens after which a prompt is cut.
        dtype: of the weights.
        device: where it runs.
        pad: to `max_length`, as upstream does, and not to the longest prompt of the batch. Padding is masked, so the
            features are the same up to rounding; short prompts are many times faster without.

    Raises:
        SetupError: transformers is not installed, or the folder is not there.
        ArtifactError: the folder is not a T5 of this width.

    Source: FoundationVision/Infinity @ 4c27bbb, `tools/run_infinity.py` (`load_tokenizer`, `encode_prompt`).
    """

    def __init__(
        self,
        folder: Path,
        channels: int = 2048,
        max_length: int = 512,
        dtype: Precision = "float16",
        device: str = "cpu",
        pad: bool = False,
    ):
        self.folder, self.max_length, self.dtype, self.device, self.pad = folder, max_length, dtype, device, pad
        self._loaded: tuple[Any, Any] | None = None
        if importlib.util.find_spec("transformers") is None:
            raise SetupError("the text encoder needs the package transformers, which is not installed", INSTALL)
        if not folder.is_dir():
            raise SetupError(f"text encoder: {folder} is missing", "put the folder of google/flan-t5-xl there")
        try:
            config = load_json((folder / "config.json").read_text(encoding="utf-8"))
            width = config["d_model"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"{folder} has no config.json of a T5: {error}", "fetch google/flan-t5-xl") from error
        if width != channels:
            raise ArtifactError(
                f"{folder} holds a text encoder of width {width}, the transformer reads {channels}",
                "Infinity's is google/flan-t5-xl, of width 2048",
            )

    def load(self) -> None:
        """Read tokenizer and network, if they are not there already.

        Raises:
            SetupError: a package that the tokenizer needs is missing.
            ArtifactError: the folder is damaged or incomplete.
        """
        if self._loaded is not None:
            return
        hub: Any = importlib.import_module("transformers")
        hub.utils.logging.disable_progress_bar()  # it knows nothing of --quiet
        try:
            words = hub.AutoTokenizer.from_pretrained(self.folder, legacy=True, local_files_only=True)
            net, info = hub.T5EncoderModel.from_pretrained(
                self.folder, dtype=getattr(torch, self.dtype), local_files_only=True, output_loading_info=True
            )
        except ImportError as error:
            raise SetupError(f"text encoder: {str(error).strip().splitlines()[0]}", INSTALL) from error
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            if "pip install" in str(error):  # transformers guesses at packages when it cannot read spiece.model
                raise SetupError(
                    f"text encoder: the tokenizer in {self.folder} needs a package: {first}", INSTALL
                ) from error
            raise ArtifactError(f"{self.folder} is damaged or incomplete: {first}", "fetch the folder again") from error
        missing = sorted(info["missing_keys"])
        if missing:  # transformers would fill them with random numbers
            raise ArtifactError(
                f"{self.folder} lacks {len(missing)} tensors of a T5 encoder ({', '.join(missing[:3])})",
                "fetch the folder again",
            )
        words.model_max_length = self.max_length
        self._loaded = words, net.eval().requires_grad_(False).to(self.device)

    def release(self) -> None:
        """Free the network; the next prompt reads it again."""
        self._loaded = None
        gc.collect()  # transformers' modules hold cycles
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> list[Tensor]:
        """Features of each text, all in one batch; on the host, in the dtype that the network gives.

        Raises:
            SetupError, ArtifactError: see `load`.
            ArtifactError: features that are not finite.
        """
        self.load()
        assert self._loaded is not None
        words, net = self._loaded
        padding = "max_length" if self.pad else "longest"
        read = words(list(texts), max_length=self.max_length, padding=padding, truncation=True, return_tensors="pt")
        ids, mask = read["input_ids"].to(self.device), read["attention_mask"].to(self.device)
        hidden = net(input_ids=ids, attention_mask=mask).last_hidden_state.cpu()
        features = [row[:length] for row, length in zip(hidden, mask.sum(1).tolist(), strict=True)]
        for text, rows in zip(texts, features, strict=True):
            if not rows.isfinite().all():
                raise ArtifactError(
                    f"text encoder in {self.dtype}: the features of {text!r} are not finite",
                    "try model.params.t5_dtype=float32; if they still are not, fetch the folder again",
                )
        return features
