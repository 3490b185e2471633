"""Cached index keys are what was written, up to the rounding of their format, and nothing else."""

from __future__ import annotations

import pytest
import torch

from mortise.kv.index_keys import IndexKeyCache
from mortise.spec.paged_mqa import IndexKeyDtype

SLOTS = torch.tensor([3, 64, 63, 191])


def cache(
    dim: int = 32,
    key_dtype: IndexKeyDtype = IndexKeyDtype.FP8_E4M3,
    dtype: torch.dtype = torch.float32,
) -> IndexKeyCache:
    return IndexKeyCache(
        layers=range(2),
        num_pages=3,
        dim=dim,
        key_dtype=key_dtype,
        dtype=dtype,
        device=torch.device("cpu"),
    )


def rows(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def stored(one: IndexKeyCache, layer: int) -> torch.Tensor:
    """float32 ``[P * 64, D]``, scales multiplied."""
    pages = one.pages(layer)
    keys = pages.keys.float()
    return (keys if pages.scales is None else keys * pages.scales.unsqueeze(-1)).flatten(0, 1)


@pytest.mark.parametrize("dim", [24, 32])
def test_what_is_written_is_read_within_half_a_step(dim: int) -> None:
    """The last bit of e4m3 is 1/8 of a power of two; below 2**-6 its step is fixed."""
    one, keys = cache(dim), rows(4, dim)
    one.write(1, SLOTS, keys)
    got, wanted = stored(one, 1)[SLOTS], one.turned(keys)
    step = torch.maximum(wanted.abs() / 16, wanted.abs().amax(-1, keepdim=True) / 448 * 2**-10)
    assert ((got - wanted).abs() <= step * (1 + 1e-5)).all()
    assert not torch.equal(got, wanted)


def test_nothing_else_is_written() -> None:
    one = cache()
    one.write(1, SLOTS, rows(4, 32))
    untouched = torch.ones(192, dtype=torch.bool)
    untouched[SLOTS] = False
    assert not stored(one, 1)[untouched].any()
    assert not stored(one, 0).any()
    scales = one.pages(1).scales
    assert scales is not None
    assert not scales.flatten()[untouched].any()


def test_a_later_write_replaces_an_earlier_one() -> None:
    one, keys = cache(), rows(4, 32)
    one.write(0, SLOTS, 1000 * rows(4, 32).flip(0))
    one.write(0, SLOTS, keys)
    fresh = cache()
    fresh.write(0, SLOTS, keys)
    assert torch.equal(stored(one, 0), stored(fresh, 0))


def test_no_row_at_all() -> None:
    one = cache()
    one.write(0, SLOTS[:0], rows(0, 32))
    assert not stored(one, 0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_in_the_compute_dtype_are_exact(dtype: torch.dtype) -> None:
    one, keys = cache(24, IndexKeyDtype.COMPUTE, dtype), rows(4, 24).to(dtype)
    one.write(1, SLOTS, keys)
    assert torch.equal(one.pages(1).keys.flatten(0, 1)[SLOTS], keys)
    assert one.turned(keys) is keys


def test_products_with_turned_queries_are_the_products() -> None:
    one, keys, queries = cache(), rows(4, 32), rows(5, 2, 32).flip(-1)
    got = one.turned(queries) @ one.turned(keys).T
    torch.testing.assert_close(got, queries @ keys.T)


def test_where_the_width_is_no_power_of_two_nothing_is_turned() -> None:
    queries = rows(4, 24)
    assert cache(24).turned(queries) is queries
