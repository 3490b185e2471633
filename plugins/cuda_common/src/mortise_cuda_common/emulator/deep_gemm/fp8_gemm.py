"""DeepGEMM's products of e4m3 rows, dense and grouped."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mortise_cuda_common.emulator.deep_gemm.checks import (
    is_k_major,
    poison,
    require,
    require_dtype,
    require_output,
    require_tma,
    shape_of,
)
from mortise_cuda_common.emulator.deep_gemm.products import (
    contiguous_rows,
    psum_rows,
    require_masked_capacity,
    scaled_product,
    write_gaps,
    write_groups,
)
from mortise_cuda_common.emulator.deep_gemm.scales import (
    COLUMNS,
    Recipe,
    row_scales,
    transform_pair,
)

if TYPE_CHECKING:
    from mortise_cuda_common.emulator.deep_gemm.state import State

Scaled = tuple[torch.Tensor, torch.Tensor]
Recipes = tuple[Recipe | None, Recipe | None, Recipe | None]
"""For both operands, for A, and for B."""


def dense(
    state: State,
    a: Scaled,
    b: Scaled,
    d: torch.Tensor,
    c: torch.Tensor | None,
    recipes: Recipes,
    disable_ue8m0_cast: bool,
) -> None:
    """``d = c + a @ b.T``; float32 results of SM90 need scales of single rows on both sides."""
    _require_operands(state, a, b, both_k_major=state.is_sm90)
    m, k = shape_of(a[0], 2)
    n, k_of_b = shape_of(b[0], 2)
    require((m, n) == shape_of(d, 2) and k == k_of_b, "m == m_ and n == n_ and k == k_")
    require_output(d, torch.bfloat16, torch.float32)
    if returns_early(m, n, k, d, c):
        return
    scale_a, scale_b = transform_pair(
        state, a[1], b[1], (m, n, k), recipes, (None, None), disable_ue8m0_cast
    )
    if state.is_sm90 and scale_b.shape[0] != n:
        bf16_alone = c is None and d.dtype == torch.bfloat16
        require(bf16_alone, "not c.has_value() and d.scalar_type() == torch::kBFloat16")
    require_tma((a[0], b[0], d))
    columns = -(-k // COLUMNS)
    product = scaled_product(
        a[0], row_scales(scale_a, m, columns), b[0], row_scales(scale_b, n, columns)
    )
    d.copy_(product if c is None else product + d.float())


def contiguous(
    state: State,
    a: Scaled,
    b: Scaled,
    d: torch.Tensor,
    grouped_layout: torch.Tensor,
    recipes: Recipes,
    disable_ue8m0_cast: bool,
    use_psum_layout: bool,
    ensure_zero_padding: bool,
    expected_m: int | None,
) -> None:
    """Rows of several groups one after another, each group's by its own weight."""
    _require_operands(state, a, b, both_k_major=state.is_sm90)
    require(is_k_major(a[0]), "major_a == cute::UMMA::Major::K")
    m, k = shape_of(a[0], 2)
    groups, n, k_of_b = shape_of(b[0], 3)
    require((m, n) == shape_of(d, 2) and k == k_of_b, "m == m_ and n == n_ and k == k_")
    require(n > 0 and k > 0 and groups > 0, "n > 0 and k > 0 and num_groups > 0")
    require_output(d, torch.bfloat16)
    require_layout(grouped_layout, groups if use_psum_layout else m)
    require(use_psum_layout or expected_m is None, "not expected_m_for_psum_layout.has_value()")
    if m == 0:
        return
    scale_a, scale_b = transform_pair(
        state,
        a[1],
        b[1],
        (m, n, k),
        recipes,
        (None, groups),
        disable_ue8m0_cast,
        grouped_layout if use_psum_layout else None,
    )
    require_tma((a[0], b[0], d))
    columns = -(-k // COLUMNS)
    scale_a, scale_b = row_scales(scale_a, m, columns), row_scales(scale_b, n, columns)
    find = psum_rows if use_psum_layout else contiguous_rows
    write_groups(
        d,
        find(state, grouped_layout),
        lambda own, group: scaled_product(a[0][own], scale_a[own], b[0][group], scale_b[group]),
    )
    if use_psum_layout and ensure_zero_padding:
        write_gaps(state, d, grouped_layout)


def masked(
    state: State,
    a: Scaled,
    b: Scaled,
    d: torch.Tensor,
    masked_m: torch.Tensor,
    expected_m: int,
    recipes: Recipes,
    disable_ue8m0_cast: bool,
) -> None:
    """A slot of rows for each group, of which the first ``masked_m`` are there."""
    _require_operands(state, a, b, both_k_major=True)
    groups, m, k = shape_of(a[0], 3)
    groups_of_b, n, k_of_b = shape_of(b[0], 3)
    require_masked(groups, groups_of_b, (m, n, k, k_of_b), d, masked_m, expected_m)
    require_masked_capacity(state, groups, m)
    scale_a, scale_b = transform_pair(
        state, a[1], b[1], (m, n, k), recipes, (groups, groups), disable_ue8m0_cast
    )
    require_tma((a[0], b[0], d))
    columns = -(-k // COLUMNS)
    scale_a, scale_b = row_scales(scale_a, m, columns), row_scales(scale_b, n, columns)
    poison(d)
    for group, count in enumerate(masked_m.tolist()):
        own = slice(0, count)
        d[group, own] = scaled_product(
            a[0][group, own], scale_a[group, own], b[0][group], scale_b[group]
        ).to(d.dtype)


def require_layout(layout: torch.Tensor, size: int) -> None:
    """The layout of contiguous groups is dense int32 of one number a row, or a group."""
    require(layout.is_contiguous(), "grouped_layout.is_contiguous()")
    require(shape_of(layout, 1) == (size,), f"m == m__ or num_groups == num_groups_: {size}")
    require_dtype(layout, torch.int32)


def require_masked(
    groups: int,
    groups_of_b: int,
    sizes: tuple[int, int, int, int],
    d: torch.Tensor,
    masked_m: torch.Tensor,
    expected_m: int,
) -> None:
    """Assert what a masked product asserts beside its operands."""
    m, n, k, k_of_b = sizes
    require(masked_m.is_contiguous(), "masked_m.is_contiguous()")
    require(
        groups == groups_of_b == shape_of(d, 3)[0] == masked_m.numel(),
        "num_groups == num_groups_ and num_groups == num_groups__ and num_groups == num_groups___",
    )
    require((m, n) == tuple(d.shape[1:]) and k == k_of_b, "m == m_ and n == n_ and k == k_")
    require(
        min(expected_m, m, n, k, groups) > 0,
        "expected_m > 0 and m > 0 and n > 0 and k > 0 and num_groups > 0",
    )
    require_output(d, torch.bfloat16)
    require_dtype(masked_m, torch.int32)
    require(bool((masked_m <= m).all()), f"no masked_m above the {m} rows of a slot")


def returns_early(m: int, n: int, k: int, d: torch.Tensor, c: torch.Tensor | None) -> bool:
    """Serve products of nothing, and put what is added to where the kernel adds."""
    if m == 0 or n == 0:
        return True
    same = c is not None and c.data_ptr() == d.data_ptr()
    if c is not None:
        require(is_k_major(c), "t.stride(-1) == 1")
        require(c.dtype == d.dtype, "d.scalar_type() == c.value().scalar_type()")
        require(
            not same or (c.shape == d.shape and c.stride() == d.stride()),
            "c->sizes() == d.sizes() and c->strides() == d.strides()",
        )
    if not same and (k == 0 or c is not None):
        d.copy_(torch.zeros_like(d) if c is None else c)
    return k == 0


def _require_operands(state: State, a: Scaled, b: Scaled, *, both_k_major: bool) -> None:
    major_a, major_b = is_k_major(a[0]), is_k_major(b[0])
    if both_k_major:
        require(major_a, "major_a == cute::UMMA::Major::K")
        require(major_b, "major_b == cute::UMMA::Major::K")
    for values, _ in (a, b):
        require_dtype(values, torch.float8_e4m3fn)
