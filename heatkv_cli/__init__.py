"""heatkv: a command-line experiment toolkit for KV-cache compression of visual autoregressive image models.

Nothing is imported here on purpose: `heatkv --help` must not pay for torch.
"""

from __future__ import annotations

__version__ = "0.1.0"
