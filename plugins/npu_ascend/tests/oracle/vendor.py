"""Reads the vendor's operator schemas, and lets its shape functions run without its libraries.

Only ever imported by the process that ``judge.py`` runs in: what it registers stays registered.
"""

from __future__ import annotations

import contextlib
import re
import sys
import zipfile
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

import torch
import yaml

from mortise_npu_ascend.emulator import numbers

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

SCHEMAS: Final = "torch_npu/csrc/aten/npu_native_functions_by_codegen.yaml"
SHAPE_FUNCTIONS: Final = "torch_npu/op_plugin/meta/_meta_registrations.py"
FIRST_ARGUMENT: Final = re.compile(r"\((Tensor(?:\([a-z]!?\))?\??) self\b")

# Some shape functions ask which chip there is; none of the emulated operators' does.
CHIP: Final = 220
LIBRARIES: Final = "9.2.0"


def read_schemas(wheel: Path) -> dict[str, str]:
    """By name: what torch-npu registers itself, in torch's schema language.

    The code that registers them calls a first argument ``self`` by the name ``input``.
    """
    with zipfile.ZipFile(wheel) as archive:
        listed = yaml.safe_load(archive.read(SCHEMAS))["custom"]
    schemas = (FIRST_ARGUMENT.sub(r"(\1 input", entry["func"]) for entry in listed)
    return {schema.partition("(")[0]: schema for schema in schemas}


def define(schemas: Iterable[str]) -> torch.library.Library:
    """Define operators; they stay as long as the result is held.

    Those with types that this torch does not know are left out: a wheel of an older one has some.
    """
    library = torch.library.Library("npu", "FRAGMENT")
    for schema in schemas:
        with contextlib.suppress(RuntimeError):
            library.define(schema)
    return library


def run_shape_functions(wheel: Path) -> dict[str, Any]:
    """Register the shape functions of all operators; they stay as long as the result is held."""
    _stand_in_for_the_package()
    with zipfile.ZipFile(wheel) as archive:
        source = archive.read(SHAPE_FUNCTIONS).decode()
    namespace: dict[str, Any] = {"__name__": "vendor_shape_functions"}
    exec(compile(source, SHAPE_FUNCTIONS, "exec"), namespace)
    return namespace


class _ErrorCodes:
    """``ErrCode.VALUE`` and the like, which only end up in messages."""

    def __getattr__(self, name: str) -> str:
        return name


def _stand_in_for_the_package() -> None:
    """Give the shape functions what they import; the package itself needs a device's libraries."""
    dtypes = {name.lower(): value for name, value in vars(numbers).items() if name.isupper()}
    package = _module("torch_npu", uint8=torch.uint8, **dtypes)
    package.npu = _module("torch_npu.npu")
    package.npu.utils = _module(
        "torch_npu.npu.utils",
        get_cann_version=lambda: LIBRARIES,
        _is_gte_cann_version=lambda version, module: True,
    )
    _module("torch_npu.npu._backends", get_soc_version=lambda: CHIP)
    _module("torch_npu.utils")
    _module("torch_npu.utils._error_code", ErrCode=_ErrorCodes(), ops_error=lambda code: f" {code}")


def _module(name: str, **attributes: object) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(attributes)
    sys.modules[name] = module
    return module
