"""The bytes and strides that DeepGEMM reads tensors in, where torch's own would not do."""

from __future__ import annotations

from typing import Final

import torch

from mortise.plugin import ContractError, ReasonCode

SIGN_AND_MANTISSA: Final = -0x7F800001  # 0x807fffff as a signed number
EXPONENT_SHIFT: Final = 23
SCALES_PER_WORD: Final = 4
ROWS_PER_TMA_LINE: Final = 4


def pack_row_scales(scales: torch.Tensor) -> torch.Tensor:
    """Pack float32 ``[.., R, C]`` into int32 ``[.., R, ceil(C/4)]`` with rows side by side.

    Byte j of word i is the biased exponent of column ``4 i + j``. The library's own kernel traps on
    a scale that is no power of two, in rows that nothing defines as well; here their bytes are cut
    out whatever they are, and what is multiplied by them is undefined as before.
    """
    batched = scales if scales.dim() == 3 else scales.unsqueeze(0)
    groups, rows, columns = batched.shape
    words = -(-columns // SCALES_PER_WORD)
    exponents = batched.new_zeros((groups, rows, words * SCALES_PER_WORD), dtype=torch.uint8)
    bits = batched.view(torch.int32) >> EXPONENT_SHIFT
    exponents[..., :columns] = (bits & 0xFF).to(torch.uint8)
    aligned = -(-rows // ROWS_PER_TMA_LINE) * ROWS_PER_TMA_LINE
    packed = torch.empty_strided(
        (groups, rows, words),
        (aligned * words, 1, aligned),
        dtype=torch.int32,
        device=scales.device,
    )
    packed.copy_(exponents.view(torch.int32))
    return packed if scales.dim() == 3 else packed.squeeze(0)


def dense_strides(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory, under the strides that follow from the shape.

    Torch takes a tensor for contiguous whatever the stride of a dimension of 1 is; the library
    compares that stride too, as with the weight of a single expert.
    """
    if not tensor.is_contiguous():
        return tensor
    strides, step = [], 1
    for size in reversed(tensor.shape):
        strides.append(step)
        step *= size
    wanted = tuple(reversed(strides))
    return tensor if tensor.stride() == wanted else tensor.as_strided(tensor.shape, wanted)


def require_powers_of_two(scale: torch.Tensor) -> None:
    """See that scales of a weight are positive powers of two.

    Raises:
        ContractError: one is not.
    """
    bits = scale.contiguous().view(torch.int32)
    wrong = ((bits & SIGN_AND_MANTISSA) != 0) | (bits == 0)
    if wrong.any():
        first = scale.contiguous()[wrong][0].item()
        raise ContractError(
            f"DeepGEMM on Blackwell was given a weight scale of {first!r}, and"
            f" {int(wrong.sum())} of {scale.numel()} are no powers of two",
            reason=ReasonCode.CONTRACT_BROKEN,
            expected="powers of two, which the weight was quantised with",
            remedy='set option runner to "triton", which multiplies by any scale',
        )
