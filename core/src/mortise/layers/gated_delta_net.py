"""Gated delta net: linear attention whose memory of a sequence is one matrix per head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self

import torch
import torch.nn.functional as F
from torch import nn

from mortise.layers.gated_delta_rule import gated_delta_rule
from mortise.layers.linear import linear
from mortise.spec.qkv import QKVLayout, QKVParts

if TYPE_CHECKING:
    from mortise.layers.context import LayerContext
    from mortise.layers.sequences import Sequences, Steps
    from mortise.spec.qkv import QKVShape

# Shape suffixes: B sequences, T tokens of all, H hidden, C = 2*nk*hk + nv*hv channels of the
# convolution, W its width, R = W - 1 rows that it keeps, N value heads (nv), D key head dimension
# (hk), V value head dimension (hv), S tokens of each sequence where all have as many.


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedDeltaState:
    """All that one layer remembers of B sequences, whatever their lengths.

    ``conv`` ``[B, W - 1, C]``: the newest inputs of the convolution, in the layer's dtype.
    ``recurrent`` float32 ``[B, N, D, V]``: what was written under each direction of the keys.
    A value: a forward pass returns another one and writes to neither tensor.
    """

    conv: torch.Tensor
    recurrent: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedDeltaSteps:
    """All that one layer would remember of B sequences after each of S tokens.

    ``conv`` ``[B, S, W - 1, C]`` and ``recurrent`` float32 ``[B, S, N, D, V]``: S states of every
    sequence, in storage of their own.
    """

    conv: torch.Tensor
    recurrent: torch.Tensor

    @classmethod
    def room(cls, state: GatedDeltaState, num_steps: int) -> Self:
        """Uninitialised room for ``num_steps`` states of every sequence of ``state``."""
        return cls(conv=_room(state.conv, num_steps), recurrent=_room(state.recurrent, num_steps))

    @property
    def num_bytes(self) -> int:
        """Memory of all these states."""
        return self.conv.nbytes + self.recurrent.nbytes

    def put(self, step: int, state: GatedDeltaState) -> None:
        """Keep what is remembered after token ``step`` of every sequence."""
        self.conv[:, step] = state.conv
        self.recurrent[:, step] = state.recurrent

    def after(self, num_tokens_B: torch.Tensor) -> GatedDeltaState:
        """What is remembered after the first tokens of each sequence.

        Args:
            num_tokens_B: int64 ``[B]``, from 1 to S.
        """
        every_B = torch.arange(len(num_tokens_B), device=num_tokens_B.device)
        newest_B = num_tokens_B - 1
        return GatedDeltaState(
            conv=self.conv[every_B, newest_B], recurrent=self.recurrent[every_B, newest_B]
        )


def _room(state: torch.Tensor, num_steps: int) -> torch.Tensor:
    return state.new_empty(state.shape[0], num_steps, *state.shape[1:])


class Recur(Protocol):
    """Where the states of a pass come from, and what becomes of them."""

    def __call__(self, net: GatedDeltaNet, hidden_TH: torch.Tensor) -> torch.Tensor:
        """Let a layer read the pass's tokens: ``[T, H]`` to ``[T, H]``."""
        ...


