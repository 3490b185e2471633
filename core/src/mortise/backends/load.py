"""Take a backend through its whole life: discover, validate, select, bind, for one model role."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING

from mortise.backends.adapters import adapters_of
from mortise.backends.auto import select_auto
from mortise.backends.bind import BoundParts, bind, import_backend, ops_table
from mortise.backends.candidate import Candidate, Stage, replace_row
from mortise.backends.decisions import Decision
from mortise.backends.discover import discover_backends, engine_version
from mortise.backends.select import select_by_name
from mortise.backends.validate import AUTO, CORE_DISTRIBUTION, REFERENCE
from mortise.errors import BackendUnusableError
from mortise.spec.capabilities import BindContext
from mortise.spec.hooks import HOOKS
from mortise.spec.reasons import ReasonCode

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from mortise.backends.ops import Ops
    from mortise.plugin import Backend
    from mortise.spec.roles import ModelRole


class ProviderRule(StrEnum):
    """Why a hook is answered by whom."""

    IMPLEMENTED = "implemented"
    ADAPTED = "adapted"
    """It implements the previous version, which the core still serves."""
    FALLBACK = "fallback"
    """The backend does not implement it: the exact reference answers, on the same device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundBackend:
    """A backend bound for one model role.

    Args:
        ops: what the model calls.
        backend: the object that ``Backend.create`` made for this role.
        decisions: which backend was chosen and who provides each hook, with reasons.
        row: the chosen row.
        candidates: the whole table, as it stood after binding.
    """

    ops: Ops
    backend: Backend
    decisions: tuple[Decision, ...]
    row: Candidate
    candidates: tuple[Candidate, ...]

    @property
    def fallbacks(self) -> tuple[Decision, ...]:
        """Hooks that the reference answers instead of the chosen backend; news for the user."""
        return tuple(
            decision for decision in self.decisions if decision.rule == ProviderRule.FALLBACK
        )

    @property
    def adapted(self) -> tuple[Decision, ...]:
        """Hooks that the chosen backend answers in their previous version; news for the user."""
        return tuple(
            decision for decision in self.decisions if decision.rule == ProviderRule.ADAPTED
        )


def load_backend(
    name: str,
    *,
    role: ModelRole,
    device: str | None = None,
    options: Mapping[str, object] | None = None,
    options_by_name: Mapping[str, Mapping[str, object]] | None = None,
    strict: bool = False,
    source: str = "the caller",
    candidates: Sequence[Candidate] | None = None,
    local_rank: int = 0,
) -> BoundBackend:
    """Find the backend of a name and bind it for one model role.

    Args:
        name: name of a backend, ``distribution:name``, or ``auto``.
        role: the model it is bound for; call once per role, nothing is shared.
        device: the configured device text, or None for the backend's own.
        options: the backend's own table of the configuration.
        options_by_name: the tables of all backends, of which the chosen one gets its own; for
            callers that do not know yet what ``auto`` will choose. ``options`` goes before it.
        strict: hooks that the backend does not implement are an error.
        source: where the name came from, for the decision (``engine.toml``, ``--backend``).
        candidates: rows of an earlier ``discover_backends``, to read the metadata once.
        local_rank: number of this process among those of its machine.

    Raises:
        BackendError: with the reason code of what went wrong; ``create`` may raise ``ConfigError``.
    """
    rows = discover_backends() if candidates is None else tuple(candidates)
    selection = select_auto(rows) if name == AUTO else select_by_name(rows, name)
    owner = import_backend(selection.row)
    if options is None:
        options = (options_by_name or {}).get(selection.row.name, {})
    context = BindContext(
        role=role,
        device=device,
        options=dict(options),
        engine_version=_engine_version(rows),
        local_rank=local_rank,
    )
    parts = bind(owner, selection.row, context)
    row = replace(selection.row, stage=Stage.BOUND)
    missing = tuple(hook for hook in HOOKS if hook not in parts.hooks)
    if missing and strict:
        raise _fallback_denied(row, missing)
    providers = dict.fromkeys(HOOKS, parts)
    if missing:
        providers |= dict.fromkeys(missing, _reference(rows, parts, context))
    return BoundBackend(
        ops=ops_table(parts, providers, role),
        backend=parts.backend,
        decisions=(
            Decision(
                role=role,
                subject="backend",
                value=str(parts.identity),
                rule=selection.rule,
                reason=selection.reason,
                source=source,
            ),
            *_choices(parts, row, role),
            *(_provider_decision(hook, parts, providers[hook], row, context) for hook in HOOKS),
        ),
        row=row,
        candidates=replace_row(selection.candidates, selection.row, row),
    )


def _engine_version(rows: Sequence[Candidate]) -> str:
    """From the core's own row: reading the metadata again would cost as much as the binding."""
    own = (row.version for row in rows if row.distribution == CORE_DISTRIBUTION)
    return next(own, None) or engine_version()


def _choices(parts: BoundParts, row: Candidate, role: ModelRole) -> Iterator[Decision]:
    """What the backend decided by itself when it was created."""
    for choice in parts.backend.choices():
        yield Decision(
            role=role,
            subject=choice.subject,
            value=choice.value,
            rule="backend",
            reason=choice.reason,
            source=row.provenance,
        )


def _provider_decision(
    hook: str, chosen: BoundParts, provider: BoundParts, row: Candidate, context: BindContext
) -> Decision:
    rule, reason = _provided(hook, chosen, provider, row)
    return Decision(
        role=context.role,
        subject=hook,
        value=str(provider.identity),
        rule=rule,
        reason=reason,
        source=row.provenance,
    )


def _provided(
    hook: str, chosen: BoundParts, provider: BoundParts, row: Candidate
) -> tuple[ProviderRule, str]:
    current = HOOKS[hook].version
    if provider is not chosen:
        device = provider.capabilities.device
        reason = f"{row.name} does not implement it; the exact reference answers on {device}"
        return ProviderRule.FALLBACK, reason
    assert row.manifest is not None
    adapter = adapters_of(row.manifest.implements).get(hook)
    if adapter is None:
        return ProviderRule.IMPLEMENTED, f"its manifest implements version {current}"
    reason = f"its manifest implements version {adapter.version}, adapted to {current}"
    return (
        ProviderRule.ADAPTED,
        f"{reason}; {CORE_DISTRIBUTION} {adapter.removed_in} will refuse it",
    )


def _reference(rows: Sequence[Candidate], parts: BoundParts, context: BindContext) -> BoundParts:
    """The reference on the chosen backend's device, for the hooks that it lacks."""
    row = select_by_name(rows, REFERENCE).row
    on_device = replace(context, device=str(parts.capabilities.device), options={})
    return bind(import_backend(row), row, on_device)


def _fallback_denied(row: Candidate, missing: Sequence[str]) -> BackendUnusableError:
    return BackendUnusableError(
        f"backend {row.name!r} does not implement {', '.join(missing)}",
        reason=ReasonCode.DENIED_BY_CONFIG,
        details=[f"found: {row.provenance}", "strict denies the reference as a substitute"],
        expected="a backend that implements every hook",
        remedy="configure strict = false, or another backend",
    )
