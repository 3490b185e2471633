"""DeepSeek-V3 and V3.2 as a model family."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mortise.models import nextn
from mortise.models.decoder_weights import decoder_placements, decoder_skips
from mortise.models.deepseek_v32.config import DeepseekV32Config, LatentMoEConfig
from mortise.models.deepseek_v32.model import DeepseekV32Draft, DeepseekV32ForCausalLM
from mortise.models.family import ModelFacts

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from mortise.checkpoint.placement import Placement, Skip
    from mortise.layers.context import LayerContext
    from mortise.models.family import CausalLM, DraftModel
    from mortise.parallel.group import ExpertParallelGroup


class DeepseekV32Family:
    """Reads ``model_type`` ``deepseek_v3`` and ``deepseek_v32``.

    Attributes:
        config_class: reads ``config.json``; all else of the family follows from it.
    """

    __slots__ = ()

    model_types: tuple[str, ...] = ("deepseek_v3", "deepseek_v32")
    config_class: type[LatentMoEConfig] = DeepseekV32Config

    def facts(self, raw: Mapping[str, object]) -> ModelFacts:
        """See :class:`~mortise.models.family.ModelFamily`."""
        config = self.config_class.from_dict(raw)
        return ModelFacts(
            architecture=config.model_type,
            vocab_size=config.vocab_size,
            max_position_embeddings=config.max_position_embeddings,
            eos_token_ids=config.eos_token_ids,
            dtype=config.torch_dtype,
            hidden_size=config.hidden_size,
            num_experts=config.n_routed_experts,
            num_experts_per_tok=config.num_experts_per_tok,
            index_num_heads=config.index_n_heads or 0,
            index_head_dim=config.index_head_dim or 0,
        )

    def build(self, raw: Mapping[str, object], context: LayerContext) -> CausalLM:
        """See :class:`~mortise.models.family.ModelFamily`."""
        return DeepseekV32ForCausalLM(self.config_class.from_dict(raw), context)

    def placements(self, model: CausalLM) -> Iterable[Placement]:
        """See :class:`~mortise.models.family.ModelFamily`."""
        assert isinstance(model, DeepseekV32ForCausalLM)
        return decoder_placements(model.model, model.lm_head, model.context.schemes)

    def skips(self, raw: Mapping[str, object], group: ExpertParallelGroup) -> tuple[Skip, ...]:
        """See :class:`~mortise.models.family.ModelFamily`."""
        return decoder_skips(self.config_class.from_dict(raw), group)

    def build_draft(self, raw: Mapping[str, object], context: LayerContext) -> DraftModel:
        """See :class:`~mortise.models.family.ModelFamily`."""
        return DeepseekV32Draft(nextn.require_nextn(self.config_class.from_dict(raw)), context)

    def draft_placements(self, draft: DraftModel, main: CausalLM) -> Iterable[Placement]:
        """See :class:`~mortise.models.family.ModelFamily`."""
        assert isinstance(draft, DeepseekV32Draft)
        assert isinstance(main, DeepseekV32ForCausalLM)
        return nextn.draft_placements(draft, main.model, main.lm_head)

    def draft_skips(
        self, raw: Mapping[str, object], group: ExpertParallelGroup
    ) -> tuple[Skip, ...]:
        """See :class:`~mortise.models.family.ModelFamily`."""
        return nextn.draft_skips(self.config_class.from_dict(raw), group)
