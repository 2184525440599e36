"""Every key and shape of the official checkpoints, from `VarConfig` and `TokenizerConfig` alone.

The official classes on meta tensors made the table; networks are built on meta tensors here too.
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

from heatkv_cli.config import compose
from heatkv_cli.models.var.checkpoint import HITS, LEVELS, MASK, identify
from heatkv_cli.models.var.tokenizer import Tokenizer, TokenizerConfig, phi_table
from heatkv_cli.models.var.transformer import Var, VarConfig
from heatkv_cli.planning.job import geometry_of, sketch_of

pytestmark = pytest.mark.golden

ROOT = Path(__file__).parents[2]
DATA = Path(__file__).parent / "data" / "var_official_keys.json.gz"
SHARED = Path(os.environ.get("HEATKV_SHARED", ROOT / ".." / "shared")) / "golden" / "var_hart_official_keys.json"
TABLE: dict[str, dict[str, list[int]]] = json.loads(gzip.decompress(DATA.read_bytes()))

SMALL = tuple((p, p) for p in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
LARGE = tuple((p, p) for p in (1, 2, 3, 4, 6, 9, 13, 18, 24, 32))
TRANSFORMERS = {
    **{f"var_d{d}": VarConfig(d, 64 * d, d, SMALL) for d in (16, 20, 24, 30)},
    "var_d36": VarConfig(36, 64 * 36, 36, LARGE, shared=True),
}
PARAMETERS = {
    "var_d16": 310_283_520,
    "var_d20": 600_917_136,
    "var_d24": 1_033_399_360,
    "var_d30": 2_010_020_356,
    "var_d36": 2_353_893_904,
}


def shapes(net: nn.Module) -> dict[str, list[int]]:
    return {name: list(t.shape) for name, t in net.state_dict().items()}


def on_meta(make: Any, config: Any) -> nn.Module:
    with torch.device("meta"):
        net: nn.Module = make(config)
    return net


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_the_keys_of_a_transformer(name: str) -> None:
    """All but two buffers that hold no weights: the scale of each token, and the mask of training."""
    config = TRANSFORMERS[name]
    net = on_meta(Var, config)
    buffers = {LEVELS: [1, config.tokens], MASK: [1, 1, config.tokens, config.tokens]}
    assert shapes(net) | buffers == TABLE[name]
    assert sum(p.numel() for p in net.parameters()) == PARAMETERS[name]
    assert config.head_dim == 64


def test_the_keys_of_the_tokenizer() -> None:
    """All but the usage of the codebook, a statistic of training."""
    net = on_meta(Tokenizer, TokenizerConfig())
    assert shapes(net) | {HITS: [10, 4096]} == TABLE["vae_ch160v4096z32"]
    assert isinstance(net, Tokenizer)
    counts = [sum(p.numel() for p in part.parameters()) for part in (net.encoder, net.decoder, net)]
    assert counts == [44_107_872, 64_653_923, 108_948_355]
    assert net.config.stride == 16


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_the_yaml_of_a_model_makes_its_official_file(name: str) -> None:
    model = compose([f"model={'var-d36-s' if name == 'var_d36' else name.replace('_', '-')}"]).first.model
    networks = sketch_of(model, geometry_of(model)).networks
    files = {file.role: file for file in model.weights.files}
    for role, stem in (("transformer", name), ("tokenizer", "vae_ch160v4096z32")):
        wanted = {key: shape for key, shape in TABLE[stem].items() if key not in (LEVELS, MASK, HITS)}
        assert shapes(networks[role]) == wanted
        assert files[role].name == f"{stem}.pth" and files[role].hub == f"FoundationVision/var/{stem}.pth"
        size = 4 * sum(math.prod(shape) for shape in TABLE[stem].values())  # bar the scale of each token, 8 bytes each
        assert files[role].bytes == pytest.approx(size, rel=2e-3)


@pytest.mark.parametrize("name", TABLE)
def test_an_official_file_is_recognised_by_its_shapes(name: str) -> None:
    found = identify({key: tuple(shape) for key, shape in TABLE[name].items()})
    names = {"var_d36": "var-d36-s", "vae_ch160v4096z32": "vae_ch160v4096z32"}
    assert found is not None and found.name == names.get(name, name.replace("_", "-"))


@pytest.mark.parametrize(
    ("scales", "table"),
    [
        (10, (0, 0, 1, 1, 1, 2, 2, 3, 3, 3)),
        (14, (0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3)),
        (8, (0, 0, 1, 1, 2, 2, 3, 3)),
        (5, (0, 1, 2, 2, 3)),
    ],
)
def test_which_phi_a_scale_uses(scales: int, table: tuple[int, ...]) -> None:
    """Upstream's tables; with ten scales the third is a tie that rounding decides."""
    assert phi_table(scales) == table


@pytest.mark.skipif(not SHARED.is_file(), reason=f"needs {SHARED}: set HEATKV_SHARED")
def test_the_committed_table_is_the_golden_one() -> None:
    golden = json.loads(SHARED.read_text(encoding="utf-8"))
    assert {name: keys for name, keys in golden.items() if name.startswith(("var_", "vae_"))} == TABLE
