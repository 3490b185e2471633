"""Whether DeepGEMM can be used here: what is seen without importing it, and how it fails."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from packaging.version import InvalidVersion, Version

from mortise.plugin import BackendUnusableError, ReasonCode
from mortise_cuda_common.environment import (
    CUDA_HOME,
    USE_NVRTC,
    VendorEnvironment,
    read_environment,
)

if TYPE_CHECKING:
    from mortise_cuda_common.chip import Chip

MODULE: Final = "deep_gemm"
DISTRIBUTION: Final = "sgl-deep-gemm"
PIP: Final = f'pip install "{DISTRIBUTION}==0.1.5.post1"'
INSTEAD: Final = 'or set options runner and indexer to "triton", which needs no DeepGEMM'

USUAL_TOOLKIT: Final = Path("/usr/local/cuda")
OLDEST_TOOLKIT: Final = "12.3"
OLDEST_TOOLKIT_OF_BLACKWELL: Final = "12.9"

TORCH_OF: Final = (("0.2.3", "2.14"), ("0.1.5.post2", "2.12"))
"""From which version of the fork on which torch is the oldest: its wheels name none themselves."""

_SYMBOL: Final = re.compile(r"undefined symbol: (\w+)")
_LIBRARY: Final = re.compile(r"(\S+): cannot open shared object file")


@dataclass(frozen=True, slots=True, kw_only=True)
class Installed:
    """What is there, by the look of it.

    Args:
        distribution: that brings ``deep_gemm``; empty where none says that it does.
        version: of it; empty likewise.
        toolkit: folder of the CUDA toolkit that kernels are compiled with.
    """

    distribution: str
    version: str
    toolkit: Path

    def __str__(self) -> str:
        """In words, for the doctor."""
        whose = " ".join((self.distribution, self.version)).strip() or MODULE
        return f"{whose}, which compiles its kernels with the CUDA toolkit at {self.toolkit}"


def look(chip: Chip | None = None, environment: VendorEnvironment | None = None) -> Installed:
    """See that DeepGEMM and what it compiles with are here, without importing it.

    Args:
        chip: the chip, if it is known: Blackwell needs a newer compiler.
        environment: what the library finds in the environment; None is that of this process.

    Raises:
        BackendUnusableError: it is missing, made for another torch, or there is no compiler.
    """
    if importlib.util.find_spec(MODULE) is None:
        raise BackendUnusableError(
            f"{MODULE} is not installed",
            reason=ReasonCode.IMPORT_FAILED,
            details=[f"torch is {torch.__version__}"],
            remedy=f"{PIP}, {INSTEAD}",
        )
    distribution, version = _distribution()
    if distribution == DISTRIBUTION:
        _require_matching_torch(version)
    toolkit = _require_toolkit(environment or read_environment(), chip)
    return Installed(distribution=distribution, version=version, toolkit=toolkit)


def failure_of_import(error: Exception) -> BackendUnusableError:
    """Say what an import of the library failed of, root cause first, remedy last."""
    cause = _root(error)
    text = f"{type(cause).__name__}: {' '.join(str(cause).split())}".removesuffix(": ")
    details = [f"while importing {' '.join(_distribution()) or MODULE}"]
    if symbol := _SYMBOL.search(str(cause)):
        details.append(
            f"{symbol[1]} is not in torch {torch.__version__}: the wheel was built for another"
        )
        remedy = PIP
    elif library := _LIBRARY.search(str(cause)):
        details.append(f"torch {torch.__version__} is built for CUDA {torch.version.cuda}")
        remedy = f"install a torch that brings {library[1]}"
    elif isinstance(cause, AssertionError):
        details.append("it asserts that there is a CUDA toolkit")
        remedy = _toolkit_remedy()
    elif isinstance(cause, ModuleNotFoundError):
        remedy = PIP
    else:
        remedy = f"run python -c 'import {MODULE}' to see it alone; check the driver, {PIP}"
    return BackendUnusableError(
        text, reason=ReasonCode.IMPORT_FAILED, details=details, remedy=f"{remedy}, {INSTEAD}"
    )


def failure_of_use(error: Exception, what: str) -> BackendUnusableError:
    """Say what a first use of the library failed of, root cause first, remedy last."""
    cause = _root(error)
    return BackendUnusableError(
        f"{type(cause).__name__}: {' '.join(str(cause).split())}",
        reason=ReasonCode.CREATE_FAILED,
        details=[f"while DeepGEMM multiplied {what} for the first time"],
        remedy=f"check that the CUDA toolkit at {CUDA_HOME} is one for this chip and driver,"
        f" {INSTEAD}",
    )


def toolkit_folder(environment: VendorEnvironment) -> Path | None:
    """Where the library will look for the CUDA toolkit; None where it will find none."""
    named = environment.cuda_home or environment.cuda_path
    if named is not None:
        return Path(named)
    compiler = shutil.which("nvcc", path=environment.search_path or "")
    if compiler is not None:
        return Path(compiler).parent.parent
    return USUAL_TOOLKIT if USUAL_TOOLKIT.exists() else None


def _distribution() -> tuple[str, str]:
    """Name and version of what brings the module; nothing where no metadata says."""
    try:
        return DISTRIBUTION, importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        bring_it = importlib.metadata.packages_distributions().get(MODULE, [])
    return (bring_it[0], importlib.metadata.version(bring_it[0])) if bring_it else ("", "")


def _require_matching_torch(version: str) -> None:
    found = Version(torch.__version__)
    try:
        number = Version(version)
    except InvalidVersion:
        return
    for first, oldest in TORCH_OF:
        if number >= Version(first) and found < Version(oldest):
            raise BackendUnusableError(
                f"{DISTRIBUTION} {version} is installed beside torch {torch.__version__}",
                reason=ReasonCode.IMPORT_FAILED,
                expected=f"torch {oldest} or later: the wheel uses what this one has not, and ends"
                " the process where it does",
                remedy=f"{PIP}, {INSTEAD}",
            )


def _require_toolkit(environment: VendorEnvironment, chip: Chip | None) -> Path:
    folder = toolkit_folder(environment)
    if folder is None:
        raise BackendUnusableError(
            f"there is no CUDA toolkit, and {MODULE} compiles its kernels with one",
            reason=ReasonCode.IMPORT_FAILED,
            details=[
                f"{CUDA_HOME} is not set, no nvcc is on PATH, and no {USUAL_TOOLKIT} is there"
            ],
            remedy=f"{_toolkit_remedy()}, {INSTEAD}",
        )
    if not (folder / "bin" / "nvcc").exists() and not environment.compiles_without_nvcc:
        raise BackendUnusableError(
            f"the CUDA toolkit at {folder} has no bin/nvcc",
            reason=ReasonCode.IMPORT_FAILED,
            remedy=f"{_toolkit_remedy()}, or set {USE_NVRTC} to 1 for a compiler without nvcc,"
            f" {INSTEAD}",
        )
    _require_new_toolkit(folder, chip)
    return folder


def _require_new_toolkit(folder: Path, chip: Chip | None) -> None:
    """The toolkit tells its version in a file; where there is none, the first product tells."""
    for_blackwell = chip is not None and chip.architecture.is_blackwell
    oldest = OLDEST_TOOLKIT_OF_BLACKWELL if for_blackwell else OLDEST_TOOLKIT
    try:
        said = json.loads((folder / "version.json").read_text(encoding="utf-8"))
        found = Version(said["cuda"]["version"])
    except (OSError, ValueError, KeyError, TypeError):
        return
    if found < Version(oldest):
        whose = "Blackwell" if for_blackwell else "DeepGEMM"
        raise BackendUnusableError(
            f"the CUDA toolkit at {folder} is {found}",
            reason=ReasonCode.IMPORT_FAILED,
            expected=f"{oldest} or later for {whose}",
            remedy=f"{_toolkit_remedy()}, {INSTEAD}",
        )


def _toolkit_remedy() -> str:
    return f"install CUDA 13.0 with nvcc and set {CUDA_HOME} to its folder before the start"


def _root(error: BaseException) -> BaseException:
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    return error
