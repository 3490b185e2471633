"""How DeepEP is told in which format rows travel, whatever its environment variable says."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from mortise.plugin import DispatchDtype, DispatchMode
from mortise_npu_ascend.dispatch import Generation
from mortise_npu_ascend.environment import INT8_DISPATCH
from mortise_npu_ascend.exchange_library import LIBRARY, Refusal

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from mortise_npu_ascend.environment import VendorEnvironment


def format_arguments(
    method: Callable[..., Any],
    mode: DispatchMode,
    dtype: DispatchDtype,
    generation: Generation,
    environment: VendorEnvironment,
) -> Mapping[str, object] | Refusal:
    """Arguments of a dispatch that state bf16 or int8 rows, and never leave it unsaid.

    Unsaid is a third thing: then the variable ``DEEP_NORMAL_MODE_USE_INT8_QUANT`` decides, for all
    layers of a process at once. The port has said it in two ways, so its signature is asked which:

    - ``quant_mode`` names the format, and outranks the variable (July to September 2026; of the
      low-latency exchange None is bf16, where ``use_fp8`` is false as well);
    - ``use_fp8`` alone (sgl-kernel-npu pull requests 773, 774 and 792) means int8 on A2 and A3 and
      float8 on A5, and all flags false leave it unsaid.

    Args:
        method: ``dispatch`` or ``low_latency_dispatch`` of the installed library.
        mode: which of them.
        dtype: bf16 or int8.
        generation: of the chip.
        environment: what the library finds.

    Returns:
        Arguments by name; or why the installed library cannot be told.
    """
    assert dtype in (DispatchDtype.BF16, DispatchDtype.INT8)
    parameters = inspect.signature(method).parameters
    int8 = dtype is DispatchDtype.INT8
    flags = {
        name: int8 and name == "use_fp8"
        for name in ("use_fp8", "use_ue8m0", "use_mxfp4", "use_mxfp8", "round_scale")
        if name in parameters
    }
    if "quant_mode" in parameters:
        if mode is DispatchMode.NORMAL:
            return {**flags, "quant_mode": dtype.value}
        # An older one asks nobody else; with use_mxfp8 it does, where it is told None.
        if int8 or "use_mxfp8" not in parameters:
            return {**flags, "quant_mode": dtype.value if int8 else None}
    elif "use_fp8" not in parameters:
        return Refusal(
            f"the installed {LIBRARY} takes neither quant_mode nor use_fp8, so that only an"
            " environment variable says in which format rows travel",
            "install one of July 2026 or later, for this device",
        )
    asks_the_variable = mode is DispatchMode.NORMAL or "use_mxfp8" in parameters
    if asks_the_variable and int8 and generation is Generation.A5:
        return Refusal(f"the installed {LIBRARY} sends float8 on A5 where int8 is asked for")
    if asks_the_variable and not int8 and environment.forces_int8:
        return Refusal(
            f"the installed {LIBRARY} quantises bf16 rows because {INT8_DISPATCH} is 1",
            f"unset {INT8_DISPATCH} before the processes start",
        )
    return flags
