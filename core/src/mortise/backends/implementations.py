"""Check the hooks of a backend class against the contract before any of its code runs."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from types import FunctionType
from typing import TYPE_CHECKING, Final

from mortise.backends.adapters import parameters_of
from mortise.backends.validate import similar_hook
from mortise.errors import ContractError
from mortise.spec import hooks
from mortise.spec.reasons import ReasonCode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Set

    from mortise.backends.candidate import Candidate

MARK: Final = f"{hooks.PROJECT}_impl"
# Wrapping and ordering among several answers have no meaning where one backend answers; an optional
# hook would hide a misspelt name.
FORBIDDEN_OPTIONS: Final = ("wrapper", "hookwrapper", "tryfirst", "trylast", "optionalhook")


@dataclass(frozen=True, slots=True)
class Implementation:
    """A marked attribute of a backend class: the hook it claims and the object behind it."""

    hook: str
    attribute: str
    value: object
    options: Mapping[str, object]


def check_implementations(owner: type, row: Candidate) -> None:
    """Check that a class implements exactly the hooks of its manifest, with exact signatures.

    Raises:
        ContractError: the first disagreement; names hook, class, distribution and file.
    """
    assert row.manifest is not None
    found: dict[str, Implementation] = {}
    for implementation in _implementations(owner):
        complaint = _Complaint(owner, implementation.attribute, implementation.value, row)
        _check_name(implementation, complaint)
        _check_callable(implementation, complaint)
        _check_options(implementation, complaint)
        _check_signature(implementation, complaint, declared_version(implementation.hook, row))
        if implementation.hook in found:
            raise complaint(
                f"hook {implementation.hook} is implemented twice, by "
                f"{found[implementation.hook].attribute} and {implementation.attribute}",
                ReasonCode.CONTRACT_BROKEN,
                remedy="keep one",
            )
        found[implementation.hook] = implementation
    _check_declared(owner, row, row.manifest.implements.keys(), found.keys())


def declared_version(hook: str, row: Candidate) -> int:
    """The version of a hook that a manifest declares; the current one where it is silent."""
    assert row.manifest is not None
    return row.manifest.implements.get(hook, hooks.HOOKS[hook].version)


def adapted_attribute(owner: type, hook: str) -> str:
    """The name of the method that implements a hook."""
    return next(one.attribute for one in _implementations(owner) if one.hook == hook)


def _implementations(owner: type) -> Iterator[Implementation]:
    for attribute in dir(owner):
        if attribute.startswith("__"):
            continue
        value = inspect.getattr_static(owner, attribute, None)
        options = _options(value)
        if options is not None:
            hook = options.get("specname") or attribute
            yield Implementation(str(hook), attribute, value, options)


def _options(value: object) -> Mapping[str, object] | None:
    """The options that ``hookimpl`` left on an attribute, or on the function inside it."""
    inner = getattr(value, "fget", None) or getattr(value, "__func__", None)
    for holder in (value, inner):
        options = getattr(holder, MARK, None)
        if isinstance(options, dict):
            return options
    return None


@dataclass(frozen=True, slots=True)
class _Complaint:
    """Makes the error about one attribute: what is wrong, then whose it is and where it stands."""

    owner: type
    attribute: str
    value: object
    row: Candidate

    def __call__(
        self, what: str, reason: ReasonCode, *, expected: str | None = None, remedy: str
    ) -> ContractError:
        place = _place(self.value) or _place(self.owner)
        return ContractError(
            what,
            reason=reason,
            details=[
                f"in {self.owner.__module__}.{self.owner.__qualname__}.{self.attribute}"
                + (f" ({place})" if place else ""),
                f"backend {self.row.name!r} of {self.row.provenance}",
            ],
            expected=expected,
            remedy=remedy,
        )


def _place(value: object) -> str:
    function = getattr(value, "__func__", value)
    try:
        source = inspect.unwrap(function) if callable(function) else function
        _, line = inspect.getsourcelines(source)  # type: ignore[arg-type]
        return f"{inspect.getsourcefile(source)}, line {max(line, 1)}"  # type: ignore[arg-type]
    except (OSError, TypeError):
        return ""


def _check_name(implementation: Implementation, complaint: _Complaint) -> None:
    if implementation.hook not in hooks.HOOKS:
        raise complaint(
            f"{implementation.hook!r} is no hook{similar_hook(implementation.hook)}",
            ReasonCode.HOOK_UNKNOWN,
            expected=f"one of {', '.join(hooks.HOOKS)}",
            remedy="rename the method, or remove @hookimpl",
        )


def _check_callable(implementation: Implementation, complaint: _Complaint) -> None:
    function = _function(implementation.value)
    if function is None:
        kind = type(implementation.value)
        raise complaint(
            f"hook {implementation.hook} is a {kind.__module__}.{kind.__qualname__} object",
            ReasonCode.HOOK_MISSING,
            expected="a method written with def; other callables would be skipped in silence",
            remedy="write a method that calls it",
        )
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        raise complaint(
            f"hook {implementation.hook} is asynchronous",
            ReasonCode.SIGNATURE_MISMATCH,
            expected="a plain function; a coroutine would be taken for the answer",
            remedy="write def instead of async def",
        )
    if inspect.isgeneratorfunction(function):
        raise complaint(
            f"hook {implementation.hook} is a generator",
            ReasonCode.SIGNATURE_MISMATCH,
            expected="a function that returns its answer",
            remedy="return instead of yield",
        )


def _function(value: object) -> Callable[..., object] | None:
    inner = value.__func__ if isinstance(value, staticmethod | classmethod) else value
    return inner if isinstance(inner, FunctionType) else None


def _check_options(implementation: Implementation, complaint: _Complaint) -> None:
    used = [option for option in FORBIDDEN_OPTIONS if implementation.options.get(option)]
    if used:
        raise complaint(
            f"hook {implementation.hook} is marked {', '.join(used)}",
            ReasonCode.CONTRACT_BROKEN,
            expected="@hookimpl without options: one backend answers, there is nothing to order",
            remedy=f"remove {', '.join(used)}",
        )


def _check_signature(implementation: Implementation, complaint: _Complaint, version: int) -> None:
    function = _function(implementation.value)
    assert function is not None
    parameters = list(inspect.signature(function).parameters.values())
    if not isinstance(implementation.value, staticmethod):
        parameters = parameters[1:]
    expected = parameters_of(implementation.hook, version)
    problem = _signature_problem(parameters, expected)
    if problem:
        raise complaint(
            f"hook {implementation.hook} has the wrong signature: {problem}",
            ReasonCode.SIGNATURE_MISMATCH,
            expected=f"{implementation.hook}({', '.join(expected)})",
            remedy="use these names in this order, without defaults",
        )


def _signature_problem(parameters: list[inspect.Parameter], expected: tuple[str, ...]) -> str:
    for parameter in parameters:
        if parameter.kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
            return f"parameter {str(parameter)!r} is {parameter.kind.description}"
        if parameter.default is not inspect.Parameter.empty:
            return f"parameter {parameter.name!r} has a default"
    names = tuple(parameter.name for parameter in parameters)
    if names == expected:
        return ""
    for found, wanted in zip(names, expected, strict=False):
        if found != wanted:
            return f"parameter {found!r} stands where {wanted!r} belongs"
    if len(names) > len(expected):
        return f"parameter {names[len(expected)]!r} is one too many"
    return f"parameter {expected[len(names)]!r} is missing"


def _check_declared(owner: type, row: Candidate, declared: Set[str], found: Set[str]) -> None:
    for hook in hooks.HOOKS:
        if hook in declared - found:
            raise _missing(owner, hook, row)
        if hook in found - declared:
            raise _Complaint(owner, hook, owner, row)(
                f"hook {hook} is implemented but not declared",
                ReasonCode.CONTRACT_BROKEN,
                expected=f"implements.{hook} = {hooks.HOOKS[hook].version} in backend.toml",
                remedy="declare it, or remove the method",
            )
        if hook not in found and _unmarked(owner, hook):
            raise _missing(owner, hook, row)


def _unmarked(owner: type, hook: str) -> bool:
    return callable(inspect.getattr_static(owner, hook, None))


def _missing(owner: type, hook: str, row: Candidate) -> ContractError:
    forgotten = _unmarked(owner, hook)
    return _Complaint(owner, hook, inspect.getattr_static(owner, hook, owner), row)(
        f"method {hook} is not marked as a hook"
        if forgotten
        else f"hook {hook} is declared in backend.toml but not implemented",
        ReasonCode.HOOK_MISSING,
        expected=f"@hookimpl\n    def {hook}(self, "
        f"{', '.join(parameters_of(hook, declared_version(hook, row)))})",
        remedy="add @hookimpl" if forgotten else "implement it, or remove it from the manifest",
    )
