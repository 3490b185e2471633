"""How an emulated operator refuses its arguments: before computing, in the device's words."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Final, NoReturn

import torch

from mortise_npu_ascend.emulator.chip import current_chip

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

NULL_POINTER: Final = 161001
"""Code of the vendor's library for an argument that is missing."""

INVALID_PARAMETER: Final = 161002
"""Code of the vendor's library for an argument that is wrong."""

_DEVICE_NAMES: Final[Mapping[torch.dtype, str]] = MappingProxyType(
    {
        torch.bfloat16: "DT_BFLOAT16",
        torch.bool: "DT_BOOL",
        torch.float16: "DT_FLOAT16",
        torch.float32: "DT_FLOAT",
        torch.float64: "DT_DOUBLE",
        torch.float8_e4m3fn: "DT_FLOAT8_E4M3FN",
        torch.float8_e5m2: "DT_FLOAT8_E5M2",
        torch.int8: "DT_INT8",
        torch.int16: "DT_INT16",
        torch.int32: "DT_INT32",
        torch.int64: "DT_INT64",
        torch.uint8: "DT_UINT8",
        torch.uint64: "DT_UINT64",
    }
)


def device_name(dtype: torch.dtype) -> str:
    """A dtype as the vendor's messages write it: ``DT_BFLOAT16``."""
    return _DEVICE_NAMES.get(dtype, str(dtype))


def reject(
    operator: str, reason: str, *, kernel: str | None = None, code: int = INVALID_PARAMETER
) -> NoReturn:
    """Raise what a caller of the device would get.

    Args:
        operator: that was called, ``npu_grouped_matmul``.
        reason: with the words that the device's own message carries.
        kernel: of the vendor's library, ``aclnnGroupedMatmulV5``, where the library refuses; None
            where torch_npu does so before.
        code: of the vendor's library.

    Raises:
        RuntimeError: always, and says that the chip is emulated.
    """
    where = f"{operator} on an emulated Ascend {current_chip().generation}"
    if kernel is None:
        raise RuntimeError(f"{where}: {reason}")
    raise RuntimeError(f"{where}: call {kernel} failed, error code is {code}, EZ1001: {reason}")


def require(
    condition: bool,
    operator: str,
    reason: str,
    *,
    kernel: str | None = None,
    code: int = INVALID_PARAMETER,
) -> None:
    """:func:`reject` unless a condition holds.

    Raises:
        RuntimeError: it does not.
    """
    if not condition:
        reject(operator, reason, kernel=kernel, code=code)


def require_dtype(
    tensor: torch.Tensor,
    argument: str,
    allowed: Iterable[torch.dtype],
    operator: str,
    *,
    kernel: str | None = None,
) -> None:
    """:func:`reject` an argument of a dtype that the operator does not take.

    Raises:
        RuntimeError: with the argument, its dtype and the dtypes that would be taken.
    """
    names = [device_name(dtype) for dtype in allowed]
    require(
        device_name(tensor.dtype) in names,
        operator,
        f"Tensor {argument} not implemented for {device_name(tensor.dtype)}, should be in dtype "
        f"support list [{','.join(names)}]",
        kernel=kernel,
    )


def not_emulated(operator: str, what: str) -> NoReturn:
    """Say that the device may well do this, and that the emulator does not.

    Raises:
        NotImplementedError: always; it is a ``RuntimeError`` too.
    """
    raise NotImplementedError(
        f"{operator} on an emulated Ascend {current_chip().generation}: {what} is not emulated"
    )