class GatedRMSNorm(nn.Module):
    """``x / rms(x) * weight * silu(gate)``, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, hidden: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """``[..., size]`` twice to the same shape, dtype of the gate."""
        weight = self.weight.float()
        normed = F.rms_norm(hidden.float(), weight.shape, weight, self.eps)
        return (normed * F.silu(gate.float())).to(gate.dtype)


class GatedDeltaNet(nn.Module):
    """The linear attention of Qwen3-Next and Qwen3.5 (Gated Delta Networks, arXiv 2412.06464).

    Modules have the names of the checkpoint. An interleaved one (Qwen3-Next) stores the fused
    ``in_proj_qkvz`` and ``in_proj_ba``; a contiguous one (Qwen3.5) stores ``in_proj_qkv``,
    ``in_proj_z``, ``in_proj_b`` and ``in_proj_a``, whose outputs are joined.

    Args:
        layer: index of the layer among those that keep a state.
        context: where the model is built.
        name: dotted name in the checkpoint.
        hidden_size: H.
        shape: heads, head sizes and the layout of the fused projections; the number of value heads
            is a multiple of the number of key heads.
        conv_kernel_size: W, tokens that the causal convolution sees.
        rms_norm_eps: of the gated norm.
    """

    def __init__(
        self,
        layer: int,
        context: LayerContext,
        name: str,
        *,
        hidden_size: int,
        shape: QKVShape,
        conv_kernel_size: int,
        rms_norm_eps: float,
    ) -> None:
        super().__init__()
        assert shape.num_value_heads % shape.num_key_heads == 0
        self.layer = layer
        self.shape = shape
        self.ops = context.ops
        self.keys = shape.num_key_heads * shape.key_head_dim
        self.values = shape.num_value_heads * shape.value_head_dim
        channels, heads = 2 * self.keys + self.values, shape.num_value_heads
        self._qkvz, self._ba = _stored_projections(shape.layout, channels, self.values, heads)
        for own, size in (*self._qkvz.items(), *self._ba.items()):
            setattr(self, own, linear(context, [f"{name}.{own}"], hidden_size, size))
        self.conv1d = nn.Conv1d(channels, channels, conv_kernel_size, groups=channels, bias=False)
        self.A_log = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.norm = GatedRMSNorm(shape.value_head_dim, rms_norm_eps)
        self.out_proj = linear(context, [f"{name}.out_proj"], self.values, hidden_size)

    def forward(self, hidden_TH: torch.Tensor, recur: Recur) -> torch.Tensor:
        """Read the next tokens of several requests, and keep what is remembered of them.

        Args:
            hidden_TH: ``[T, H]``, compute dtype.
            recur: the states of the requests.

        Returns:
            ``[T, H]`` of the same dtype.
        """
        return recur(self, hidden_TH)

    def advance(
        self, hidden_TH: torch.Tensor, sequences: Sequences, state: GatedDeltaState
    ) -> tuple[torch.Tensor, GatedDeltaState]:
        """Read the next tokens of several sequences, any number of them, none included.

        Args:
            hidden_TH: ``[T, H]``, compute dtype.
            sequences: which rows are whose; its windows are as wide as the convolution.
            state: what the tokens before left; all zero before the first.

        Returns:
            ``[T, H]`` of the same dtype, and the state after the last token of each sequence.
            However a sequence is cut into calls, the results are the same up to rounding.
        """
        recalled_TX, state = self._recall(self._parts(hidden_TH), sequences, state)
        output_TH: torch.Tensor = self.out_proj(recalled_TX)
        return output_TH, state

    def advance_by_steps(
        self, hidden_TH: torch.Tensor, steps: Steps, state: GatedDeltaState
    ) -> tuple[torch.Tensor, GatedDeltaSteps]:
        """Read as many tokens of each sequence, and keep what is remembered after every one.

        Between the projections, which take all rows at once, tokens are read one after another as
        :meth:`advance` reads single ones: to the bit what that gives of the same projected rows.

        Args:
            hidden_TH: ``[B * S, H]``, compute dtype, the tokens of a sequence together.
            steps: which rows are whose; its windows are as wide as the convolution.
            state: what the tokens before left; all zero before the first.

        Returns:
            ``[B * S, H]`` of the same dtype, and the states after each token.
        """
        parts, kept = self._parts(hidden_TH), GatedDeltaSteps.room(state, steps.num_steps)
        recalled_TX = parts.z.new_empty(len(hidden_TH), self.values)
        for step, rows_B in enumerate(steps.rows_SB):
            recalled_TX[rows_B], state = self._recall(_taken(parts, rows_B), steps.single, state)
            kept.put(step, state)
        output_TH: torch.Tensor = self.out_proj(recalled_TX)
        return output_TH, kept

    def _recall(
        self, parts: QKVParts, sequences: Sequences, state: GatedDeltaState
    ) -> tuple[torch.Tensor, GatedDeltaState]:
        """What is between the projections: ``[T, nv * hv]``, and the state after the tokens."""
        mixed_TC, conv = causal_conv(
            parts.mixed_qkv, state.conv, self.conv1d.weight.squeeze(1), sequences
        )
        attended_TNV, recurrent = gated_delta_rule(
            *self._heads(mixed_TC), *self._gates(parts), state.recurrent, sequences
        )
        recalled_TX = self.norm(attended_TNV, parts.z).flatten(1)
        return recalled_TX, GatedDeltaState(conv=conv, recurrent=recurrent)

    def _parts(self, hidden_TH: torch.Tensor) -> QKVParts:
        return self.ops.qkv_split(
            self._joined(self._qkvz, hidden_TH), self._joined(self._ba, hidden_TH), self.shape
        )

    def _joined(self, modules: dict[str, int], hidden_TH: torch.Tensor) -> torch.Tensor:
        outputs = [getattr(self, own)(hidden_TH) for own in modules]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)

    def _heads(self, mixed_TC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Normalised queries and keys ``[T, N, D]``, one per value head, and values."""
        shape = self.shape
        query, key, value = mixed_TC.split([self.keys, self.keys, self.values], dim=-1)
        query, key = (
            # Every key head serves as many neighbouring value heads.
            l2_normalised(
                part.unflatten(-1, (shape.num_key_heads, shape.key_head_dim))
            ).repeat_interleave(shape.num_value_heads // shape.num_key_heads, dim=1)
            for part in (query, key)
        )
        value = value.unflatten(-1, (shape.num_value_heads, shape.value_head_dim))
        return query * shape.key_head_dim**-0.5, key, value

    def _gates(self, parts: QKVParts) -> tuple[torch.Tensor, torch.Tensor]:
        """How much of the memory stays, as a logarithm, and how much of the new is written."""
        step_TN = F.softplus(parts.a.float() + self.dt_bias.float())
        return -self.A_log.float().exp() * step_TN, parts.b.float().sigmoid()


def _stored_projections(
    layout: QKVLayout, channels: int, values: int, heads: int
) -> tuple[dict[str, int], dict[str, int]]:
    """Modules that make ``qkvz`` and ``ba``, in the order of their outputs, with the sizes."""
    if layout is QKVLayout.INTERLEAVED:
        return {"in_proj_qkvz": channels + values}, {"in_proj_ba": 2 * heads}
    return (
        {"in_proj_qkv": channels, "in_proj_z": values},
        {"in_proj_b": heads, "in_proj_a": heads},
    )


def _taken(parts: QKVParts, rows: torch.Tensor) -> QKVParts:
    """Some rows of every part, each part contiguous as it was."""
    return QKVParts(
        mixed_qkv=parts.mixed_qkv.index_select(0, rows),
        z=parts.z.index_select(0, rows),
        b=parts.b.index_select(0, rows),
        a=parts.a.index_select(0, rows),
    )


def causal_conv(
    rows_TC: torch.Tensor, before_BRC: torch.Tensor, weight_CW: torch.Tensor, sequences: Sequences
) -> tuple[torch.Tensor, torch.Tensor]:
    """Depthwise convolution over this and the ``W - 1`` tokens before, then SiLU.

    Args:
        rows_TC: ``[T, C]``.
        before_BRC: ``[B, W - 1, C]``, the rows that came before.
        weight_CW: ``[C, W]``, the newest token's weight last.
        sequences: which rows are whose.

    Returns:
        float32 ``[T, C]``, and the newest rows ``[B, W - 1, C]`` in storage of their own.
    """
    width = weight_CW.shape[1]
    assert width == sequences.width and before_BRC.shape[:2] == (sequences.num_sequences, width - 1)
    seen = torch.cat([before_BRC.flatten(0, 1), rows_TC])
    mixed_TC = torch.zeros_like(rows_TC, dtype=torch.float32)
    for tap_T, weight_C in zip(
        sequences.window_TW.unbind(1), weight_CW.float().unbind(1), strict=True
    ):
        mixed_TC += seen.index_select(0, tap_T).float() * weight_C
    return F.silu(mixed_TC), seen[sequences.newest_BR]


def l2_normalised(x: torch.Tensor) -> torch.Tensor:
    """Vectors along the last dimension divided by their length, 1e-6 under the root."""
    return x * torch.rsqrt(x.square().sum(dim=-1, keepdim=True) + 1e-6)
