"""The layouts that DeepGEMM's kernels want scales in, and how it brings them there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from mortise_cuda_common.emulator.deep_gemm.checks import device_fault, require, require_dtype

if TYPE_CHECKING:
    from mortise_cuda_common.emulator.deep_gemm.state import State

COLUMNS: Final = 128
"""Columns that share a scale, and rows of a weight that do."""

SIGN_AND_MANTISSA: Final = -0x7F800001  # 0x807fffff as a signed number
EXPONENT_SHIFT: Final = 23
SCALES_PER_WORD: Final = 4

Recipe = tuple[int, int, int] | tuple[int, int]


def tma_aligned_size(mn: int, element_size: int) -> int:
    """``mn`` rounded up so that as many elements are a multiple of 16 bytes."""
    require(16 % element_size == 0, "kNumTMAAlignmentBytes % element_size == 0")
    step = 16 // element_size
    return -(-mn // step) * step


def default_recipe(state: State, scale_b: torch.Tensor) -> tuple[int, int, int]:
    """Rows of A, rows of B, and columns that share a scale, where the caller does not say."""
    if state.is_sm90:
        require_dtype(scale_b, torch.float32)
        return (1, COLUMNS, COLUMNS)
    require_dtype(scale_b, torch.float32, torch.int32)
    return (1, COLUMNS if scale_b.dtype == torch.float32 else 1, COLUMNS)


def check_scales(
    scales: torch.Tensor,
    mn: int,
    k: int,
    granularity: tuple[int, int],
    num_groups: int | None,
) -> None:
    """Assert shape and dtype of scales, in either form."""
    require_dtype(scales, torch.float32, torch.int32)
    dims = 2 + (num_groups is not None)
    require(
        scales.dim() == dims, f"sf.dim() == static_cast<int>(num_groups.has_value()) + 2: {dims}"
    )
    if num_groups is not None:
        require(scales.shape[-3] == num_groups, "sf.size(-3) == num_groups.value()")
    columns = granularity[1] * (1 if scales.dtype == torch.float32 else SCALES_PER_WORD)
    shape = tuple(scales.shape)
    rows = -(-mn // granularity[0])
    require(shape[-2] == rows, f"sf.size(-2) == ceil_div(mn, gran_mn): {shape} for {rows} rows")
    columns = -(-k // columns)
    require(shape[-1] == columns, f"sf.size(-1) == ceil_div(k, ...): {shape} for {columns} columns")


def transform(
    state: State,
    scales: torch.Tensor,
    mn: int,
    k: int,
    recipe: Recipe,
    num_groups: int | None = None,
    is_a: bool | None = None,
    disable_ue8m0_cast: bool = False,
    psum_layout: torch.Tensor | None = None,
) -> torch.Tensor:
    """Bring scales into the layout that the chip's kernels read.

    Args:
        state: the library.
        scales: float32 ``[(G,) ceil(mn / rows), ceil(k / columns)]``, or packed int32.
        mn: rows of the operand.
        k: its columns.
        recipe: rows of A, rows of B and columns of a scale, with ``is_a``; or rows and columns.
        num_groups: G, for scales of a grouped operand.
        is_a: which of the two operands, where the recipe has three numbers.
        disable_ue8m0_cast: keep float32.
        psum_layout: ends of groups, whose rows alone are read.

    Returns:
        SM90: float32, MN-major for rows of one, unchanged for blocks. SM100: packed int32
        ``[(G,) mn, ceil(k / columns / 4)]``, MN-major.
    """
    if len(recipe) == 3:
        require(is_a is not None, "is_sfa.has_value()")
        rows, columns = recipe[0] if is_a else recipe[1], recipe[2]
    else:
        require(is_a is None, "not is_sfa.has_value()")
        rows, columns = recipe
    check_scales(scales, mn, k, (rows, columns), num_groups)
    if (
        scales.dtype == torch.float32
        and columns == COLUMNS
        and (state.is_sm90 or disable_ue8m0_cast)
    ):
        if rows == 1:
            return mn_major_tma_aligned(scales)
        if rows == COLUMNS:
            _require_block_strides(scales)
            return scales
    if not state.is_sm90 and columns in (32, COLUMNS):
        if scales.dtype == torch.float32:
            require(not disable_ue8m0_cast, "not disable_ue8m0_cast")
            wide = scales if rows == 1 else scales.repeat_interleave(rows, dim=-2)[..., :mn, :]
            return packed_ue8m0(state, wide, psum_layout)
        if rows == 1:
            _require_packed_strides(scales, mn)
            return scales
    require(False, "Unknown SF transformation")
    raise AssertionError


def transform_pair(
    state: State,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    sizes: tuple[int, int, int],
    recipes: tuple[Recipe | None, Recipe | None, Recipe | None],
    groups: tuple[int | None, int | None],
    disable_ue8m0_cast: bool,
    psum_layout: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bring the scales of both operands into the kernel's layout.

    Args:
        state: the library.
        scale_a: scales of the first operand.
        scale_b: scales of the second.
        sizes: M, N and K.
        recipes: for both, for A, and for B; either the first or the other two.
        groups: of A and of B.
        disable_ue8m0_cast: keep float32.
        psum_layout: ends of the groups of A.
    """
    both, for_a, for_b = recipes
    if both is None and for_a is None:
        both = default_recipe(state, scale_b)
    require((for_a is None) == (for_b is None), "recipe_a.has_value() == recipe_b.has_value()")
    require((for_a is None) != (both is None), "recipe_a.has_value() != recipe.has_value()")
    m, n, k = sizes
    first, second = both or for_a, both or for_b
    assert first is not None
    assert second is not None
    side_a, side_b = (True, False) if both is not None else (None, None)
    return (
        transform(state, scale_a, m, k, first, groups[0], side_a, disable_ue8m0_cast, psum_layout),
        transform(state, scale_b, n, k, second, groups[1], side_b, disable_ue8m0_cast),
    )


