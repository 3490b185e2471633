"""The engine configuration: frozen, checked at the boundary, with the origin of every value."""

from mortise.config.engine import (
    CacheConfig,
    DispatchConfig,
    DraftConfig,
    EngineConfig,
    ParallelConfig,
    SchedulerConfig,
)
from mortise.config.layers import (
    environment_layers,
    file_layer,
    option_layer,
    standard_layers,
)
from mortise.config.resolve import Layer, ResolvedConfig, resolve
from mortise.config.table import FrozenTable

__all__ = [
    "CacheConfig",
    "DispatchConfig",
    "DraftConfig",
    "EngineConfig",
    "FrozenTable",
    "Layer",
    "ParallelConfig",
    "ResolvedConfig",
    "SchedulerConfig",
    "environment_layers",
    "file_layer",
    "option_layer",
    "resolve",
    "standard_layers",
]
