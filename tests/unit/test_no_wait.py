"""The loop over scales never waits for the device: shown with the model and the cache on torch's meta device.

Meta tensors have no numbers, so whatever asks for one (`item`, `tolist`, `bool`, a bool mask as index) fails. What
would be a blocking copy on a GPU and is silent here is caught on the way: copies between host and device that are not
`non_blocking`, tensors made from Python numbers on the device, lists as indices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_method_hack import calibration
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from heatkv_cli.benchmarks.base import items_of
from heatkv_cli.config import choices, compose
from heatkv_cli.core.budget import Budget
from heatkv_cli.core.cache import KVCache
from heatkv_cli.core.scales import Geometry, ScaleSchedule
from heatkv_cli.methods.base import Method, Setting
from heatkv_cli.models.infinity.model import InfinityModel
from heatkv_cli.models.infinity.sampling import Sampling, draw_bits
from heatkv_cli.models.infinity.tokenizer import Codes, Tokenizer, TokenizerConfig
from heatkv_cli.models.infinity.transformer import Infinity, InfinityConfig, Text

GEOMETRY = Geometry("small", 4, 4, 16, ScaleSchedule.squares((1, 2, 3, 4, 5, 6)), 1, 2)
SAMPLING = Sampling((2.0, 1.0, 2.0, 3.0, 2.0, 2.0), (1.0, 1.0, 0.5, 0.7, 1.0, 1.0), 900, 0.97)
META = torch.device("meta")


class WaitError(RuntimeError):
    """Something the host would stand still for."""


class NoHiddenCopies(TorchFunctionMode):
    """Python numbers that become device tensors: each is a blocking copy."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if func in (torch.tensor, torch.as_tensor) and device is not None and torch.device(device) == META:
            raise WaitError(f"{func.__name__} on the device")
        if func in (Tensor.__getitem__, Tensor.__setitem__) and args[0].device == META:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(i, list) or (isinstance(i, Tensor) and i.dtype == torch.bool) for i in index):
                raise WaitError("a list or a mask as index")
        return func(*args, **kwargs)


class NoBlockingCopies(TorchDispatchMode):
    """Copies that wait, and indices that are still on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.copies = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name in ("aten::_to_copy", "aten::copy_"):
            source = args[-1] if name == "aten::_to_copy" else args[1]
            target = kwargs.get("device", source.device) if name == "aten::_to_copy" else args[0].device
            if source.device != torch.device(target):
                self.copies += 1
                blocking = not (kwargs.get("non_blocking") or (name == "aten::copy_" and args[2:3] == (True,)))
                if blocking or source.device == META:
                    raise WaitError(f"{name} from {source.device} to {target}")
        flat = [a for a in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        if name.startswith("aten::index") and len({a.device for a in flat}) > 1:
            raise WaitError(f"{name} with an index on the host")
        return func(*args, **kwargs)


def model(patch: int) -> InfinityModel:
    codes = Codes(4, patch)
    with META:
        net = Infinity(InfinityConfig(4, 64, 4, 2, codes, text_channels=128, text_length=9))
        vae = Tokenizer(TokenizerConfig(4, 16, (1, 1), 8))
    net.block_chunks.to(torch.bfloat16)
    return InfinityModel(GEOMETRY, net.eval().requires_grad_(False), vae, None, (6, 6))


ONLINE = ("cake", "h2o", "hack", "lookm", "meda", "pyramidkv", "scalekv", "snapkv")
"""Methods that look at keys: the host waits for what they choose, to know which slots are free."""


def cases() -> list[Any]:
    """Every method of the package; those that wait today must be told from this list when they no longer do."""
    waits = pytest.mark.xfail(raises=(RuntimeError, NotImplementedError), strict=True)
    found = [pytest.param(name, "0.3", 1, id=name, marks=waits if name in ONLINE else ()) for name in choices("method")]
    return [*found, *(pytest.param(name, "0.1", 2, id=f"{name}-patches") for name in ("full", "random", "sinks"))]


@pytest.mark.parametrize(("name", "text", "patch"), cases())
def test_a_generation_never_waits(name: str, text: str, patch: int) -> None:
    method: Method = compose([f"method={name}"], command="generate").first.method.object
    budget = Budget.parse("1" if name == "full" else text)
    decisions = method.policy(Setting(GEOMETRY, budget, 4, calibration=calibration(GEOMETRY)))
    net, lengths = model(patch), (5, 9)
    prompts = Text(torch.empty(2, 9, 128, device=META), lengths)
    seam = KVCache(GEOMETRY, decisions, 4, 2, torch.bfloat16, META)
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    forced = [None, None, torch.zeros(2, 3 * patch, 3 * patch, 4, dtype=torch.uint8)]  # from a trace on disk
    with NoHiddenCopies(), NoBlockingCopies() as seen:
        trace = net.generate(prompts, SAMPLING, seam, generators, forced)
    assert seen.copies > 2 * GEOMETRY.num_scales  # noise and slots go there, without anybody waiting
    assert [tuple(bits.shape) for bits in trace.codes] == [(2, n * patch, n * patch, 4) for n in range(1, 7)]
    assert all(bits.device == META for bits in trace.codes)


def test_text_goes_to_the_device_without_waiting() -> None:
    class Stored:
        def prepare(self, prompts: Any, root: Any) -> None: ...

        def encode(self, prompts: Any) -> list[Tensor]:
            return [torch.ones(3, 128, dtype=torch.float16), torch.ones(7, 128, dtype=torch.float16)]

    net = model(1)
    net.text = Stored()
    with NoHiddenCopies(), NoBlockingCopies() as seen:
        text = net.encode(items_of("ab"))
    assert text.features.device == META and text.features.dtype == torch.float32 and seen.copies == 2


MISTAKES: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "tolist": lambda x: x.tolist(),
    "bool": lambda x: bool((x > 0).all()),
    "numpy": lambda x: x.cpu(),
    "nonzero": lambda x: (x > 0).nonzero(),
    "mask": lambda x: x[x > 0],
    "list": lambda x: x[[0, 1]],
    "list in place": lambda x: x.__setitem__([0, 1], 1.0),
    "number": lambda x: torch.tensor(3, device=x.device),
    "blocking copy": lambda x: torch.ones(3).to(x.device),
    "blocking copy in place": lambda x: x.copy_(torch.ones(3)),
    "index on the host": lambda x: x.index_select(0, torch.tensor([0])),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_waiting_is_noticed(mistake: str) -> None:
    x = torch.empty(3, device=META)
    with pytest.raises((RuntimeError, NotImplementedError)), NoHiddenCopies(), NoBlockingCopies():
        MISTAKES[mistake](x)


def test_drawing_on_the_device_is_drawing_on_the_host() -> None:
    """Only where the numbers come from is special; on meta the shapes are what can be seen."""
    logits = torch.empty(2, 5, 3, 2, device=META)
    bits = draw_bits(logits, 900, 0.97, [torch.Generator().manual_seed(i) for i in range(2)])
    assert bits.shape == (2, 5, 3) and bits.device == META and bits.dtype == torch.uint8
