"""The pool's tensors: one row a token and layer, finite where nothing was written."""

from __future__ import annotations

import pytest
import torch

from mortise.kv.latent import LatentPool


def pool(index_dim: int | None = 4, dtype: torch.dtype = torch.bfloat16) -> LatentPool:
    return LatentPool(
        num_layers=3,
        num_pages=2,
        latent_dim=6,
        index_dim=index_dim,
        dtype=dtype,
        device=torch.device("cpu"),
    )


def test_layers_have_memory_of_their_own() -> None:
    one = pool()
    one.latents(1).fill_(1)
    one.index_keys(2).fill_(2)
    assert [float(one.latents(layer).sum()) for layer in range(3)] == [0, 2 * 64 * 6, 0]
    assert [float(one.index_keys(layer).sum()) for layer in range(3)] == [0, 0, 2 * 2 * 64 * 4]


def test_shapes_and_size() -> None:
    one = pool()
    assert one.latents(0).shape == (2, 64, 6)
    assert one.index_keys(0).shape == (2, 64, 4)
    assert one.latents(0).dtype == one.index_keys(0).dtype == one.dtype == torch.bfloat16
    assert one.num_bytes == 3 * 2 * 64 * (6 + 4) * 2
    assert pool(dtype=torch.float32).num_bytes == 2 * one.num_bytes


def test_a_model_without_indexer_caches_no_index_keys() -> None:
    one = pool(index_dim=None)
    assert one.num_bytes == 3 * 2 * 64 * 6 * 2
    with pytest.raises(AssertionError, match="no indexer"):
        one.index_keys(0)
