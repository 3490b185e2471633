"""Multi-head latent attention: the projections around an attention that is passed in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from mortise.layers.linear import float_weight, linear
from mortise.layers.norm import RMSNorm

if TYPE_CHECKING:
    from mortise.layers.context import LayerContext
    from mortise.layers.rotary import Rotation


@dataclass(frozen=True, slots=True, kw_only=True)
class MLAShape:
    """Sizes of one attention layer (names of the Hugging Face configuration)."""

    hidden_size: int
    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rms_norm_eps: float
    attention_bias: bool
    rope_interleave: bool
    softmax_scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexProjections:
    """What the lightning indexer makes of each token.

    ``query`` ``[T, N, D]`` and ``key`` ``[T, D]``, rotated; ``weights`` float32 ``[T, N]`` with the
    factors ``N**-0.5`` and ``D**-0.5`` folded in.
    """

    query: torch.Tensor
    key: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class MLAProjections:
    """What attention needs of each token.

    ``query_nope`` ``[T, N, qk_nope]``, ``query_rope`` ``[T, N, qk_rope]``, ``latent``
    ``[T, kv_lora_rank + qk_rope]`` (normalised latent, then the rotated shared key: the row that is
    cached), ``index`` of layers that have an indexer.
    """

    query_nope: torch.Tensor
    query_rope: torch.Tensor
    latent: torch.Tensor
    index: IndexProjections | None


class Attend(Protocol):
    """How queries meet keys: over a paged cache, or within the tokens at hand when training."""

    def __call__(self, attention: MLAttention, projections: MLAProjections) -> torch.Tensor:
        """Values attended to, ``[T, N, v_head_dim]``."""
        ...


class LightningIndexer(nn.Module):
    """DeepSeek-V3.2's indexer: cheap multi-query scores that pick the keys attention may see.

    The first ``qk_rope_head_dim`` dimensions are rotated, queries come from the latent query, keys
    are layer-normalised (DeepSeek-V3.2-Exp, ``inference/model.py``). The Hadamard rotation of the
    original is orthogonal and changes no product; it is left to caches that quantise.

    Args:
        rope_interleave: whether pairs of neighbours are rotated (GLM-5), or halves (DeepSeek-V3.2).
    """

    def __init__(
        self,
        context: LayerContext,
        name: str,
        *,
        hidden_size: int,
        q_lora_rank: int,
        num_heads: int,
        head_dim: int,
        rope_dim: int,
        topk: int,
        rope_interleave: bool = False,
    ) -> None:
        super().__init__()
        self.wq_b = linear(context, [f"{name}.wq_b"], q_lora_rank, num_heads * head_dim)
        self.wk = linear(context, [f"{name}.wk"], hidden_size, head_dim)
        self.k_norm = nn.LayerNorm(head_dim, eps=1e-6)
        self.weights_proj = linear(
            context, [f"{name}.weights_proj"], hidden_size, num_heads, as_float=True
        )
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.rope_dim = rope_dim
        self.topk = topk
        self.rope_interleave = rope_interleave

    def forward(
        self, hidden_TH: torch.Tensor, query_latent_TQ: torch.Tensor, rotation: Rotation
    ) -> IndexProjections:
        """Project ``[T, H]`` and the latent query ``[T, q_lora_rank]``."""
        query_TND = self.wq_b(query_latent_TQ).unflatten(-1, (self.num_heads, self.head_dim))
        key_TD = self.k_norm(self.wk(hidden_TH))
        # The key is rotated as one more head.
        both_TMD = torch.cat([query_TND, key_TD.unsqueeze(1)], dim=1)
        rope, rest = both_TMD.split([self.rope_dim, self.head_dim - self.rope_dim], dim=-1)
        rotate = rotation.interleaved if self.rope_interleave else rotation.halves
        both_TMD = torch.cat([rotate(rope), rest], dim=-1)
        scale = float(self.num_heads * self.head_dim) ** -0.5
        return IndexProjections(
            query=both_TMD[:, :-1],
            key=both_TMD[:, -1],
            # In float32 whatever the model's dtype is, as published.
            weights=F.linear(hidden_TH.float(), float_weight(self.weights_proj).float()) * scale,
        )


class MLAttention(nn.Module):
    """DeepSeek's multi-head latent attention (arXiv 2405.04434 section 2.1).

    Args:
        layer: index of the layer in the cache.
        shape: sizes.
        indexer: the lightning indexer, or None.
        context: where the model is built.
        name: dotted name in the checkpoint.
        shares_keys: whether to attend to the keys that the nearest earlier layer with an indexer
            picked; without either, to every key.
    """

    def __init__(
        self,
        layer: int,
        shape: MLAShape,
        indexer: LightningIndexer | None,
        context: LayerContext,
        name: str,
        *,
        shares_keys: bool = False,
    ) -> None:
        super().__init__()
        assert not (shares_keys and indexer is not None)
        self.layer = layer
        self.shares_keys = shares_keys
        self.shape = shape
        hidden, heads, bias = shape.hidden_size, shape.num_attention_heads, shape.attention_bias
        head_dim = shape.qk_nope_head_dim + shape.qk_rope_head_dim
        if shape.q_lora_rank is None:
            self.q_proj = linear(context, [f"{name}.q_proj"], hidden, heads * head_dim)
        else:
            rank = shape.q_lora_rank
            self.q_a_proj = linear(context, [f"{name}.q_a_proj"], hidden, rank, bias=bias)
            self.q_a_layernorm = RMSNorm(rank, shape.rms_norm_eps)
            self.q_b_proj = linear(context, [f"{name}.q_b_proj"], rank, heads * head_dim)
        latent_dim = shape.kv_lora_rank + shape.qk_rope_head_dim
        self.kv_a_proj_with_mqa = linear(
            context, [f"{name}.kv_a_proj_with_mqa"], hidden, latent_dim, bias=bias
        )
        self.kv_a_layernorm = RMSNorm(shape.kv_lora_rank, shape.rms_norm_eps)
        # Attention also multiplies its parts with queries, so it is needed as a matrix.
        self.kv_b_proj = linear(
            context,
            [f"{name}.kv_b_proj"],
            shape.kv_lora_rank,
            heads * (shape.qk_nope_head_dim + shape.v_head_dim),
            as_float=True,
        )
        self.o_proj = linear(
            context, [f"{name}.o_proj"], heads * shape.v_head_dim, hidden, bias=bias
        )
        self.indexer = indexer

    def forward(self, hidden_TH: torch.Tensor, rotation: Rotation, attend: Attend) -> torch.Tensor:
        """``[T, H]`` to ``[T, H]``."""
        attended_TNV = attend(self, self.project(hidden_TH, rotation))
        output: torch.Tensor = self.o_proj(attended_TNV.flatten(1))
        return output

    def project(self, hidden_TH: torch.Tensor, rotation: Rotation) -> MLAProjections:
        """Everything that depends on each token alone."""
        shape = self.shape
        rotate = rotation.interleaved if shape.rope_interleave else rotation.halves
        if shape.q_lora_rank is None:
            query, index = self.q_proj(hidden_TH), None
        else:
            query_latent_TQ = self.q_a_layernorm(self.q_a_proj(hidden_TH))
            query = self.q_b_proj(query_latent_TQ)
            index = (
                None if self.indexer is None else self.indexer(hidden_TH, query_latent_TQ, rotation)
            )
        query_nope, query_rope = query.unflatten(-1, (shape.num_attention_heads, -1)).split(
            [shape.qk_nope_head_dim, shape.qk_rope_head_dim], dim=-1
        )
        latent, key_rope = self.kv_a_proj_with_mqa(hidden_TH).split(
            [shape.kv_lora_rank, shape.qk_rope_head_dim], dim=-1
        )
        # The shared key is rotated as one more head.
        rotated_TMR = rotate(torch.cat([query_rope, key_rope.unsqueeze(1)], dim=1))
        return MLAProjections(
            query_nope=query_nope,
            query_rope=rotated_TMR[:, :-1],
            latent=torch.cat([self.kv_a_layernorm(latent), rotated_TMR[:, -1]], dim=-1),
            index=index,
        )

    def expand(self, latent_CL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys ``[N, C, qk_nope + qk_rope]`` and values ``[N, C, v]`` of cached rows ``[C, L]``."""
        shape = self.shape
        latent, key_rope = latent_CL.split([shape.kv_lora_rank, shape.qk_rope_head_dim], dim=-1)
        expanded_NCD = (
            self.kv_b_proj(latent).unflatten(-1, (shape.num_attention_heads, -1)).transpose(0, 1)
        )
        key_nope, value = expanded_NCD.split([shape.qk_nope_head_dim, shape.v_head_dim], dim=-1)
        key_rope = key_rope.expand(shape.num_attention_heads, -1, -1)
        return torch.cat([key_nope, key_rope], dim=-1), value

    def absorbed(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of ``kv_b_proj``: ``[N, qk_nope, kv_lora_rank]`` and ``[N, v, kv_lora_rank]``."""
        shape = self.shape
        weight_NDL = float_weight(self.kv_b_proj).unflatten(0, (shape.num_attention_heads, -1))
        key, value = weight_NDL.split([shape.qk_nope_head_dim, shape.v_head_dim], dim=1)
        return key, value
