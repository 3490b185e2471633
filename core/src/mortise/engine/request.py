"""One request on its way through the engine."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from random import Random
from typing import TYPE_CHECKING

from mortise.engine.speculative.statistics import DraftStatistics

if TYPE_CHECKING:
    import torch

    from mortise.engine.healing import Healing
    from mortise.engine.sampling_params import SamplingParams
    from mortise.engine.text import TextStream


class FinishReason(StrEnum):
    """Why a request generates no more."""

    STOP = "stop"
    """An end-of-text token, a stop token or a stop text came."""
    LENGTH = "length"
    """It has as many tokens as it asked for, or the context is full."""
    ABORTED = "aborted"
    """Its caller gave it up."""


@dataclass(frozen=True, slots=True)
class Finish:
    """The end of a request: why, and the token or text that made it stop."""

    reason: FinishReason
    stopped_by: int | str | None = None


class Request:
    """What is asked, and how far it is.

    The engine alone changes it. ``token_ids`` are the prompt's tokens and then the generated ones;
    the first ``num_computed`` of them have their rows in the cache, in ``pages``, and are what
    recurrent layers remember in ``state_slot``, which a request has while it runs. All but the last
    token must be there before another can be sampled. ``draft_hidden`` is where its next drafts
    begin, a hidden state ``[H]`` of the draft model; None where it is not drafted for.

    Args:
        id: number that tells the requests of an engine apart.
        prompt_token_ids: at least one; without the token that is healed.
        params: as asked.
        max_new_tokens: tokens it may generate, ``params.max_tokens`` made definite.
        seed: of its random numbers, ``params.seed`` made definite.
        stop_token_ids: tokens that end it, the model's own among them unless ignored.
        text: makes text of its tokens; None where there is no tokenizer.
        healing: what its first new token stands in for; None if it simply goes on.
        index: place of the prompt in its call.
        num_draft_tokens: tokens drafted for it in one step; 0 if nothing drafts.
    """

    __slots__ = (
        "added_at",
        "arrival",
        "draft_hidden",
        "drafting",
        "finish",
        "finished_at",
        "first_token_at",
        "healing",
        "id",
        "index",
        "max_new_tokens",
        "num_computed",
        "num_preemptions",
        "num_prompt_tokens",
        "pages",
        "params",
        "prefill_target",
        "random",
        "seed",
        "state_slot",
        "stop_token_ids",
        "text",
        "token_ids",
    )

    def __init__(
        self,
        *,
        id: int,
        prompt_token_ids: list[int],
        params: SamplingParams,
        max_new_tokens: int,
        seed: int,
        stop_token_ids: frozenset[int] = frozenset(),
        text: TextStream | None = None,
        healing: Healing | None = None,
        index: int = 0,
        num_draft_tokens: int = 0,
    ) -> None:
        self.id = id
        self.index = index
        self.params = params
        self.max_new_tokens = max_new_tokens
        self.seed = seed
        self.stop_token_ids = stop_token_ids
        self.text = text
        self.healing = healing
        # Python's own generator gives the same numbers on every device and in every batch.
        self.random = Random(seed)
        self.num_prompt_tokens = len(prompt_token_ids)
        self.token_ids = list(prompt_token_ids)
        self.num_computed = 0
        self.prefill_target = len(prompt_token_ids)
        self.pages: list[int] = []
        self.state_slot: int | None = None
        self.draft_hidden: torch.Tensor | None = None
        self.drafting = DraftStatistics.none(num_draft_tokens) if num_draft_tokens else None
        self.num_preemptions = 0
        self.finish: Finish | None = None
        self.added_at = 0.0
        self.arrival = 0
        self.first_token_at: float | None = None
        self.finished_at: float | None = None

    @property
    def num_generated(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def generated_token_ids(self) -> list[int]:
        """The generated tokens, the one that ended the request included."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def allowed_token_ids(self) -> tuple[int, ...] | None:
        """Tokens among which the next one is chosen; None if that is all."""
        if self.healing is None or self.num_generated:
            return None
        return self.healing.allowed

    @property
    def is_prefilling(self) -> bool:
        """Whether tokens it had when it was admitted are not in the cache yet."""
        return self.num_computed < self.prefill_target

    def restart(self) -> None:
        """Forget what is in the cache; every token so far will be computed again."""
        self.pages = []
        self.state_slot = None
        self.draft_hidden = None
        self.num_computed = 0
        self.prefill_target = len(self.token_ids)
        self.num_preemptions += 1

    def __repr__(self) -> str:
        return (
            f"Request(id={self.id}, tokens={len(self.token_ids)}, computed={self.num_computed}, "
            f"pages={len(self.pages)})"
        )


def finish_of(request: Request) -> Finish | None:
    """Whether the newest token of a request was its last, and why."""
    newest = request.token_ids[-1]
    if newest in request.stop_token_ids:
        return Finish(FinishReason.STOP, newest)
    if request.text is not None and request.text.stopped_by is not None:
        return Finish(FinishReason.STOP, request.text.stopped_by)
    if request.num_generated >= request.max_new_tokens:
        return Finish(FinishReason.LENGTH)
    return None
