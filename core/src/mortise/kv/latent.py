"""The tensors in which the pages of latent attention and of the indexer live."""

from __future__ import annotations

import torch

from mortise.kv.pages import PAGE_SIZE


class LatentPool:
    """Cached rows of every layer: MLA latents, and index keys where the model has an indexer.

    Args:
        num_layers: layers that cache.
        num_pages: pages per layer, shared by all requests.
        latent_dim: ``kv_lora_rank + qk_rope_head_dim``.
        index_dim: ``index_head_dim``, or None without an indexer.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_pages: int,
        latent_dim: int,
        index_dim: int | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_pages = num_pages
        self.dtype = dtype

        def pages(dim: int) -> torch.Tensor:
            # Zeros, not garbage: rows that no token ever wrote are masked, and must be finite.
            return torch.zeros(num_layers, num_pages, PAGE_SIZE, dim, dtype=dtype, device=device)

        self._latents = pages(latent_dim)
        self._index_keys = None if index_dim is None else pages(index_dim)

    @property
    def num_bytes(self) -> int:
        """Memory of all pages."""
        index = 0 if self._index_keys is None else self._index_keys.nbytes
        return self._latents.nbytes + index

    def latents(self, layer: int) -> torch.Tensor:
        """``[P, 64, latent_dim]`` of one layer."""
        return self._latents[layer]

    def index_keys(self, layer: int) -> torch.Tensor:
        """``[P, 64, index_dim]`` of one layer."""
        assert self._index_keys is not None, "this model has no indexer"
        return self._index_keys[layer]
