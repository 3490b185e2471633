"""SwiGLU by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from mortise_npu_ascend.emulator.rejections import require, require_dtype

if TYPE_CHECKING:
    from collections.abc import Callable

KERNEL: Final = "aclnnSwiGlu"

_FLOATS: Final = (torch.float32, torch.float16, torch.bfloat16)


def npu_swiglu(input: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """silu(first half along ``dim``) * second half, in float32, rounded once.

    Args:
        input: float32, float16 or bfloat16; an even number of elements along ``dim``.
        dim: axis that is halved.

    Returns:
        The same dtype, half as long along ``dim``.
    """
    operator = "npu_swiglu"
    require_dtype(input, "x", _FLOATS, operator, kernel=KERNEL)
    require(
        -input.ndim <= dim < input.ndim,
        operator,
        f"The value of attr [dim] must be in the range [-{input.ndim}, {input.ndim - 1}], but got "
        f"[{dim}].",
        kernel=KERNEL,
    )
    require(
        input.shape[dim] % 2 == 0,
        operator,
        f"The shape {list(input.shape)} is not divisible by 2 along axis {dim}.",
        kernel=KERNEL,
    )
    gate, up = input.float().chunk(2, dim=dim)
    return (silu(gate) * up).to(input.dtype)


def silu(gate: torch.Tensor) -> torch.Tensor:
    """gate / (1 + exp(-gate)), which is the sequence of the vector units' instructions."""
    return gate / (1 + torch.exp(-gate))


OPERATORS: Final[tuple[tuple[str, Callable[..., object]], ...]] = (("npu_swiglu", npu_swiglu),)
