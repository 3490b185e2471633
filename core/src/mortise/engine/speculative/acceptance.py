"""Drawing drafts, and keeping of them what leaves the main model's distribution as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch

from mortise.engine.sampler import as_column, constrained, distributions, draws, pick

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mortise.engine.request import Request

# Shape suffixes: B requests, G greedy ones, S sampled ones, K drafts of a request, J = K + 1 places
# that the main model gives logits for, V vocabulary.


@dataclass(frozen=True, slots=True)
class Proposal:
    """What was drafted for one request in one step.

    Args:
        token_ids: the drafts, in order.
        weights_KV: float32, the distribution that each of them was drawn from; None if they are
            not drawn but certain, as those of a greedy request are.
    """

    token_ids: tuple[int, ...]
    weights_KV: torch.Tensor | None


def draw(
    logits_BV: torch.Tensor, requests: Sequence[Request]
) -> tuple[list[int], torch.Tensor | None]:
    """One draft for each row, by its request's own temperature and filters.

    Takes one random number of each request that is not greedy, none of the others.

    Args:
        logits_BV: float32, of the draft; unchanged by this.
        requests: whose rows they are.

    Returns:
        The drafts; and the distributions they were drawn from, float32 ``[B, V]``, all weight on
        the draft where the request is greedy, or None if all are.
    """
    if all(request.params.is_greedy for request in requests):
        return cast("list[int]", logits_BV.argmax(dim=-1).tolist()), None
    weights_BV = distributions(logits_BV, requests)
    # Any number picks the only token with weight.
    numbers = [0.0 if one.params.is_greedy else draws([one])[0] for one in requests]
    return _picked(weights_BV, numbers), weights_BV


def accept(
    logits_BJV: torch.Tensor, proposals: Sequence[Proposal], requests: Sequence[Request]
) -> list[list[int]]:
    """The tokens that a verify pass gives: for each request its accepted drafts and one more.

    A greedy request gets what it would get without drafts: the drafts as long as each is the most
    likely token, then the most likely token after them. A sampled one gets tokens with the same
    joint distribution as without drafts: a draft y is accepted with probability
    ``min(1, p(y) / q(y))``, where p is the main model's distribution and q the one that y was drawn
    from, both after the request's filters; at the first rejection the token is drawn from
    ``max(p - q, 0)`` instead, and after the last acceptance from the next p. It takes one random
    number for each draft that is looked at, and one for the token after.

    Which of several equal logits is the most likely token, and what a token that a request must not
    take next means, is as in plain sampling; so is the resolution of the random numbers, 2^-24.

    Source: Leviathan et al., arXiv 2211.17192, algorithm 1; Chen et al., arXiv 2302.01318.

    Args:
        logits_BJV: float32, the main model's after the token before the drafts and after each
            draft; unchanged by this.
        proposals: K drafts of each request.
        requests: whose they are, without the drafts among their tokens.
    """
    assert all(len(proposal.token_ids) + 1 == logits_BJV.shape[1] for proposal in proposals)
    logits_BJV = _constrained_at_first(logits_BJV, requests)
    greedy = [row for row, request in enumerate(requests) if request.params.is_greedy]
    sampled = [row for row, request in enumerate(requests) if not request.params.is_greedy]
    result: list[list[int]] = [[] for _ in requests]
    for rows, rule in ((greedy, _accept_greedy), (sampled, _accept_sampled)):
        if rows:
            some_BJV = logits_BJV if len(rows) == len(requests) else logits_BJV[rows]
            taken = rule(
                some_BJV, [proposals[row] for row in rows], [requests[row] for row in rows]
            )
            for row, token_ids in zip(rows, taken, strict=True):
                result[row] = token_ids
    return result


def _constrained_at_first(logits_BJV: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
    """A request that must choose among some tokens is free again after one of them."""
    if all(request.allowed_token_ids is None for request in requests):
        return logits_BJV
    result_BJV = logits_BJV.clone()
    result_BJV[:, 0] = constrained(logits_BJV[:, 0], requests)
    return result_BJV


def _accept_greedy(
    logits_GJV: torch.Tensor, proposals: Sequence[Proposal], _requests: Sequence[Request]
) -> list[list[int]]:
    best = cast("list[list[int]]", logits_GJV.argmax(dim=-1).tolist())
    return [
        token_ids[: _equal_at_first(proposal.token_ids, token_ids) + 1]
        for proposal, token_ids in zip(proposals, best, strict=True)
    ]


def _equal_at_first(drafts: Sequence[int], best: Sequence[int]) -> int:
    """How many drafts come before the first wrong one."""
    for place, draft in enumerate(drafts):
        if draft != best[place]:
            return place
    return len(drafts)


def _accept_sampled(
    logits_SJV: torch.Tensor, proposals: Sequence[Proposal], requests: Sequence[Request]
) -> list[list[int]]:
    num_places = logits_SJV.shape[1]
    of_places = [request for request in requests for _ in range(num_places)]
    main_SJV = distributions(logits_SJV.flatten(0, 1), of_places).view_as(logits_SJV)
    draft_SJV = _draft_weights(proposals, main_SJV)
    drafts_SK = torch.tensor([proposal.token_ids for proposal in proposals], device=main_SJV.device)
    counts = [
        _num_accepted(request, main, draft)
        for request, main, draft in zip(
            requests, _at(main_SJV, drafts_SK), _at(draft_SJV, drafts_SK), strict=True
        )
    ]
    rows_S = torch.arange(len(requests), device=main_SJV.device)
    ends_S = torch.tensor(counts, device=main_SJV.device)
    rest_SV = residual(main_SJV[rows_S, ends_S], draft_SJV[rows_S, ends_S])
    last = _picked(rest_SV, draws(requests))
    return [
        [*proposal.token_ids[:count], token_id]
        for proposal, count, token_id in zip(proposals, counts, last, strict=True)
    ]


def _draft_weights(proposals: Sequence[Proposal], main_SJV: torch.Tensor) -> torch.Tensor:
    """``[S, J, V]``: what drafts were drawn from, and zero in the last place, which has no draft.

    So the residual of the last place is the main model's distribution itself.
    """
    weights_SJV = torch.zeros_like(main_SJV)
    for row, proposal in enumerate(proposals):
        if proposal.weights_KV is not None:
            weights_SJV[row, :-1] = proposal.weights_KV
        else:
            places = list(range(len(proposal.token_ids)))
            weights_SJV[row, places, list(proposal.token_ids)] = 1.0
    return weights_SJV


def _at(weights_SJV: torch.Tensor, drafts_SK: torch.Tensor) -> list[list[float]]:
    """Weights of the drafts, one list a request."""
    weights_SK = weights_SJV[:, :-1].gather(2, drafts_SK.unsqueeze(2).long()).squeeze(2)
    return cast("list[list[float]]", weights_SK.tolist())


def _num_accepted(request: Request, main: Sequence[float], draft: Sequence[float]) -> int:
    """How many drafts come before the first rejected one.

    A product, so that nothing is divided by a small number; it is exact, since both factors have 24
    bits. A draft without weight in ``main`` is below no number.
    """
    for place, (p, q) in enumerate(zip(main, draft, strict=True)):
        (number,) = draws([request])
        if not number * q < p:
            return place
    return len(main)


def residual(main_SV: torch.Tensor, draft_SV: torch.Tensor) -> torch.Tensor:
    """Weights of the token that stands in for a rejected draft: ``max(p - q, 0)``.

    Args:
        main_SV: float32, what the main model gives.
        draft_SV: float32, what the draft was drawn from.

    Returns:
        float32 ``[S, V]``, not normalised. Where p is nowhere above q, which only rounding makes
        of two distributions, it is p.
    """
    rest_SV = (main_SV - draft_SV).clamp(min=0.0)
    return torch.where(rest_SV.sum(dim=-1, keepdim=True) > 0.0, rest_SV, main_SV)


def _picked(weights_SV: torch.Tensor, numbers: Sequence[float]) -> list[int]:
    """One token a row, in proportion to weights."""
    places_S1 = pick(weights_SV, as_column(numbers, weights_SV.device))
    return cast("list[int]", places_S1.squeeze(1).tolist())
