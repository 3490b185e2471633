"""The one place that registers operators of namespace ``npu`` with torch."""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Final

import torch

from mortise.plugin import BackendUnusableError, ReasonCode
from mortise_npu_ascend.emulator.chip import current_chip
from mortise_npu_ascend.emulator.schemas import SCHEMA_OF

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

NAMESPACE: Final = "npu"
VENDOR: Final = "torch_npu"


def register(operators: Iterable[tuple[str, Callable[..., object]]]) -> None:
    """Make operators callable for CPU tensors; those that are so already stay as they are.

    Registration holds for the whole process, by torch's design. The functions therefore keep
    nothing between calls, and learn from :mod:`mortise_npu_ascend.emulator.chip` what they act as.

    Raises:
        BackendUnusableError: the vendor's own operators are there, or may come.
    """
    refuse_beside_the_vendor()
    for name, function in operators:
        if not is_registered(name):
            define(SCHEMA_OF[name])
            implement(name, function)


def define(schema: str) -> None:
    """Tell torch an operator's name, arguments and results.

    Args:
        schema: ``name(arguments) -> results``, an overload as ``name.overload(...)``.
    """
    name, bracket, signature = schema.partition("(")
    torch.library.define(f"{NAMESPACE}::{name}", bracket + signature)


def implement(name: str, function: Callable[..., object]) -> None:
    """Let an operator that was defined compute CPU tensors by ``function``, for an emulated chip.

    Without a chip it raises, so that nothing is emulated for code that did not ask for it.
    """

    @functools.wraps(function)
    def on_a_chip(*args: object, **kwargs: object) -> object:
        current_chip()
        return function(*args, **kwargs)

    torch.library.impl(f"{NAMESPACE}::{name}", "CPU", on_a_chip)


def is_registered(name: str) -> bool:
    """Whether an operator can be called with CPU tensors; the vendor's own cannot."""
    overload = overload_of(name)
    return overload is not None and overload.has_kernel_for_dispatch_key(torch._C.DispatchKey.CPU)


def overload_of(name: str) -> torch._ops.OpOverload | None:
    """The operator as torch knows it, None if it does not."""
    packet, _, overload = name.partition(".")
    found = getattr(getattr(torch.ops, NAMESPACE), packet, None)
    return getattr(found, overload or "default", None)


def refuse_beside_the_vendor() -> None:
    """Let nothing emulated stand beside, or in front of, the real library.

    Raises:
        BackendUnusableError: torch_npu is loaded in this process, or has left its operators.
    """
    loaded = sys.modules.get(VENDOR) is not None
    foreign = [name for name in SCHEMA_OF if overload_of(name) and not is_registered(name)]
    if not loaded and not foreign:
        return
    found = f"{VENDOR} is loaded" if loaded else f"torch.ops.{NAMESPACE} holds {foreign[0]}"
    raise BackendUnusableError(
        f"the emulator of the Ascend NPU cannot be installed: {found} in this process",
        reason=ReasonCode.CREATE_FAILED,
        details=["the real operators and emulated ones have the same names"],
        remedy=f"use the device, or start a process that does not import {VENDOR}",
    )
