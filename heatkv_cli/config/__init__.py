"""Configuration: YAML groups and overrides in, frozen dataclasses out.

Used by the commands and the pipeline only; the science below never sees a config file. Reading order: `leaves`
(what a file of conf/ holds), `settings` (what a run is), `sweep` (what was typed), `compose` (the way from one to the
other), `check` (numbers, names, budgets), `typed` (filling dataclasses, building leaves), `groups` (which files there
are).
"""

from __future__ import annotations

from heatkv_cli.config.compose import compose
from heatkv_cli.config.groups import GROUPS, catalogue, choices, conf_dir, read_yaml
from heatkv_cli.config.leaves import (
    BenchmarkConfig,
    MethodConfig,
    MetricConfig,
    ModelConfig,
    RuntimeConfig,
    WeightFile,
    Weights,
)
from heatkv_cli.config.settings import Experiment, Plan, RunConfig, config_hash
from heatkv_cli.config.sweep import PATH_KEYS
from heatkv_cli.config.typed import build, build_leaf

__all__ = [
    "GROUPS",
    "PATH_KEYS",
    "BenchmarkConfig",
    "Experiment",
    "MethodConfig",
    "MetricConfig",
    "ModelConfig",
    "Plan",
    "RunConfig",
    "RuntimeConfig",
    "WeightFile",
    "Weights",
    "build",
    "build_leaf",
    "catalogue",
    "choices",
    "compose",
    "conf_dir",
    "config_hash",
    "read_yaml",
]