def mn_major_tma_aligned(scales: torch.Tensor) -> torch.Tensor:
    """Float32 ``[(G,) mn, C]`` with its rows side by side, columns 16 bytes apart or a multiple."""
    require(scales.dim() in (2, 3), "dim == 2 or dim == 3")
    require_dtype(scales, torch.float32)
    batched = scales if scales.dim() == 3 else scales.unsqueeze(0)
    groups, mn, columns = batched.shape
    aligned = tma_aligned_size(mn, scales.element_size())
    dense = batched.stride(0) == aligned * columns or scales.dim() == 2
    if dense and batched.stride(1) == 1 and batched.stride(2) == aligned:
        return scales
    out = _mn_major(groups, mn, columns, torch.float32)
    out.copy_(batched)
    return out if scales.dim() == 3 else out.squeeze(0)


def packed_ue8m0(
    state: State, scales: torch.Tensor, psum_layout: torch.Tensor | None = None
) -> torch.Tensor:
    """Pack float32 powers of two, four to a word, into MN-major int32 ``[(G,) mn, ceil(C/4)]``.

    Raises:
        RuntimeError: a scale is no power of two: older kernels cut its mantissa off without a
            word, newer ones trap.
    """
    require(scales.dim() in (2, 3), "dim == 2 or dim == 3")
    require_dtype(scales, torch.float32)
    batched = scales if scales.dim() == 3 else scales.unsqueeze(0)
    groups, mn, columns = batched.shape
    if psum_layout is not None:
        require(
            groups == 1 and batched.is_contiguous(),
            "num_sf_batches == 1 and batched_sf.is_contiguous()",
        )
        batched = batched.clone()
        batched[0, ~rows_of_groups(psum_layout, mn, state.alignment)] = 0.0
    if not batched.is_contiguous() and groups == 1 and mn % SCALES_PER_WORD == 0:
        side_by_side = batched.stride(1) == 1 and batched.stride(2) == mn
        require(side_by_side, "batched_sf.stride(1) == 1 and batched_sf.stride(2) == mn")
    words = batched.contiguous().view(torch.int32)
    _require_powers_of_two(words)
    bytes_ = torch.zeros(groups, mn, -(-columns // 4) * 4, dtype=torch.uint8)
    bytes_[..., :columns] = (words >> EXPONENT_SHIFT).to(torch.uint8)
    packed = bytes_.view(torch.int32)
    out = _mn_major(groups, mn, packed.shape[-1], torch.int32)
    out.copy_(packed)
    return out if scales.dim() == 3 else out.squeeze(0)


def rows_of_groups(ends: torch.Tensor, num_rows: int, alignment: int) -> torch.Tensor:
    """Bool ``[num_rows]``: whether a row lies in a group, of groups given by their ends."""
    inside = torch.zeros(num_rows, dtype=torch.bool)
    start = 0
    for end in ends.tolist():
        inside[start:end] = True
        start = -(-end // alignment) * alignment
    return inside


def row_scales(scales: torch.Tensor, mn: int, num_columns: int) -> torch.Tensor:
    """What a kernel reads: float32 ``[.., mn, num_columns]`` of scales in either form."""
    if scales.dtype == torch.int32:
        # A copy: one column with rows side by side counts as dense already, and cannot be viewed.
        dense = scales.clone(memory_format=torch.contiguous_format)
        exponents = dense.view(torch.uint8)[..., :num_columns]
        return (exponents.to(torch.int32) << EXPONENT_SHIFT).view(torch.float32)
    if scales.shape[-2] == mn:
        return scales
    return scales.repeat_interleave(COLUMNS, dim=-2)[..., :mn, :]


def _mn_major(groups: int, mn: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    aligned = tma_aligned_size(mn, 4)
    return torch.empty_strided((groups, mn, columns), (aligned * columns, 1, aligned), dtype=dtype)


def _require_powers_of_two(words: torch.Tensor) -> None:
    wrong = (words & SIGN_AND_MANTISSA) != 0
    if wrong.any():
        first = words[wrong][0].view(torch.float32).item()
        raise device_fault(
            "device-side assert triggered: (values[j] & 0x807fffffu) == 0: a scale of"
            f" {first!r} is no power of two"
        )


def _require_block_strides(scales: torch.Tensor) -> None:
    rows, columns = scales.shape[-2:]
    if scales.dim() == 3:
        dense = scales.stride(-3) == rows * columns
        require(dense, "sf.stride(-3) == sf.size(-2) * sf.size(-1)")
    row_major = scales.stride(-1) == 1 and scales.stride(-2) == columns
    require(
        row_major or (scales.stride(-1) == rows and scales.stride(-2) == 1),
        "(sf.stride(-1) == 1 and sf.stride(-2) == sf.size(-1)) or"
        " (sf.stride(-1) == sf.size(-2) and sf.stride(-2) == 1)",
    )


def _require_packed_strides(scales: torch.Tensor, mn: int) -> None:
    if scales.dim() == 3:
        dense = scales.stride(-3) == scales.stride(-1) * scales.shape[-1]
        require(dense, "sf.stride(-3) == sf.stride(-1) * sf.size(-1)")
    require(scales.stride(-2) == 1 or mn == 1, "sf.stride(-2) == 1 or mn == 1")
    aligned = tma_aligned_size(mn, scales.element_size())
    require(
        scales.stride(-1) == aligned,
        "sf.stride(-1) == get_tma_aligned_size(mn, sf.element_size())",
    )
