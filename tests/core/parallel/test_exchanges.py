"""Ranks that exchange rows see, bit for bit, what one process sees that has all tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pytest
import torch
from tests.fixtures.dispatch_cases import (
    CAPACITY,
    CASES,
    EXCHANGES,
    NUM_EXPERTS,
    Seen,
    experts,
    groups,
    run_cases,
    tokens_of,
)
from tests.fixtures.dispatch_formats import FORMATS, as_bytes
from tests.fixtures.ranks import Raised, launches, run_ranks

from mortise.formats.rows import dequantise_rows, quantise_rows
from mortise.reference.dispatch import LocalDispatcher
from mortise.spec.dispatch import DispatchedTokens, DispatchMode, Routing

if TYPE_CHECKING:
    from collections.abc import Mapping

Ranks = list["Mapping[tuple[str, str, str], Seen]"]


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest) -> Ranks:
    """What 2 or 4 ranks saw, of all cases in one run."""
    with launches(request.param) as every:
        outcomes = run_ranks(run_cases, every)
    results = [outcome.result for outcome in outcomes if outcome is not None]
    assert len(results) == request.param
    assert not [result for result in results if isinstance(result, Raised)], results
    return results


@dataclass(frozen=True)
class OneProcess:
    """What one process sees of the tokens of all ranks."""

    hidden: torch.Tensor
    routing: Routing
    tokens: DispatchedTokens
    combined: torch.Tensor


def one_process(way: str, name: str, case: str, world_size: int) -> OneProcess:
    shares = [tokens_of(case, name, rank) for rank in range(world_size)]
    hidden = torch.cat([hidden for hidden, _ in shares])
    routing = Routing(
        topk_ids=torch.cat([routing.topk_ids for _, routing in shares]),
        topk_weights=torch.cat([routing.topk_weights for _, routing in shares]),
    )
    dispatcher = LocalDispatcher(NUM_EXPERTS, max_tokens_per_rank=CAPACITY * world_size)
    tokens, handle = dispatcher.dispatch(hidden, routing, EXCHANGES[way].row_format(name))
    combined = dispatcher.combine(experts(tokens, 0, hidden.dtype), handle)
    return OneProcess(hidden, routing, tokens, combined)


def dispatched(seen: Seen, like: DispatchedTokens) -> DispatchedTokens:
    """The record that a rank had, in the format of another."""
    return replace(
        like,
        rows=seen.rows,
        scales=seen.scales,
        group_list=torch.tensor(seen.counts),
        group_counts=seen.group_counts,
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", EXCHANGES)
def test_rows_arrive_by_expert_rank_and_token_and_come_home(
    ranks: Ranks, way: str, case: str
) -> None:
    for name in FORMATS:
        expected = one_process(way, name, case, len(ranks))
        for rank, results in enumerate(ranks):
            check_arrival(results[way, name, case], expected.tokens, rank, len(ranks))
        combined = torch.cat([results[way, name, case].combined for results in ranks])
        assert combined.dtype == expected.hidden.dtype, name
        assert torch.equal(combined, expected.combined), name


def check_arrival(seen: Seen, expected: DispatchedTokens, rank: int, world_size: int) -> None:
    """Compare the bytes of every expert's rows and scales with those of one process."""
    each = NUM_EXPERTS // world_size
    own = slice(rank * each, (rank + 1) * each)
    tokens = dispatched(seen, expected)
    name = f"{expected.format} on rank {rank}"
    assert (seen.scales is None) is (expected.scales is None), name
    pairs = [(seen.rows, expected.rows), (seen.scales, expected.scales)]
    for found, wanted in pairs:
        if found is None or wanted is None:
            continue
        assert found.dtype == wanted.dtype, name
        for ours, theirs in zip(groups(tokens, found), groups(expected, wanted)[own], strict=True):
            assert torch.equal(as_bytes(ours), as_bytes(theirs)), name


@pytest.mark.parametrize("way", EXCHANGES)
def test_what_is_undefined_is_poison(ranks: Ranks, way: str) -> None:
    """Rows of no expert in bfloat16; with two stages all rows, until they are received."""
    mode = EXCHANGES[way].mode
    for results in ranks:
        for case in CASES:
            seen = results[way, "bf16", case]
            rows = seen.rows.clone()
            tokens = dispatched(seen, one_process(way, "bf16", case, 1).tokens)
            assert (seen.group_counts is None) is (mode is DispatchMode.LOW_LATENCY)
            for group in groups(tokens, rows):
                assert group.isfinite().all()
                group.fill_(torch.nan)
            assert rows.isnan().all()
            if EXCHANGES[way].two_stage:
                assert seen.was_poison


def test_shapes_of_the_low_latency_exchange_never_change(ranks: Ranks) -> None:
    each = NUM_EXPERTS // len(ranks)
    for results in ranks:
        for case in CASES:
            masked = results["low latency", "bf16", case].rows
            assert masked.shape[:2] == (each, CAPACITY * len(ranks))
            flat = results["low latency, flat", "bf16", case].rows
            assert flat.shape[0] == CAPACITY * len(ranks) * min(3, each)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("way", EXCHANGES)
def test_experts_that_multiply_give_the_weighted_sum(ranks: Ranks, way: str, name: str) -> None:
    """Said without any dispatcher: each token times what its experts multiply by."""
    tolerance = 1e-5 if name == "fp32" else 2e-2
    for case in CASES:
        for rank, results in enumerate(ranks):
            hidden, routing = tokens_of(case, name, rank)
            plain = dequantise_rows(
                *quantise_rows(hidden, FORMATS[name]), FORMATS[name], torch.float64
            )
            factors = torch.where(routing.topk_ids < 0, 0, routing.topk_ids + 1)
            expected = plain * (factors * routing.topk_weights).sum(1, keepdim=True)
            combined = results[way, name, case].combined.double()
            torch.testing.assert_close(combined, expected, rtol=tolerance, atol=tolerance)
