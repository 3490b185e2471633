"""The emulated Triton language computes what Triton's own semantics and interpreter say."""

from __future__ import annotations

import importlib
import importlib.util
from itertools import product
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plugins.cuda_common.tests.interpreted import interpret, needs_triton

from mortise.formats.nvfp4 import dequantise_nvfp4
from mortise_cuda_common.chip import Architecture
from mortise_cuda_common.programs import dtypes
from mortise_cuda_common.programs.ahead import compile_ahead
from mortise_cuda_common.programs.base import CompileCase
from mortise_cuda_common.programs.emulated import EmulatedPrograms

if TYPE_CHECKING:
    from collections.abc import Callable

    from plugins.cuda_common.tests.kernel_cases import Machine

tl: Any = importlib.import_module("triton.language") if importlib.util.find_spec("triton") else None
PROGRAMS = EmulatedPrograms()
TRITON_NAMES = {
    dtypes.int1: "int1",
    dtypes.int8: "int8",
    dtypes.int16: "int16",
    dtypes.int32: "int32",
    dtypes.int64: "int64",
    dtypes.uint8: "uint8",
    dtypes.uint16: "uint16",
    dtypes.uint32: "uint32",
    dtypes.float16: "float16",
    dtypes.bfloat16: "bfloat16",
    dtypes.float32: "float32",
    dtypes.float64: "float64",
}
INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.uint32)


@needs_triton
@pytest.mark.parametrize("divides", [False, True])
def test_what_comes_of_two_formats(divides: bool) -> None:
    language = importlib.import_module("triton.language")
    semantic = importlib.import_module("triton.language.semantic").TritonSemantic(None)
    for one, other in product(TRITON_NAMES, repeat=2):
        left, right = (getattr(language, TRITON_NAMES[each]) for each in (one, other))
        try:
            wanted = semantic.computation_type_impl(left, False, right, False, divides)
        except TypeError:
            # Quotients of signed and unsigned integers; programs have none.
            continue
        if dtypes.int1 in (one, other) and dtypes.Form.FLOAT not in (one.form, other.form):
            # Triton computes truths as integers of one bit.
            continue
        assert TRITON_NAMES[dtypes.promoted(one, other, divides=divides)] == wanted.name.replace(
            "fp", "float"
        ).replace("bf16", "bfloat16")


def arithmetic(one, other, sums, SIGNED: tl.constexpr, N: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
    lanes = tl.program_id(0) * N + tl.arange(0, N)
    left = tl.load(one + lanes)
    right = tl.load(other + lanes)
    results = sums + tl.program_id(0) * 12 * N + tl.arange(0, N)
    tl.store(results, left + right)
    tl.store(results + N, left - right)
    tl.store(results + 2 * N, left * right)
    tl.store(results + 3 * N, left // right)
    tl.store(results + 4 * N, left % right)
    tl.store(results + 5 * N, left & right)
    tl.store(results + 6 * N, (left | right) ^ 3)
    tl.store(results + 7 * N, left << (right & 3))
    tl.store(results + 8 * N, left >> (right & 3))
    tl.store(results + 9 * N, tl.where(left < right, left, right))
    # Of unsigned ones numpy 2.4 keeps the interpreter from it.
    if SIGNED:
        tl.store(results + 10 * N, ~left)
        tl.store(results + 11 * N, -left)


@needs_triton
@settings(max_examples=12, deadline=None)
@given(st.sampled_from(INTEGERS), st.integers(0, 2**16))
def test_integers_are_tritons(dtype: torch.dtype, seed: int) -> None:
    """Divided towards zero, cut to their bits, shifted with their sign."""
    facts = torch.iinfo(dtype)
    generator = torch.Generator().manual_seed(seed)
    sizes = {"size": (32,), "generator": generator}
    # The interpreter is numpy's, which warns of what does not fit.
    most = int(facts.max**0.45)
    least = -most if facts.min < 0 else 0
    left = torch.randint(least, most + 1, **sizes).to(dtype)
    right = (torch.randint(1, most + 1, **sizes) * (1 if least == 0 else -1)).to(dtype)
    found, wanted = (torch.zeros(12 * 32, dtype=dtype) for _ in range(2))
    constants = {"SIGNED": least < 0, "N": 16}
    PROGRAMS.launch(arithmetic, 2, [left, right, found], constants)
    interpret(arithmetic, 2, [left, right, wanted], constants)
    assert torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))


