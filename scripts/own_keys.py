"""What the keys of a scale's own map are worth: KL at that scale when every second or fourth of them is gone.

    python scripts/own_keys.py --models tiny,tiny-160 --to results/tiny-160/own-keys.csv

Forced passes on the full run's bits. At one scale, in all layers and heads, queries see all earlier scales whole and of
their own scale a checkerboard (half) or every second row and column (quarter), whose logits are raised by the log of
how many tokens each stands for. KL(full || thinned) in nats, mean over the bits of that scale, of the logits that
sampling uses (after guidance, tau 1). A map of which half is enough has spare keys.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from heatkv_cli.config import compose
from heatkv_cli.metrics.intervals import bootstrap_interval
from heatkv_cli.models.base import Trace
from heatkv_cli.models.infinity.sampling import bit_kl
from heatkv_cli.planning.job import generators_of, load_model
from heatkv_cli.planning.resolver import Resolver
from heatkv_cli.results import encode_rows, write_file
from tiny_net import FullAttention

COLUMNS = ("model", "side", "kept", "keys", "of", "kl", "low", "high", "prompts")
BATCH = 8


def kept_tokens(side: int, share: str) -> Tensor:
    """Indices of the tokens of a side x side map that stay: a checkerboard ('half') or a lattice ('quarter')."""
    row, column = torch.arange(side)[:, None], torch.arange(side)[None]
    stays = (row + column) % 2 == 0 if share == "half" else (row % 2 == 0) & (column % 2 == 0)
    return stays.flatten().nonzero()[:, 0]


class Thinned(FullAttention):
    """The full cache, but at one scale with some of that scale's own keys only."""

    def __init__(self, scale: int, kept: Tensor):
        super().__init__()
        self.thinned, self.kept, self.scale = scale, kept, 0

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
        past = self.past.get(layer)
        whole = super().attend(layer, q, k, v, softmax_scale)
        if self.scale != self.thinned:
            return whole
        own = [t[:, :, self.kept] for t in (k, v)]
        keys, values = own if past is None else [torch.cat(pair, 2) for pair in zip(past, own, strict=True)]
        bias = torch.zeros(q.shape[2], keys.shape[2], dtype=q.dtype)
        bias[:, -len(self.kept) :] = math.log(k.shape[2] / len(self.kept))
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=bias, scale=softmax_scale)

    def end_step(self) -> None:
        self.scale += 1


def divergences(full: Trace, other: Trace, scale: int) -> list[float]:
    """KL per bit at one scale, image by image."""
    images = range(len(full.latent))
    return [
        bit_kl(*([logits[i : i + 1] for logits in trace.logits] for trace in (full, other)))[f"kl_s{scale}"]
        for i in images
    ]


def measure(name: str, prompts: int, smallest: int) -> Iterator[dict[str, object]]:
    """One row a scale from side `smallest` on and share of kept keys."""
    run = compose([f"model={name}", "method=full", f"limit={prompts}", f"runtime.batch_size={BATCH}"]).first
    job = Resolver().job(run)
    model = load_model(run, job.inputs.files)
    sides = [height for height, _ in run.model.sizes]
    cases = [(s, share) for s, side in enumerate(sides) if side >= smallest for share in ("half", "quarter")]
    found: dict[tuple[int, str], list[float]] = {case: [] for case in cases}
    for batch in job.batches:
        text = model.encode([image.item for image in batch])
        full = model.generate(text, job.sampling, FullAttention(), generators_of(batch))
        for s, share in cases:
            seam = Thinned(s, kept_tokens(sides[s], share))
            found[s, share] += divergences(full, model.generate(text, job.sampling, seam, None, full.codes), s)
    for (s, share), values in found.items():
        kl = bootstrap_interval(values)
        kept, of = len(kept_tokens(sides[s], share)), sides[s] ** 2
        numbers = [f"{x:.5f}" for x in (kl.mean, kl.low, kl.high)]
        yield dict(zip(COLUMNS, (name, sides[s], share, kept, of, *numbers, len(values)), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="tiny,tiny-160", help="comma list")
    parser.add_argument("--prompts", type=int, default=32, help=f"of the model's benchmark, in batches of {BATCH}")
    parser.add_argument("--smallest", type=int, default=5, help="sides below it are left out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--to", type=Path, help="CSV to write")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    rows = [row for name in a.models.split(",") for row in measure(name, a.prompts, a.smallest)]
    table = (",".join(COLUMNS) + "\n").encode() + encode_rows(rows, COLUMNS)
    print(table.decode(), end="")
    if a.to:
        write_file(a.to, table)


if __name__ == "__main__":
    main()
