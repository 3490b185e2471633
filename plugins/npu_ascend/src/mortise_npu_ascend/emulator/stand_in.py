"""What the plugin uses of ``torch_npu``, acting on CPU tensors as one emulated chip."""

from __future__ import annotations

import functools
import warnings
from typing import TYPE_CHECKING, Any, Final

import torch

from mortise_npu_ascend.emulator import numbers, storage
from mortise_npu_ascend.emulator.chip import EmulatedChip, running_on
from mortise_npu_ascend.emulator.library import NAMESPACE
from mortise_npu_ascend.emulator.schemas import SCHEMA_OF

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

# Spelt as the device's driver spells it.
_BASE_FORMAT: Final = (
    "Cannot create tensor with interal format while allow_internel_format=False, "
    "tensor will be created with base format."
)


class DeviceConfig:
    """``torch_npu.npu.config``, of one emulated chip.

    Attributes:
        allow_internal_format: whether a tensor may be stored in a format other than ``ND``.
    """

    def __init__(self, *, allow_internal_format: bool) -> None:
        self.allow_internal_format = allow_internal_format


class DeviceModule:
    """``torch_npu.npu``, of one emulated chip."""

    def __init__(self, chip: EmulatedChip) -> None:
        self._chip = chip
        self.config = DeviceConfig(allow_internal_format=chip.facts.internal_formats)

    def current_device(self) -> int:
        """The only one there is."""
        return 0

    def device_count(self) -> int:
        """One."""
        return 1

    def is_available(self) -> bool:
        """Whether there is a device: no, only its emulation."""
        return False

    def get_device_name(self, device: object = None) -> str:
        """A name that begins as the chip's does and says what it is."""
        return f"{self._chip.facts.soc} (emulated)"


class EmulatedNpu:
    """An object with the attributes of the module ``torch_npu`` that the plugin uses.

    Each backend role has its own. Two of them never touch each other, whatever their generations:
    an operator acts as the chip of the object that it was called through. An attribute that
    begins with ``npu_`` is an operator, which computes CPU tensors.

    Attributes:
        chip: which the operators act as.
        npu: the part called ``torch_npu.npu``.
        emulated: True; the real module has no such attribute.
    """

    Format = storage.Format
    int4 = numbers.INT4
    hifloat8 = numbers.HIFLOAT8
    float8_e5m2 = numbers.FLOAT8_E5M2
    float8_e4m3fn = numbers.FLOAT8_E4M3FN
    float8_e8m0fnu = numbers.FLOAT8_E8M0FNU
    float4_e2m1fn_x2 = numbers.FLOAT4_E2M1FN_X2
    float4_e1m2fn_x2 = numbers.FLOAT4_E1M2FN_X2
    emulated = True

    def __init__(self, chip: EmulatedChip) -> None:
        self.chip = chip
        self.npu = DeviceModule(chip)

    def __repr__(self) -> str:
        strict = ", strict" if self.chip.strict else ""
        return f"<torch_npu as an emulated Ascend {self.chip.generation}{strict}>"

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """The operator ``npu_...``."""
        if name not in SCHEMA_OF:
            raise AttributeError(f"{self!r} has no {name!r}: it is not emulated", name=name)
        return functools.partial(_call, self.chip, getattr(getattr(torch.ops, NAMESPACE), name))

    def active(self) -> AbstractContextManager[EmulatedChip]:
        """For calls of ``torch.ops.npu`` itself: inside the block they act as this chip."""
        return running_on(self.chip)

    @property
    def config(self) -> DeviceConfig:
        """Short for ``npu.config``."""
        return self.npu.config

    def get_npu_format(self, tensor: torch.Tensor) -> storage.Format:
        """How a tensor is stored; all views of one storage have one format."""
        return storage.storage_format(tensor)

    def npu_format_cast(
        self,
        tensor: torch.Tensor,
        acl_format: int,
        *,
        customize_dtype: int | None = None,
        input_dtype: int | None = None,
    ) -> torch.Tensor:
        """A copy with the same numbers in the same order, whose storage is tagged as tiled.

        Where internal formats are not allowed, a warning and a copy in ``ND``, as on the device.

        Raises:
            RuntimeError: a format that is not emulated, or a tensor of less than two dimensions.
        """
        if acl_format not in tuple(storage.Format):
            raise RuntimeError(f"npu_format_cast: format {acl_format} is not emulated")
        asked = storage.Format(acl_format)
        if asked is storage.Format.ND:
            return storage.stored_as(tensor, asked)
        if tensor.ndim < 2:
            raise RuntimeError(
                f"npu_format_cast: FRACTAL_NZ needs at least two dimensions, got {tensor.ndim}"
            )
        if not self.config.allow_internal_format:
            warnings.warn(_BASE_FORMAT, stacklevel=2)
            asked = storage.Format.ND
        return storage.stored_as(tensor, asked)


def _call(
    chip: EmulatedChip, operator: torch._ops.OpOverloadPacket, *args: Any, **kwargs: Any
) -> Any:
    with running_on(chip):
        return operator(*args, **kwargs)
