"""The one place that imports torch_npu, or puts the emulator in its place where that was asked."""

from __future__ import annotations

import fnmatch
import importlib.metadata
import importlib.util
import re
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import torch
from packaging.version import Version

from mortise.plugin import BackendUnusableError, ConfigError, DeviceProbe, ReasonCode
from mortise_npu_ascend import emulator
from mortise_npu_ascend.dispatch import Generation
from mortise_npu_ascend.emulator.library import is_registered
from mortise_npu_ascend.emulator.schemas import SCHEMA_OF

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mortise_npu_ascend.options import Options

DISTRIBUTION: Final = "torch-npu"
EMULATED: Final = "emulated"
DEFAULT_GENERATION: Final = Generation.A2

SOC_NAMES: Final[Mapping[str, Generation]] = MappingProxyType(
    {
        "Ascend910B*": Generation.A2,
        "Ascend910_93*": Generation.A3,
        "Ascend950*": Generation.A5,
    }
)
"""Names that ``torch_npu.npu.get_device_name`` gives, as shell patterns."""

_DEVICE: Final = re.compile(r"npu(?::(\d+))?")
_INSTEAD: Final = f'or set device = "{EMULATED}" to compute on the CPU what the chip would'


@dataclass(frozen=True, slots=True, kw_only=True)
class Vendor:
    """The operators, and what was found out about the device they run on.

    Args:
        torch_npu: the module, or what stands in for it.
        generation: of the chip.
        device: where tensors live.
        emulated: whether ``torch_npu`` is the stand-in.
        tiles: whether weights are stored in tiles where they can be.
    """

    torch_npu: Any
    generation: Generation
    device: torch.device
    emulated: bool
    tiles: bool = True


def load(device: str | None, options: Options, local_rank: int) -> Vendor:
    """Get the operators for the configured device.

    Args:
        device: ``emulated``, ``npu``, ``npu:N``, or None, which is the device and never its
            emulation.
        options: the backend's table.
        local_rank: number of the device where ``device`` names none.

    Raises:
        ConfigError: no such device text, or options that do not go with it.
        BackendUnusableError: torch_npu, CANN or the chip is missing or does not fit.
    """
    if device == EMULATED:
        return load_emulator(options)
    named = _DEVICE.fullmatch(device or "npu")
    if named is None:
        raise ConfigError(
            f"device is {device!r}, which backend npu_ascend does not know",
            expected=f"{EMULATED}, npu, or npu:N",
        )
    if options.strict is not None:
        raise ConfigError(
            f"option strict of backend npu_ascend is {options.strict}, and device is not emulated",
            expected=f'strict only beside device = "{EMULATED}"',
        )
    number = local_rank if named[1] is None else int(named[1])
    return _with_tiles(load_device(number, options.chip), options)


def _with_tiles(vendor: Vendor, options: Options) -> Vendor:
    """Let the library store tensors in tiles, which it does not on every chip unless told to.

    The library's setting holds for the process and changes no number; ``weight_format = "nd"``
    leaves it alone.
    """
    if options.weight_format == "nd":
        return replace(vendor, tiles=False)
    vendor.torch_npu.npu.config.allow_internal_format = True
    return vendor


def load_emulator(options: Options) -> Vendor:
    """The stand-in, because it was asked for by name."""
    generation = options.chip or DEFAULT_GENERATION
    stand_in = emulator.install(generation, strict=bool(options.strict))
    vendor = Vendor(
        torch_npu=stand_in, generation=generation, device=torch.device("cpu"), emulated=True
    )
    return _with_tiles(vendor, options)


def probe() -> DeviceProbe:
    """Say whether a device is here, and which.

    Raises:
        BackendUnusableError: torch_npu cannot be imported.
    """
    library = import_torch_npu()
    if not library.npu.is_available():
        return DeviceProbe(found=False, reason="torch_npu sees no device")
    name = library.npu.get_device_name(0)
    return DeviceProbe(found=True, arch=name, reason=f"torch_npu sees {name}")


