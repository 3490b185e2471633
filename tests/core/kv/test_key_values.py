"""The pool of keys and values: a row a token, layer and head, finite where none was written."""

from __future__ import annotations

import torch

from mortise.kv.key_values import KeyValuePool


def pool(
    dtype: torch.dtype = torch.bfloat16, num_pages: int = 2, device: str = "cpu"
) -> KeyValuePool:
    return KeyValuePool(
        num_layers=3,
        num_pages=num_pages,
        num_heads=5,
        key_dim=4,
        value_dim=6,
        dtype=dtype,
        device=torch.device(device),
    )


def test_layers_have_memory_of_their_own() -> None:
    one = pool()
    one.keys(1).fill_(1)
    one.values(2).fill_(2)
    assert [float(one.keys(layer).sum()) for layer in range(3)] == [0, 2 * 64 * 5 * 4, 0]
    assert [float(one.values(layer).sum()) for layer in range(3)] == [0, 0, 2 * 2 * 64 * 5 * 6]


def test_shapes_and_size() -> None:
    one = pool()
    assert one.keys(0).shape == (2, 64, 5, 4)
    assert one.values(0).shape == (2, 64, 5, 6)
    assert one.keys(0).dtype == one.values(0).dtype == one.dtype == torch.bfloat16
    assert one.num_bytes == 3 * 2 * 64 * 5 * (4 + 6) * 2
    assert pool(torch.float32).num_bytes == 2 * one.num_bytes


def test_a_pool_without_memory_tells_what_one_page_takes() -> None:
    """The engine asks before it allocates."""
    assert 2 * pool(num_pages=1, device="meta").num_bytes == pool().num_bytes
