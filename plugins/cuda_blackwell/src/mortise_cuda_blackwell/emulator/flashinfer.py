"""FlashInfer's functions for NVFP4 rows in slots, with its signatures, on a CPU."""

# Read in flashinfer-ai/flashinfer at fb28d72: gemm/kernels/grouped_gemm_masked_wrapper.py and
# grouped_gemm_masked_blackwell.py, quantization/fp4_quantization.py, activation.py, and
# csrc/nv_internal/tensorrt_llm/{thop/fp4Quantize.cpp,kernels/quantization.cuh}. Its quotients are
# approximate unless FLASHINFER_DISABLE_FP4_QUANT_FAST_MATH is set; here they are exact.

from __future__ import annotations

from types import MappingProxyType, SimpleNamespace
from typing import Any, Final

import torch

from mortise.formats.nvfp4 import dequantise_nvfp4, quantise_nvfp4_by_divisor
from mortise_cuda_blackwell.scales import from_tiles, to_tiles

BLOCK: Final = 16
_POISON: Final = 0xFF
_ELEMENTS_OF_16_BYTES: Final = 32
_OUTPUTS: Final = MappingProxyType(
    {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
)


class EmulatedFlashInfer:
    """What is called of the module ``flashinfer``; the same on every chip that it knows."""

    __version__: Final = "0.6.18"

    def __init__(self) -> None:
        self.gemm: Final = SimpleNamespace(grouped_gemm_nt_masked=self._grouped_gemm_nt_masked)

    def scaled_fp4_grouped_quantize(
        self, a: torch.Tensor, mask: torch.Tensor, a_global_sf: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantise the first ``mask[e]`` rows of each ``a[e]``.

        Args:
            a: bfloat16 or float16 ``[E, M, K]``, contiguous.
            mask: int32 ``[E]``.
            a_global_sf: float32 ``[E]``, by which numbers are multiplied before they are rounded.

        Returns:
            uint8 ``[M, K/2, E]``, ``[E, M, K/2]`` in memory, and e4m3 scales in tiles.

        Raises:
            RuntimeError, NotImplementedError, AssertionError: what the library refuses.
        """
        _check_quantiser(a, mask, a_global_sf, a.shape[2])
        return _quantised(a, mask, a_global_sf)

    def silu_and_mul_scaled_nvfp4_experts_quantize(
        self, a: torch.Tensor, mask: torch.Tensor, a_global_sf: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same of silu(first half of the columns) times the second, rounded once."""
        _check_quantiser(a, mask, a_global_sf, a.shape[2] // 2)
        gate, up = a.float().chunk(2, dim=2)
        return _quantised((torch.nn.functional.silu(gate) * up).to(a.dtype), mask, a_global_sf)

    def _grouped_gemm_nt_masked(
        self,
        lhs: tuple[torch.Tensor, torch.Tensor],
        rhs: tuple[torch.Tensor, torch.Tensor],
        out: torch.Tensor,
        masked_m: torch.Tensor,
        *,
        ab_dtype: str,
        sf_dtype: str,
        c_dtype: str,
        sf_vec_size: int,
        **kwargs: Any,
    ) -> None:
        """Multiply: ``out[:m, :, e] = alpha[e] * a[:m, :, e] @ b[:, :, e].T``, m of ``masked_m``.

        Other rows are left alone. Every operand is indexed with the expert last, and lies with the
        expert first.

        Raises:
            ValueError, AssertionError, RuntimeError: what the library refuses, or is known to do
                wrongly.
        """
        alpha, alpha_dtype = kwargs.pop("alpha", None), kwargs.pop("alpha_dtype", None)
        for name in ("mma_tiler_mn", "cluster_shape_mn", "sm_count"):
            kwargs.pop(name, None)
        assert not kwargs, f"Unsupported kwargs: {kwargs}"
        if (ab_dtype, sf_dtype, sf_vec_size) != ("float4_e2m1fn", "float8_e4m3fn", BLOCK):
            raise NotImplementedError("the emulation multiplies NVFP4 alone")
        _check_product(lhs, rhs, out, masked_m)
        assert out.dtype is _OUTPUTS[c_dtype], f"out is {out.dtype}, c_dtype {c_dtype}"
        if alpha is not None:
            assert alpha_dtype == "float32" and alpha.dtype is torch.float32
            assert alpha.shape == masked_m.shape
        left, right = (_dequantised(*operand) for operand in (lhs, rhs))
        for expert, count in enumerate(masked_m.tolist()):
            sums = left[expert, :count] @ right[expert].T
            if alpha is not None:
                sums = sums * alpha[expert]
            out[:count, :, expert] = sums.to(out.dtype)


def _check_quantiser(
    a: torch.Tensor, mask: torch.Tensor, a_global_sf: torch.Tensor, columns: int
) -> None:
    assert columns % BLOCK == 0, f"k must be multiple of 16, but got {columns}."
    if a.dtype not in {torch.bfloat16, torch.float16}:
        raise NotImplementedError(
            "silu_and_mul_scaled_nvfp4_experts_quantize only supports input tensor with dtypes"
            " fp16/bf16."
        )
    if not (a.is_contiguous() and mask.is_contiguous() and a_global_sf.is_contiguous()):
        raise RuntimeError("input, mask and input_global_scale must be contiguous")
    if mask.dtype is not torch.int32 or a_global_sf.dtype is not torch.float32:
        raise RuntimeError("mask must be int32, input_global_scale float32")
    if mask.shape != a_global_sf.shape or mask.dim() != 1:
        raise RuntimeError("mask.shape()[0] must be equal to n_experts")


def _quantised(
    plain: torch.Tensor, mask: torch.Tensor, divisors: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    packed, scales = quantise_nvfp4_by_divisor(plain, divisors[:, None, None])
    undefined = torch.arange(plain.shape[1]) >= mask.unsqueeze(1)
    packed[undefined] = _POISON
    scale_bytes = scales.view(torch.uint8)
    scale_bytes[undefined] = _POISON
    tiles = to_tiles(scales).view(torch.uint8).clone(memory_format=torch.preserve_format)
    _poison_padding(tiles, plain.shape[1], scales.shape[2])
    return packed.permute(1, 2, 0), tiles.view(torch.float8_e4m3fn)


def _poison_padding(tiles: torch.Tensor, num_rows: int, num_columns: int) -> None:
    """The library writes no scale of a row or column that is not there."""
    row = torch.arange(tiles.shape[2] * 128).view(-1, 4, 32).permute(2, 1, 0)
    column = torch.arange(tiles.shape[4] * 4).view(-1, 4).T
    missing = (row >= num_rows)[..., None, None] | (column >= num_columns)
    tiles.masked_fill_(missing.unsqueeze(-1), _POISON)


def _check_product(
    lhs: tuple[torch.Tensor, torch.Tensor],
    rhs: tuple[torch.Tensor, torch.Tensor],
    out: torch.Tensor,
    masked_m: torch.Tensor,
) -> None:
    if out.dim() != 3 or not out.permute(2, 0, 1).is_contiguous():
        raise ValueError(
            "grouped_gemm_nt_masked: `out` must be a 3D (m, n, l) tensor that is contiguous in the"
            " layout implied by c_major='n'"
        )
    (rows, _, experts), (outputs, packed, _) = lhs[0].shape, rhs[0].shape
    if experts == 1:
        raise RuntimeError("nvidia-cutlass-dsl has issue when l=1")
    if 2 * packed % _ELEMENTS_OF_16_BYTES or outputs % 8:
        raise TypeError("contiguous dimensions are aligned to 16 bytes")
    assert out.shape == (rows, outputs, experts)
    assert masked_m.dtype is torch.int32 and masked_m.shape == (experts,)
    for values, tiles in (lhs, rhs):
        assert values.dtype is torch.uint8 and tiles.dtype is torch.float8_e4m3fn
        # Compiled for this order in memory, from pointers: strides are not looked at.
        assert values.permute(2, 0, 1).is_contiguous(), "values lie with the expert first"
        assert tiles.permute(5, 2, 4, 0, 1, 3).is_contiguous(), "scales lie in tiles"
        wanted = (32, 4, -(-values.shape[0] // 128), 4, -(-values.shape[1] // 32), experts)
        assert tuple(tiles.shape) == wanted, f"scales {tuple(tiles.shape)}, expected {wanted}"


def _dequantised(values: torch.Tensor, tiles: torch.Tensor) -> torch.Tensor:
    """float32 ``[E, M, K]``; a padded column holds zero times a scale that nobody may have set."""
    rows, packed, _ = values.shape
    scales = from_tiles(tiles, rows, tiles.shape[4] * 4)
    if scales.shape[2] * BLOCK != 2 * packed:
        raise RuntimeError("scales of columns that are not there multiply them all the same")
    return dequantise_nvfp4(values.permute(2, 0, 1), scales, 1.0)
