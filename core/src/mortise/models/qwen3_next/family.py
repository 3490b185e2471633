"""Qwen3-Next and Qwen3.5 MoE as a model family."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mortise.models.family import ModelFacts
from mortise.models.qwen3_next import weights
from mortise.models.qwen3_next.config import Qwen3NextConfig
from mortise.models.qwen3_next.model import Qwen3NextForCausalLM
from mortise.models.qwen3_next.mtp import Qwen3NextDraft

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from mortise.checkpoint.placement import Placement, Skip
    from mortise.layers.context import LayerContext
    from mortise.models.family import CausalLM, DraftModel
    from mortise.parallel.group import ExpertParallelGroup


class Qwen3NextFamily:
    """Reads ``model_type`` ``qwen3_next``, ``qwen3_5_moe`` and ``qwen3_5_moe_text``."""

    __slots__ = ()

    model_types = ("qwen3_next", "qwen3_5_moe", "qwen3_5_moe_text")

    def facts(self, raw: Mapping[str, object]) -> ModelFacts:
        """See :class:`~mortise.models.family.ModelFamily`."""
        config = Qwen3NextConfig.from_dict(raw)
        return ModelFacts(
            architecture=config.model_type,
            vocab_size=config.vocab_size,
            max_position_embeddings=config.max_position_embeddings,
            eos_token_ids=config.eos_token_ids,
            dtype=config.torch_dtype,
            hidden_size=config.hidden_size,
            num_experts=config.num_experts,
            num_experts_per_tok=config.num_experts_per_tok,
        )

    def build(self, raw: Mapping[str, object], context: LayerContext) -> CausalLM:
        """See :class:`~mortise.models.family.ModelFamily`."""
        return Qwen3NextForCausalLM(Qwen3NextConfig.from_dict(raw), context)

    def placements(self, model: CausalLM) -> Iterable[Placement]:
        """See :class:`~mortise.models.family.ModelFamily`."""
        assert isinstance(model, Qwen3NextForCausalLM)
        return weights.placements(model)

    def skips(self, raw: Mapping[str, object], group: ExpertParallelGroup) -> tuple[Skip, ...]:
        """See :class:`~mortise.models.family.ModelFamily`."""
        return weights.skips(Qwen3NextConfig.from_dict(raw), group)

    def build_draft(self, raw: Mapping[str, object], context: LayerContext) -> DraftModel:
        """See :class:`~mortise.models.family.ModelFamily`."""
        return Qwen3NextDraft(Qwen3NextConfig.from_dict(raw), context)

    def draft_placements(self, draft: DraftModel, main: CausalLM) -> Iterable[Placement]:
        """See :class:`~mortise.models.family.ModelFamily`."""
        assert isinstance(draft, Qwen3NextDraft)
        assert isinstance(main, Qwen3NextForCausalLM)
        return weights.draft_placements(draft, main)

    def draft_skips(
        self, raw: Mapping[str, object], group: ExpertParallelGroup
    ) -> tuple[Skip, ...]:
        """See :class:`~mortise.models.family.ModelFamily`."""
        return weights.draft_skips(Qwen3NextConfig.from_dict(raw), group)
