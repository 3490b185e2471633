"""A projection's weights as they are stored: their number formats and their scales."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class WeightScheme(StrEnum):
    """How the weights of one projection are stored, and what its input is made of.

    The tensors of each scheme are those of :class:`StoredWeight`; the arithmetic is that of
    ``mortise.reference``.
    """

    FLOAT = "float"
    """bfloat16 or float32, as the tensors are."""
    FP8_BLOCK = "fp8_block"
    """float8 e4m3 in blocks of 128 x 128, input float8 e4m3 per 128 columns."""
    W8A8 = "w8a8"
    """int8 per output channel, input int8 per token (or static, where an input scale is stored)."""
    W4A8 = "w4a8"
    """int4 per output channel or group of columns, input int8 per token."""
    W4A4 = "w4a4"
    """int4 per output channel or group of columns, input int4 per token."""
    W4A16 = "w4a16"
    """int4 per output channel or group of columns, input unquantised."""
    NVFP4 = "nvfp4"
    """float4 e2m1 in blocks of 16 columns under a global scale, input likewise."""


class ScaleFormat(StrEnum):
    """Number format of scales."""

    FLOAT32 = "float32"
    """float32."""
    E4M3 = "e4m3"
    """float8 e4m3, beside a global scale."""
    UE8M0 = "ue8m0"
    """Powers of two: kept as float32 beside weights, packed four to an int32 beside rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredWeight:
    """One projection ``[N, K]``, or the same projection of every local expert ``[E_l, N, K]``.

    ``...`` below is nothing or ``E_l``. S is the number of equal parts of N that were separate
    projections in the checkpoint: 2 for gate over up, else 1. G is the number of groups of columns
    that share a scale; 1 is per channel. B is the number of blocks of rows, counted in each part
    for itself: S times (N/S)/128. Divisions round up.

    ========== ======================== ================================= =========================
    scheme     ``weight``               ``scale``                         other
    ========== ======================== ================================= =========================
    FLOAT      ``[..., N, K]``          None
    FP8_BLOCK  e4m3 ``[..., N, K]``     float32 ``[..., B, K/128]``       ``scale_format``
    W8A8       int8 ``[..., N, K]``     float32 ``[..., N, 1]``           static: ``input_scale``,
                                                                          ``input_offset``
    W4A8 W4A4  int32 ``[..., N, K/8]``  float32 ``[..., N, G]``
    W4A16      int32 ``[..., N, K/8]``  float32 ``[..., N, G]``
    NVFP4      uint8 ``[..., N, K/2]``  e4m3 ``[..., N, K/16]``           ``global_scale``,
                                                                          ``input_scale``
    ========== ======================== ================================= =========================

    Packed int4 is two's complement, eight to an int32, the lowest nibble first, along K; packed
    float4 is two to a byte, the even column in the low nibble. Every scale multiplies: the weight
    is ``values * scale`` (times ``global_scale``).

    Args:
        scheme: how it is stored.
        weight: the values.
        scale: scales of the values.
        global_scale: float32 ``[..., S]`` (NVFP4).
        input_scale: float32 ``[..., S]``, static scale of the input. NVFP4: the global scale of
            the input, absent where only the weights are quantised. W8A8: present if the input is
            quantised statically.
        input_offset: float32 ``[..., S]``, added to the statically quantised input (W8A8).
        num_parts: S.
        scale_format: FP8_BLOCK: whether the scales are powers of two, the input's too.
    """

    scheme: WeightScheme
    weight: torch.Tensor
    scale: torch.Tensor | None = None
    global_scale: torch.Tensor | None = None
    input_scale: torch.Tensor | None = None
    input_offset: torch.Tensor | None = None
    num_parts: int = 1
    scale_format: ScaleFormat = ScaleFormat.FLOAT32


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearWeight:
    """A quantised projection outside the experts: attention, shared experts, dense blocks.

    Args:
        layer: dotted module name.
        stored: its weight.
        bias: ``[N]`` in the compute dtype, or None.
        out_features: N.
        in_features: K.
        prepared: what ``prepare_linear_weight`` made of it: opaque to the core, owned by the
            backend, None until prepared.
    """

    layer: str
    stored: StoredWeight
    bias: torch.Tensor | None
    out_features: int
    in_features: int
    prepared: object | None = None
