"""Numbers inside words, against arithmetic on Python's integers."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mortise_npu_ascend.emulator.poison import poison_rows, unwritten
from mortise_npu_ascend.emulator.words import (
    pack_words,
    scale_of_words,
    scale_words,
    unpack_words,
)

NIBBLES = st.lists(st.integers(-8, 7), min_size=8, max_size=8)


def word_of(values: list[int]) -> int:
    """Eight int4 values as an unsigned number, the first in the lowest four bits."""
    return sum((value % 16) << (4 * place) for place, value in enumerate(values))


@settings(deadline=None, max_examples=50)
@given(st.lists(NIBBLES, min_size=1, max_size=4))
def test_the_lowest_nibble_is_the_first_value(rows: list[list[int]]) -> None:
    values = torch.tensor(rows)
    words = pack_words(values)
    assert words.shape == (len(rows), 1)
    assert [word % 2**32 for word in words[:, 0].tolist()] == [word_of(row) for row in rows]
    assert torch.equal(unpack_words(words).to(torch.int64), values)


def test_every_nibble_comes_back() -> None:
    values = torch.arange(-8, 8, dtype=torch.int8).view(2, 8)
    assert pack_words(values).view(-1).tolist() == [-0x01234568, 0x76543210]
    assert torch.equal(unpack_words(pack_words(values)), values)


def test_words_are_the_bytes_of_little_endian_memory() -> None:
    values = np.array([1, -2, 3, -4, 5, -6, 7, -8])
    pairs = [(high % 16) << 4 | low % 16 for low, high in values.reshape(-1, 2).tolist()]
    assert pack_words(torch.from_numpy(values)).item() == struct.unpack("<i", bytes(pairs))[0]


def test_unpacking_along_another_axis_of_a_transposed_view() -> None:
    values = torch.randint(-8, 8, (3, 16), generator=torch.Generator().manual_seed(0))
    transposed = unpack_words(pack_words(values).t(), dim=0)
    assert torch.equal(transposed.to(torch.int64), values.t())


@settings(deadline=None, max_examples=50)
@given(st.floats(width=32, allow_nan=False))
def test_scale_words_are_the_bits_of_the_number(scale: float) -> None:
    bits = struct.unpack("<I", struct.pack("<f", scale))[0]
    words = scale_words(torch.tensor([scale]))
    assert (words.dtype, words.tolist()) == (torch.int64, [bits])
    assert scale_of_words(words).view(torch.int32).item() % 2**32 == bits
    assert scale_of_words(words.view(torch.uint64)).view(torch.int32).item() % 2**32 == bits


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.int8, -128), (torch.int32, -(2**31)), (torch.int64, -(2**63)), (torch.bool, True)],
)
def test_poison_of_integers(dtype: torch.dtype, expected: int) -> None:
    assert unwritten((2,), dtype).tolist() == [expected] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_poison_of_floating_point_numbers(dtype: torch.dtype) -> None:
    rows = poison_rows(torch.zeros(3, 2).to(dtype), 1)
    assert rows.float().isnan().tolist() == [[False] * 2, [True] * 2, [True] * 2]
