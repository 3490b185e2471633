"""Ranks that exchange rows through the emulated DeepEP see what the core's exchange shows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from tests.fixtures import cuda_layers, cuda_ranks
from tests.fixtures.cuda_ranks import ALIGNMENT, CAPACITY, CARRIED, CASES, HIDDEN, WAYS, Seen
from tests.fixtures.ranks import Raised, launches, run_ranks

from mortise.errors import BackendUnusableError
from mortise.formats.fp8 import dequantise_fp8_rows, unpack_ue8m0
from mortise_cuda_common.libraries.deep_ep import require_installed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mortise.env import Launch

BF16_COMBINE = 1e-5
"""Most difference of a low-latency exchange of bf16 rows (DeepEP, tests/test_low_latency.py)."""
FP8_COMBINE = 9e-4
"""Most difference of a low-latency exchange of fp8 rows from what was sent (the same file)."""
HALF_STEP = 2.0**-8
"""Most relative error of one rounding to bfloat16."""

formats = pytest.mark.parametrize("name", CARRIED)
normal_ways = pytest.mark.parametrize("way", ["normal", "normal, aligned"])
fast_ways = pytest.mark.parametrize("way", ["low latency", "low latency, two stages"])

Results = dict[tuple[str, str, str], Seen]


def on_ranks(work: Callable[[Launch], Any], world_size: int = 2) -> list[Any]:
    with launches(world_size) as every:
        outcomes = run_ranks(work, every)
    results = [outcome.result for outcome in outcomes if outcome is not None]
    assert len(results) == world_size
    assert not [result for result in results if isinstance(result, Raised)], results
    return results


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """``calc_diff`` of DeepEP's tests: half the squared relative error, roughly."""
    x, y = ours.double() + 1, theirs.double() + 1
    return float(1 - 2 * (x * y).sum() / (x * x + y * y).sum()) if x.numel() else 0.0


@pytest.fixture(scope="module")
def two_ranks() -> list[Results]:
    return on_ranks(cuda_ranks.compare_with_the_core)


@pytest.fixture(scope="module")
def four_ranks() -> list[Results]:
    return on_ranks(cuda_ranks.compare_four_ranks, 4)


@pytest.fixture(scope="module")
def two_gpus() -> list[Results]:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"torch sees {torch.cuda.device_count()} GPUs: the real DeepEP takes two")
    try:
        require_installed()
    except BackendUnusableError as error:
        pytest.skip(f"the real DeepEP cannot be asked: {error.what}")
    return on_ranks(cuda_ranks.compare_on_gpus)


@pytest.fixture(params=["two", "four", pytest.param("gpus", marks=pytest.mark.device)])
def ranks(request) -> list[Results]:
    name = "two_gpus" if request.param == "gpus" else f"{request.param}_ranks"
    results: list[Results] = request.getfixturevalue(name)
    return results


def of(ranks: list[Results], way: str, name: str) -> Iterator[tuple[str, int, Seen]]:
    for rank, results in enumerate(ranks):
        for (found_way, found_name, case), seen in results.items():
            if (found_way, found_name) == (way, name):
                yield case, rank, seen


@formats
@normal_ways
def test_rows_and_scales_of_the_normal_exchange_are_those_of_the_core(ranks, way, name) -> None:
    for case, _, seen in of(ranks, way, name):
        for ours, portable in zip(seen.rows, seen.portable_rows, strict=True):
            assert ours.dtype is portable.dtype
            assert torch.equal(ours.view(torch.uint8), portable.view(torch.uint8)), case
        assert (seen.scales is None) is (name == "bf16") is (seen.portable_scales is None)
        for ours, portable in zip(seen.scales or (), seen.portable_scales or (), strict=True):
            assert torch.equal(ours, portable), case


@fast_ways
def test_bf16_rows_of_the_low_latency_exchange_are_those_of_the_core(ranks, way) -> None:
    for case, _, seen in of(ranks, way, "bf16"):
        for ours, portable in zip(seen.rows, seen.portable_rows, strict=True):
            in_any_order = sorted(cuda_ranks.bytes_of(row) for row in ours)
            assert in_any_order == sorted(cuda_ranks.bytes_of(row) for row in portable), case


