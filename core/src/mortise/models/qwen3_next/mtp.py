"""The multi-token prediction layer, which guesses one token further than the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from mortise.errors import ModelConfigError
from mortise.layers.finish import finish_loading
from mortise.layers.linear import linear
from mortise.layers.norm import ZeroCentredRMSNorm
from mortise.layers.paged_grouped_attention import PagedGroupedAttention
from mortise.models.key_value_cached import KeyValueCached
from mortise.models.qwen3_next.layer import draft_layer
from mortise.models.qwen3_next.model import rotary_embedding

if TYPE_CHECKING:
    from mortise.layers.context import LayerContext
    from mortise.models.family import PagedPass
    from mortise.models.qwen3_next.config import Qwen3NextConfig
    from mortise.spec.dispatch import DispatchDecision

DRAFT_LAYER = "mtp.layers.0"
"""Dotted name of the one layer in the checkpoint, of all the family."""
DRAFT_PROJECTION = "mtp.fc"
"""What joins embedding and hidden state."""


class Qwen3NextDraft(KeyValueCached, nn.Module):
    """One layer of attention and experts that reads what the model knows of a token and the next.

    The layer attends even where nearly all of the model's are gated delta nets, so that it keeps no
    states (``qwen3_next_mtp.py`` and ``qwen3_5_mtp.py`` of vLLM, and of SGLang).
    Parameters are created empty on the current torch device and dtype; fill them with the
    placements of ``weights.py``, then call :meth:`finish_loading`.

    Args:
        config: the main model's configuration.
        context: hooks, stored schemes, and the other surroundings of the draft role.

    Raises:
        ModelConfigError: the configuration says that there is no such layer, or that it has an
            embedding of its own.
    """

    def __init__(self, config: Qwen3NextConfig, context: LayerContext) -> None:
        super().__init__()
        _require_layer(config)
        self.config = config
        self.num_cached_layers = 1
        self.context = context
        hidden_size, eps = config.hidden_size, config.rms_norm_eps
        self.pre_fc_norm_embedding = ZeroCentredRMSNorm(hidden_size, eps)
        self.pre_fc_norm_hidden = ZeroCentredRMSNorm(hidden_size, eps)
        self.fc = linear(context, [DRAFT_PROJECTION], 2 * hidden_size, hidden_size)
        self.layer = draft_layer(config, DRAFT_LAYER, context)
        self.norm = ZeroCentredRMSNorm(hidden_size, eps)
        self.rotary = rotary_embedding(config)

    def finish_loading(self) -> dict[str, tuple[DispatchDecision, ...]]:
        """Let the layer decide and prepare; after loading and after weight updates."""
        norm = self.norm.weight
        self.rotary.to(norm.device)
        return finish_loading(self, norm.dtype)

    def run(
        self, embeddings_TH: torch.Tensor, hidden_TH: torch.Tensor, paged_pass: PagedPass
    ) -> torch.Tensor:
        """Normalised hidden states ``[T, H]`` for the main model's head and for the next draft.

        Args:
            embeddings_TH: of the token after each position.
            hidden_TH: normalised hidden states of each position.
            paged_pass: where the rows sit; they are written to the draft's cache.
        """
        assert isinstance(paged_pass, PagedGroupedAttention)
        embeddings_TH = self.pre_fc_norm_embedding(embeddings_TH)
        hidden_TH = self.pre_fc_norm_hidden(hidden_TH)
        output_TH = self.layer(
            self.fc(torch.cat([embeddings_TH, hidden_TH], dim=-1)),
            self.rotary(paged_pass.positions),
            paged_pass,
            None,
            paged_pass.dispatch_mode,
        )
        normalised: torch.Tensor = self.norm(output_TH)
        return normalised


def _require_layer(config: Qwen3NextConfig) -> None:
    if not config.mtp_num_hidden_layers:
        raise ModelConfigError(
            f"this {config.model_type} model has no multi-token prediction layer to draft with",
            details=["mtp_num_hidden_layers of config.json is 0"],
            expected="mtp_num_hidden_layers: 1",
            remedy="leave out draft.num_tokens (--draft), or name a directory that holds the"
            " layer in draft.model",
        )
    if config.mtp_use_dedicated_embeddings:
        raise ModelConfigError(
            "the multi-token prediction layer has an embedding of its own",
            details=["mtp_use_dedicated_embeddings of config.json is true"],
            expected="a layer that reads the main model's embedding",
            remedy="leave out draft.num_tokens (--draft)",
        )
