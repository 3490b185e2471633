"""The cache of grouped-query attention, for the layers of a model or the one of a draft."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from mortise.kv.key_values import KeyValuePool
from mortise.layers.paged_grouped_attention import PagedGroupedAttention

if TYPE_CHECKING:
    import torch

    from mortise.layers.paged_attention import BatchLayout
    from mortise.models.family import CachePool


class CachedHeads(Protocol):
    """What a configuration says of the rows that are cached."""

    @property
    def num_key_value_heads(self) -> int:
        """Heads of keys, and of values."""
        ...

    @property
    def head_dim(self) -> int:
        """Numbers of each."""
        ...


class KeyValueCached:
    """A model all of whose layers cache keys and values.

    Attributes:
        config: the model's configuration.
        num_cached_layers: layers that have a place in the cache.
    """

    config: CachedHeads
    num_cached_layers: int

    def new_pool(
        self,
        num_pages: int,
        dtype: torch.dtype,
        device: torch.device,
        num_slots: int = 0,  # noqa: ARG002
    ) -> KeyValuePool:
        """An empty cache for every layer; no layer keeps states."""
        return KeyValuePool(
            num_layers=self.num_cached_layers,
            num_pages=num_pages,
            num_heads=self.config.num_key_value_heads,
            key_dim=self.config.head_dim,
            value_dim=self.config.head_dim,
            dtype=dtype,
            device=device,
        )

    def new_pass(self, pool: CachePool, layout: BatchLayout) -> PagedGroupedAttention:
        """Plan one forward pass over the cache."""
        assert isinstance(pool, KeyValuePool)
        return PagedGroupedAttention(pool, layout)
