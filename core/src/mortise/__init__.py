"""An inference engine for Mixture-of-Experts language models whose core knows no hardware."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mortise.config import EngineConfig
    from mortise.engine.events import Completion
    from mortise.engine.llm import LLM
    from mortise.engine.sampling_params import SamplingParams
    from mortise.errors import MortiseError

    __version__: str

__all__ = [
    "LLM",
    "Completion",
    "EngineConfig",
    "MortiseError",
    "SamplingParams",
    "__version__",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that ``import mortise`` costs nothing."""
    match name:
        case "LLM":
            module = "mortise.engine.llm"
        case "Completion":
            module = "mortise.engine.events"
        case "SamplingParams":
            module = "mortise.engine.sampling_params"
        case "EngineConfig":
            module = "mortise.config"
        case "MortiseError":
            module = "mortise.errors"
        case "__version__":
            from importlib.metadata import version

            return version("mortise-core")
        case _:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(module), name)


def __dir__() -> list[str]:
    return sorted(__all__)
