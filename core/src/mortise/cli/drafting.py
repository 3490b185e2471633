"""What drafting came to, for the line of timings and for the document of ``generate``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mortise.engine.speculative.statistics import DraftStatistics

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mortise.engine.events import Completion
    from mortise.engine.llm import LLM


def drafting_text(num_tokens: int, completions: Sequence[Completion]) -> str:
    """``drafted 2 a step: 1.94 tokens a step, accepted 62% 32%``, of all completions together.

    Args:
        num_tokens: tokens that a step drafts, at least 1.
        completions: what became of every prompt.
    """
    each = (one.drafting for one in completions if one.drafting is not None)
    total = sum(each, start=DraftStatistics.none(num_tokens))
    if total.acceptance_length is None:
        return f"drafted {num_tokens} a step: none was verified"
    shares = " ".join(f"{count / total.steps:.0%}" for count in total.accepted_by_place)
    return (
        f"drafted {num_tokens} a step: {total.acceptance_length:.2f} tokens a step,"
        f" accepted {shares}"
    )


def draft_fields(llm: LLM) -> dict[str, Any] | None:
    """The model that drafts, as JSON."""
    draft = llm.loaded.draft
    if draft is None:
        return None
    return {
        "num_tokens": llm.config.draft.num_tokens,
        "model": str(draft.directory.path),
        "backend": draft.bound.row.name,
        "emulated": draft.bound.ops.backend.emulated,
    }


def drafting_fields(drafting: DraftStatistics | None) -> dict[str, Any] | None:
    """What became of the drafts of one completion, as JSON."""
    if drafting is None:
        return None
    return {
        "steps": drafting.steps,
        "drafted": drafting.drafted,
        "accepted_by_place": list(drafting.accepted_by_place),
        "acceptance_rate": drafting.acceptance_rate,
        "acceptance_length": drafting.acceptance_length,
    }
