"""The prompts of one call, shared among the ranks of a run."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from mortise.engine.events import Completion, Timings
from mortise.engine.generation import Generation
from mortise.engine.logprobs import TokenLogprobs
from mortise.engine.request import FinishReason
from mortise.engine.speculative.statistics import DraftStatistics
from mortise.parallel.collectives import all_gather_objects

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mortise.engine.generation import Delivery
    from mortise.engine.prompts import Prompt
    from mortise.engine.sampling_params import SamplingParams
    from mortise.parallel.group import ExpertParallelGroup


def generate_shared(
    group: ExpertParallelGroup,
    delivery: Delivery,
    prompts: Sequence[Prompt],
    sampling: Sequence[SamplingParams],
) -> list[Completion]:
    """Let each rank continue its share of the prompts; every rank gets all completions.

    Rank r of G takes every G-th prompt from the r-th on. Every rank is given all prompts and checks
    all of them, so that a wrong one is the same error everywhere and nobody waits for anybody.

    Raises:
        RequestError: a prompt cannot be served as asked.
        CapacityError: the cache is too small for one of them.
        RankLostError: another rank died or does not answer.
    """
    Generation(delivery, prompts, sampling).close()
    own = slice(group.rank, None, group.world_size)
    completions = Generation(delivery, prompts[own], sampling[own]).completions()
    delivery.engine.follow()
    shares = all_gather_objects(group, [asdict(completion) for completion in completions])
    gathered = [
        replace(_completion(fields), index=rank + place * group.world_size)
        for rank, share in enumerate(shares)
        for place, fields in enumerate(share)
    ]
    return sorted(gathered, key=lambda completion: completion.index)


def _completion(fields: dict[str, Any]) -> Completion:
    """A completion whose lists and numbers came through JSON."""
    logprobs, drafting = fields["logprobs"], fields["drafting"]
    return Completion(
        **{
            **fields,
            "prompt_token_ids": tuple(fields["prompt_token_ids"]),
            "token_ids": tuple(fields["token_ids"]),
            "finish_reason": FinishReason(fields["finish_reason"]),
            "logprobs": None if logprobs is None else tuple(map(_token_logprobs, logprobs)),
            "timings": Timings(**fields["timings"]),
            "drafting": None if drafting is None else _statistics(drafting),
        }
    )


def _token_logprobs(fields: dict[str, Any]) -> TokenLogprobs:
    return TokenLogprobs(fields["token"], tuple((token, value) for token, value in fields["top"]))


def _statistics(fields: dict[str, Any]) -> DraftStatistics:
    return DraftStatistics(**{**fields, "accepted_by_place": tuple(fields["accepted_by_place"])})
