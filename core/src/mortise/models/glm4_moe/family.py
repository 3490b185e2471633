"""GLM-4.5, 4.6 and 4.7 as a model family."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mortise.models import nextn
from mortise.models.decoder_weights import decoder_placements, decoder_skips
from mortise.models.family import ModelFacts
from mortise.models.glm4_moe.config import Glm4MoeConfig
from mortise.models.glm4_moe.model import Glm4MoeDraft, Glm4MoeForCausalLM

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from mortise.checkpoint.placement import Placement, Skip
    from mortise.layers.context import LayerContext
    from mortise.models.family import CausalLM, DraftModel
    from mortise.parallel.group import ExpertParallelGroup


class Glm4MoeFamily:
    """Reads ``model_type`` ``glm4_moe``."""

    __slots__ = ()

    model_types = ("glm4_moe",)

    def facts(self, raw: Mapping[str, object]) -> ModelFacts:
        """See :class:`~mortise.models.family.ModelFamily`."""
        config = Glm4MoeConfig.from_dict(raw)
        return ModelFacts(
            architecture=config.model_type,
            vocab_size=config.vocab_size,
            max_position_embeddings=config.max_position_embeddings,
            eos_token_ids=config.eos_token_ids,
            dtype=config.torch_dtype,
            hidden_size=config.hidden_size,
            num_experts=config.n_routed_experts,
            num_experts_per_tok=config.num_experts_per_tok,
        )

    def build(self, raw: Mapping[str, object], context: LayerContext) -> CausalLM:
        """See :class:`~mortise.models.family.ModelFamily`."""
        return Glm4MoeForCausalLM(Glm4MoeConfig.from_dict(raw), context)

    def placements(self, model: CausalLM) -> Iterable[Placement]:
        """See :class:`~mortise.models.family.ModelFamily`."""
        assert isinstance(model, Glm4MoeForCausalLM)
        return decoder_placements(model.model, model.lm_head, model.context.schemes)

    def skips(self, raw: Mapping[str, object], group: ExpertParallelGroup) -> tuple[Skip, ...]:
        """See :class:`~mortise.models.family.ModelFamily`."""
        return decoder_skips(Glm4MoeConfig.from_dict(raw), group)

    def build_draft(self, raw: Mapping[str, object], context: LayerContext) -> DraftModel:
        """See :class:`~mortise.models.family.ModelFamily`."""
        return Glm4MoeDraft(nextn.require_nextn(Glm4MoeConfig.from_dict(raw)), context)

    def draft_placements(self, draft: DraftModel, main: CausalLM) -> Iterable[Placement]:
        """See :class:`~mortise.models.family.ModelFamily`."""
        assert isinstance(draft, Glm4MoeDraft)
        assert isinstance(main, Glm4MoeForCausalLM)
        return nextn.draft_placements(draft, main.model, main.lm_head)

    def draft_skips(
        self, raw: Mapping[str, object], group: ExpertParallelGroup
    ) -> tuple[Skip, ...]:
        """See :class:`~mortise.models.family.ModelFamily`."""
        return nextn.draft_skips(Glm4MoeConfig.from_dict(raw), group)
