"""The content of conf/: one frozen dataclass per config group, and the object that each leaf names.

Pure Python: no hydra, no torch, no file is opened here. `object` is filled by `config.check`, which builds the leaves
when a run is composed, so that what is wrong with a parameter is told with all other errors.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from heatkv_cli.models.weights import WeightFile

DTYPE_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Weights:
    """The files of a model, and where they lie: in the package's assets, or where `find_file` looks.

    `verify`: refuse other content than the digests say; off for weights of one's own under an official name.
    """

    place: Literal["package", "folder"] = "folder"
    verify: bool = True
    files: tuple[WeightFile, ...] = ()


@dataclass(frozen=True)
class ModelConfig:
    """`conf/model/<name>.yaml`.

    Args:
        name: CLI value, file name and CSV cell.
        target: dotted path of the class or function that makes the model.
        num_layers, num_heads, head_dim: L, H, D of self-attention.
        sink_scales: number of first scales that are always kept.
        layout_scales: scales whose codes are copied from the full run for PSNR "copied layout".
        resolutions: the scale schedules, (height, width) of each scale, by name; at the aspect ratio.
        resolution: name of the one that is used.
        aspect_ratio: height / width of the image, for models that have several.
        order_scales: scales at which published order files were found; empty: those of the largest resolution.
        trained_at: resolutions the checkpoint was trained for; empty where there is no other.
        force_resolution: make images at others as well.
        preset: name of the sampling defaults in use; their values are in `sampling` and `params`.
        sampling: the family's dataclass of how codes are drawn, one value per scale.
        dtype: number format of weights and KV state, and so of a budget's bytes.
        default_benchmark: benchmark of `generate` and `eval` when none is named.
        calibration_prompts: the benchmark whose prompts `calibrate` uses.
        calibration_check: a second list, whose orders `calibrate` compares with the first one's.
        world: the only subject that the model was trained on (`shapes`); "" for any.
        sketch: dotted path of the function that makes its shape without weights, for byte plans.
        weights: files, digests, licences.
        params: the remaining arguments of `target`.
    """

    name: str
    target: str
    num_layers: int
    num_heads: int
    head_dim: int
    sink_scales: int
    layout_scales: tuple[int, ...]
    resolutions: dict[str, tuple[tuple[int, int], ...]]
    resolution: str
    sampling: Any
    dtype: Literal["float32", "bfloat16", "float16"]
    default_benchmark: str
    calibration_prompts: str
    calibration_check: str
    aspect_ratio: float = 1.0
    order_scales: tuple[tuple[int, int], ...] = ()
    trained_at: tuple[str, ...] = ()
    force_resolution: bool = False
    preset: str = ""
    world: str = ""
    sketch: str = ""
    weights: Weights = field(default_factory=Weights)
    params: dict[str, Any] = field(default_factory=dict)
    paper: str = ""
    note: str = ""

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of each scale at the chosen resolution."""
        return self.resolutions[self.resolution]

    @property
    def shape_label(self) -> str:
        """Resolution, and the aspect ratio where it is not square: "1M", "1M@1.5"."""
        return self.resolution + ("" if self.aspect_ratio == 1 else f"@{self.aspect_ratio:g}")

    @property
    def untrained(self) -> bool:
        """Whether the checkpoint was trained for other resolutions only."""
        return bool(self.trained_at) and self.resolution not in self.trained_at

    @property
    def dtype_bytes(self) -> int:
        """Bytes of one number of the KV state."""
        return DTYPE_BYTES[self.dtype]

    def identity(self) -> dict[str, Any]:
        """Return the parts of the model that can change an image; whoever opens the weights adds their digest.

        The aspect ratio is in the sizes, the preset in the values it stands for. A parameter that is null is left out,
        so that a new one changes no run that does not use it.
        """
        return {
            "name": self.name,
            "target": self.target,
            "dims": [self.num_layers, self.num_heads, self.head_dim],
            "sink_scales": self.sink_scales,
            "layout_scales": self.layout_scales,
            "resolution": self.resolution,
            "sizes": self.sizes,
            "sampling": asdict(self.sampling),
            "dtype": self.dtype,
            "params": {key: value for key, value in self.params.items() if value is not None},
            **({"forced_resolution": True} if self.untrained else {}),
        }


@dataclass(frozen=True)
class MethodConfig:
    """`conf/method/<name>.yaml`.

    Args:
        name: CLI value and CSV cell.
        target: dotted path of the method's dataclass.
        budgetless: the method has no budget, it always keeps everything (`full`).
        params: the paper's parameters; every other key of the YAML.
        object: the method itself.
    """

    name: str
    target: str
    budgetless: bool = False
    params: dict[str, Any] = field(default_factory=dict)
    paper: str = ""
    note: str = ""
    object: Any = field(default=None, compare=False, repr=False)

    def identity(self) -> dict[str, Any]:
        """Return the parts of the method that can change an image."""
        return {"name": self.name, "target": self.target, "params": self.params}


@dataclass(frozen=True)
class BenchmarkConfig:
    """`conf/benchmark/<name>.yaml`: a versioned list of prompts.

    Args:
        name: CLI value and CSV cell.
        target: dotted path of the class or function that reads the prompts.
        version: changes whenever a prompt changes.
        default_metrics: names of the metrics that `eval` computes when none is named.
        world: models of this world alone can draw it; "" is for all.
        params: every other key of the YAML.
        object: the benchmark itself; its files are not read yet.
    """

    name: str
    target: str
    version: str
    default_metrics: tuple[str, ...] = ()
    world: str = ""
    params: dict[str, Any] = field(default_factory=dict)
    paper: str = ""
    note: str = ""
    object: Any = field(default=None, compare=False, repr=False)

    def identity(self) -> dict[str, Any]:
        """Return the parts of the benchmark that can change an image; the address of its files is none."""
        params = {key: value for key, value in self.params.items() if key != "hub"}
        return {"name": self.name, "version": self.version, "target": self.target, "params": params}


@dataclass(frozen=True)
class MetricConfig:
    """`conf/metric/<name>.yaml`.

    Args:
        name: CLI value and CSV cell.
        target: dotted path of the metric's class.
        needs: the pass it reads: "free", "layout" or "forced"; None where the class itself says it.
        params: every knob that changes the number; every other key of the YAML.
        object: the metric itself.
    """

    name: str
    target: str
    needs: Literal["free", "layout", "forced"] | None = None
    params: dict[str, Any] = field(default_factory=dict)
    paper: str = ""
    note: str = ""
    object: Any = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class RuntimeConfig:
    """`conf/runtime/<name>.yaml`.

    Args:
        device: "cpu" or "cuda"; "auto", a GPU where there is one, is resolved when the run is composed.
        device_index: number of the GPU; never part of a hash.
        threads: CPU threads of torch; None leaves torch's own choice; never part of a hash.
        attention: back end of ragged attention; "varlen" needs CUDA, "masked" is the slow dense oracle; "auto" is
            resolved when the run is composed.
        batch_size: prompts per batch (guidance doubles the rows).
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    device_index: int = 0
    threads: int | None = None
    attention: Literal["auto", "grouped", "varlen", "masked"] = "auto"
    batch_size: int = 8

    @property
    def torch_device(self) -> str:
        """torch's name of the device: "cpu", "cuda:1"."""
        return f"cuda:{self.device_index}" if self.device == "cuda" else "cpu"

    def identity(self) -> dict[str, Any]:
        """Return the parts of the machinery that can change a float, and so a pixel."""
        return {"device": self.device, "attention": self.attention, "batch_size": self.batch_size}
