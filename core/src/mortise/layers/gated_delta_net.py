"""Gated delta net: linear attention whose memory of a sequence is one matrix per head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

if TYPE_CHECKING:
    from mortise.backends.ops import Ops
    from mortise.spec.qkv import QKVParts, QKVShape

# Shape suffixes: T tokens, H hidden, C = 2*nk*hk + nv*hv channels of the convolution, W its width,
# L = W - 1 + T rows that it sees, N value heads (nv), D key head dimension (hk), V value head
# dimension (hv).


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedDeltaState:
    """All that one layer remembers of one sequence, whatever its length.

    ``conv`` ``[W - 1, C]``: the newest inputs of the convolution, in the layer's dtype.
    ``recurrent`` float32 ``[N, D, V]``: what was written under each direction of the keys.
    A value: a forward pass returns another one and writes to neither tensor.
    """

    conv: torch.Tensor
    recurrent: torch.Tensor


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

    Parameters have the names of a Qwen3-Next checkpoint, whose layout is interleaved. A Qwen3.5
    checkpoint is contiguous and stores the fused weights apart: ``in_proj_qkvz`` is its
    ``in_proj_qkv`` above its ``in_proj_z``, and ``in_proj_ba`` its ``in_proj_b`` above its
    ``in_proj_a``.

    Args:
        hidden_size: H.
        shape: heads, head sizes and the layout of the fused projections; the number of value heads
            is a multiple of the number of key heads.
        conv_kernel_size: W, tokens that the causal convolution sees.
        rms_norm_eps: of the gated norm.
        ops: the hooks bound for this role.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        shape: QKVShape,
        conv_kernel_size: int,
        rms_norm_eps: float,
        ops: Ops,
    ) -> None:
        super().__init__()
        assert shape.num_value_heads % shape.num_key_heads == 0
        self.shape = shape
        self.ops = ops
        self.keys = shape.num_key_heads * shape.key_head_dim
        self.values = shape.num_value_heads * shape.value_head_dim
        channels = 2 * self.keys + self.values
        self.in_proj_qkvz = nn.Linear(hidden_size, channels + self.values, bias=False)
        self.in_proj_ba = nn.Linear(hidden_size, 2 * shape.num_value_heads, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, conv_kernel_size, groups=channels, bias=False)
        self.A_log = nn.Parameter(torch.empty(shape.num_value_heads))
        self.dt_bias = nn.Parameter(torch.empty(shape.num_value_heads))
        self.norm = GatedRMSNorm(shape.value_head_dim, rms_norm_eps)
        self.out_proj = nn.Linear(self.values, hidden_size, bias=False)

    def new_state(self) -> GatedDeltaState:
        """The state before the first token, all zero, on the device of the weights."""
        channels, _, width = self.conv1d.weight.shape
        shape, weight = self.shape, self.in_proj_qkvz.weight
        return GatedDeltaState(
            conv=weight.new_zeros(width - 1, channels),
            recurrent=weight.new_zeros(
                (shape.num_value_heads, shape.key_head_dim, shape.value_head_dim),
                dtype=torch.float32,
            ),
        )

    def forward(
        self, hidden_TH: torch.Tensor, state: GatedDeltaState
    ) -> tuple[torch.Tensor, GatedDeltaState]:
        """Read the next tokens of one sequence, any number of them, none included.

        Args:
            hidden_TH: ``[T, H]``, compute dtype.
            state: what the tokens before left; ``new_state()`` before the first.

        Returns:
            ``[T, H]`` of the same dtype, and the state after the last token. However a sequence is
            cut into calls, the results are the same up to rounding.
        """
        parts = self.ops.qkv_split(
            self.in_proj_qkvz(hidden_TH), self.in_proj_ba(hidden_TH), self.shape
        )
        mixed_TC, conv = causal_conv(parts.mixed_qkv, state.conv, self.conv1d.weight.squeeze(1))
        query_TND, key_TND, value_TNV = self._heads(mixed_TC)
        decay_TN, beta_TN = self._gates(parts)
        attended_TNV, recurrent = gated_delta_rule(
            query_TND, key_TND, value_TNV, decay_TN, beta_TN, state.recurrent
        )
        output_TH: torch.Tensor = self.out_proj(self.norm(attended_TNV, parts.z).flatten(1))
        return output_TH, GatedDeltaState(conv=conv, recurrent=recurrent)

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
        """How much of the memory stays and how much of the new is written, ``[T, N]``, 0 to 1."""
        step_TN = F.softplus(parts.a.float() + self.dt_bias.float())
        return (-self.A_log.float().exp() * step_TN).exp(), parts.b.float().sigmoid()


def causal_conv(
    rows_TC: torch.Tensor, before: torch.Tensor, weight_CW: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Depthwise convolution over this and the ``W - 1`` tokens before, then SiLU.

    Args:
        rows_TC: ``[T, C]``.
        before: ``[W - 1, C]``, the rows that came before.
        weight_CW: ``[C, W]``, the newest token's weight last.

    Returns:
        float32 ``[T, C]``, and the newest ``W - 1`` rows in storage of their own.
    """
    tokens, width = rows_TC.shape[0], weight_CW.shape[1]
    assert before.shape == (width - 1, rows_TC.shape[1])
    seen_LC = torch.cat([before, rows_TC])
    # Not conv1d, which refuses to see fewer rows than its width: no token is a legal input.
    taps = [seen_LC[tap : tap + tokens].float() * weight_CW[:, tap].float() for tap in range(width)]
    return F.silu(torch.stack(taps).sum(dim=0)), seen_LC[tokens:].clone()


def l2_normalised(x: torch.Tensor) -> torch.Tensor:
    """Vectors along the last dimension divided by their length, 1e-6 under the root."""
    return x * torch.rsqrt(x.square().sum(dim=-1, keepdim=True) + 1e-6)


def gated_delta_rule(
    query_TND: torch.Tensor,
    key_TND: torch.Tensor,
    value_TNV: torch.Tensor,
    decay_TN: torch.Tensor,
    beta_TN: torch.Tensor,
    state_NDV: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Forget, correct, read, one token after another (arXiv 2412.06464, equation 10).

    ``S = S * decay``, then ``S += key (beta * (value - key @ S))``, then ``output = query @ S``.
    Everything is float32, also where a model computes in less: errors in the memory add up.

    Returns:
        Outputs ``[T, N, V]`` and the memory after the last token ``[N, D, V]``.
    """
    output_TNV = torch.empty_like(value_TNV)
    for token in range(value_TNV.shape[0]):
        key_ND1 = key_TND[token].unsqueeze(-1)
        state_NDV = state_NDV * decay_TN[token, :, None, None]
        recalled_NV = (key_ND1 * state_NDV).sum(dim=1)
        correction_NV = (value_TNV[token] - recalled_NV) * beta_TN[token].unsqueeze(-1)
        state_NDV = state_NDV + key_ND1 * correction_NV.unsqueeze(1)
        output_TNV[token] = (query_TND[token].unsqueeze(-1) * state_NDV).sum(dim=1)
    return output_TNV, state_NDV
