"""DeepGEMM as its authors publish it, 2.6.1."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mortise_cuda_common.emulator.deep_gemm import bf16_gemm, fp8_gemm, mqa, scales
from mortise_cuda_common.emulator.deep_gemm.library import EmulatedDeepGEMM

if TYPE_CHECKING:
    import torch

    from mortise_cuda_common.emulator.deep_gemm.fp8_gemm import Scaled
    from mortise_cuda_common.emulator.deep_gemm.scales import Recipe


class UpstreamDeepGEMM(EmulatedDeepGEMM):
    """Its own names and defaults."""

    __version__ = "2.6.1"

    def fp8_fp4_gemm_nt(
        self,
        a: Scaled,
        b: Scaled,
        d: torch.Tensor,
        c: torch.Tensor | None = None,
        recipe: Recipe | None = None,
        recipe_a: Recipe | None = None,
        recipe_b: Recipe | None = None,
        compiled_dims: str = "nk",
        disable_ue8m0_cast: bool = False,
    ) -> None:
        """One product."""
        recipes = (recipe, recipe_a, recipe_b)
        fp8_gemm.dense(self._state, a, b, d, c, recipes, disable_ue8m0_cast)

    fp8_gemm_nt = fp8_fp4_gemm_nt
    m_grouped_fp8_gemm_nt_masked = EmulatedDeepGEMM.m_grouped_fp8_fp4_gemm_nt_masked

    def bf16_gemm_nt(
        self,
        a: torch.Tensor,
        b: torch.Tensor,
        d: torch.Tensor,
        c: torch.Tensor | None = None,
        compiled_dims: str = "nk",
    ) -> None:
        """One product of bfloat16."""
        bf16_gemm.dense(self._state, a, b, d, c)

    def get_mn_major_tma_aligned_packed_ue8m0_tensor(
        self, sf: torch.Tensor, psum_layout: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Pack powers of two."""
        return scales.packed_ue8m0(self._state, sf, psum_layout)

    def transform_sf_into_required_layout(
        self,
        sf: torch.Tensor,
        mn: int,
        k: int,
        recipe: Recipe,
        num_groups: int | None = None,
        is_sfa: bool | None = None,
        disable_ue8m0_cast: bool = False,
        psum_layout: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Scales as the kernels read them."""
        return scales.transform(
            self._state, sf, mn, k, recipe, num_groups, is_sfa, disable_ue8m0_cast, psum_layout
        )

    def fp8_mqa_logits(
        self,
        q: torch.Tensor,
        kv: Scaled,
        weights: torch.Tensor,
        cu_seq_len_k_start: torch.Tensor,
        cu_seq_len_k_end: torch.Tensor,
        clean_logits: bool = True,
        max_seqlen_k: int = 0,
    ) -> torch.Tensor:
        """Scores against dense keys."""
        keys_of_row = (cu_seq_len_k_start, cu_seq_len_k_end)
        return mqa.logits(self._state, q, kv, weights, *keys_of_row, clean_logits, max_seqlen_k)
