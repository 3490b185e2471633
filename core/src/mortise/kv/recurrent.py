"""The tensors in which recurrent layers keep what they remember of each running request."""

from __future__ import annotations

import torch


class RecurrentPool:
    """One state of every gated delta net layer for each slot; its size is the same at any length.

    Args:
        num_layers: layers that keep a state.
        num_slots: requests that have one at the same time.
        conv_rows: inputs of the convolution that are kept, its width less one.
        channels: of the convolution.
        num_heads: value heads.
        key_dim, value_dim: of one head.
        dtype: of the hidden state, and of the convolution's inputs; the memory is float32.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_slots: int,
        conv_rows: int,
        channels: int,
        num_heads: int,
        key_dim: int,
        value_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_layers = num_layers
        self.num_slots = num_slots
        self.conv_rows = conv_rows
        self.device = device
        self._conv = torch.zeros(
            num_layers, num_slots, conv_rows, channels, dtype=dtype, device=device
        )
        self._memory = torch.zeros(
            (num_layers, num_slots, num_heads, key_dim, value_dim),
            dtype=torch.float32,
            device=device,
        )

    @property
    def num_bytes(self) -> int:
        """Memory of all slots."""
        return self._conv.nbytes + self._memory.nbytes

    def conv(self, layer: int) -> torch.Tensor:
        """``[S, conv_rows, channels]`` of one layer: the newest inputs of its convolution."""
        return self._conv[layer]

    def memory(self, layer: int) -> torch.Tensor:
        """float32 ``[S, num_heads, key_dim, value_dim]`` of one layer."""
        return self._memory[layer]