def test_nobody_may_count_on_an_order_of_the_low_latency_exchange(two_ranks) -> None:
    assert not all(
        torch.equal(ours, portable)
        for _, _, seen in of(two_ranks, "low latency", "bf16")
        for ours, portable in zip(seen.rows, seen.portable_rows, strict=True)
    )


@fast_ways
@pytest.mark.parametrize("name", CARRIED[1:])
def test_fp8_rows_of_the_low_latency_exchange_are_rounded_tokens(ranks, way, name) -> None:
    """Each is within half a step of e4m3 of the token it came from, and no scale is loose."""
    for case, rank, seen in of(ranks, way, name):
        ids = [cuda_ids(case, source, len(ranks)) for source in range(len(ranks))]
        local = len(seen.rows)
        for place, (values, scales) in enumerate(zip(seen.rows, seen.scales, strict=True)):
            expert = rank * local + place
            tokens = torch.cat(
                [
                    hidden[[expert in row for row in routing.topk_ids.tolist()]]
                    for hidden, routing in (
                        cuda_ranks.tokens_of(of_source, source)
                        for source, of_source in enumerate(ids)
                    )
                ]
            ).float()
            assert len(tokens) == len(values)
            if not len(values):
                continue
            factors = unpack_ue8m0(scales, HIDDEN // 128) if "ue8m0" in name else scales
            plain = dequantise_fp8_rows(values, factors, torch.float32)
            nearest = torch.cdist(plain, tokens).argmin(dim=1)
            assert sorted(nearest.tolist()) == list(range(len(tokens))), case
            source = tokens[nearest]
            wide = factors.repeat_interleave(128, dim=1)
            bound = torch.maximum(source.abs() * 2.0**-4, wide * 2.0**-10) * (1 + 2.0**-20)
            assert bool(((plain - source).abs() <= bound).all()), case
            amax = source.abs().unflatten(1, (-1, 128)).amax(2)
            loose = 2.0 if "ue8m0" in name else 1.0
            assert bool((factors * 448 >= amax * (1 - 2.0**-22)).all())
            assert bool((factors * 448 <= amax * loose * (1 + 2.0**-22)).all())


def cuda_ids(case: str, source: int, world_size: int) -> cuda_ranks.Ids:
    if world_size == 2:
        return CASES[case](source)
    return cuda_ranks.FOUR_RANKS[case](source)


@formats
@pytest.mark.parametrize("way", WAYS)
def test_sums_are_those_of_the_core(ranks, way: str, name: str) -> None:
    for case, _, seen in of(ranks, way, name):
        assert seen.combined.dtype is torch.bfloat16
        assert seen.combined.shape == seen.portable.shape
        fast_fp8 = way.startswith("low") and name != "bf16"
        assert difference(seen.combined, seen.portable) < (
            FP8_COMBINE if fast_fp8 else BF16_COMBINE
        ), case
        if not fast_fp8:
            # One rounding there; here of each rank's sum, all of one sign, and of all ranks' sum.
            torch.testing.assert_close(
                seen.combined, seen.portable, rtol=3.1 * HALF_STEP, atol=1e-30
            )


@pytest.mark.parametrize("way", WAYS)
def test_each_token_is_the_weighted_sum_of_what_its_experts_make(ranks, way: str) -> None:
    """Said without any dispatcher: experts multiply by their number plus one."""
    for case, rank, seen in of(ranks, way, "bf16"):
        hidden, routing = cuda_ranks.tokens_of(cuda_ids(case, rank, len(ranks)), rank)
        factors = torch.where(routing.topk_ids < 0, 0, routing.topk_ids + 1)
        sums = (factors * routing.topk_weights.double()).sum(1, keepdim=True)
        expected = hidden.double() * sums
        assert difference(seen.combined, expected) < BF16_COMBINE
        # Three roundings to bfloat16 of positive multiples of one number: of the experts' rows, of
        # the sum of each rank, of their sum.
        torch.testing.assert_close(
            seen.combined.double(), expected, rtol=3.1 * HALF_STEP, atol=1e-30
        )


@formats
@normal_ways
def test_what_is_known_of_a_normal_dispatch(two_ranks, way: str, name: str) -> None:
    for case, rank, seen in of(two_ranks, way, name):
        ids = torch.tensor([one for source in range(2) for one in CASES[case](source)])
        own = [int((ids == 2 * rank + place).sum()) for place in range(2)]
        assert seen.counts == list(seen.group_counts or ()) == own
        multiple = ALIGNMENT if way == "normal, aligned" else 1
        assert seen.shape == (sum(-(-count // multiple) * multiple for count in own), HIDDEN)


@formats
@fast_ways
def test_shapes_of_the_low_latency_exchange_never_change(two_ranks, way: str, name: str) -> None:
    for _, _, seen in of(two_ranks, way, name):
        assert seen.shape == (2, 2 * CAPACITY, HIDDEN)
        assert seen.group_counts is None
        assert seen.is_poison_elsewhere
        assert seen.was_poison_before is ("two stages" in way)


def test_a_layer_of_two_ranks_is_the_layer_of_one() -> None:
    """Exchange, products and the way back together: no row is lost, and none is read twice."""
    for results in on_ranks(cuda_layers.run_a_layer):
        assert len(results) == 8
        for name, (ours, expected) in results.items():
            assert bool(ours.isfinite().all()), name
            # The Triton programs keep float32 between the products, so that some rows of the
            # second are the next e4m3 number.
            bound = FP8_COMBINE if "triton" in name else BF16_COMBINE
            assert difference(ours, expected) < bound, name


def test_a_quantised_model_and_an_unquantised_draft_do_not_hear_each_other() -> None:
    for results in on_ranks(cuda_ranks.interleave_two_models):
        for way in ("normal, aligned", "low latency, two stages"):
            for name, dtype in (("main", "torch.float8_e4m3fn"), ("draft", "torch.bfloat16")):
                alone = results[f"{way} {name} {name}"]
                assert alone[0] == dtype
                for order in ("main+draft", "draft+main"):
                    found_dtype, rows, combined = results[f"{way} {order} {name}"]
                    assert (found_dtype, rows) == (dtype, alone[1])
                    assert torch.equal(combined, alone[2])


def test_all_ranks_take_one_exchange_and_say_why_once() -> None:
    first, second = on_ranks(cuda_ranks.agree_on_an_exchange)
    assert len(first) == len(second) == 2
    assert "it does not carry the rows of another process" in first[0]
    assert "needs queues of 14 for dispatch.max_tokens_per_rank 6" in second[0]
    for found in (first[1], second[1]):
        assert found.startswith("BackendUnusableError: layer model.layers.4.mlp: DeepEP does not")


def test_what_is_wrong_is_told_on_every_rank() -> None:
    layer = "layer model.layers.3.mlp"
    expected = {
        "another format": f"ContractError: {layer}: fp8 rows in an exchange of another format",
        "another dtype": f"ContractError: {layer}: torch.float32 rows are to be sent",
        "float32 rows": f"ContractError: {layer}: the experts made torch.float32 rows",
        "missing rows": f"ContractError: {layer}: the experts made torch.bfloat16",
        "too many tokens": f"CapacityError: {layer}: 7 tokens in a low-latency exchange",
        "read before": "True",
        "combined before": f"ContractError: {layer}: rows are combined that were not received",
        "another before": f"ContractError: {layer}: an exchange begins while that of {layer} has",
        "normal before": f"ContractError: {layer}: an exchange begins while that of {layer} has",
        "combined after": "nothing was raised",
        "connections": "1",
        "a larger layer": "the core's exchange sends tokens to their experts instead of DeepEP",
    }
    for found in on_ranks(cuda_ranks.misuse):
        for name, beginning in expected.items():
            assert found[name].startswith(beginning), (name, found[name])


def test_ranks_that_disagree_on_the_capacity_hear_of_it() -> None:
    for found in on_ranks(cuda_ranks.disagree_on_capacity):
        assert "ranks do not agree on" in found, found
