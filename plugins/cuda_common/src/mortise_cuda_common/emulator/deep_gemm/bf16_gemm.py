"""DeepGEMM's products of bfloat16 rows, dense and grouped."""

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
from mortise_cuda_common.emulator.deep_gemm.fp8_gemm import (
    require_layout,
    require_masked,
    returns_early,
)
from mortise_cuda_common.emulator.deep_gemm.products import (
    contiguous_rows,
    psum_rows,
    require_masked_capacity,
    write_gaps,
    write_groups,
)

if TYPE_CHECKING:
    from mortise_cuda_common.emulator.deep_gemm.state import State


def dense(
    state: State, a: torch.Tensor, b: torch.Tensor, d: torch.Tensor, c: torch.Tensor | None
) -> None:
    """``d = c + a @ b.T``."""
    is_k_major(a)
    is_k_major(b)
    m, k = shape_of(a, 2)
    n, k_of_b = shape_of(b, 2)
    require((m, n) == shape_of(d, 2) and k == k_of_b, "m == m_ and n == n_ and k == k_")
    _require_bf16(a, b)
    require_output(d, torch.bfloat16, torch.float32)
    if returns_early(m, n, k, d, c):
        return
    require_tma((a, b, d))
    product = a.float() @ b.float().T
    d.copy_(product if c is None else product + d.float())


def contiguous(
    state: State,
    a: torch.Tensor,
    b: torch.Tensor,
    d: torch.Tensor,
    grouped_layout: torch.Tensor,
    use_psum_layout: bool,
    ensure_zero_padding: bool,
    expected_m: int | None,
) -> None:
    """Rows of several groups one after another, each group's by its own weight."""
    require(is_k_major(a), "major_a == cute::UMMA::Major::K")
    is_k_major(b)
    m, k = shape_of(a, 2)
    groups, n, k_of_b = shape_of(b, 3)
    require((m, n) == shape_of(d, 2) and k == k_of_b, "m == m_ and n == n_ and k == k_")
    require(n > 0 and k > 0 and groups > 0, "n > 0 and k > 0 and num_groups > 0")
    _require_bf16(a, b)
    require_output(d, torch.bfloat16)
    require_layout(grouped_layout, groups if use_psum_layout else m)
    require(use_psum_layout or expected_m is None, "not expected_m_for_psum_layout.has_value()")
    if m == 0:
        return
    require_tma((a, b, d))
    find = psum_rows if use_psum_layout else contiguous_rows
    write_groups(
        d,
        find(state, grouped_layout),
        lambda own, group: a[own].float() @ b[group].float().T,
    )
    if use_psum_layout and ensure_zero_padding:
        write_gaps(state, d, grouped_layout)


def masked(
    state: State,
    a: torch.Tensor,
    b: torch.Tensor,
    d: torch.Tensor,
    masked_m: torch.Tensor,
    expected_m: int,
) -> None:
    """A slot of rows for each group, of which the first ``masked_m`` are there."""
    k_major = is_k_major(a) and is_k_major(b)
    require(k_major, "major_a == cute::UMMA::Major::K and major_b == cute::UMMA::Major::K")
    groups, m, k = shape_of(a, 3)
    groups_of_b, n, k_of_b = shape_of(b, 3)
    _require_bf16(a, b)
    require_masked(groups, groups_of_b, (m, n, k, k_of_b), d, masked_m, expected_m)
    require_masked_capacity(state, groups, m)
    require_tma((a, b, d))
    poison(d)
    for group, count in enumerate(masked_m.tolist()):
        own = slice(0, count)
        d[group, own] = (a[group, own].float() @ b[group].float().T).to(d.dtype)


def _require_bf16(a: torch.Tensor, b: torch.Tensor) -> None:
    require_dtype(a, torch.bfloat16)
    require_dtype(b, torch.bfloat16)
