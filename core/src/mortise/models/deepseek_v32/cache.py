"""The cache of latent attention, for the main model's layers and for the draft's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mortise.kv.latent import LatentPool
from mortise.layers.paged_attention import PagedAttention

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from mortise.layers.context import LayerContext
    from mortise.layers.paged_attention import BatchLayout
    from mortise.models.deepseek_v32.config import LatentMoEConfig
    from mortise.models.family import CachePool


class LatentCached:
    """A model whose layers cache latent rows, and index keys where they have an indexer.

    Attributes:
        config: the model's configuration.
        context: the surroundings of its layers.
        cached_layers: numbers in the checkpoint of the layers, in the order of their places in the
            cache.
    """

    config: LatentMoEConfig
    context: LayerContext
    cached_layers: Sequence[int]

    def new_pool(
        self,
        num_pages: int,
        dtype: torch.dtype,
        device: torch.device,
        num_slots: int = 0,  # noqa: ARG002
    ) -> LatentPool:
        """An empty cache for every layer; none keeps a state."""
        return LatentPool(
            num_layers=len(self.cached_layers),
            num_pages=num_pages,
            latent_dim=self.config.latent_dim,
            index_dim=self.config.index_head_dim,
            index_layers=[
                place
                for place, layer in enumerate(self.cached_layers)
                if self.config.has_own_indexer(layer)
            ],
            dtype=dtype,
            device=device,
            index_key_dtype=self.context.index_key_dtype,
        )

    def new_pass(self, pool: CachePool, layout: BatchLayout) -> PagedAttention:
        """Plan one forward pass over the cache."""
        assert isinstance(pool, LatentPool)
        return PagedAttention(self.context.ops, pool, layout, self.config.index_topk)
