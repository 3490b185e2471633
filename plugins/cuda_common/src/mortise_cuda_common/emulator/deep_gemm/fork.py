"""The fork of DeepGEMM that is on the package index, sgl-deep-gemm 0.1.5.post1."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mortise_cuda_common.emulator.deep_gemm import bf16_gemm, fp8_gemm, mqa, scales
from mortise_cuda_common.emulator.deep_gemm.library import EmulatedDeepGEMM

if TYPE_CHECKING:
    import torch

    from mortise_cuda_common.emulator.deep_gemm.fp8_gemm import Scaled
    from mortise_cuda_common.emulator.deep_gemm.scales import Recipe


class ForkDeepGEMM(EmulatedDeepGEMM):
    """It has no ``m_grouped_fp8_gemm_nt_masked``, and defaults of its own."""

    __version__ = "0.1.5.post1"

    def fp8_fp4_gemm_nt(
        self,
        a: Scaled,
        b: Scaled,
        d: torch.Tensor,
        c: torch.Tensor | None = None,
        recipe: Recipe | None = None,
        recipe_a: Recipe | None = None,
        recipe_b: Recipe | None = None,
        compiled_dims: str = "",
        disable_ue8m0_cast: bool = False,
    ) -> None:
        """One product."""
        recipes = (recipe, recipe_a, recipe_b)
        fp8_gemm.dense(self._state, a, b, d, c, recipes, disable_ue8m0_cast)

    fp8_gemm_nt = fp8_fp4_gemm_nt

    def bf16_gemm_nt(
        self,
        a: torch.Tensor,
        b: torch.Tensor,
        d: torch.Tensor,
        c: torch.Tensor | None = None,
        compiled_dims: str = "",
    ) -> None:
        """One product of bfloat16."""
        bf16_gemm.dense(self._state, a, b, d, c)

    def get_mn_major_tma_aligned_packed_ue8m0_tensor(self, sf: torch.Tensor) -> torch.Tensor:
        """Pack powers of two."""
        return scales.packed_ue8m0(self._state, sf)

    def transform_sf_into_required_layout(
        self,
        sf: torch.Tensor,
        mn: int,
        k: int,
        recipe: Recipe,
        num_groups: int | None = None,
        is_sfa: bool | None = None,
        disable_ue8m0_cast: bool = False,
    ) -> torch.Tensor:
        """Scales as the kernels read them."""
        return scales.transform(
            self._state, sf, mn, k, recipe, num_groups, is_sfa, disable_ue8m0_cast
        )

    def fp8_mqa_logits(
        self,
        q: torch.Tensor,
        kv: Scaled,
        weights: torch.Tensor,
        ks: torch.Tensor,
        ke: torch.Tensor,
        clean_logits: bool = False,
        max_seqlen_k: int = 0,
    ) -> torch.Tensor:
        """Scores against dense keys."""
        return mqa.logits(self._state, q, kv, weights, ks, ke, clean_logits, max_seqlen_k)
