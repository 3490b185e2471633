"""Import the chosen backend, check it against the contract, and bind it for one model role."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import pluggy

from mortise.backends.adapters import adapters_of
from mortise.backends.causes import cause_and_consequences
from mortise.backends.implementations import adapted_attribute, check_implementations
from mortise.backends.ops import BackendIdentity, Ops
from mortise.backends.shims import (
    BoundHook,
    guard_1,
    guard_2,
    guard_3,
    guard_4,
    guard_5,
    guard_declining,
)
from mortise.errors import BackendUnusableError, ContractError, MortiseError
from mortise.plugin import Backend, BindContext, Capabilities, Support
from mortise.spec import hooks
from mortise.spec.reasons import ReasonCode

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from mortise.backends.candidate import Candidate
    from mortise.spec.roles import ModelRole

LayerRequest = TypeVar("LayerRequest")


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundParts:
    """One backend bound for one role: the object, its facts, and its hooks as plain callables."""

    backend: Backend
    capabilities: Capabilities
    identity: BackendIdentity
    hooks: Mapping[str, Callable[..., Any]]


class _OneBackendManager(pluggy.PluginManager):
    """A manager that looks at attributes which can be hooks, not at the dozens Python adds.

    Args:
        skipped: attributes that implement hooks in a version which is not the current one.
    """

    def __init__(self, skipped: frozenset[str]) -> None:
        super().__init__(hooks.PROJECT)
        self._skipped = skipped

    def parse_hookspec_opts(self, module_or_class: object, name: str) -> pluggy.HookspecOpts | None:
        if name not in hooks.HOOKS:
            return None
        return super().parse_hookspec_opts(module_or_class, name)  # type: ignore[arg-type]

    def parse_hookimpl_opts(self, plugin: object, name: str) -> pluggy.HookimplOpts | None:
        if name.startswith("__") or name in self._skipped:
            return None
        return super().parse_hookimpl_opts(plugin, name)


def import_backend(row: Candidate) -> type[Backend]:
    """Import the class of one row, and nothing of any other.

    Raises:
        BackendUnusableError: the import fails; the root cause comes first.
        ContractError: there is no such class, it is no ``Backend``, or it breaks the contract.
    """
    assert row.manifest is not None
    assert row.manifest.object is not None
    module_name, _, class_name = row.manifest.object.partition(":")
    try:
        module = importlib.import_module(module_name)
    # A module that leaves the process while it is imported must not take the engine with it.
    except (Exception, SystemExit) as error:
        raise _failed(row, error, ReasonCode.IMPORT_FAILED, f"importing {module_name}") from error
    owner = getattr(module, class_name, None)
    if not (inspect.isclass(owner) and issubclass(owner, Backend)):
        found = f"a {type(owner).__name__}" if owner is not None else "nothing"
        raise _broken(
            row,
            f"{module_name}:{class_name} is {found}",
            expected="a subclass of mortise.plugin.Backend",
        )
    if abstract := sorted(getattr(owner, "__abstractmethods__", ())):
        raise _broken(
            row,
            f"{module_name}:{class_name} does not define {', '.join(abstract)}",
            expected="every abstract method of mortise.plugin.Backend",
        )
    check_implementations(owner, row)
    return owner


def bind(owner: type[Backend], row: Candidate, context: BindContext) -> BoundParts:
    """Create the backend for one role and register it, alone, with a fresh pluggy manager.

    Raises:
        BackendUnusableError: ``create`` raised; other errors of Mortise pass with a note.
        ContractError: ``create`` or ``capabilities`` returned something else, or an object hides
            one of its class's hooks.
    """
    backend = _create(owner, row, context)
    if type(backend) is not owner:
        check_implementations(type(backend), row)
    capabilities = _checked_capabilities(backend, row)
    return BoundParts(
        backend=backend,
        capabilities=capabilities,
        identity=BackendIdentity(
            name=row.name,
            distribution=row.distribution,
            version=row.version,
            emulated=capabilities.emulated,
        ),
        hooks=_registered(backend, row),
    )


def _create(owner: type[Backend], row: Candidate, context: BindContext) -> Backend:
    what = f"creating it for the {context.role.value} model"
    try:
        backend: object = owner.create(context)
    except MortiseError as error:
        error.add_note(f"backend {row.name!r} of {row.provenance}, {what}")
        raise
    except Exception as error:
        raise _failed(row, error, ReasonCode.CREATE_FAILED, what) from error
    if not isinstance(backend, Backend):
        raise _broken(
            row,
            f"{owner.__qualname__}.create returned {_shown(backend)}",
            expected="an object of a subclass of mortise.plugin.Backend",
            reason=ReasonCode.RETURNED_NONE if backend is None else ReasonCode.CONTRACT_BROKEN,
        )
    return backend


def _checked_capabilities(backend: Backend, row: Candidate) -> Capabilities:
    try:
        capabilities: object = backend.capabilities()
    except MortiseError:
        raise
    except Exception as error:
        what = "asking for its capabilities"
        raise _failed(row, error, ReasonCode.CREATE_FAILED, what) from error
    if not isinstance(capabilities, Capabilities):
        raise _broken(
            row,
            f"capabilities() returned {_shown(capabilities)}",
            expected="mortise.plugin.Capabilities",
            reason=ReasonCode.RETURNED_NONE if capabilities is None else ReasonCode.CONTRACT_BROKEN,
        )
    return capabilities


def _registered(backend: Backend, row: Candidate) -> dict[str, Callable[..., Any]]:
    """What pluggy made of the object; it must be what the manifest says, no less and no more."""
    assert row.manifest is not None
    adapters = adapters_of(row.manifest.implements)
    attributes = {hook: adapted_attribute(type(backend), hook) for hook in adapters}
    manager = _OneBackendManager(frozenset(attributes.values()))
    manager.add_hookspecs(hooks)
    try:
        manager.register(backend, name=row.name)
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise _broken(row, str(error), expected="the signatures of mortise.spec.hooks") from error
    found = {
        caller.name: caller.get_hookimpls()[0].function
        for caller in manager.get_hookcallers(backend) or ()
    }
    found |= {
        hook: adapter.adapt(getattr(backend, attributes[hook]))
        for hook, adapter in adapters.items()
    }
    if hidden := sorted(row.manifest.implements.keys() - found.keys()):
        raise _broken(
            row,
            f"hook {', '.join(hidden)} is declared, but the created object hides it",
            expected="methods of the class; an attribute set on the object takes their place",
            reason=ReasonCode.HOOK_MISSING,
        )
    return found


def checked_support(
    method: Callable[[LayerRequest], Support], hook: BoundHook
) -> Callable[[LayerRequest], Support]:
    """``Backend.supports`` or ``Backend.supports_linear`` with its answer checked."""
    ask = guard_1(method, hook)

    def supports(request: LayerRequest, /) -> Support:
        answer: object = ask(request)
        if not isinstance(answer, Support):
            raise ContractError(
                f"{hook.name}() of backend {hook.provider} returned {_shown(answer)}",
                reason=ReasonCode.CONTRACT_BROKEN,
                expected="mortise.plugin.Support",
                remedy=f"report it to the authors of {hook.provider.distribution}",
            )
        return answer

    return supports


def ops_table(parts: BoundParts, providers: Mapping[str, BoundParts], role: ModelRole) -> Ops:
    """The frozen table: each hook guarded and attributed to the backend that provides it."""

    def function(name: str) -> Callable[..., Any]:
        return providers[name].hooks[name]

    def hook(name: str) -> BoundHook:
        return BoundHook(name, providers[name].identity, role)

    # Whoever computes a layer knows which of them it can compute.
    experts, projections = providers["quantized_moe_apply"], providers["quantized_linear"]

    return Ops(
        resolve_dispatch_dtype=guard_1(
            function("resolve_dispatch_dtype"), hook("resolve_dispatch_dtype")
        ),
        prepare_expert_weights=guard_2(
            function("prepare_expert_weights"), hook("prepare_expert_weights")
        ),
        prepare_linear_weight=guard_1(
            function("prepare_linear_weight"), hook("prepare_linear_weight")
        ),
        create_token_dispatcher=guard_declining(
            function("create_token_dispatcher"), hook("create_token_dispatcher")
        ),
        paged_mqa_metadata=guard_4(function("paged_mqa_metadata"), hook("paged_mqa_metadata")),
        paged_mqa_logits=guard_5(function("paged_mqa_logits"), hook("paged_mqa_logits")),
        quantized_moe_apply=guard_3(function("quantized_moe_apply"), hook("quantized_moe_apply")),
        quantized_linear=guard_3(function("quantized_linear"), hook("quantized_linear")),
        qkv_split=guard_3(function("qkv_split"), hook("qkv_split")),
        supports=checked_support(
            experts.backend.supports, BoundHook("supports", experts.identity, role)
        ),
        supports_linear=checked_support(
            projections.backend.supports_linear,
            BoundHook("supports_linear", projections.identity, role),
        ),
        capabilities=parts.capabilities,
        role=role,
        backend=parts.identity,
    )


def _shown(value: object) -> str:
    return "None" if value is None else f"a {type(value).__module__}.{type(value).__qualname__}"


def _failed(
    row: Candidate, error: BaseException, reason: ReasonCode, doing: str
) -> BackendUnusableError:
    """Root cause first, then what it led to, then what was being done and for which backend."""
    cause, lines = cause_and_consequences(error)
    return BackendUnusableError(
        cause,
        reason=reason,
        details=[*lines, f"while {doing}", f"backend {row.name!r} of {row.provenance}"],
        remedy=f"mend the cause, or configure another backend than {row.name!r}",
    )


def _broken(
    row: Candidate,
    what: str,
    *,
    expected: str,
    reason: ReasonCode = ReasonCode.CONTRACT_BROKEN,
) -> ContractError:
    return ContractError(
        what,
        reason=reason,
        details=[f"backend {row.name!r} of {row.provenance}"],
        expected=expected,
        remedy=f"report it to the authors of {row.distribution}",
    )
