"""The decoder: embedding, layers of gated delta nets or gated attention with experts, head."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from mortise.kv.key_values import KeyValuePool
from mortise.kv.recurrent import RecurrentPool
from mortise.layers.finish import finish_loading
from mortise.layers.norm import ZeroCentredRMSNorm
from mortise.layers.rotary import RotaryEmbedding
from mortise.models.qwen3_next.cache import HybridPass, HybridPool
from mortise.models.qwen3_next.layer import decoder_layer
from mortise.spec.dispatch import DispatchMode

if TYPE_CHECKING:
    from mortise.layers.context import LayerContext
    from mortise.layers.gated_delta_net import Recur
    from mortise.layers.grouped_attention import GroupedAttend
    from mortise.layers.paged_attention import BatchLayout
    from mortise.layers.rotary import Rotation
    from mortise.models.family import CachePool, PagedPass
    from mortise.models.qwen3_next.config import Qwen3NextConfig
    from mortise.spec.dispatch import DispatchDecision


class Qwen3NextModel(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: Qwen3NextConfig, context: LayerContext) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(
            config.vocab_size,
            config.hidden_size,
            _weight=torch.empty(config.vocab_size, config.hidden_size),
        )
        self.layers = nn.ModuleList(
            decoder_layer(config, index, context) for index in range(config.num_hidden_layers)
        )
        self.norm = ZeroCentredRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        token_ids_T: torch.Tensor,
        rotation: Rotation,
        attend: GroupedAttend,
        recur: Recur,
        mode: DispatchMode = DispatchMode.NORMAL,
    ) -> torch.Tensor:
        """Token ids int64 ``[T]`` to normalised hidden states ``[T, H]``."""
        hidden_TH = self.embed_tokens(token_ids_T)
        for layer in self.layers:
            hidden_TH = layer(hidden_TH, rotation, attend, recur, mode)
        normalised: torch.Tensor = self.norm(hidden_TH)
        return normalised


class Qwen3NextForCausalLM(nn.Module):
    """The whole language model of one role.

    Parameters are created empty on the current torch device and dtype; fill them with the
    placements of ``weights.py``, then call :meth:`finish_loading`.

    Args:
        config: the model's configuration.
        context: hooks, stored schemes, and the other surroundings of this role.
    """

    def __init__(self, config: Qwen3NextConfig, context: LayerContext) -> None:
        super().__init__()
        self.config = config
        self.model = Qwen3NextModel(config, context)
        self.lm_head: nn.Linear | None = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rotary = rotary_embedding(config)

    def finish_loading(self) -> dict[str, tuple[DispatchDecision, ...]]:
        """Let every layer decide and prepare; after loading and after weight updates."""
        norm = self.model.norm.weight
        self.rotary.to(norm.device)
        return finish_loading(self, norm.dtype)

    def new_pool(
        self, num_pages: int, dtype: torch.dtype, device: torch.device, num_slots: int = 0
    ) -> HybridPool:
        """Empty pages for the attention layers, and slots for the states of the others."""
        config = self.config
        shape = config.qkv_shape()
        return HybridPool(
            KeyValuePool(
                num_layers=config.num_hidden_layers - config.num_recurrent_layers,
                num_pages=num_pages,
                num_heads=config.num_key_value_heads,
                key_dim=config.head_dim,
                value_dim=config.head_dim,
                dtype=dtype,
                device=device,
            ),
            RecurrentPool(
                num_layers=config.num_recurrent_layers,
                num_slots=num_slots,
                conv_rows=config.linear_conv_kernel_dim - 1,
                channels=2 * shape.num_key_heads * shape.key_head_dim
                + shape.num_value_heads * shape.value_head_dim,
                num_heads=shape.num_value_heads,
                key_dim=shape.key_head_dim,
                value_dim=shape.value_head_dim,
                dtype=dtype,
                device=device,
            ),
        )

    def new_pass(self, pool: CachePool, layout: BatchLayout) -> HybridPass:
        """Plan one forward pass over pages and slots."""
        assert isinstance(pool, HybridPool)
        return HybridPass(pool, layout)

    def embed(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        """``[T, H]`` of int64 token ids."""
        embedded: torch.Tensor = self.model.embed_tokens(token_ids_T)
        return embedded

    def run(self, token_ids_T: torch.Tensor, paged_pass: PagedPass) -> torch.Tensor:
        """Normalised hidden states ``[T, H]`` of int64 token ids ``[T]``."""
        assert isinstance(paged_pass, HybridPass)
        hidden: torch.Tensor = self.model(
            token_ids_T,
            self.rotary(paged_pass.positions),
            paged_pass.attend,
            paged_pass.recur,
            paged_pass.dispatch_mode,
        )
        return hidden

    def logits(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        """float32 ``[T, vocab]`` of normalised hidden states."""
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        return F.linear(hidden_TH, head.weight).float()


def rotary_embedding(config: Qwen3NextConfig) -> RotaryEmbedding:
    """The rotations that all layers share."""
    with torch.device("cpu"):
        return RotaryEmbedding(
            config.rotary_dim, config.rope_theta, config.max_position_embeddings, config.yarn
        )
