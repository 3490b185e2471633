"""The emulated DeepEP passes what DeepEP's own tests check, and refuses what it must."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from tests.fixtures import cuda_buffers
from tests.fixtures.cuda_buffers import HIDDEN, INT_BITS, NUM_CHOICES, NUM_EXPERTS, TOKENS
from tests.fixtures.ranks import Raised, launches, run_ranks

if TYPE_CHECKING:
    from collections.abc import Callable

LOCAL = NUM_EXPERTS // 2


def on_two_ranks(work: Callable[..., Any]) -> list[Any]:
    with launches(2) as every:
        outcomes = run_ranks(work, every)
    results = [outcome.result for outcome in outcomes if outcome is not None]
    assert len(results) == 2
    assert not [result for result in results if isinstance(result, Raised)], results
    return results


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """``calc_diff`` of DeepEP's tests."""
    x, y = ours.double() + 1, theirs.double() + 1
    return float(1 - 2 * (x * y).sum() / (x * x + y * y).sum())


@pytest.fixture(scope="module")
def normal() -> list[dict[str, Any]]:
    return on_two_ranks(cuda_buffers.normal_exchange)


@pytest.fixture(scope="module")
def fast() -> list[dict[str, Any]]:
    return on_two_ranks(cuda_buffers.low_latency_exchange)


def test_the_layout_counts_a_token_once_for_a_rank(normal) -> None:
    for rank, seen in enumerate(normal):
        own = seen["own"]
        is_in_rank = torch.stack(
            [((own >= LOCAL * place) & (own < LOCAL * (place + 1))).any(1) for place in range(2)], 1
        )
        assert torch.equal(seen["is_in_rank"], is_in_rank)
        assert torch.equal(seen["per_rank"][rank], is_in_rank.sum(0).int())
        counts = torch.tensor([(own == expert).sum() for expert in range(NUM_EXPERTS)])
        assert torch.equal(seen["per_expert"][rank], counts.int())


def test_rows_come_by_source_rank_and_token(normal) -> None:
    for rank, seen in enumerate(normal):
        found = seen["number"]
        begin = 0
        for source in range(2):
            end = int(found["prefixes"][source, rank])
            assert bool((found["rows"][begin:end] == source).all())
            assert bool((found["sources"][begin:end].diff() > 0).all())
            begin = end
        assert begin == len(found["rows"]) == int(seen["per_rank"][:, rank].sum())


