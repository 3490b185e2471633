"""Lets the vendor's schemas and shape functions judge the emulator; run in a process of its own.

Usage: ``python -m plugins.npu_ascend.tests.oracle.judge WHEEL VERDICT.json``
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from unittest import mock

import torch
from plugins.npu_ascend.tests.oracle import (
    product_cases,
    quantisation_cases,
    routing_cases,
    vendor,
)

from mortise_npu_ascend.emulator import EmulatedNpu, Generation, install
from mortise_npu_ascend.emulator.library import overload_of
from mortise_npu_ascend.emulator.operators import OPERATORS
from mortise_npu_ascend.emulator.schemas import SCHEMA_OF
from mortise_npu_ascend.emulator.storage import Format

if TYPE_CHECKING:
    from collections.abc import Mapping

    from plugins.npu_ascend.tests.oracle.case import Case

CASES: Final = (*quantisation_cases.CASES, *product_cases.CASES, *routing_cases.CASES)


def main(wheel: Path, verdict: Path) -> None:
    """Write what was found; every chip is made before anything that looks like the vendor's."""
    chips = {
        (generation, strict): install(generation, strict=strict)
        for generation in Generation
        for strict in (False, True)
    }
    theirs = vendor.read_schemas(wheel)
    held = (
        vendor.define(text for name, text in theirs.items() if overload_of(name) is None),
        vendor.run_shape_functions(wheel),
    )
    found = {
        "schemas": {
            name: [parsed(ours), parsed(theirs.get(name))] for name, ours in SCHEMA_OF.items()
        },
        "operators": [name for name, _ in OPERATORS],
        "shape_functions": [name for name in SCHEMA_OF if has_shape_function(name)],
        "dtypes": {
            str(key): name for key, name in held[1]["TORCH_NPU_DTYPE_TO_STRING_MAP"].items()
        },
        "cases": [judged(case, chips) for case in CASES],
    }
    verdict.write_text(json.dumps(found), encoding="utf-8")


def parsed(schema: str | None) -> str | None:
    """In torch's own spelling, so that only meaning counts."""
    return None if schema is None else str(torch._C.parse_schema(f"npu::{schema}"))


def has_shape_function(name: str) -> bool:
    overload = overload_of(name)
    return overload is not None and overload.has_kernel_for_dispatch_key(torch._C.DispatchKey.Meta)


def judged(case: Case, chips: Mapping[tuple[str, bool], EmulatedNpu]) -> dict[str, Any]:
    """Whether torch finds the emulator's results to be what the vendor's function foretold."""
    shown = {name: getattr(case, name) for name in ("operator", "says", "differs", "found")}
    overload = overload_of(case.operator)
    if overload is None:
        return shown | {"outcome": "not registered"}
    asked = ["test_schema", *(["test_faketensor"] if has_shape_function(case.operator) else [])]
    with ExitStack() as stack:
        stack.enter_context(chips[case.generation, case.strict].active())
        if case.tiled:
            stack.enter_context(every_weight_in_tiles())
        try:
            torch.library.opcheck(overload, case.args, dict(case.kwargs), test_utils=asked)
        except Exception as error:
            return shown | {"outcome": f"{type(error).__name__}: {error}"[:2000]}
    return shown | {"outcome": None}


def every_weight_in_tiles() -> ExitStack:
    """Torch checks copies, and a copy is stored row after row."""
    stack = ExitStack()
    for name, module in sorted(sys.modules.items()):
        if name.startswith("mortise_npu_ascend.emulator.") and hasattr(module, "storage_format"):
            tiles = mock.patch.object(module, "storage_format", return_value=Format.FRACTAL_NZ)
            stack.enter_context(tiles)
    return stack


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
