"""The tensors in which the pages of keys and values live, for attention that caches both."""

from __future__ import annotations

import torch

from mortise.kv.pages import PAGE_SIZE


class KeyValuePool:
    """Cached keys and values of every attention layer, one row a token and key-value head.

    Args:
        num_layers: layers that cache; layers of other kinds have no place here.
        num_pages: pages per layer, shared by all requests.
        num_heads: key-value heads.
        key_dim, value_dim: dimensions of one head.
        dtype: of the hidden state, and of what is cached.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_pages: int,
        num_heads: int,
        key_dim: int,
        value_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_pages = num_pages
        self.dtype = dtype
        # Zeros, not garbage: rows that no token ever wrote are masked, and must be finite.
        self._keys, self._values = (
            torch.zeros(
                num_layers, num_pages, PAGE_SIZE, num_heads, dim, dtype=dtype, device=device
            )
            for dim in (key_dim, value_dim)
        )

    @property
    def num_bytes(self) -> int:
        """Memory of all pages."""
        return self._keys.nbytes + self._values.nbytes

    def keys(self, layer: int) -> torch.Tensor:
        """``[P, 64, G, key_dim]`` of one layer, G key-value heads."""
        return self._keys[layer]

    def values(self, layer: int) -> torch.Tensor:
        """``[P, 64, G, value_dim]`` of one layer, G key-value heads."""
        return self._values[layer]
