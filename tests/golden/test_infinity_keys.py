"""Every key and shape of the official checkpoints, from `InfinityConfig` and `TokenizerConfig` alone.

The official classes on meta tensors made the table; networks are built on meta tensors here too: the 8B costs nothing.
"""

from __future__ import annotations

import gzip
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from heatkv_cli.config.groups import read_yaml
from heatkv_cli.models.infinity.schedules import STRIDE
from heatkv_cli.models.infinity.tokenizer import Codes, Tokenizer, TokenizerConfig
from heatkv_cli.models.infinity.transformer import Infinity, InfinityConfig

pytestmark = pytest.mark.golden

ROOT = Path(__file__).parents[2]
DATA = Path(__file__).parent / "data" / "infinity_official_keys.json.gz"
SHARED = Path(os.environ.get("HEATKV_SHARED", ROOT / ".." / "shared")) / "golden" / "infinity_official_keys.json"
TABLE: dict[str, dict[str, list[int]]] = json.loads(gzip.decompress(DATA.read_bytes()))

TRANSFORMERS = {
    "infinity_2b": InfinityConfig(32, 2048, 16, 8, Codes(32)),
    "infinity_8b": InfinityConfig(40, 3584, 28, 8, Codes(14, 2)),
    "infinity_layer12": InfinityConfig(12, 768, 8, 4, Codes(32)),
}
TOKENIZERS = {
    "vae_d32_s16": TokenizerConfig(32, 128, (1, 2, 4, 4, 4)),
    "vae_d14_s8_patchify": TokenizerConfig(14, 128, (1, 2, 4, 4)),
}


def shapes(net: nn.Module) -> dict[str, list[int]]:
    return {name: list(t.shape) for name, t in net.state_dict().items()}


def on_meta(make: Any, config: Any) -> nn.Module:
    with torch.device("meta"):
        net: nn.Module = make(config)
    return net


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_the_keys_of_a_transformer(name: str) -> None:
    assert shapes(on_meta(Infinity, TRANSFORMERS[name])) == TABLE[name]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_keys_of_a_tokenizer(name: str) -> None:
    """All but the masks of integer labels, which bit models do not have."""
    wanted = {key: shape for key, shape in TABLE[name].items() if not key.endswith("lfq.mask")}
    assert len(TABLE[name]) - len(wanted) == 2
    assert shapes(on_meta(Tokenizer, TOKENIZERS[name])) == wanted


# depth, width, heads, FFN width, chunks, pool heads, parameters in millions at 32 token bits (docs/infinity.md)
SIZES = {
    "layer12": (12, 768, 8, 3072, 4, 16, 125.2),
    "layer16": (16, 1152, 12, 4608, 4, 16, 361.6),
    "layer24": (24, 1536, 16, 6144, 4, 16, 940.9),
    "layer32": (32, 2080, 20, 8192, 4, 16, 2257),
    "layer40": (40, 2688, 24, 10752, 4, 16, 4716),
    "layer48": (48, 3360, 28, 13312, 4, 16, 8767),
    "2b": (32, 2048, 16, 8192, 8, 16, 2204.564032),
    "20b": (58, 4608, 36, 18432, 2, 32, 19950),
}


@pytest.mark.parametrize("name", SIZES)
def test_the_size_of_every_released_shape(name: str) -> None:
    """The FFN width of layer32 and layer48 is a tie that Python rounds to even: 32.5 -> 32 and 52.5 -> 52 times 256."""
    depth, width, heads, hidden, chunks, pool_heads, millions = SIZES[name]
    config = InfinityConfig(depth, width, heads, chunks, Codes(14, 2) if name == "20b" else Codes(32))
    assert (config.hidden, config.pool_heads) == (hidden, pool_heads)
    net = on_meta(Infinity, config)
    count = sum(p.numel() for p in net.parameters()) / 1e6
    assert count == pytest.approx(millions, rel=5e-4)


def test_the_exact_parameters_of_the_released_models() -> None:
    counts = {name: sum(p.numel() for p in on_meta(Infinity, c).parameters()) for name, c in TRANSFORMERS.items()}
    assert (counts["infinity_2b"], counts["infinity_8b"]) == (2_204_564_032, 8_375_791_824)
    wanted = {"vae_d32_s16": [45_025_696, 65_092_355], "vae_d14_s8_patchify": [33_139_598, 48_484_611]}
    for name, config in TOKENIZERS.items():
        net = on_meta(Tokenizer, config)
        assert [sum(p.numel() for p in part.parameters()) for part in (net.encoder, net.decoder)] == wanted[name]


@pytest.mark.parametrize("name", ["infinity-2b", "infinity-8b", "infinity-8b-512"])
def test_the_yaml_of_a_released_model_gives_its_shapes(name: str) -> None:
    conf = read_yaml("model", name)
    params = conf["params"]
    pixels = {key: value for key, value in params["tokenizer"].items() if key != "patch"}
    codes = Codes(pixels["bits"], params["tokenizer"]["patch"])
    config = InfinityConfig(
        conf["num_layers"],
        params["width"],
        conf["num_heads"],
        params["block_chunks"],
        codes,
        params["text_channels"],
        params["text_length"],
    )
    assert config == TRANSFORMERS[name.replace("-", "_").removesuffix("_512")]
    assert config.head_dim == conf["head_dim"]
    tokenizer = TokenizerConfig(**{**pixels, "multipliers": tuple(pixels["multipliers"])})
    assert tokenizer in TOKENIZERS.values()
    assert tokenizer.stride * codes.patch == STRIDE


@pytest.mark.skipif(not SHARED.is_file(), reason=f"needs {SHARED}: set HEATKV_SHARED")
def test_the_committed_table_is_the_golden_one() -> None:
    golden = json.loads(SHARED.read_text(encoding="utf-8"))
    assert {name: {key: shape for key, (shape, _) in keys.items()} for name, keys in golden.items()} == TABLE
    dtypes = {dtype for keys in golden.values() for key, (_, dtype) in keys.items() if not key.endswith("lfq.mask")}
    assert dtypes == {"float32"}
    assert sum(math.prod(shape) for shape in TABLE["infinity_2b"].values()) > 2_204_564_032  # buffers are listed too
