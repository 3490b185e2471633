"""Thin typed wrappers that check the answer of a bound hook and say who failed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from mortise.errors import ContractError
from mortise.spec.hooks import NOT_SUPPORTED
from mortise.spec.reasons import ReasonCode

if TYPE_CHECKING:
    from collections.abc import Callable

    from mortise.backends.ops import BackendIdentity
    from mortise.spec.roles import ModelRole

A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")
D = TypeVar("D")
E = TypeVar("E")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class BoundHook:
    """One hook of one backend and role, for the messages of its failures."""

    name: str
    provider: BackendIdentity
    role: ModelRole

    def annotate(self, error: Exception, *arguments: object) -> None:
        """Add a note to an exception that the hook raised."""
        error.add_note(f"in {self._described(arguments)}")

    def unanswered(self, result: object, *arguments: object) -> ContractError:
        """The error for an answer that is none."""
        returned_none = result is None
        return ContractError(
            f"hook {self.name} returned {'None' if returned_none else 'NOT_SUPPORTED'}",
            reason=ReasonCode.RETURNED_NONE if returned_none else ReasonCode.CONTRACT_BROKEN,
            details=[f"in {self._described(arguments)}"],
            expected="an answer; what cannot be served is said in Backend.supports",
            remedy=f"report it to the authors of {self.provider.distribution}",
        )

    def _described(self, arguments: tuple[object, ...]) -> str:
        text = f"hook {self.name} of backend {self.provider}, role {self.role.value}"
        # Only some records know their layer; looked at after a failure alone.
        layers = (getattr(argument, "layer", None) for argument in arguments)
        layer = next((layer for layer in layers if isinstance(layer, str)), None)
        return f"{text}, layer {layer}" if layer else text


# One function an arity: unpacking *arguments would cost more than the call it guards. A try block
# costs nothing until something is raised.


def guard_1(function: Callable[[A], Result], hook: BoundHook) -> Callable[[A], Result]:
    """Guard a hook of one parameter."""

    def call(a: A, /) -> Result:
        try:
            result = function(a)
        except Exception as error:
            hook.annotate(error, a)
            raise
        if result is None or result is NOT_SUPPORTED:
            raise hook.unanswered(result, a)
        return result

    return call


def guard_declining(function: Callable[[A], Result], hook: BoundHook) -> Callable[[A], Result]:
    """Guard a hook of one parameter that may answer ``NOT_SUPPORTED``."""

    def call(a: A, /) -> Result:
        try:
            result = function(a)
        except Exception as error:
            hook.annotate(error, a)
            raise
        if result is None:
            raise hook.unanswered(result, a)
        return result

    return call


def guard_2(function: Callable[[A, B], Result], hook: BoundHook) -> Callable[[A, B], Result]:
    """Guard a hook of two parameters."""

    def call(a: A, b: B, /) -> Result:
        try:
            result = function(a, b)
        except Exception as error:
            hook.annotate(error, a, b)
            raise
        if result is None or result is NOT_SUPPORTED:
            raise hook.unanswered(result, a, b)
        return result

    return call


def guard_3(function: Callable[[A, B, C], Result], hook: BoundHook) -> Callable[[A, B, C], Result]:
    """Guard a hook of three parameters."""

    def call(a: A, b: B, c: C, /) -> Result:
        try:
            result = function(a, b, c)
        except Exception as error:
            hook.annotate(error, a, b, c)
            raise
        if result is None or result is NOT_SUPPORTED:
            raise hook.unanswered(result, a, b, c)
        return result

    return call


def guard_4(
    function: Callable[[A, B, C, D], Result], hook: BoundHook
) -> Callable[[A, B, C, D], Result]:
    """Guard a hook of four parameters."""

    def call(a: A, b: B, c: C, d: D, /) -> Result:
        try:
            result = function(a, b, c, d)
        except Exception as error:
            hook.annotate(error, a, b, c, d)
            raise
        if result is None or result is NOT_SUPPORTED:
            raise hook.unanswered(result, a, b, c, d)
        return result

    return call


def guard_5(
    function: Callable[[A, B, C, D, E], Result], hook: BoundHook
) -> Callable[[A, B, C, D, E], Result]:
    """Guard a hook of five parameters."""

    def call(a: A, b: B, c: C, d: D, e: E, /) -> Result:
        try:
            result = function(a, b, c, d, e)
        except Exception as error:
            hook.annotate(error, a, b, c, d, e)
            raise
        if result is None or result is NOT_SUPPORTED:
            raise hook.unanswered(result, a, b, c, d, e)
        return result

    return call
