"""Grouped-query attention: the projections around an attention that is passed in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from mortise.layers.linear import linear

if TYPE_CHECKING:
    from collections.abc import Callable

    from mortise.layers.context import LayerContext
    from mortise.layers.rotary import Rotation

# Shape suffixes: T tokens, H hidden, N query heads, G key-value heads, M heads of both, D head
# dimension.


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedShape:
    """Sizes of one attention layer (names of the Hugging Face configuration).

    ``num_attention_heads`` is a multiple of ``num_key_value_heads``. ``attention_bias`` is of
    queries, keys and values, ``output_bias`` of the output. With ``output_gate`` the query
    projection is twice as wide, each head's query before its gate (Qwen3-Next).
    """

    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    attention_bias: bool = False
    output_bias: bool = False
    output_gate: bool = False

    @property
    def softmax_scale(self) -> float:
        """Factor on the products of queries and keys."""
        scale: float = self.head_dim**-0.5
        return scale


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedProjections:
    """What attention needs of each token.

    ``query`` ``[T, N, D]`` and ``key`` ``[T, G, D]``, rotated; ``value`` ``[T, G, D]``; ``gate``
    ``[T, N * D]`` of layers that have one, before its sigmoid.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    gate: torch.Tensor | None = None


class GroupedAttend(Protocol):
    """How queries meet keys: over a paged cache, or within the tokens at hand when training."""

    def __call__(
        self, attention: GroupedQueryAttention, projections: GroupedProjections
    ) -> torch.Tensor:
        """Values attended to, ``[T, N, D]``."""
        ...


class GroupedQueryAttention(nn.Module):
    """Attention in which neighbouring query heads share a key-value head (arXiv 2305.13245).

    As many leading dimensions of a head are rotated, in halves, as the rotation is wide; the rest
    are left as they are.

    Args:
        layer: index of the layer in the cache.
        shape: sizes.
        context: where the model is built.
        name: dotted name in the checkpoint.
        qk_norm: makes the norm of one head's dimensions, for queries and for keys before they are
            rotated; None leaves them as projected.
    """

    def __init__(
        self,
        layer: int,
        shape: GroupedShape,
        context: LayerContext,
        name: str,
        *,
        qk_norm: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        assert shape.num_attention_heads % shape.num_key_value_heads == 0
        self.layer = layer
        self.shape = shape
        hidden, bias = shape.hidden_size, shape.attention_bias
        query_size = shape.num_attention_heads * shape.head_dim
        key_size = shape.num_key_value_heads * shape.head_dim
        asked_size = 2 * query_size if shape.output_gate else query_size
        self.q_proj = linear(context, [f"{name}.q_proj"], hidden, asked_size, bias=bias)
        self.k_proj = linear(context, [f"{name}.k_proj"], hidden, key_size, bias=bias)
        self.v_proj = linear(context, [f"{name}.v_proj"], hidden, key_size, bias=bias)
        self.o_proj = linear(
            context, [f"{name}.o_proj"], query_size, hidden, bias=shape.output_bias
        )
        self.q_norm = None if qk_norm is None else qk_norm(shape.head_dim)
        self.k_norm = None if qk_norm is None else qk_norm(shape.head_dim)

    def forward(
        self, hidden_TH: torch.Tensor, rotation: Rotation, attend: GroupedAttend
    ) -> torch.Tensor:
        """``[T, H]`` to ``[T, H]``."""
        projections = self.project(hidden_TH, rotation)
        attended = attend(self, projections).flatten(1)
        if projections.gate is not None:
            attended = attended * projections.gate.sigmoid()
        output: torch.Tensor = self.o_proj(attended)
        return output

    def project(self, hidden_TH: torch.Tensor, rotation: Rotation) -> GroupedProjections:
        """Everything that depends on each token alone."""
        shape = self.shape
        query_TND, gate = self._query(hidden_TH)
        key_TGD = self.k_proj(hidden_TH).unflatten(-1, (shape.num_key_value_heads, -1))
        value_TGD = self.v_proj(hidden_TH).unflatten(-1, (shape.num_key_value_heads, -1))
        if self.q_norm is not None and self.k_norm is not None:
            query_TND, key_TGD = self.q_norm(query_TND), self.k_norm(key_TGD)
        # The keys are rotated as further heads.
        both_TMD = rotated_in_part(torch.cat([query_TND, key_TGD], dim=1), rotation)
        query_TND, key_TGD = both_TMD.split(
            [shape.num_attention_heads, shape.num_key_value_heads], dim=1
        )
        return GroupedProjections(query=query_TND, key=key_TGD, value=value_TGD, gate=gate)

    def _query(self, hidden_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Queries ``[T, N, D]``, and gates ``[T, N * D]`` where there are some."""
        heads = self.q_proj(hidden_TH).unflatten(-1, (self.shape.num_attention_heads, -1))
        if not self.shape.output_gate:
            return heads, None
        query_TND, gate_TND = heads.chunk(2, dim=-1)
        return query_TND, gate_TND.flatten(1)


def rotated_in_part(heads_TMD: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Rotate the leading dimensions of ``[T, M, D]``, as many as the rotation is wide."""
    rotary_dim, head_dim = rotation.cos.shape[-1], heads_TMD.shape[-1]
    turned, rest = heads_TMD.split([rotary_dim, head_dim - rotary_dim], dim=-1)
    return torch.cat([rotation.halves(turned), rest], dim=-1)
