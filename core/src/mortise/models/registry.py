"""Which family answers to a checkpoint's ``model_type``."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from mortise.errors import UnknownArchitectureError
from mortise.models.deepseek_v32.family import DeepseekV32Family
from mortise.models.glm4_moe.family import Glm4MoeFamily
from mortise.models.glm_moe_dsa.family import GlmMoeDsaFamily
from mortise.models.qwen3_next.family import Qwen3NextFamily

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mortise.models.family import ModelFamily

FAMILIES: tuple[ModelFamily, ...] = (
    DeepseekV32Family(),
    GlmMoeDsaFamily(),
    Glm4MoeFamily(),
    Qwen3NextFamily(),
)


def family_of(raw: Mapping[str, object]) -> ModelFamily:
    """The family for a parsed ``config.json``.

    Raises:
        UnknownArchitectureError: no family answers to its ``model_type``.
    """
    model_type = raw.get("model_type")
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = [name for family in FAMILIES for name in family.model_types]
    close = difflib.get_close_matches(str(model_type), known, n=1)
    raise UnknownArchitectureError(
        f"unknown model_type {model_type!r} in config.json",
        details=[f"did you mean {close[0]!r}?"] if close else [],
        expected=f"one of {', '.join(known)}",
        remedy="use a checkpoint of a supported family, or add a family under mortise/models",
    )
