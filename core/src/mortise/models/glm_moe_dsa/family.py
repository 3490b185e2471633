"""GLM-5 with sparse attention as a model family."""

from __future__ import annotations

from mortise.models.deepseek_v32.family import DeepseekV32Family
from mortise.models.glm_moe_dsa.config import GlmMoeDsaConfig


class GlmMoeDsaFamily(DeepseekV32Family):
    """Reads ``model_type`` ``glm_moe_dsa``: DeepSeek-V3.2's modules, configured another way."""

    __slots__ = ()

    model_types = ("glm_moe_dsa",)
    config_class = GlmMoeDsaConfig
