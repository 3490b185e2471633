"""What a user is told of a loaded model without having asked: who stands in, and for what."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from mortise.backends import BoundBackend
    from mortise.engine.llm import LLM
    from mortise.spec.dispatch import DispatchDecision


def news_of(llm: LLM) -> Iterator[str]:
    """Each piece of news once; one that holds for one of two models alone says for which."""
    loaded, draft = llm.loaded, llm.loaded.draft
    by_model = {"main model": [*_of_model(loaded.bound, loaded.dispatch)]}
    if draft is not None:
        by_model["draft model"] = [*_of_model(draft.bound, draft.dispatch)]
    for text in dict.fromkeys(text for texts in by_model.values() for text in texts):
        models = [model for model, texts in by_model.items() if text in texts]
        yield text if len(models) == len(by_model) else f"{models[0]}: {text}"
    yield from _options_of_nobody(llm)


def _of_model(
    bound: BoundBackend, dispatch: Mapping[str, tuple[DispatchDecision, ...]]
) -> Iterator[str]:
    if bound.fallbacks:
        hooks = ", ".join(decision.subject for decision in bound.fallbacks)
        yield (
            f"backend {bound.row.name!r} does not implement {hooks}: the exact reference answers,"
            " on the same device (--strict makes this an error)"
        )
    if bound.adapted:
        hooks = ", ".join(decision.subject for decision in bound.adapted)
        yield (
            f"backend {bound.row.name!r} answers the previous version of {hooks}, which this core"
            f" adapts: a newer {bound.row.distribution} is needed before it no longer does"
        )
    yield from _substitutions(dispatch)
    if bound.ops.backend.emulated:
        yield f"backend {bound.row.name!r} is emulated: its numerics, not its speed"


def _substitutions(dispatch: Mapping[str, tuple[DispatchDecision, ...]]) -> Iterator[str]:
    """Rows that travel in another format than was asked for, as their device's policy has it."""
    for decisions in dispatch.values():
        for decision in decisions:
            if decision.asked is not None:
                rows = decision.format
                yield (
                    f"rows travel to the experts as {rows.dtype.value} instead of"
                    f" {decision.asked.value}: {decision.reason}"
                )


def _options_of_nobody(llm: LLM) -> Iterator[str]:
    config, draft = llm.config, llm.loaded.draft
    installed = {row.name for row in llm.loaded.bound.candidates}
    for name in sorted(set(config.backend_options) - installed):
        yield f"backend_options.{name} is for a backend that is not installed"
    if draft is not None:
        for name in sorted(set(config.draft.backend_options) - installed):
            yield f"draft.backend_options.{name} is for a backend that is not installed"