def test_choices_of_other_ranks_are_none_and_have_no_weight(normal) -> None:
    for rank, seen in enumerate(normal):
        local, weights = seen["number"]["local"], seen["number"]["weights"]
        assert bool(((local == -1) | ((local >= 0) & (local < LOCAL))).all())
        assert bool((weights[local == -1] == 0).all())
        counts = [int((seen["ids"] == rank * LOCAL + place).sum()) for place in range(LOCAL)]
        for place, count in enumerate(counts):
            assert int((local == place).sum()) == count
        assert seen["fp8"]["counts"] == counts
        assert seen["number"]["counts"] == [-(-count // 3) * 3 for count in counts]


@pytest.mark.parametrize("name", ["number", "noise", "fp8"])
def test_what_comes_back_is_the_row_times_its_ranks(normal, name: str) -> None:
    for seen in normal:
        found = seen[name]
        ranks = seen["is_in_rank"].sum(1, keepdim=True)
        sent = found["sent"]
        plain = cuda_buffers.dequantise_fp8_rows(*sent) if isinstance(sent, tuple) else sent
        exact = plain.bfloat16().double() * ranks
        assert difference(found["combined"], exact) < 5e-6
        chosen = (seen["own"] >= 0) * seen["own_weights"]
        assert difference(found["combined_weights"], chosen) < 1e-9


def test_biases_are_added_before_the_sum_is_rounded(normal) -> None:
    for seen in normal:
        plain = cuda_buffers.dequantise_fp8_rows(*seen["fp8"]["sent"]).bfloat16().float()
        exact = plain * seen["is_in_rank"].sum(1, keepdim=True) + 2 * seen["bias"].float()
        assert torch.equal(seen["biased"], exact.bfloat16())


def test_the_worst_number_of_rows_ends_in_rows_of_nobody(normal) -> None:
    for seen in normal:
        rows, worst = seen["bias"], seen["worst"]
        there = len(seen["number"]["rows"])
        assert worst["counts"] == []
        assert worst["rows"].shape == (2 * TOKENS, HIDDEN)
        assert bool(worst["rows"][there:].isnan().all())
        assert bool((worst["local"][there:] == -1).all())
        expected = (rows.float() * seen["is_in_rank"].sum(1, keepdim=True)).bfloat16()
        assert torch.equal(seen["worst combined"], expected)
        assert "num_worst_tokens is 1" in seen["too few"]


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("name", ["bf16", "fp8", "rounded", "ue8m0"])
def test_masked_rows_are_where_the_handle_says(fast, name: str, hooked: bool) -> None:
    for rank, seen in enumerate(fast):
        found = seen[f"{name} {hooked}"]
        assert torch.equal(found["statistics"], found["counts"])
        for place in range(LOCAL):
            expert, count = rank * LOCAL + place, int(found["counts"][place])
            assert count == int((seen["ids"] == expert).sum())
            assert count == int((found["ranges"][place] & INT_BITS).sum())
            rows, sources = found["rows"][place], found["sources"][place]
            assert torch.equal(rows[:count, -1].int(), sources[:count])
            assert bool(rows[count:].isnan().all())
            for source in range(2):
                packed = int(found["ranges"][place, source])
                begin, number = packed >> 32, packed & INT_BITS
                tokens = (seen["ids"][source] == expert).any(1).nonzero().flatten()
                assert sorted(sources[begin : begin + number].tolist()) == tokens.tolist()
                ones = rows[begin : begin + number, :-128].float()
                # 1 and 2 are powers of two, but their scale need not be.
                torch.testing.assert_close(
                    ones, torch.full_like(ones, source + 1.0), rtol=2.0**-4, atol=0
                )


@pytest.mark.parametrize("name", ["bf16", "fp8", "rounded", "ue8m0"])
def test_nothing_is_there_before_the_hook(fast, name: str) -> None:
    for seen in fast:
        assert seen[f"{name} True"]["before"]
        assert not seen[f"{name} False"]["before"]
        assert seen[f"{name} True"]["was_nan"]


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("name", ["bf16", "fp8", "rounded", "ue8m0"])
def test_the_way_back_weights_and_sums(fast, name: str, hooked: bool) -> None:
    for seen in fast:
        sums = ((seen["own"] >= 0) * seen["weights"]).sum(1, keepdim=True)
        bound = 1e-5 if name == "bf16" else 9e-4
        found = seen[f"{name} {hooked}"]["combined"]
        assert difference(found, seen["plain"].double() * sums) < bound


def test_scales_lie_column_after_column(fast) -> None:
    for seen in fast:
        for name, dtype in (("fp8", torch.float32), ("ue8m0", torch.int32)):
            found = seen[f"{name} False"]
            assert found["scale_dtype"] is dtype
            assert found["scale_strides"][1:] == (1, 2 * TOKENS)
        assert seen["bf16 False"]["scale_dtype"] is None


def test_the_order_of_rows_is_of_a_seed_and_changes_from_call_to_call() -> None:
    for one, same, other in on_two_ranks(cuda_buffers.shuffles):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(one, same, strict=True))
        assert not torch.equal(one[0], one[1])
        assert not torch.equal(one[0], other[0])


def test_what_is_refused() -> None:
    undefined = "RuntimeError: emulated DeepEP: the device's answer to this is undefined: "
    asserted = "RuntimeError: Failed: Assertion error '"
    waits = "while another low-latency exchange was not received, which then waits forever"
    expected = {
        "hook and event": asserted + "not(async and return_recv_hook)",
        "few": asserted + "x.size(0) == topk_idx.size(0) and x.size(0) <= num_max_dispatch_tokens",
        "deep": "AssertionError",
        "ue8m0 alone": asserted + "round_scale and",
        "large": asserted + "layout.total_bytes <= num_rdma_bytes",
        "hidden": asserted + "hidden % 512 == 0",
        "choices": asserted + "num_topk <= kNumMaxTopK",
        "twice": undefined + "more rows for one expert than num_max_dispatch_tokens_per_rank",
        "second": undefined + "a low-latency dispatch " + waits,
        "normal": undefined + "a normal dispatch " + waits,
        "cleaning": undefined + "clean_low_latency_buffer " + waits,
        "hook again": undefined + "a hook that was called before",
        "not cleaned": undefined + "a low-latency dispatch after other exchanges, without clean",
        "cleaned": "nothing was raised",
        "other sizes": "nothing was raised",
        "float32": asserted + "x.scalar_type() == torch::kBFloat16",
        "no weights": asserted + "topk_idx.has_value() == topk_weights.has_value()",
        "rows": asserted + "src_idx.size(0) == num_tokens",
        "cached": "NotImplementedError: a dispatch by the handle of another is not emulated",
        "float32 rows": asserted + "x.dim() == 2 and x.is_contiguous() and x.scalar_type()",
        "small": asserted,
        "not for it": asserted + "low_latency_mode",
    }
    for found in on_two_ranks(cuda_buffers.misused):
        assert set(found) == set(expected)
        for name, beginning in expected.items():
            assert found[name].startswith(beginning), (name, found[name])


def test_choices_are_distinct() -> None:
    """What the checks above take for granted of their inputs."""
    for rank in range(2):
        ids, weights = cuda_buffers.choices(rank)
        assert ids.shape == weights.shape == (TOKENS, NUM_CHOICES)
        assert bool((ids == -1).any())
        for row in ids.tolist():
            chosen = [expert for expert in row if expert >= 0]
            assert len(chosen) == len(set(chosen))
