"""The tensors in which the pages of latent attention and of the indexer live."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mortise.kv.index_keys import IndexKeyCache
from mortise.kv.pages import PAGE_SIZE
from mortise.spec.paged_mqa import IndexKeyDtype

if TYPE_CHECKING:
    from collections.abc import Sequence


class LatentPool:
    """Cached rows of every layer: MLA latents, and index keys where the model has an indexer.

    Args:
        num_layers: layers that cache.
        num_pages: pages per layer, shared by all requests.
        latent_dim: ``kv_lora_rank + qk_rope_head_dim``.
        index_dim: ``index_head_dim``, or None without an indexer.
        index_layers: the layers that have an indexer of their own, or None for all.
        index_key_dtype: how index keys are stored.
        dtype: of the hidden state, and of latents.
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
        index_layers: Sequence[int] | None = None,
        index_key_dtype: IndexKeyDtype = IndexKeyDtype.COMPUTE,
    ) -> None:
        self.num_pages = num_pages
        self.dtype = dtype
        # Zeros, not garbage: rows that no token ever wrote are masked, and must be finite.
        self._latents = torch.zeros(
            num_layers, num_pages, PAGE_SIZE, latent_dim, dtype=dtype, device=device
        )
        self._index_keys = None
        if index_dim is not None:
            self._index_keys = IndexKeyCache(
                layers=range(num_layers) if index_layers is None else index_layers,
                num_pages=num_pages,
                dim=index_dim,
                key_dtype=index_key_dtype,
                dtype=dtype,
                device=device,
            )

    @property
    def num_bytes(self) -> int:
        """Memory of all pages."""
        index = 0 if self._index_keys is None else self._index_keys.num_bytes
        return self._latents.nbytes + index

    def latents(self, layer: int) -> torch.Tensor:
        """``[P, 64, latent_dim]`` of one layer."""
        return self._latents[layer]

    @property
    def index_keys(self) -> IndexKeyCache:
        """The keys of every layer's indexer."""
        assert self._index_keys is not None, "this model has no indexer"
        return self._index_keys
