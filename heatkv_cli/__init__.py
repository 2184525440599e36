"""heatkv: a toolkit for KV-cache compression of visual autoregressive image models, as commands and as a library.

    import heatkv_cli as heatkv

    heatkv.load("tiny").generate(["a red circle on gray"], method="heatkv", budget=0.1, seed=0)

Nothing is imported here before it is used: `heatkv --help` must not pay for torch. See `heatkv_cli.library`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "calibrate", "evaluate", "generate", "load"]

if TYPE_CHECKING:
    from heatkv_cli.library import calibrate, evaluate, generate, load


def __getattr__(name: str) -> Any:
    """Import the library when one of its functions is asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("heatkv_cli.library"), name)
