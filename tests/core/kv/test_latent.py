"""The pool's tensors: one row a token and layer, finite where nothing was written."""

from __future__ import annotations

import pytest
import torch

from mortise.kv.latent import LatentPool
from mortise.spec.paged_mqa import IndexKeyDtype

FP8 = IndexKeyDtype.FP8_E4M3


def pool(
    index_dim: int | None = 4,
    dtype: torch.dtype = torch.bfloat16,
    key_dtype: IndexKeyDtype = IndexKeyDtype.COMPUTE,
) -> LatentPool:
    return LatentPool(
        num_layers=3,
        num_pages=2,
        latent_dim=6,
        index_dim=index_dim,
        dtype=dtype,
        device=torch.device("cpu"),
        index_key_dtype=key_dtype,
    )


def test_layers_have_memory_of_their_own() -> None:
    one = pool()
    one.latents(1).fill_(1)
    keys = [one.index_keys.pages(layer).keys for layer in range(3)]
    keys[2].fill_(2)
    assert [float(one.latents(layer).sum()) for layer in range(3)] == [0, 2 * 64 * 6, 0]
    assert [float(own.sum()) for own in keys] == [0, 0, 2 * 2 * 64 * 4]


def test_shapes_and_size() -> None:
    one = pool()
    pages = one.index_keys.pages(0)
    assert one.latents(0).shape == (2, 64, 6)
    assert pages.keys.shape == (2, 64, 4)
    assert pages.keys.is_contiguous()
    assert pages.scales is None
    assert one.latents(0).dtype == pages.keys.dtype == one.dtype == torch.bfloat16
    assert one.num_bytes == 3 * 2 * 64 * (6 + 4) * 2
    assert pool(dtype=torch.float32).num_bytes == 2 * one.num_bytes


def test_a_model_without_indexer_caches_no_index_keys() -> None:
    one = pool(index_dim=None)
    assert one.num_bytes == 3 * 2 * 64 * 6 * 2
    with pytest.raises(AssertionError, match="no indexer"):
        _ = one.index_keys


@pytest.mark.parametrize("dim", [1, 3, 4, 128])
def test_float8_keys_and_their_scales_are_one_block_a_page(dim: int) -> None:
    """What the kernels of a chip take: ``[P, 64, 1, D + 4]`` bytes, the scales behind the keys."""
    one = pool(index_dim=dim, key_dtype=FP8)
    assert one.num_bytes == 3 * 2 * 64 * (6 * 2 + dim + 4)
    pages = one.index_keys.pages(1)
    assert pages.scales is not None
    assert (pages.keys.shape, pages.keys.dtype) == ((2, 64, dim), torch.float8_e4m3fn)
    assert (pages.scales.shape, pages.scales.dtype) == ((2, 64), torch.float32)
    block = 64 * (dim + 4)
    assert pages.keys.stride() == (block, dim, 1)
    assert pages.scales.stride() == (block // 4, 1)
    assert pages.scales.data_ptr() - pages.keys.data_ptr() == 64 * dim
    assert pages.scales.data_ptr() % 4 == 0
    other = one.index_keys.pages(2)
    assert other.keys.data_ptr() - pages.keys.data_ptr() == 2 * block


def test_a_pool_without_memory_tells_what_one_page_takes() -> None:
    """The engine asks before it allocates."""
    meta = LatentPool(
        num_layers=3,
        num_pages=1,
        latent_dim=6,
        index_dim=4,
        dtype=torch.bfloat16,
        device=torch.device("meta"),
        index_key_dtype=FP8,
    )
    assert 2 * meta.num_bytes == pool(key_dtype=FP8).num_bytes
