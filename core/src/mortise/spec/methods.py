"""What experts of each scheme ordinarily consume, where a backend does not say otherwise."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Final, assert_never

from mortise.spec.capabilities import ExpertMethod
from mortise.spec.dispatch import DispatchDtype
from mortise.spec.weights import WeightScheme

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

# By name, since a backend's module is read on machines where torch is not loaded yet.
_UNQUANTISED: Final[Mapping[str, DispatchDtype]] = MappingProxyType(
    {"torch.float32": DispatchDtype.FP32, "torch.bfloat16": DispatchDtype.BF16}
)


def unquantised(compute_dtype: torch.dtype) -> DispatchDtype:
    """The format of rows that travel in the compute dtype, float32 or bfloat16."""
    return _UNQUANTISED[str(compute_dtype)]


def ordinary_method(
    scheme: WeightScheme, compute_dtype: torch.dtype, *, static_input: bool = False
) -> ExpertMethod:
    """The method of experts whose first projection is stored in ``scheme``.

    Rows travel in the format that the first projection multiplies, where there is a dispatch
    format for it; unquantised rows are always consumed too, then the method quantises by itself.

    Args:
        scheme: of w13.
        compute_dtype: ``torch.float32`` or ``torch.bfloat16``.
        static_input: the checkpoint holds scales for the input of w13.
    """
    plain = unquantised(compute_dtype)
    match scheme:
        case WeightScheme.FLOAT | WeightScheme.W4A4 | WeightScheme.W4A16:
            return ExpertMethod(accepted=(plain,), requested=plain)
        case WeightScheme.FP8_BLOCK:
            return ExpertMethod(
                accepted=(DispatchDtype.FP8_E4M3, plain), requested=DispatchDtype.FP8_E4M3
            )
        case WeightScheme.W8A8 if static_input:
            # Rows travel quantised per token, which a static scale is not.
            return ExpertMethod(accepted=(plain,), requested=plain)
        case WeightScheme.W8A8 | WeightScheme.W4A8:
            return ExpertMethod(accepted=(DispatchDtype.INT8, plain), requested=DispatchDtype.INT8)
        case WeightScheme.NVFP4 if static_input:
            return ExpertMethod(accepted=(DispatchDtype.NVFP4, plain))
        case WeightScheme.NVFP4:
            # Without a scale for its input only the weights are quantised.
            return ExpertMethod(accepted=(plain,), requested=plain)
        case _:
            assert_never(scheme)
