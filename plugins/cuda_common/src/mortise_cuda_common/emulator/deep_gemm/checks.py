"""DeepGEMM's assertions on the host, and what the device does where there is none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

POISON: Final = 0xFF
"""Every byte of what a kernel leaves undefined: NaN in all float formats, -1 in integers."""

TMA_BYTES: Final = 16
"""Strides and addresses that the tensor memory accelerator takes are multiples of it."""


def require(condition: bool, text: str) -> None:
    """Fail as ``DG_HOST_ASSERT`` does, with the condition as the library writes it.

    Raises:
        RuntimeError: it does not hold.
    """
    if not condition:
        raise RuntimeError(f"Assertion error (emulated DeepGEMM): {text}")


def device_fault(text: str) -> RuntimeError:
    """What a kernel would end with, or never end; on a chip the error comes later and elsewhere."""
    return RuntimeError(f"CUDA error (emulated DeepGEMM): {text}")


def shape_of(tensor: torch.Tensor, dims: int) -> tuple[int, ...]:
    """The shape of a tensor that must have so many dimensions."""
    require(tensor.dim() == dims, f"t.dim() == N: a tensor of {tuple(tensor.shape)}, N is {dims}")
    return tuple(tensor.shape)


def require_dtype(tensor: torch.Tensor, *dtypes: torch.dtype) -> None:
    """The dtype is one of these."""
    names = " or ".join(str(dtype) for dtype in dtypes)
    require(tensor.dtype in dtypes, f"scalar_type() == {names}, not {tensor.dtype}")


def is_k_major(tensor: torch.Tensor) -> bool:
    """Whether the last dimension is the dense one; one of the last two must be."""
    require(tensor.dim() in (2, 3), "dim == 2 or dim == 3")
    if tensor.dim() == 3:
        dense = tensor.stride(0) == tensor.shape[-2] * tensor.shape[-1]
        require(dense, "t.stride(0) == t.size(-2) * t.size(-1)")
    require(
        tensor.stride(-2) == 1 or tensor.stride(-1) == 1, "t.stride(-2) == 1 or t.stride(-1) == 1"
    )
    return tensor.stride(-1) == 1


def require_output(tensor: torch.Tensor, *dtypes: torch.dtype) -> None:
    """Outputs are row-major, of a dtype that the kernel writes."""
    require(is_k_major(tensor), "t.stride(-1) == 1")
    require_dtype(tensor, *dtypes)


def require_tma(tensors: Sequence[torch.Tensor]) -> None:
    """Rows begin at multiples of 16 bytes, or no tensor map can be made.

    Raises:
        RuntimeError: as the driver words it.
    """
    for tensor in tensors:
        stride = max(tensor.stride(-1), tensor.stride(-2)) * tensor.element_size()
        if stride % TMA_BYTES or tensor.data_ptr() % TMA_BYTES:
            raise RuntimeError(
                "CUDA driver error (emulated DeepGEMM): 1 (CUDA_ERROR_INVALID_VALUE, invalid"
                f" argument): a tensor of {tuple(tensor.shape)} {tensor.dtype} with rows of"
                f" {stride} bytes, and a tensor map takes multiples of {TMA_BYTES}"
            )


def poison(tensor: torch.Tensor) -> None:
    """Leave nothing in a tensor that could be taken for a result."""
    tensor.copy_(poisoned_like(tensor))


def poisoned_like(tensor: torch.Tensor) -> torch.Tensor:
    """A dense tensor of the same shape and dtype that holds poison."""
    return poisoned(tuple(tensor.shape), tensor.dtype)


def poisoned(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A dense tensor of a shape and dtype that holds poison."""
    width = torch.empty((), dtype=dtype).element_size()
    flat = torch.full((torch.Size(shape).numel() * width,), POISON, dtype=torch.uint8)
    return flat.view(dtype).reshape(tuple(shape))
