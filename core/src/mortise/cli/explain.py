"""The verb ``explain``: every decision of a run, with the rule that took it and the reason."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from mortise.cli.options import configuration_options, json_option, resolve_options
from mortise.cli.output import document, print_json, results, table

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from mortise.backends import Decision
    from mortise.config import ResolvedConfig
    from mortise.engine.llm import LLM


@click.command(short_help="Show every decision with its reason.")
@configuration_options
@json_option
def explain(as_json: bool, **options: Any) -> None:
    """Show what a run with these options would do, and why.

    The backend is bound and the model is loaded as for `mortise generate`; nothing is compiled or
    generated.
    Shown are the configuration with the origin of every value, who answers each hook for each
    model, main and draft, and every decision with its rule and reason.
    """
    from mortise.cli.session import load_llm

    llm = load_llm(resolve_options(options), warm_up=False)
    if as_json:
        print_json(_document(llm))
        return
    _show(llm)


def _document(llm: LLM) -> dict[str, Any]:
    loaded = llm.loaded
    identity = loaded.bound.ops.backend
    return document(
        configuration={
            key: {"value": value, "origin": origin}
            for key, value, origin in configuration_rows(llm.resolved)
        },
        model=str(loaded.directory.path),
        backend={
            "name": identity.name,
            "distribution": identity.distribution,
            "version": identity.version,
            "emulated": identity.emulated,
            "device": str(loaded.device),
        },
        decisions=[_decision_fields(decision) for decision in llm.decisions],
    )


def _decision_fields(decision: Decision) -> dict[str, Any]:
    return {
        "role": _role(decision) or None,
        "subject": decision.subject,
        "value": decision.value,
        "rule": str(decision.rule),
        "reason": decision.reason,
        "source": decision.source,
    }


def _show(llm: LLM) -> None:
    from mortise.spec.hooks import HOOKS

    console = results()
    console.print(
        table(
            ("key", "value", "from"),
            [
                (key, "unset" if value is None else json.dumps(value), origin)
                for key, value, origin in configuration_rows(llm.resolved)
            ],
            title="Configuration",
        )
    )
    console.print()
    console.print(
        table(
            ("role", "hook", "runs in phase", "answered by", "rule", "reason"),
            [
                (
                    _role(one),
                    one.subject,
                    HOOKS[one.subject].phase.value,
                    one.value,
                    str(one.rule),
                    one.reason,
                )
                for one in llm.decisions
                if one.subject in HOOKS
            ],
            title="Hooks",
        )
    )
    console.print()
    console.print(
        table(
            ("role", "subject", "decision", "rule", "reason", "from"),
            [
                (_role(one), one.subject, one.value, str(one.rule), one.reason, one.source)
                for one in llm.decisions
                if one.subject not in HOOKS
            ],
            title="Decisions",
        )
    )


def _role(decision: Decision) -> str:
    """The model that a decision holds for; empty for the whole run."""
    return "" if decision.role is None else decision.role.value


def configuration_rows(resolved: ResolvedConfig) -> Iterator[tuple[str, Any, str]]:
    """Every key with its value and where that came from."""
    values = resolved.config.model_dump()
    for key, origin in resolved.origins.items():
        yield key, _value_of(values, key), origin


def _value_of(values: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key; a name of a table may itself hold dots."""
    if key in values:
        return values[key]
    head, _, rest = key.partition(".")
    return _value_of(values[head], rest)
