"""Removal orders: per source scale, all heads of all layers from the least to the most needed.

An order says *which* (head, layer) loses a source scale first; how many do, and when, is `scheduler.py`. Orders come
from a calibration (ascending S-CAS), from a file of the HeatKV repository, or from a seed (the `random` control).

Source: arXiv 2605.14877; the file format is checked against arm-research/heatkv @ 96dc288.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from heatkv_cli.calibration.calibration import Calibration
from heatkv_cli.core.scales import Geometry, ScaleSchedule
from heatkv_cli.errors import ArtifactError
from heatkv_cli.results import load_json, read_regular


@dataclass(frozen=True, eq=False)
class Orders:
    """One removal order per source scale.

    Args:
        order: long (num_sources, L*H, 2) of [head, layer]; row i is source scale sink_scales + i, the first entry is
            removed first.
        name: its origin, for tables: `s-cas`, `random-3`, a file name.
        calibrated_on: the scales at which the order was found; a lower resolution may use the same lists.
        source_sha256: digest of the calibration or file behind it; empty for a seeded order.
    """

    order: Tensor = field(repr=False)
    name: str
    calibrated_on: ScaleSchedule
    source_sha256: str = ""

    @property
    def sha256(self) -> str:
        """Hash of the lists in canonical form (`orders_sha256` of the golden schedules)."""
        return canonical_sha256(self.order.tolist())

    def at(self, geometry: Geometry) -> Orders:
        """Return the orders for `geometry`: the lists of the source scales that exist there.

        Raises:
            ArtifactError: `geometry` has source scales without a list, or other layers or heads.
        """
        have, need = self.order.shape[0], len(geometry.sources)
        if have < need:
            raise ArtifactError(
                f"order {self.name} has lists for {have} source scales, {geometry} needs {need}",
                f"calibrate at {geometry.schedule.resolution}: heatkv calibrate --model {geometry.model}",
            )
        check_orders(self.order[:need], geometry, self.name)
        return replace(self, order=self.order[:need])


def canonical_sha256(rows: list[Any]) -> str:
    """Return the SHA-256 of nested integer lists as compact ASCII JSON, the form in which hashes are published."""
    return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode("ascii")).hexdigest()


def ascending_orders(scores: Tensor) -> Tensor:
    """Return the order of ascending score for each source; ties go to the lower head, then the lower layer.

    Args:
        scores: float (num_sources, L, H), finite.

    Returns:
        long (num_sources, L*H, 2) of [head, layer].
    """
    num_layers, num_heads = scores.shape[1:]
    layer, head = (grid.ravel() for grid in np.indices((num_layers, num_heads)))
    orders = []
    for score in scores.double().cpu().numpy():
        index = np.lexsort((layer, head, score.ravel()))  # the last key is the first to decide
        orders.append(np.stack([head[index], layer[index]], axis=1))
    return torch.from_numpy(np.array(orders, dtype=np.int64).reshape(-1, num_layers * num_heads, 2))


def calibrated_orders(calibration: Calibration, prompts: Sequence[int] | None = None) -> Orders:
    """Return the orders of a calibration: ascending by (S-CAS, head, layer), one list per source scale.

    Args:
        calibration: the model's calibration.
        prompts: indices of the prompts to use; None for all.
    """
    scores = calibration.scores(prompts)
    return Orders(ascending_orders(scores), "s-cas", calibration.geometry.schedule, calibration.sha256)


def random_orders(geometry: Geometry, seed: int) -> Orders:
    """Return seeded random orders, drawn independently for each source scale.

    Each (source, head, layer) is ranked by a hash, not by a generator: the same seed gives the same order with every
    library version, and a source scale keeps its order when the number of scales changes.
    """
    scores = torch.zeros(len(geometry.sources), geometry.num_layers, geometry.num_heads, dtype=torch.float64)
    for index, source in enumerate(geometry.sources):
        for layer in range(geometry.num_layers):
            for head in range(geometry.num_heads):
                digest = hashlib.sha256(f"random-order/{seed}/{source}/{head}/{layer}".encode()).digest()
                scores[index, layer, head] = int.from_bytes(digest[:6])  # 48 bits: exact in a double
    return Orders(ascending_orders(scores), f"random-{seed}", geometry.schedule)


def load_orders(path: Path | str, geometry: Geometry, calibrated_on: ScaleSchedule | None = None) -> Orders:
    """Read an order file of the HeatKV repository: a JSON list of one list of [head, layer] per source scale.

    The repository's `scas_orders.json` (the lists under "orders", beside "metadata") is read as well; unlike there,
    what its metadata says about the model must agree.

    Args:
        path: the file.
        geometry: shape of the cache that will use it.
        calibrated_on: the scales at which the file was made, where they are not those of `geometry`; the first list
            is source scale S in both, and the lists of the sources that exist are used.

    Raises:
        ArtifactError: missing or not JSON; wrong number or length of lists; an entry that is not [head, layer], out
            of range or a duplicate. Names the list and the entry.
    """
    path = Path(path)
    try:
        raw = read_regular(path)
    except OSError as error:
        raise ArtifactError(
            f"order file {path} cannot be read: {error.strerror or error}",
            f"name an existing file, or calibrate: heatkv calibrate --model {geometry.model}",
        ) from error
    try:
        data = load_json(raw)
    except ValueError as error:
        raise ArtifactError(f"order file {path} is not JSON: {error}", "download it again") from error
    if isinstance(data, dict) and "orders" in data:
        _check_metadata(path, data.get("metadata"), geometry)
        data = data["orders"]
    trained = calibrated_on or geometry.schedule
    order = _parse_lists(path, data, trained.num_scales - 1 - geometry.sink_scales, geometry)
    return Orders(order, path.stem, trained, hashlib.sha256(raw).hexdigest()).at(geometry)


def check_orders(order: Tensor, geometry: Geometry, name: str) -> None:
    """Check that `order` holds one permutation of all (head, layer) pairs per source scale of `geometry`.

    Raises:
        ArtifactError: wrong shape, an entry out of range, or a duplicate; names the list.
    """
    expected = (len(geometry.sources), geometry.heads, 2)
    if tuple(order.shape) != expected:
        raise ArtifactError(
            f"order {name} has shape {tuple(order.shape)}, {geometry} needs {expected} (source scales, heads, 2)",
            "build the order for this model and resolution",
        )
    for index, entries in enumerate(order.tolist()):
        _check_list(f"order {name}", index, entries, geometry)


def order_ranks(order: Tensor, geometry: Geometry) -> Tensor:
    """Return the rank of every atom, long (num_sources, L, H): 0 is removed first."""
    ranks = torch.zeros(order.shape[0], geometry.num_layers, geometry.num_heads, dtype=torch.long)
    position = torch.arange(geometry.heads)
    for index in range(order.shape[0]):
        ranks[index, order[index, :, 1], order[index, :, 0]] = position
    return ranks


def _parse_lists(path: Path, data: Any, num_lists: int, geometry: Geometry) -> Tensor:
    """Return the lists of an order file, checked, as long (num_lists, L*H, 2)."""
    if not isinstance(data, list) or not all(isinstance(entries, list) for entries in data):
        raise ArtifactError(
            f"order file {path} is not a list of lists", "expected one list of [head, layer] pairs per source scale"
        )
    if len(data) != num_lists:
        raise ArtifactError(
            f"order file {path} has {len(data)} lists, expected {num_lists}: one per source scale "
            f"{geometry.sink_scales}..{geometry.sink_scales + num_lists - 1} ({geometry})",
            "use the file of this model and resolution; for a file made at another resolution say at which",
        )
    for index, entries in enumerate(data):
        _check_list(f"order file {path}", index, entries, geometry)
    return torch.tensor(data, dtype=torch.long).reshape(num_lists, geometry.heads, 2)


def _check_list(name: str, index: int, entries: list[Any], geometry: Geometry) -> None:
    """Check one list; ArtifactError names the list and the entry."""
    where = f"{name}, list {index} (source scale {geometry.sink_scales + index})"
    hint = f"each list is a permutation of all {geometry.heads} [head, layer] pairs of {geometry.model}"
    if len(entries) != geometry.heads:
        raise ArtifactError(f"{where} has {len(entries)} entries, expected {geometry.heads}", hint)
    seen: dict[tuple[int, int], int] = {}
    for position, entry in enumerate(entries):
        if not isinstance(entry, list) or len(entry) != 2 or not all(type(number) is int for number in entry):
            raise ArtifactError(f"{where}, entry {position} is {entry!r}, expected [head, layer]", hint)
        head, layer = entry
        if not (0 <= head < geometry.num_heads and 0 <= layer < geometry.num_layers):
            raise ArtifactError(
                f"{where}, entry {position} is [head {head}, layer {layer}], out of range for "
                f"{geometry.num_heads} heads and {geometry.num_layers} layers",
                hint,
            )
        if (head, layer) in seen:
            raise ArtifactError(f"{where}, entry {position} repeats entry {seen[head, layer]}: {entry}", hint)
        seen[head, layer] = position


def _check_metadata(path: Path, metadata: Any, geometry: Geometry) -> None:
    """Check what a locally computed upstream file says about its model; the upstream loader does not."""
    if not isinstance(metadata, Mapping):
        return
    wanted = {
        "num_layers": geometry.num_layers,
        "num_heads": geometry.num_heads,
        "sink_scales": geometry.sink_scales,
    }
    for key, value in wanted.items():
        if metadata.get(key, value) != value:
            raise ArtifactError(
                f"order file {path} was made with {key} = {metadata[key]}, {geometry} has {value}",
                "use the file of this model",
            )
