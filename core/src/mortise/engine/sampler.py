"""Choosing one token of each request from the model's logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple, cast

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mortise.engine.request import Request

# Shape suffixes: B requests, G requests of one group, V vocabulary, C candidates of a row.


class Filter(NamedTuple):
    """What shapes a distribution; requests that agree in it are sampled together."""

    temperature: float
    top_k: int
    top_p: float


# Logits divided by less than this could leave what float32 holds.
_SMALL_TEMPERATURE: Final = 1e-25


def sample(logits_BV: torch.Tensor, requests: Sequence[Request]) -> list[int]:
    """One token for each row.

    What a row gives depends on its logits, its request's parameters and its request's random
    numbers alone, of which it takes one for each token that is not greedy. A request that may
    choose among some tokens only is sampled as if the others were impossible.

    Args:
        logits_BV: float32, unchanged by this.
        requests: whose rows they are.
    """
    logits_BV = constrained(logits_BV, requests)
    tokens = [0] * len(requests)
    for shape, rows in _by_filter(requests).items():
        some = [requests[row] for row in rows]
        for row, token in zip(rows, _sample_group(_of(logits_BV, rows), shape, some), strict=True):
            tokens[row] = token
    return tokens


def distributions(logits_BV: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
    """What each row's token is drawn from, after its request's temperature and filters.

    Args:
        logits_BV: float32, unchanged by this; of all tokens that the request may take, see
            :func:`constrained`.
        requests: whose rows they are.

    Returns:
        float32 ``[B, V]``; each row sums to one, and is all on the most likely token where the
        request is greedy.
    """
    weights_BV = torch.empty_like(logits_BV)
    for shape, rows in _by_filter(requests).items():
        weights_BV[rows] = _distributions_of_group(_of(logits_BV, rows), shape)
    return weights_BV


def draws(requests: Sequence[Request]) -> list[float]:
    """One random number in [0, 1) from each request.

    24 bits are what a float32 below one holds exactly.
    """
    return [request.random.getrandbits(24) * 2.0**-24 for request in requests]


def _by_filter(requests: Sequence[Request]) -> dict[Filter, list[int]]:
    """The rows of requests that agree in how they are sampled."""
    groups: dict[Filter, list[int]] = {}
    for row, request in enumerate(requests):
        params = request.params
        shape = Filter(params.temperature, params.top_k, params.top_p)
        groups.setdefault(shape, []).append(row)
    return groups


def _of(logits_BV: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """Some rows, in ascending order; not copied if they are all."""
    return logits_BV if len(rows) == len(logits_BV) else logits_BV[rows]


def constrained(logits_BV: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
    """The logits with minus infinity for tokens that a request must not take next.

    Args:
        logits_BV: float32; returned itself where every request may take any token.
        requests: whose rows they are.
    """
    allowed = [(row, request.allowed_token_ids) for row, request in enumerate(requests)]
    if all(token_ids is None for _, token_ids in allowed):
        return logits_BV
    result_BV = logits_BV.clone()
    for row, token_ids in allowed:
        if token_ids is not None:
            token_ids_C = torch.tensor(token_ids, device=logits_BV.device)
            result_BV[row] = -torch.inf
            result_BV[row, token_ids_C] = logits_BV[row, token_ids_C]
    return result_BV


def _sample_group(logits_GV: torch.Tensor, shape: Filter, requests: Sequence[Request]) -> list[int]:
    if shape.temperature == 0.0:
        return cast("list[int]", logits_GV.argmax(dim=-1).tolist())
    weights_GC, token_ids_GC = candidates(logits_GV, shape)
    places_G1 = pick(weights_GC, as_column(draws(requests), logits_GV.device))
    if token_ids_GC is not None:
        places_G1 = token_ids_GC.gather(1, places_G1)
    return cast("list[int]", places_G1.squeeze(1).tolist())


def _distributions_of_group(logits_GV: torch.Tensor, shape: Filter) -> torch.Tensor:
    if shape.temperature == 0.0:
        best_G1 = logits_GV.argmax(dim=-1, keepdim=True)
        return torch.zeros_like(logits_GV).scatter_(1, best_G1, 1.0)
    weights_GC, token_ids_GC = candidates(logits_GV, shape)
    if token_ids_GC is None:
        return weights_GC
    weights_GC = weights_GC / weights_GC.sum(dim=-1, keepdim=True)
    return torch.zeros_like(logits_GV).scatter_(1, token_ids_GC, weights_GC)


def candidates(logits_GV: torch.Tensor, shape: Filter) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Probabilities of the tokens that may be chosen, most likely first where a filter applies.

    Returns:
        float32 ``[G, C]``, zero for tokens that ``top_p`` leaves out and not normalised again; and
        the tokens they belong to, int64 ``[G, C]``, or None where column is token.
    """
    scaled_GV = _tempered(logits_GV, shape.temperature)
    if shape.top_k == 0 and shape.top_p == 1.0:
        return scaled_GV.softmax(dim=-1), None
    if 0 < shape.top_k < scaled_GV.shape[1]:
        scaled_GC, token_ids_GC = scaled_GV.topk(shape.top_k, dim=-1)
    else:
        scaled_GC, token_ids_GC = scaled_GV.sort(dim=-1, descending=True, stable=True)
    weights_GC = scaled_GC.softmax(dim=-1)
    if shape.top_p < 1.0:
        before_GC = weights_GC.cumsum(dim=-1) - weights_GC
        weights_GC = weights_GC.masked_fill(before_GC >= shape.top_p, 0.0)
    return weights_GC, token_ids_GC


def _tempered(logits_GV: torch.Tensor, temperature: float) -> torch.Tensor:
    """The logits divided by the temperature; the most likely ones become 0 where it is small."""
    if temperature >= _SMALL_TEMPERATURE:
        return logits_GV / temperature
    below_GV = logits_GV - logits_GV.amax(dim=-1, keepdim=True)
    return below_GV / max(temperature, torch.finfo(torch.float32).tiny)


def as_column(numbers: Sequence[float], device: torch.device) -> torch.Tensor:
    """Random numbers as :func:`pick` takes them, float32 ``[G, 1]``."""
    return torch.tensor(numbers, dtype=torch.float32, device=device).unsqueeze(1)


def pick(weights_GC: torch.Tensor, draws_G1: torch.Tensor) -> torch.Tensor:
    """Columns int64 ``[G, 1]``, chosen in proportion to weights by draws in [0, 1)."""
    sums_GC = weights_GC.cumsum(dim=-1)
    total_G1 = sums_GC[:, -1:]
    # Below the total even after rounding, so that a column with weight is found.
    below_G1 = torch.nextafter(total_G1, torch.zeros_like(total_G1))
    return torch.searchsorted(sums_GC, torch.minimum(draws_G1 * total_G1, below_G1), right=True)
