"""Choosing one token of each request from the model's logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, cast

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
    groups: dict[Filter, list[int]] = {}
    for row, request in enumerate(requests):
        params = request.params
        shape = Filter(params.temperature, params.top_k, params.top_p)
        groups.setdefault(shape, []).append(row)
    if len(groups) == 1:
        (shape,) = groups
        return _sample_group(logits_BV, shape, requests)
    tokens = [0] * len(requests)
    for shape, rows in groups.items():
        chosen = _sample_group(logits_BV[rows], shape, [requests[row] for row in rows])
        for row, token in zip(rows, chosen, strict=True):
            tokens[row] = token
    return tokens


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
    # 24 bits are what a float32 below one holds exactly.
    draws = [request.random.getrandbits(24) * 2.0**-24 for request in requests]
    draws_G1 = torch.tensor(draws, dtype=torch.float32, device=logits_GV.device).unsqueeze(1)
    weights_GC, token_ids_GC = candidates(logits_GV, shape)
    places_G1 = pick(weights_GC, draws_G1)
    if token_ids_GC is not None:
        places_G1 = token_ids_GC.gather(1, places_G1)
    return cast("list[int]", places_G1.squeeze(1).tolist())


def candidates(logits_GV: torch.Tensor, shape: Filter) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Probabilities of the tokens that may be chosen, most likely first where a filter applies.

    Returns:
        float32 ``[G, C]``, zero for tokens that ``top_p`` leaves out and not normalised again; and
        the tokens they belong to, int64 ``[G, C]``, or None where column is token.
    """
    scaled_GV = logits_GV / shape.temperature
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


def pick(weights_GC: torch.Tensor, draws_G1: torch.Tensor) -> torch.Tensor:
    """Columns int64 ``[G, 1]``, chosen in proportion to weights by draws in [0, 1)."""
    sums_GC = weights_GC.cumsum(dim=-1)
    total_G1 = sums_GC[:, -1:]
    # Below the total even after rounding, so that a column with weight is found.
    below_G1 = torch.nextafter(total_G1, torch.zeros_like(total_G1))
    return torch.searchsorted(sums_GC, torch.minimum(draws_G1 * total_G1, below_G1), right=True)
