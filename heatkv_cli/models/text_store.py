"""Text features on disk: what an encoder too large to keep beside the model has computed, read by every later run.

`<root>/<sha256 of the encoder>/<sha256 of text and settings>.safetensors`, one file a prompt. A run whose prompts are
all there needs no encoder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from heatkv_cli.errors import ArtifactError, ConfigError, SetupError
from heatkv_cli.models.weights import sha256_path
from heatkv_cli.results import write_file

LOG = logging.getLogger("heatkv.models")

BATCH = 16  # prompts an encoder reads at once
SHOWN = 3  # prompts that an error quotes


class Encoder(Protocol):
    """A text network: read when the first text comes, freed by `release`."""

    def encode(self, texts: Sequence[str]) -> list[Tensor]:
        """One batch: features (L_i, C) of each text."""
        ...

    def release(self) -> None: ...


@dataclass(frozen=True)
class TextStore:
    """Features of one encoder at one setting.

    Args:
        folder: named by the encoder's sha256.
        settings: what else decides the numbers (precision, longest text), plain values.
    """

    folder: Path
    settings: Mapping[str, str | int]

    def path(self, text: str) -> Path:
        """Where the features of a text are, if they are."""
        key = json.dumps([text, self.folder.name, dict(self.settings)], sort_keys=True)
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"

    def read(self, text: str) -> Tensor | None:
        """Features (L, C) as they were computed; None, and a warning where a file is damaged, if there are none."""
        path = self.path(text)
        try:
            with safe_open(path, "pt") as f:
                features, header = f.get_tensor("features").clone(), f.metadata() or {}
            if header.get("sha256") != _digest(features):
                raise ValueError("other numbers than were written")
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, ValueError) as error:
            LOG.warning("warning: %s is damaged and not used: %s", path, error)
            return None
        return features

    def write(self, text: str, features: Tensor) -> None:
        """Keep the features (L, C) of a text, completely or not at all.

        Raises:
            SetupError: it cannot be written.
        """
        features = features.cpu().contiguous()
        header = {"text": text, "sha256": _digest(features), "settings": json.dumps(dict(self.settings))}
        write_file(self.path(text), save({"features": features}, header))

    def missing(self, texts: Sequence[str]) -> list[str]:
        """Those that cannot be read, each once."""
        return [text for text in dict.fromkeys(texts) if self.read(text) is None]


def _digest(features: Tensor) -> str:
    return hashlib.sha256(features.view(torch.uint8).numpy().tobytes()).hexdigest()


def is_features(path: Path) -> bool:
    """Whether a folder is one of a store: named by a sha256."""
    return path.is_dir() and re.fullmatch("[0-9a-f]{64}", path.name) is not None


def find_features(root: Path) -> Path | None:
    """The features that may stand in for an encoder that is not there: `root` itself, or the one folder below it.

    Raises:
        ConfigError: there are those of several encoders.
    """
    if is_features(root) or not root.is_dir():
        return root if is_features(root) else None
    found = sorted(path for path in root.iterdir() if is_features(path))
    if len(found) > 1:
        raise ConfigError(f"{root} holds the text features of {len(found)} encoders", f"name one: text={found[0]}")
    return found[0] if found else None


def encoder_sha256(path: Path) -> str:
    """Digest of an encoder's files, also where only what it computed is there."""
    return path.name if is_features(path) else sha256_path(path)


class StoredText:
    """Text of a model whose encoder is too large to keep: encoded ahead, then read from disk.

    Args:
        source: files of the encoder, or a folder of features computed with it.
        encoder: the encoder, not yet loaded; None where `source` holds features.
        settings: see `TextStore`.
        rewrite: prompt -> text that is encoded.
    """

    def __init__(
        self,
        source: Path,
        encoder: Encoder | None,
        settings: Mapping[str, str | int],
        rewrite: Callable[[str], str] = str,
    ):
        self.source, self.encoder, self.settings, self.rewrite = source, encoder, settings, rewrite
        self._store: TextStore | None = None

    def prepare(self, prompts: Sequence[str], root: Path) -> None:
        """Have the features of all prompts on disk, and no encoder in memory.

        The encoder is loaded if a prompt is missing, and freed again. A file is written after every batch, so an
        interrupted run goes on where it was.

        Args:
            prompts: of the whole run.
            root: of the store; or one encoder's folder in it.

        Raises:
            SetupError: prompts are missing and the encoder is not there.
            ArtifactError: `root` holds the features of another encoder.
        """
        folder = self.source if is_features(self.source) else self._folder(root)
        store = self._store = TextStore(folder, self.settings)
        self._compute(store, store.missing([self.rewrite(prompt) for prompt in prompts]))

    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """Features (L_i, C) of each prompt: from disk where `prepare` was called, else straight from the encoder.

        Raises:
            SetupError, ArtifactError: as `prepare` or the encoder.
        """
        texts = [self.rewrite(prompt) for prompt in prompts]
        if self._store is None and self.encoder is not None:
            return self.encoder.encode(texts)
        store = self._store or TextStore(self.source, self.settings)
        found = {text: store.read(text) for text in texts}
        absent = [text for text, features in found.items() if features is None]  # not announced, or damaged since
        self._compute(store, absent)
        found |= {text: store.read(text) for text in absent}
        return [features for text in texts if (features := found[text]) is not None]

    def _compute(self, store: TextStore, texts: list[str]) -> None:
        """Encode and write; nothing is loaded where there is nothing to do."""
        if not texts:
            return
        if self.encoder is None:
            quoted = ", ".join(repr(text) for text in texts[:SHOWN]) + (", ..." if len(texts) > SHOWN else "")
            settings = ", ".join(f"{name} {value}" for name, value in self.settings.items())
            raise SetupError(
                f"{store.folder} lacks the text features of {len(texts)} prompts ({quoted}) for {settings}",
                "put the text encoder into the folder of the weights, or name the folder that holds them: text=DIR",
            )
        LOG.info("text: %d prompts to encode, once", len(texts))
        texts = sorted(texts, key=len)  # neighbours of one length need little padding
        try:
            for start in range(0, len(texts), BATCH):
                batch = texts[start : start + BATCH]
                for text, features in zip(batch, self.encoder.encode(batch), strict=True):
                    store.write(text, features)
        finally:
            self.encoder.release()

    def _folder(self, root: Path) -> Path:
        digest = encoder_sha256(self.source)
        if not is_features(root):
            return root / digest
        if root.name != digest:
            raise ArtifactError(
                f"{root} holds the text features of another encoder than {self.source}",
                f"text={root.parent}, or the folder of the encoder that made them",
            )
        return root
