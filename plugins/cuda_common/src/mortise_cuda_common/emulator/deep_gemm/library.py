"""What DeepGEMM and its fork have in common, by the names and in the order that both have."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mortise_cuda_common.chip import Architecture
from mortise_cuda_common.emulator.deep_gemm import (
    bf16_gemm,
    fp8_gemm,
    paged_mqa,
    paged_schedule,
    scales,
)
from mortise_cuda_common.emulator.deep_gemm.state import LEGACY_ALIGNMENT, State

if TYPE_CHECKING:
    import torch

    from mortise_cuda_common.chip import Chip
    from mortise_cuda_common.emulator.deep_gemm.fp8_gemm import Scaled
    from mortise_cuda_common.emulator.deep_gemm.scales import Recipe


class EmulatedDeepGEMM:
    """One library object; what the real one keeps for the process belongs to this object.

    Names, order and defaults of the parameters are the vendor's. Results that a chip would leave
    undefined are poison; what it would assert, fault on or never finish raises ``RuntimeError``.

    Args:
        chip: that it computes on.
    """

    def __init__(self, chip: Chip) -> None:
        self._state = State(chip=chip, num_sms=chip.num_sms)

    # ---- what holds for all kernels

    def get_num_sms(self) -> int:
        """Multiprocessors that kernels are planned for."""
        return self._state.num_sms

    def set_num_sms(self, new_num_sms: int) -> None:
        """Leave some multiprocessors to others."""
        self._state.num_sms = new_num_sms

    def get_tc_util(self) -> int:
        """Percent of the tensor cores' time."""
        return self._state.tensor_core_percent

    def set_tc_util(self, new_tc_util: int) -> None:
        """Leave some of the tensor cores' time to others; changes no result."""
        self._state.tensor_core_percent = new_tc_util

    def get_pdl(self) -> bool:
        """Whether kernels are launched before the one ahead of them has ended."""
        return self._state.dependent_launch

    def set_pdl(self, new_enable_pdl: bool) -> None:
        """Launch kernels before the one ahead of them has ended; changes no result."""
        self._state.dependent_launch = new_enable_pdl

    def get_mk_alignment_for_contiguous_layout(self) -> int:
        """Rows of a tile of contiguous groups."""
        return self._state.alignment

    def set_mk_alignment_for_contiguous_layout(self, new_value: int) -> None:
        """Change the rows of a tile."""
        self._state.alignment = new_value

    get_m_alignment_for_contiguous_layout = get_mk_alignment_for_contiguous_layout
    get_k_alignment_for_contiguous_layout = get_mk_alignment_for_contiguous_layout

    def get_theoretical_mk_alignment_for_contiguous_layout(
        self, expected_m: int | None = None
    ) -> int:
        """The alignment that suits so many rows of a group; on SM90 there is one."""
        if self._state.chip.architecture is Architecture.SM90:
            return LEGACY_ALIGNMENT
        return 224 if expected_m is None else min(224, max(32, -(-expected_m // 32) * 32))

    # ---- scales

    def get_tma_aligned_size(self, mn: int, element_size: int) -> int:
        """``mn`` rounded up to a multiple of 16 bytes."""
        return scales.tma_aligned_size(mn, element_size)

    def get_mn_major_tma_aligned_tensor(self, sf: torch.Tensor) -> torch.Tensor:
        """Float32 scales with their rows side by side."""
        return scales.mn_major_tma_aligned(sf)

    # ---- products of e4m3

    def m_grouped_fp8_fp4_gemm_nt_contiguous(
        self,
        a: Scaled,
        b: Scaled,
        d: torch.Tensor,
        grouped_layout: torch.Tensor,
        recipe: Recipe | None = None,
        recipe_a: Recipe | None = None,
        recipe_b: Recipe | None = None,
        compiled_dims: str = "nk",
        disable_ue8m0_cast: bool = False,
        use_psum_layout: bool = False,
        ensure_zero_padding: bool = True,
        expected_m_for_psum_layout: int | None = None,
    ) -> None:
        """Rows of several groups one after another."""
        fp8_gemm.contiguous(
            self._state,
            a,
            b,
            d,
            grouped_layout,
            (recipe, recipe_a, recipe_b),
            disable_ue8m0_cast,
            use_psum_layout,
            ensure_zero_padding,
            expected_m_for_psum_layout,
        )

    m_grouped_fp8_gemm_nt_contiguous = m_grouped_fp8_fp4_gemm_nt_contiguous

    def m_grouped_fp8_fp4_gemm_nt_masked(
        self,
        a: Scaled,
        b: Scaled,
        d: torch.Tensor,
        masked_m: torch.Tensor,
        expected_m: int,
        recipe: Recipe | None = None,
        recipe_a: Recipe | None = None,
        recipe_b: Recipe | None = None,
        compiled_dims: str = "nk",
        disable_ue8m0_cast: bool = False,
    ) -> None:
        """A slot of rows for each group."""
        recipes = (recipe, recipe_a, recipe_b)
        fp8_gemm.masked(self._state, a, b, d, masked_m, expected_m, recipes, disable_ue8m0_cast)

    fp8_m_grouped_gemm_nt_masked = m_grouped_fp8_fp4_gemm_nt_masked

    # ---- products of bfloat16

    def m_grouped_bf16_gemm_nt_contiguous(
        self,
        a: torch.Tensor,
        b: torch.Tensor,
        d: torch.Tensor,
        grouped_layout: torch.Tensor,
        compiled_dims: str = "nk",
        use_psum_layout: bool = False,
        ensure_zero_padding: bool = True,
        expected_m_for_psum_layout: int | None = None,
    ) -> None:
        """Rows of several groups one after another."""
        bf16_gemm.contiguous(
            self._state,
            a,
            b,
            d,
            grouped_layout,
            use_psum_layout,
            ensure_zero_padding,
            expected_m_for_psum_layout,
        )

    def m_grouped_bf16_gemm_nt_masked(
        self,
        a: torch.Tensor,
        b: torch.Tensor,
        d: torch.Tensor,
        masked_m: torch.Tensor,
        expected_m: int,
        compiled_dims: str = "nk",
    ) -> None:
        """A slot of rows for each group."""
        bf16_gemm.masked(self._state, a, b, d, masked_m, expected_m)

    bf16_m_grouped_gemm_nt_masked = m_grouped_bf16_gemm_nt_masked

    # ---- scores of the indexer

    def get_paged_mqa_logits_metadata(
        self,
        context_lens: torch.Tensor,
        block_kv: int,
        num_sms: int,
        indices: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Where each multiprocessor begins."""
        return paged_schedule.plan(self._state, context_lens, block_kv, num_sms, indices)

    def fp8_paged_mqa_logits(
        self,
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        weights: torch.Tensor,
        context_lens: torch.Tensor,
        block_table: torch.Tensor,
        schedule_meta: torch.Tensor,
        max_context_len: int,
        clean_logits: bool = False,
        indices: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Scores against the keys of pages."""
        return paged_mqa.paged_logits(
            self._state,
            q,
            kv_cache,
            weights,
            context_lens,
            block_table,
            schedule_meta,
            max_context_len,
            clean_logits,
            indices,
        )