def load_device(number: int, expected: Generation | None) -> Vendor:
    """The real library, on one of the machine's devices.

    Args:
        number: which.
        expected: the generation that the configuration names, if it names one.

    Raises:
        BackendUnusableError: the first thing that is missing or does not fit, root cause first.
        ConfigError: the device is of another generation than the configuration says.
    """
    library = import_torch_npu()
    count = library.npu.device_count() if library.npu.is_available() else 0
    if number >= count:
        raise BackendUnusableError(
            f"there is no device npu:{number}: torch_npu sees {count or 'none'}",
            reason=ReasonCode.DEVICE_ABSENT,
            details=[f"torch_npu {library.__version__} was imported without an error"],
            remedy="run npu-smi info; check the driver, the devices handed to this container and"
            f" ASCEND_RT_VISIBLE_DEVICES, {_INSTEAD}",
        )
    name = library.npu.get_device_name(number)
    generation = generation_of(name)
    if expected not in (None, generation):
        raise ConfigError(
            f"option generation of backend npu_ascend is {expected}, and the device is {name}",
            expected=str(generation),
            remedy="remove it: the device says itself what it is",
        )
    library.npu.set_device(number)
    return Vendor(
        torch_npu=library,
        generation=generation,
        device=torch.device("npu", number),
        emulated=False,
    )


def generation_of(name: str) -> Generation:
    """The generation of a device by its name.

    Raises:
        BackendUnusableError: none that this backend is made for.
    """
    for pattern, generation in SOC_NAMES.items():
        if fnmatch.fnmatchcase(name, pattern):
            return generation
    raise BackendUnusableError(
        f"the device calls itself {name!r}",
        reason=ReasonCode.ARCH_MISMATCH,
        expected=f"one of {', '.join(SOC_NAMES)}",
        remedy="use a backend made for this device",
    )


def import_torch_npu() -> Any:
    """Import the real library, after everything about it that can be known beforehand.

    Raises:
        BackendUnusableError: it is not installed, is made for another torch, cannot load its own
            libraries, or its operators' names are taken by the emulator.
    """
    require_matching_version()
    _require_no_emulator()
    try:
        import torch_npu  # type: ignore[import-not-found, unused-ignore]
    except Exception as error:
        # Torch's own loader may have wrapped what was missing.
        cause = _root(error)
        raise BackendUnusableError(
            f"{type(cause).__name__}: {' '.join(str(cause).split())}",
            reason=ReasonCode.IMPORT_FAILED,
            details=[f"while importing torch_npu {importlib.metadata.version(DISTRIBUTION)}"],
            remedy="install CANN and source its set_env.sh before the program starts, so that"
            f" libhccl.so and libascendcl.so are found, {_INSTEAD}",
        ) from error
    return torch_npu


def require_matching_version() -> None:
    """See that the library is installed for this torch, without importing it.

    One torch_npu minor is made for one torch minor; others crash where they are imported.

    Raises:
        BackendUnusableError: it is missing, or made for another torch.
    """
    wanted = ".".join(map(str, Version(torch.__version__).release[:2]))
    command = f'pip install "{DISTRIBUTION}=={wanted}.*"'
    if importlib.util.find_spec("torch_npu") is None:
        raise BackendUnusableError(
            "torch_npu is not installed",
            reason=ReasonCode.IMPORT_FAILED,
            details=[f"torch is {torch.__version__}"],
            remedy=f"{command}, {_INSTEAD}",
        )
    found = importlib.metadata.version(DISTRIBUTION)
    if Version(found).release[:2] != Version(wanted).release:
        raise BackendUnusableError(
            f"torch_npu {found} is installed beside torch {torch.__version__}",
            reason=ReasonCode.IMPORT_FAILED,
            expected=f"torch_npu {wanted}: each is made for one minor version of torch",
            remedy=f"{command}, {_INSTEAD}",
        )


def _require_no_emulator() -> None:
    if any(is_registered(name) for name in SCHEMA_OF):
        raise BackendUnusableError(
            "the emulator of the Ascend NPU is in use in this process, under the names of the"
            " device's own operators",
            reason=ReasonCode.CREATE_FAILED,
            remedy="use the device for all models of a process, or the emulator for all",
        )


def _root(error: BaseException) -> BaseException:
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    return error
