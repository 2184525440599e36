"""A folder like that of Flan-T5-XL, at any size: random network, word tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

WORDS = [
    "<pad>",
    "</s>",
    "<unk>",
    *"a red blue circle square left of right above the two green ring star arrow cross below touching big".split(),
]


def write_t5(path: Path, channels: int = 32, layers: int = 3, ff: int = 64) -> Path:
    """Flan-T5's shape: gated GELU, relative positions, `</s>` appended, padding 0."""
    hub = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    hub.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(path)
    torch.manual_seed(0)
    config = hub.T5Config(
        vocab_size=len(WORDS),
        d_model=channels,
        d_kv=8,
        d_ff=ff,
        num_layers=layers,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.1,
    )
    hub.T5EncoderModel(config).save_pretrained(path)
    return path
