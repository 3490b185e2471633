"""torch_npu's operators for CPU tensors: an Ascend NPU for machines that have none."""

from __future__ import annotations

from mortise.plugin import ConfigError
from mortise_npu_ascend.emulator.chip import EmulatedChip
from mortise_npu_ascend.emulator.generation import Generation
from mortise_npu_ascend.emulator.library import register
from mortise_npu_ascend.emulator.operators import OPERATORS
from mortise_npu_ascend.emulator.stand_in import EmulatedNpu

__all__ = ["EmulatedNpu", "Generation", "install"]


def install(generation: Generation | str = Generation.A2, *, strict: bool = False) -> EmulatedNpu:
    """Register the emulated operators, once for the process, and give a chip to call them on.

    Nothing is emulated before the first call, and importing this package registers nothing.

    Args:
        generation: whose tables, limits and refusals the returned object has.
        strict: also do what the device does to its users' harm, such as overwriting an input.

    Returns:
        What stands in for the module ``torch_npu``; each call returns another object.

    Raises:
        ConfigError: no such generation.
        BackendUnusableError: the real torch_npu is loaded.
    """
    try:
        chip = EmulatedChip(Generation(generation), strict=strict)
    except ValueError:
        raise ConfigError(
            f"no generation of the Ascend NPU is called {generation!r}",
            expected=f"one of {', '.join(Generation)}",
        ) from None
    register(OPERATORS)
    return EmulatedNpu(chip)