def addresses(source, target, rows, columns, stride, M: tl.constexpr, N: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
    row = tl.arange(0, M)[:, None]
    column = tl.arange(0, N)[None, :]
    inside = (row < rows) & (column < columns)
    block = tl.load(source + row.to(tl.int64) * stride + column, mask=inside, other=-7.0)
    block = tl.where(row == column, block * 2, block)
    turned = tl.trans(block)
    place = target + tl.arange(0, N)[:, None] * M + tl.arange(0, M)[None, :]
    tl.store(place, turned, mask=turned > -100.0)
    first = tl.load(source)
    if first > 0:
        tl.store(target, first)
    joined = tl.join(block, block + 1)
    left, right = tl.split(joined)
    tl.store(place + M * N, tl.trans(left) + tl.permute(right, (1, 0)))
    tl.store(place + 2 * M * N, tl.reshape(tl.broadcast_to(row, (M, N)), (N, M)).to(tl.float32))


@needs_triton
@settings(max_examples=15, deadline=None)
@given(st.integers(1, 4), st.integers(1, 8), st.integers(0, 3), st.integers(0, 2**16))
def test_addresses_masks_and_shapes_are_tritons(
    rows: int, columns: int, gap: int, seed: int
) -> None:
    source = torch.randn(rows, columns + gap, generator=torch.Generator().manual_seed(seed))
    found, wanted = (torch.zeros(3 * 4 * 8) for _ in range(2))
    arguments = [rows, columns, columns + gap]
    PROGRAMS.launch(addresses, 1, [source, found, *arguments], {"M": 4, "N": 8})
    interpret(addresses, 1, [source, wanted, *arguments], {"M": 4, "N": 8})
    assert torch.equal(found, wanted)


def bits(words, target, N: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
    word = tl.load(words + tl.arange(0, N))
    unsigned = word.to(tl.uint32, bitcast=True)
    tl.store(target + tl.arange(0, N), (unsigned >> 4) & 0xF)
    number = ((unsigned & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    tl.store(target + N + tl.arange(0, N), number.to(tl.int32, bitcast=True))
    tl.store(target + 2 * N + tl.arange(0, N), unsigned * 2654435761)
    tl.store(target + 3 * N + tl.arange(0, N), word.to(tl.uint8).to(tl.int32))
    tl.store(target + 4 * N + tl.arange(0, N), word.to(tl.int8).to(tl.int32))


@needs_triton
def test_bits_are_tritons() -> None:
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(-(2**31), 2**31, (64,), generator=generator).to(torch.int32)
    found, wanted = (torch.zeros(5 * 64, dtype=torch.int32) for _ in range(2))
    PROGRAMS.launch(bits, 1, [words, found], {"N": 64})
    interpret(bits, 1, [words, wanted], {"N": 64})
    assert torch.equal(found, wanted)


def reductions(source, target, N: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
    place = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    block = tl.load(source + place)
    lanes = tl.arange(0, N)
    tl.store(target + lanes, tl.sum(block, axis=1))
    tl.store(target + N + lanes, tl.max(block, 0))
    tl.store(target + 2 * N + lanes, tl.min(block, 1))
    tl.store(target + 3 * N + lanes, tl.argmax(block, 1).to(tl.float32))
    tl.store(target + 4 * N + place, tl.cumsum(block, 0))
    tl.store(target + (4 + N) * N + place, tl.exp2(tl.abs(block)) + tl.sigmoid(-block))
    tl.store(target + (4 + 2 * N) * N, tl.sum(block) + tl.max(block))


def test_reductions_and_functions_are_torchs() -> None:
    block = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
    found = torch.full((4 * 8 + 2 * 64 + 1,), torch.nan)
    PROGRAMS.launch(reductions, 1, [block, found], {"N": 8})
    wanted = [
        block.sum(1),
        block.amax(0),
        block.amin(1),
        block.argmax(1).float(),
        block.cumsum(0).flatten(),
        (torch.exp2(block.abs()) + torch.sigmoid(-block)).flatten(),
        (block.sum() + block.max())[None],
    ]
    torch.testing.assert_close(found, torch.cat(wanted))


def functions(source, target, length, N: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
    tl.static_assert(N == 8)
    tl.assume(length > 0)
    lanes = tl.max_contiguous(tl.multiple_of(tl.arange(0, N), N), N)
    number = tl.load(source + lanes)
    tl.store(target + lanes, tl.log(number) + tl.log2(number))
    tl.store(target + N + lanes, tl.rsqrt(number) + tl.sqrt(number))
    tl.store(target + 2 * N + lanes, tl.floor(number) - tl.ceil(number))
    tl.store(target + 3 * N + lanes, tl.clamp(number, 0.5, 1.5))
    tl.debug_barrier()
    both = tl.interleave(number, -number)
    tl.store(target + 4 * N + tl.arange(0, 2 * N), both)
    total = tl.zeros((N,), dtype=tl.float32)
    for step in tl.range(1, length, 2):
        total += number * step
    tl.store(target + 6 * N + lanes, tl.reshape(tl.expand_dims(total, 0), (N,)))


def test_functions_are_torchs() -> None:
    number = torch.rand(8, generator=torch.Generator().manual_seed(8)) * 3 + 0.1
    found = torch.full((56,), torch.nan)
    PROGRAMS.launch(functions, 1, [number, found, 6], {"N": 8})
    wanted = [
        number.log() + number.log2(),
        number.rsqrt() + number.sqrt(),
        number.floor() - number.ceil(),
        number.clamp(0.5, 1.5),
        torch.stack((number, -number), dim=1).flatten(),
        number * (1 + 3 + 5),
    ]
    torch.testing.assert_close(found, torch.cat(wanted))
    with pytest.raises(AssertionError, match="assumes what does not hold"):
        PROGRAMS.launch(functions, 1, [number, found, 0], {"N": 8})


def walk(counts, target, limit, GROUPS: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
    """Which group a tile of 4 rows belongs to, as grouped products look for it."""
    tile = tl.program_id(0)
    lanes = tl.arange(0, GROUPS)
    count = tl.load(counts + lanes)
    ends = tl.cumsum(tl.cdiv(count, 4), 0)
    if tile >= tl.max(ends, axis=0):
        return
    group = tl.sum((ends <= tile).to(tl.int32), axis=0)
    total = 0
    for one in range(group):
        total += tl.load(counts + one)
    steps = 0
    while steps * 3 < total and steps < limit:
        steps += 1
    tl.store(target + tile * 3, group)
    tl.store(target + tile * 3 + 1, total)
    tl.store(target + tile * 3 + 2, steps)


def test_numbers_of_the_program_decide_where_it_goes() -> None:
    counts = torch.tensor([5, 0, 4, 9], dtype=torch.int32)
    target = torch.full((8, 3), -1, dtype=torch.int32)
    PROGRAMS.launch(walk, 8, [counts, target, 100], {"GROUPS": 4})
    groups = [0, 0, 2, 3, 3, 3]
    before = [0, 5, 5, 9]
    wanted = [[group, before[group], -(-before[group] // 3)] for group in groups]
    assert target.tolist() == [*wanted, [-1] * 3, [-1] * 3]


def single_numbers(target, five, wide) -> None:  # type: ignore[no-untyped-def]
    number = tl.program_id(0) - five
    place = target + tl.program_id(0) * 8
    tl.store(place, number // 3)
    tl.store(place + 1, number % 3)
    tl.store(place + 2, number * -7 + (number & 6))
    tl.store(place + 3, number.to(tl.int64) * wide)
    tl.store(place + 4, (number * 0.5 + 3).to(tl.int32))
    tl.store(place + 5, tl.where(number < 0, number, five))
    tl.store(place + 6, tl.maximum(number, 2) - tl.minimum(number, 2))
    tl.store(place + 7, (number / 2 > 1) | (number == -4))


@needs_triton
def test_single_numbers_are_tritons() -> None:
    found, wanted = (torch.zeros(10, 8, dtype=torch.int64) for _ in range(2))
    PROGRAMS.launch(single_numbers, 10, [found, 5, 2**33], {})
    interpret(single_numbers, 10, [wanted, 5, 2**33], {})
    assert torch.equal(found, wanted)


def products(left, right, target, DTYPE: tl.constexpr, PRECISION: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
    place = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    one = tl.load(left + place).to(DTYPE)
    other = tl.load(right + place).to(DTYPE)
    acc = tl.full((16, 16), 1.0, dtype=tl.float32)
    acc = tl.dot(one, other.T, acc, input_precision=PRECISION)
    tl.store(target + place, acc)


@pytest.mark.parametrize(
    ("dtype", "precision", "kept_bits"),
    [
        (dtypes.bfloat16, None, 8),
        (dtypes.float16, None, 11),
        (dtypes.float8e4nv, None, 4),
        (dtypes.float32, "ieee", 24),
        (dtypes.float32, "tf32", 11),
        (dtypes.float32, None, 11),
    ],
)
def test_products_are_summed_in_float32_of_operands_as_they_are_kept(
    dtype: dtypes.Dtype, precision: str | None, kept_bits: int
) -> None:
    generator = torch.Generator().manual_seed(2)
    left, right = (torch.randn(16, 16, generator=generator) for _ in range(2))
    found = torch.zeros(16, 16)
    constants: dict[str, Any] = {"DTYPE": dtype, "PRECISION": precision}
    PROGRAMS.launch(products, 1, [left, right, found], constants)
    kept = [one.to(dtype.stored_as).double() for one in (left, right)]
    error = (found.double() - (kept[0] @ kept[1].T + 1)).abs()
    bound = kept[0].abs() @ kept[1].abs().T
    if dtype is dtypes.float32 and kept_bits < 24:
        # Both are cut to 11 bits, which changes each by less than 2^-10 of it.
        assert bool((error <= bound * 2.0**-9).all())
        assert bool((error > bound * 2.0**-20).any())
    else:
        assert bool((error <= bound * 16 * 2.0**-23).all())


def scaled(  # type: ignore[no-untyped-def]
    left,
    left_scale,
    right,
    right_scale,
    target,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    LEFT_BYTES: tl.constexpr,
    RIGHT_BYTES: tl.constexpr,
    GROUPS: tl.constexpr,
) -> None:
    rows = tl.arange(0, 16)[:, None]
    one = tl.load(left + rows * LEFT_BYTES + tl.arange(0, LEFT_BYTES)[None, :])
    other = tl.load(right + rows * RIGHT_BYTES + tl.arange(0, RIGHT_BYTES)[None, :])
    places = rows * GROUPS + tl.arange(0, GROUPS)[None, :]
    acc = tl.zeros((16, 16), dtype=tl.float32)
    acc = tl.dot_scaled(
        one, tl.load(left_scale + places), LEFT, other.T, tl.load(right_scale + places), RIGHT, acc
    )
    tl.store(target + rows * 16 + tl.arange(0, 16)[None, :], acc)


def nvfp4(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Bytes, scales, and the numbers that they stand for by the core's own format."""
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, (16, 32), generator=generator).to(torch.uint8)
    scales = torch.rand(16, 4, generator=generator).to(torch.float8_e4m3fn)
    return packed, scales, dequantise_nvfp4(packed, scales, torch.ones(()), torch.float32)


def test_blocks_of_nvfp4_are_multiplied_with_their_scales() -> None:
    left, right = nvfp4(3), nvfp4(4)
    found = torch.zeros(16, 16)
    constants: dict[str, Any] = {
        "LEFT": "e2m1",
        "RIGHT": "e2m1",
        "LEFT_BYTES": 32,
        "RIGHT_BYTES": 32,
        "GROUPS": 4,
    }
    PROGRAMS.launch(scaled, 1, [*left[:2], *right[:2], found], constants)
    torch.testing.assert_close(found, left[2] @ right[2].T)


def test_blocks_of_32_are_multiplied_with_powers_of_two() -> None:
    """MXFP8 by MXFP4: a byte of a scale is an exponent, and the even K the low half of a byte."""
    generator = torch.Generator().manual_seed(5)
    left = torch.randn(16, 64, generator=generator).to(torch.float8_e4m3fn)
    right, _, _ = nvfp4(6)
    scales = [torch.randint(120, 135, (16, 2), generator=generator) for _ in range(2)]
    ones = torch.ones(16, 4).to(torch.float8_e4m3fn)
    plain = dequantise_nvfp4(right, ones, torch.ones(()), torch.float32)
    factors = [torch.exp2(one.float() - 127).repeat_interleave(32, dim=1) for one in scales]
    found = torch.zeros(16, 16)
    constants: dict[str, Any] = {
        "LEFT": "e4m3",
        "RIGHT": "e2m1",
        "LEFT_BYTES": 64,
        "RIGHT_BYTES": 32,
        "GROUPS": 2,
    }
    bytes_of = [one.to(torch.uint8) for one in scales]
    PROGRAMS.launch(scaled, 1, [left, bytes_of[0], right, bytes_of[1], found], constants)
    wanted = (left.float() * factors[0]) @ (plain * factors[1]).T
    torch.testing.assert_close(found, wanted)
    with pytest.raises(ValueError, match="are one for 32 numbers, not"):
        PROGRAMS.launch(
            scaled, 1, [left, bytes_of[0], right, bytes_of[1], found], {**constants, "GROUPS": 1}
        )


def copy(source, target, length, N: tl.constexpr, MASKED: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
    lanes = tl.program_id(0) * N + tl.arange(0, N)
    inside = lanes < length
    if MASKED:
        tl.store(target + lanes, tl.load(source + lanes, mask=inside), mask=inside)
    else:
        tl.store(target + lanes, tl.load(source + lanes, mask=inside))


@pytest.mark.parametrize(
    "dtype",
    [
        *INTEGERS,
        torch.uint16,
        torch.bool,
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
    ],
)
def test_every_format_is_read_and_written_as_it_is(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(7)
    size = 2 * dtype.itemsize * 8
    source = torch.randint(0, 2 if dtype is torch.bool else 256, (size,), generator=generator)
    numbers = source.to(torch.uint8).view(dtype)
    target = torch.zeros_like(numbers)
    PROGRAMS.launch(copy, 4, [numbers, target, 13], {"N": 4, "MASKED": True})
    end = 13 * dtype.itemsize
    found = target.view(torch.uint8)
    assert torch.equal(found[:end], numbers.view(torch.uint8)[:end])
    assert not found[end:].any()


def test_lanes_that_nothing_is_read_for_are_poison() -> None:
    target = torch.zeros(8)
    PROGRAMS.launch(copy, 2, [torch.ones(5), target, 5], {"N": 4, "MASKED": False})
    assert target[:5].tolist() == [1.0] * 5
    assert bool(target[5:].isnan().all())
    numbers = torch.zeros(8, dtype=torch.int32)
    ones = torch.ones(5, dtype=torch.int32)
    PROGRAMS.launch(copy, 2, [ones, numbers, 5], {"N": 4, "MASKED": False})
    assert numbers[5:].tolist() == [torch.iinfo(torch.int32).min] * 3


def test_a_program_may_not_leave_its_tensors() -> None:
    source = torch.arange(8.0)
    outside = "reads or writes outside of a tensor of"
    for tensors in ((source[:5], torch.zeros(8)), (source, torch.zeros(5))):
        with pytest.raises(IndexError, match=f"{outside} 5 numbers"):
            PROGRAMS.launch(copy, 2, [*tensors, 6], {"N": 4, "MASKED": True})
    with pytest.raises(IndexError, match=f"{outside} 0 numbers"):
        PROGRAMS.launch(copy, 1, [source[:0], torch.zeros(4), 1], {"N": 4, "MASKED": True})
    PROGRAMS.launch(copy, 1, [source[:0], source[:0], 0], {"N": 4, "MASKED": True})
    with pytest.raises(ValueError, match="power of 2"):
        PROGRAMS.launch(copy, 1, [source, source, 1], {"N": 3, "MASKED": True})
    with pytest.raises(ValueError, match="up to 2147483647 programs"):
        PROGRAMS.launch(copy, 2**31, [source, source, 1], {"N": 4, "MASKED": True})


def negative(source) -> None:  # type: ignore[no-untyped-def]
    tl.load(source + tl.arange(0, 4) - 1)


def too_much(target, N: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
    tl.store(target, (tl.program_id(0) + 1) * N)


def as_e4m3(source, target) -> None:  # type: ignore[no-untyped-def]
    lanes = tl.arange(0, 4)
    tl.store(target + lanes, tl.load(source + lanes).to(tl.float8e4nv))


def of_float8(source) -> None:  # type: ignore[no-untyped-def]
    tl.load(source + tl.arange(0, 4)) * 2


def scalar_block(target) -> None:  # type: ignore[no-untyped-def]
    tl.store(target, tl.arange(0, 4))


def other_alone(source) -> None:  # type: ignore[no-untyped-def]
    tl.load(source + tl.arange(0, 4), other=0)


def bfloat_root(source) -> None:  # type: ignore[no-untyped-def]
    tl.sqrt(tl.load(source + tl.arange(0, 4)))


def bfloat_sum(source) -> None:  # type: ignore[no-untyped-def]
    tl.sum(tl.load(source + tl.arange(0, 4)), axis=0)


def test_what_triton_or_a_chip_would_not_do_is_refused() -> None:
    ones = torch.ones(4)
    with pytest.raises(IndexError, match="outside"):
        PROGRAMS.launch(negative, 1, [ones], {})
    with pytest.raises(OverflowError, match="more than the 32 bits"):
        PROGRAMS.launch(too_much, 2, [torch.zeros(1, dtype=torch.int64)], {"N": 2**30})
    with pytest.raises(ValueError, match=r"449\.0 is more than 448, the most that e4m3 holds"):
        PROGRAMS.launch(as_e4m3, 1, [ones * 449, ones.to(torch.float8_e4m3fn)], {})
    with pytest.raises(TypeError, match=r"fp8e4nv is multiplied by tl\.dot only"):
        PROGRAMS.launch(of_float8, 1, [ones.to(torch.float8_e4m3fn)], {})
    with pytest.raises(ValueError, match="addresses"):
        PROGRAMS.launch(scalar_block, 1, [torch.zeros(4, dtype=torch.int32)], {})
    with pytest.raises(ValueError, match="`other` cannot be provided without `mask`"):
        PROGRAMS.launch(other_alone, 1, [ones], {})
    with pytest.raises(TypeError, match="of fp32 and fp64, not of bf16"):
        PROGRAMS.launch(bfloat_root, 1, [ones.bfloat16()], {})
    with pytest.raises(TypeError, match="rounded after every addition"):
        PROGRAMS.launch(bfloat_sum, 1, [ones.bfloat16()], {})


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-448, 448, width=32), min_size=4, max_size=4))
def test_numbers_become_e4m3_as_they_do_in_torch(numbers: list[float]) -> None:
    source = torch.tensor(numbers)
    target = torch.zeros(4).to(torch.float8_e4m3fn)
    PROGRAMS.launch(as_e4m3, 1, [source, target], {})
    assert torch.equal(target.view(torch.uint8), source.to(torch.float8_e4m3fn).view(torch.uint8))


def add_up(source, total, N: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
    lanes = tl.arange(0, N)
    tl.atomic_add(total + lanes % 2, tl.load(source + lanes), mask=lanes < N - 1)


def test_programs_add_to_the_same_memory() -> None:
    source, total = torch.arange(8, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    PROGRAMS.launch(add_up, 3, [source, total], {"N": 8})
    assert total.tolist() == [3 * (0 + 2 + 4 + 6), 3 * (1 + 3 + 5)]


def of_seed(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def words(seed: int, size: int, least: int, most: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(least, most, (size,), generator=generator).to(dtype)


WHOLE: list[tuple[Callable[..., None], int, list[Any], dict[str, Any]]] = [
    *(
        (
            arithmetic,
            2,
            [
                words(1, 32, -11 if dtype.is_signed else 0, 11, dtype),
                words(2, 32, 1, 11, dtype),
                torch.zeros(12 * 32, dtype=dtype),
            ],
            {"SIGNED": dtype.is_signed, "N": 16},
        )
        for dtype in INTEGERS
        if dtype is not torch.uint32
    ),
    (addresses, 1, [of_seed(3, 3, 9), torch.zeros(96), 3, 7, 9], {"M": 4, "N": 8}),
    (
        bits,
        1,
        [words(4, 64, -(2**31), 2**31, torch.int32), torch.zeros(5 * 64, dtype=torch.int32)],
        {"N": 64},
    ),
    (
        walk,
        8,
        [
            torch.tensor([5, 0, 4, 9], dtype=torch.int32),
            torch.zeros(8, 3, dtype=torch.int32),
            100,
        ],
        {"GROUPS": 4},
    ),
    (single_numbers, 10, [torch.zeros(10, 8, dtype=torch.int64), 5, 2**33], {}),
    (copy, 4, [of_seed(5, 16), torch.zeros(16), 13], {"N": 4, "MASKED": True}),
    (copy, 4, [of_seed(6, 16).bfloat16(), torch.zeros(16), 13], {"N": 4, "MASKED": True}),
    (
        as_e4m3,
        1,
        [torch.tensor([448.0, -0.3, 31.37, 2.0**-10]), torch.zeros(4).to(torch.float8_e4m3fn)],
        {},
    ),
    (
        add_up,
        3,
        [torch.arange(8, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)],
        {"N": 8},
    ),
]
"""Programs whose results have no rounding, or one that is the same everywhere."""
NAMES = [f"{source.__name__} {number}" for number, (source, *_) in enumerate(WHOLE)]


ROUNDED = [
    (functions, 1, [of_seed(7, 8), torch.zeros(56), 6], {"N": 8}),
    (reductions, 1, [of_seed(8, 64), torch.zeros(161)], {"N": 8}),
]


@needs_triton
@pytest.mark.parametrize(
    ("source", "grid", "arguments", "constants"),
    [*WHOLE, *ROUNDED],
    ids=[*NAMES, "functions", "reductions"],
)
def test_what_is_emulated_is_what_triton_compiles(
    source: Callable[..., None], grid: int, arguments: list[Any], constants: dict[str, Any]
) -> None:
    """Nothing is known here of a language that Triton does not know."""
    del grid
    code = source.__code__
    kinds = [
        f"*{dtypes.OF_TORCH[one.dtype].name}"
        if isinstance(one, torch.Tensor)
        else ("i64" if one >= 2**31 else "i32")
        for one in arguments
    ]
    case = CompileCase(
        name=source.__name__,
        source=source,
        signature=dict(zip(code.co_varnames[: len(kinds)], kinds, strict=True)),
        constants=constants,
        architectures=tuple(Architecture),
    )
    assert compile_ahead(case, Architecture.SM90).ptx


@pytest.mark.device
@pytest.mark.parametrize(("source", "grid", "arguments", "constants"), WHOLE, ids=NAMES)
def test_a_chip_computes_what_is_emulated(
    machine: Machine,
    source: Callable[..., None],
    grid: int,
    arguments: list[Any],
    constants: dict[str, Any],
) -> None:
    here, there = (
        [one.clone().to(device) if isinstance(one, torch.Tensor) else one for one in arguments]
        for device in (torch.device("cpu"), machine.device)
    )
    PROGRAMS.launch(source, grid, here, constants)
    machine.programs.launch(source, grid, there, constants)
    for one, other in zip(here, there, strict=True):
        if isinstance(one, torch.Tensor):
            assert torch.equal(one.view(torch.uint8), other.cpu().view(torch.uint8))
