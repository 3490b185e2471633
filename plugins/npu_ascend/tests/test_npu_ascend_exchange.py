"""Two ranks that exchange rows through the emulated DeepEP see what the core's exchange shows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fixtures import ascend_ranks
from tests.fixtures.ascend_ranks import CAPACITY, CARRIED, CASES, Seen
from tests.fixtures.ranks import Raised, launches, run_ranks

from mortise.plugin import DispatchMode, Routing
from mortise_npu_ascend.exchange_dispatchers import every_choice_an_expert

if TYPE_CHECKING:
    from collections.abc import Callable

    from mortise.env import Launch

modes = pytest.mark.parametrize("mode", [mode.value for mode in DispatchMode])
formats = pytest.mark.parametrize("name", CARRIED)
kinds = pytest.mark.parametrize("ends", [False, True])


def on_two_ranks(work: Callable[[Launch], Any]) -> list[Any]:
    with launches(2) as every:
        outcomes = run_ranks(work, every)
    results = [outcome.result for outcome in outcomes if outcome is not None]
    assert len(results) == 2
    assert not [result for result in results if isinstance(result, Raised)], results
    return results


@pytest.fixture(scope="module")
def ranks() -> list[dict[tuple[str, str, str, bool], Seen]]:
    return on_two_ranks(ascend_ranks.compare_with_the_core)


@modes
@formats
@kinds
def test_rows_and_sums_are_those_of_the_core(ranks, mode: str, name: str, ends: bool) -> None:
    for case in CASES:
        for results in ranks:
            seen = results[mode, name, case, ends]
            for ours, portable in zip(seen.rows, seen.portable_rows, strict=True):
                assert ours.dtype is portable.dtype
                if name == "bf16":
                    assert torch.equal(ours, portable), case
                elif ours.numel():
                    assert int((ours.int() - portable.int()).abs().max()) <= 1, case
            torch.testing.assert_close(seen.combined, seen.portable, rtol=1e-2, atol=5e-2)


@modes
@formats
@kinds
def test_each_token_is_the_weighted_sum_of_what_its_experts_make(
    ranks, mode: str, name: str, ends: bool
) -> None:
    """Said without any dispatcher: experts multiply by their number plus one."""
    for case, ids in CASES.items():
        for rank, results in enumerate(ranks):
            hidden, routing = ascend_ranks.tokens_of(ids(rank), rank)
            factors = torch.where(routing.topk_ids < 0, 0, routing.topk_ids + 1)
            sums = (factors * routing.topk_weights).sum(1, keepdim=True)
            combined = results[mode, name, case, ends].combined
            assert combined.dtype is torch.bfloat16
            assert combined.shape == hidden.shape
            torch.testing.assert_close(combined.float(), hidden.float() * sums, rtol=2e-2, atol=0.2)


@formats
@kinds
def test_what_is_known_of_a_normal_dispatch(ranks, name: str, ends: bool) -> None:
    for case in CASES:
        for rank, results in enumerate(ranks):
            seen = results["normal", name, case, ends]
            ids = torch.tensor([one for source in range(2) for one in CASES[case](source)])
            own = [int((ids == 2 * rank + place).sum()) for place in range(2)]
            assert seen.counts == list(seen.group_counts or ()) == own
            # One row is there although nothing came.
            assert seen.num_rows == max(1, sum(own))


@formats
@kinds
def test_shapes_of_the_low_latency_exchange_never_change(ranks, name: str, ends: bool) -> None:
    for case in CASES:
        for results in ranks:
            seen = results["low_latency", name, case, ends]
            assert seen.num_rows == CAPACITY * 2 * 2
            assert seen.group_counts is None


def test_rows_of_one_expert_come_by_source_rank_and_token(ranks) -> None:
    case = "distinct experts"
    sources = [ascend_ranks.tokens_of(CASES[case](rank), rank) for rank in range(2)]
    for rank, results in enumerate(ranks):
        for place, rows in enumerate(results["normal", "bf16", case, False].rows):
            wanted = [
                hidden[token]
                for hidden, routing in sources
                for token in range(len(hidden))
                if 2 * rank + place in routing.topk_ids[token]
            ]
            assert torch.equal(rows, torch.stack(wanted))


def test_the_hidden_size_of_a2() -> None:
    for hidden, ids, weights, combined in on_two_ranks(ascend_ranks.send_large_rows_of_a2):
        expected = hidden.float() * ((ids + 1) * weights).sum(1, keepdim=True)
        torch.testing.assert_close(combined.float(), expected, rtol=2e-2, atol=2e-2)


def test_a_quantised_model_and_an_unquantised_draft_do_not_hear_each_other() -> None:
    """Nor the variable by which the last one built decided for all of a process."""
    for results in on_two_ranks(ascend_ranks.interleave_two_models):
        for mode in DispatchMode:
            for name, dtype in (("main", "torch.int8"), ("draft", "torch.bfloat16")):
                alone = results[f"{mode.value} {name} {name}"]
                assert alone[0] == dtype
                for order in ("main+draft", "draft+main"):
                    found_dtype, rows, combined = results[f"{mode.value} {order} {name}"]
                    assert found_dtype == dtype
                    assert torch.equal(rows.view(torch.uint8), alone[1].view(torch.uint8))
                    assert torch.equal(combined, alone[2])
        assert results["untold"] == ("torch.int8", "torch.int8"), "what the library does, untold"
        (told,) = results["told"]
        assert told.startswith(ascend_ranks.TOLD)


def test_all_ranks_take_one_exchange() -> None:
    first, second = on_two_ranks(ascend_ranks.agree_on_an_exchange)
    assert "on A2 it takes hidden sizes of 7168, and this model has 1024" in first[0]
    assert "it does not carry the rows of another process" in second[0]


def test_what_is_wrong_is_told_before_anything_is_sent() -> None:
    for found in on_two_ranks(ascend_ranks.refuse_what_is_wrong):
        expected = {
            "another format": "ContractError: layer model.layers.3.mlp: int8 rows in an exchange",
            "another dtype": "ContractError: layer model.layers.3.mlp: torch.float32 rows",
            "too many tokens": "ConfigError: layer model.layers.3.mlp: DeepEP is to send 8193 tok",
            "float32 rows": "ContractError: layer model.layers.3.mlp: the experts made torch.fl",
            "missing rows": "ContractError: layer model.layers.3.mlp: the experts made torch.bf",
            "a later dispatch": "ContractError: layer model.layers.3.mlp: rows are combined aft",
            "too many for its memory": "CapacityError: layer model.layers.3.mlp: 6 tokens in a",
            "connections": "1",
        }
        for name, beginning in expected.items():
            assert found[name].startswith(beginning), (name, found[name])


def test_a_library_that_does_not_do_as_it_is_told_is_found_out() -> None:
    for told in on_two_ranks(ascend_ranks.disobeying_library):
        assert "DeepEP was asked for bf16 rows and sent torch.int8 with scales" in told
        assert "unset DEEP_NORMAL_MODE_USE_INT8_QUANT" in told


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 5).flatmap(
        lambda choices: st.tuples(
            st.integers(choices, 9),
            st.lists(st.lists(st.integers(-1, 8), min_size=choices, max_size=choices), max_size=6),
        )
    )
)
def test_every_choice_becomes_one_of_an_expert_of_its_own(drawn) -> None:
    num_experts, rows = drawn
    choices = len(rows[0]) if rows else 2
    ids = torch.tensor(rows, dtype=torch.int64).view(-1, choices).clamp(max=num_experts - 1)
    weights = torch.rand(ids.shape, generator=torch.Generator().manual_seed(len(rows)))
    made = every_choice_an_expert(Routing(topk_ids=ids, topk_weights=weights), max(num_experts, 2))
    for row in range(len(ids)):
        assert len(set(made.topk_ids[row].tolist())) == choices
        assert all(0 <= expert < max(num_experts, 2) for expert in made.topk_ids[row].tolist())
    for expert in range(num_experts):
        before = (weights * (ids == expert)).sum(1)
        after = (made.topk_weights * (made.topk_ids == expert)).sum(1)
        torch.testing.assert_close(after, before)
