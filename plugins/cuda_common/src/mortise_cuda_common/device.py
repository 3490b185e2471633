"""The GPUs of this machine, as torch sees them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

import torch

from mortise.plugin import BackendUnusableError, ConfigError, ReasonCode
from mortise_cuda_common.chip import Architecture, Chip

if TYPE_CHECKING:
    from collections.abc import Sequence

EMULATED: Final = "emulated"
INSTEAD: Final = f'or set device = "{EMULATED}" to compute on the CPU what the chip would'
_DEVICE: Final = re.compile(r"cuda(?::(\d+))?")


def device_number(device: str | None, backend: str, local_rank: int) -> int:
    """The number of a configured device.

    Args:
        device: ``cuda``, ``cuda:N``, or None, which is the first two.
        backend: whose configuration it is.
        local_rank: the number where ``device`` names none.

    Raises:
        ConfigError: no such device text.
    """
    named = _DEVICE.fullmatch(device or "cuda")
    if named is None:
        raise ConfigError(
            f"device is {device!r}, which backend {backend} does not know",
            expected=f"{EMULATED}, cuda, or cuda:N",
        )
    return local_rank if named[1] is None else int(named[1])


def require_gpus() -> int:
    """How many GPUs there are, at least one.

    Raises:
        BackendUnusableError: torch is built without CUDA, or sees no GPU.
    """
    if torch.version.cuda is None:
        raise BackendUnusableError(
            f"torch {torch.__version__} is built without CUDA",
            reason=ReasonCode.IMPORT_FAILED,
            remedy=f"install a torch that is built for CUDA 12.9 or later, {INSTEAD}",
        )
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise BackendUnusableError(
            f"torch {torch.__version__} for CUDA {torch.version.cuda} sees no GPU",
            reason=ReasonCode.DEVICE_ABSENT,
            remedy="run nvidia-smi; check the driver, the devices handed to this container and"
            f" CUDA_VISIBLE_DEVICES, {INSTEAD}",
        )
    return count


def chip_of(number: int, wanted: Sequence[Architecture]) -> Chip:
    """One GPU of this machine.

    Args:
        number: which.
        wanted: generations that the backend is made for.

    Raises:
        BackendUnusableError: there is none of this number, or it is of another generation.
    """
    count = require_gpus()
    if number >= count:
        raise BackendUnusableError(
            f"there is no device cuda:{number}: torch sees {count}",
            reason=ReasonCode.DEVICE_ABSENT,
            remedy=f"name one below {count}, or start fewer processes on this machine",
        )
    # Any: torch's stubs lack one of its fields.
    facts: Any = torch.cuda.get_device_properties(number)
    found = f"sm_{facts.major}{facts.minor}"
    names = [one.value for one in wanted]
    if found not in names:
        raise BackendUnusableError(
            f"cuda:{number} is {facts.name}, {found}",
            reason=ReasonCode.ARCH_MISMATCH,
            expected=" or ".join(names),
            remedy="use the backend that is made for this chip, or another GPU",
        )
    return Chip(
        name=facts.name,
        architecture=Architecture(found),
        num_sms=facts.multi_processor_count,
        shared_memory=facts.shared_memory_per_block_optin,
    )
