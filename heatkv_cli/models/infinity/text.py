"""Text encoders: prompts -> one (L_i, Ct) tensor of features a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heatkv_cli.errors import ConfigError, did_you_mean


class WordEncoder(nn.Module):
    """The bundled model's text encoder: a word a token, a small bidirectional transformer.

    Takes the place of Flan-T5-XL; what it returns enters Infinity the same way.

    Args:
        words: vocabulary; index 0 is padding, index 1 the empty prompt.
        max_words: longest prompt.
        channels, layers, heads: of the transformer.
    """

    def __init__(self, words: Sequence[str], max_words: int, channels: int, layers: int, heads: int = 4):
        super().__init__()
        self.words, self.max_words = tuple(words), max_words
        self.ids = {word: i for i, word in enumerate(self.words)}
        self.embed = nn.Embedding(len(self.words), channels)
        self.position = nn.Parameter(torch.randn(max_words, channels) * 0.3)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(channels, heads, 2 * channels, 0.0, F.gelu, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(channels)

    def forward(self, ids: Tensor) -> Tensor:
        """Word ids (B, M), 0 = padding -> features (B, M, Ct)."""
        padding = ids == 0
        x = self.embed(ids) + self.position[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=padding)
        return self.norm(x)

    def ids_of(self, prompt: str) -> list[int]:
        """Word ids of a prompt.

        Raises:
            ConfigError: a word is not in the vocabulary, or there are too many.
        """
        words = prompt.lower().replace(",", " ").replace(".", " ").split()
        for word in words:
            if word not in self.ids:
                raise ConfigError(
                    f"prompt {prompt!r}: the bundled model does not know the word {word!r}",
                    did_you_mean(word, self.words[2:])
                    or f"its {len(self.words) - 2} words: {' '.join(self.words[2:])}",
                )
        if len(words) > self.max_words:
            raise ConfigError(
                f"prompt {prompt!r} has {len(words)} words, the bundled model reads {self.max_words}",
                "shorten the prompt",
            )
        return [self.ids[word] for word in words] or [1]

    def prepare(self, prompts: Sequence[str], root: Path) -> None:
        """Check that it knows the words of all prompts; it is small enough to run whenever it is asked.

        Raises:
            ConfigError: as `ids_of`.
        """
        for prompt in prompts:
            self.ids_of(prompt)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """Features of each prompt, one prompt at a time: they must not depend on their neighbours' padding."""
        device = self.position.device
        return [self(torch.tensor([self.ids_of(p)], device=device))[0] for p in prompts]
