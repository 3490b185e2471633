"""The backend's own table of the engine configuration."""

from __future__ import annotations

from types import MappingProxyType
from typing import Final, Literal

from mortise_cuda_common.chip import Architecture
from mortise_cuda_common.options import CommonOptions

CHIPS: Final = MappingProxyType({"B200": Architecture.SM100, "B300": Architecture.SM103})


class Options(CommonOptions):
    """``[backend_options.cuda_blackwell]``: what all NVIDIA backends have, and two keys more.

    Args:
        generation: emulated: which chip, a B200 unless given. On a device it must be the device's.
        nvfp4: what multiplies NVFP4 experts. ``triton`` is the backend's own programs;
            ``flashinfer`` is FlashInfer's grouped product where rows come in slots of equal
            capacity, as the low-latency exchange brings them.
    """

    generation: Literal["B200", "B300"] | None = None
    nvfp4: Literal["triton", "flashinfer"] = "triton"

    @property
    def architecture(self) -> Architecture:
        """Of the chip that is emulated."""
        return CHIPS[self.generation or "B200"]

    @property
    def architectures(self) -> tuple[Architecture, ...]:
        """Chips that may be used."""
        return tuple(CHIPS.values()) if self.generation is None else (self.architecture,)
