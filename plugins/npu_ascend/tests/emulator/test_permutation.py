"""Rows sorted by expert and back, and rows regrouped after an exchange."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mortise_npu_ascend.emulator import EmulatedNpu, Generation, install


@pytest.fixture(params=Generation)
def npu(request: pytest.FixtureRequest) -> EmulatedNpu:
    return install(request.param)


@st.composite
def chosen_experts(draw: st.DrawFn) -> np.ndarray:
    top_k = draw(st.integers(1, 3))
    row = st.lists(st.integers(0, 4), min_size=top_k, max_size=top_k)
    return np.array(draw(st.lists(row, min_size=1, max_size=6)))


@settings(max_examples=50, deadline=None)
@given(chosen_experts(), st.integers(-3, 20))
def test_permute(experts: np.ndarray, wanted: int) -> None:
    tokens, top_k = experts.shape
    x = torch.randn(tokens, 3, generator=torch.Generator().manual_seed(0))
    copies = tokens * top_k
    if copies + wanted < 0:
        return
    rows, places = install().npu_moe_token_permute(x, torch.from_numpy(experts), wanted)
    order = sorted(range(copies), key=lambda copy: experts.flat[copy])
    left = min(wanted, copies) if wanted > 0 else copies + wanted
    np.testing.assert_array_equal(rows, x[[copy // top_k for copy in order[:left]]])
    assert places.dtype == torch.int32
    np.testing.assert_array_equal(places, np.argsort(order), "the inverse of the order")


@settings(max_examples=40, deadline=None)
@given(chosen_experts(), st.integers(0, 2**32 - 1))
def test_permuted_and_summed_is_the_row_times_its_weights(experts: np.ndarray, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((len(experts), 4)).astype(np.float32)
    weights = rng.random(experts.shape).astype(np.float32)
    npu = install()
    rows, places = npu.npu_moe_token_permute(torch.from_numpy(x), torch.from_numpy(experts))
    out = npu.npu_moe_token_unpermute(rows, places, torch.from_numpy(weights))
    np.testing.assert_allclose(out, x * weights.sum(1, keepdims=True), rtol=1e-5, atol=1e-6)


def test_unpermute_by_hand(npu: EmulatedNpu) -> None:
    rows = torch.tensor([[1.0], [10.0], [100.0], [1000.0]])
    places = torch.tensor([3, 0, 1, 2], dtype=torch.int32)
    assert npu.npu_moe_token_unpermute(rows, places).flatten().tolist() == [1000, 1, 10, 100]
    weights = torch.tensor([[1.0, 2.0], [0.5, 0.25]])
    assert npu.npu_moe_token_unpermute(rows, places, weights).flatten().tolist() == [1002, 30]


def test_rows_of_no_weight_are_not_read(npu: EmulatedNpu) -> None:
    """Experts of other ranks: their weight is 0, and the row that stands for them is unwritten."""
    rows = torch.tensor([[2.0], [float("nan")]])
    places = torch.tensor([0, 1], dtype=torch.int32)
    out = npu.npu_moe_token_unpermute(rows, places, torch.tensor([[0.5, 0.0]]))
    assert out.tolist() == [[1]]


def test_places_beyond_the_rows_add_nothing_and_those_before_anything(npu: EmulatedNpu) -> None:
    places = torch.tensor([0, 5, 0, -1], dtype=torch.int32)
    out = npu.npu_moe_token_unpermute(torch.ones(1, 1), places, torch.ones(2, 2))
    assert out[0].item() == 1
    assert out[1].isnan()


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"tokens": torch.ones(2)}, "input tokens should be 2"),
        ({"indices": torch.zeros(2, 1, 1).long()}, "input indices should be 2 or 1"),
        ({"indices": torch.zeros(2)}, "indices cannot be DT_FLOAT"),
        ({"indices": torch.zeros(3).long()}, "as many rows"),
        ({"padded_mode": True}, "paddedMode only supports false"),
        ({"num_out_tokens": -3}, "leaves no row"),
        ({"tokens": torch.ones(2, 3).long()}, "tokens cannot be DT_INT64"),
    ],
)
def test_refusals_of_permute(npu: EmulatedNpu, changed: dict[str, Any], reason: str) -> None:
    arguments = {"tokens": torch.ones(2, 3), "indices": torch.zeros(2, 1, dtype=torch.int64)}
    with pytest.raises(RuntimeError, match=reason):
        npu.npu_moe_token_permute(**(arguments | changed))


def test_int8_rows_permute_on_the_newest_only(npu: EmulatedNpu) -> None:
    rows, indices = torch.ones(2, 3, dtype=torch.int8), torch.tensor([1, 0])
    if npu.chip.generation == "A5":
        assert npu.npu_moe_token_permute(rows, indices)[1].tolist() == [1, 0]
    else:
        with pytest.raises(RuntimeError, match="tokens cannot be DT_INT8"):
            npu.npu_moe_token_permute(rows, indices)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"probs": torch.ones(2)}, "input probs should be 2"),
        ({"probs": torch.ones(2, 1).char()}, "probs cannot be DT_INT8"),
        ({"probs": torch.ones(1, 1)}, "should be as many"),
        ({"permuted_tokens": torch.ones(2)}, "input permuted_tokens should be 2"),
        ({"permuted_tokens": torch.ones(2, 3).char()}, "permutedTokens cannot be DT_INT8"),
        ({"sorted_indices": torch.zeros(2, 1).int()}, "input sorted_indices should be 1"),
        ({"sorted_indices": torch.zeros(2)}, "sortedIndices cannot be DT_FLOAT"),
        ({"padded_mode": True}, "paddedMode only supports false"),
    ],
)
def test_refusals_of_unpermute(npu: EmulatedNpu, changed: dict[str, Any], reason: str) -> None:
    arguments = {
        "permuted_tokens": torch.ones(2, 3),
        "sorted_indices": torch.zeros(2, dtype=torch.int32),
    }
    with pytest.raises(RuntimeError, match=reason):
        npu.npu_moe_token_unpermute(**(arguments | changed))


@st.composite
def exchanged(draw: st.DrawFn) -> np.ndarray:
    experts = draw(st.integers(1, 4))
    row = st.lists(st.integers(0, 3), min_size=experts, max_size=experts)
    counts = np.array(draw(st.lists(row, min_size=1, max_size=4)))
    return counts if counts.sum() else counts + 1


@settings(max_examples=40, deadline=None)
@given(exchanged(), st.integers(0, 2), st.sampled_from([np.int32, np.int64]))
def test_regrouped_rows(counts: np.ndarray, spare: int, dtype: type[np.integer[Any]]) -> None:
    """A row tells which rank and expert it is of; then its number among those."""
    rows = [
        (rank, expert, number)
        for rank, row in enumerate(counts)
        for expert, count in enumerate(row)
        for number in range(count)
    ]
    total = len(rows)
    tokens = torch.tensor([*rows, *[(9, 9, 9)] * spare], dtype=torch.bfloat16)
    scales = torch.arange(total + spare, dtype=torch.float32)
    found, moved, source, numbers = install().npu_moe_re_routing(
        tokens, torch.from_numpy(counts.astype(dtype)), per_token_scales=scales
    )
    by_expert = sorted(range(total), key=lambda place: rows[place][1])
    np.testing.assert_array_equal(found[:total].float(), [rows[place] for place in by_expert])
    np.testing.assert_array_equal(source[:total], by_expert)
    np.testing.assert_array_equal(moved[:total], by_expert)
    np.testing.assert_array_equal(numbers, counts.sum(0))
    assert numbers.numpy().dtype == dtype
    assert found[total:].isnan().all() and moved[total:].isnan().all()
    assert (source[total:] < 0).all()


def test_the_other_index_of_regrouped_rows() -> None:
    counts = torch.tensor([[1, 2], [1, 1]], dtype=torch.int32)
    tokens = torch.arange(10, dtype=torch.int8).view(5, 2)
    _, _, source, _ = install("A5").npu_moe_re_routing(tokens, counts)
    _, _, place, _ = install("A5").npu_moe_re_routing(tokens, counts, idx_type=1)
    assert source.tolist() == [0, 3, 1, 2, 4]
    assert place.tolist() == [0, 2, 3, 1, 4]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"tokens": torch.ones(4).half()}, "tokens dim should larger than 1"),
        ({"tokens": torch.ones(4, 2)}, "tokens cannot be DT_FLOAT"),
        ({"expert_token_num_per_rank": torch.ones(2).int()}, "dim should larger than 1"),
        ({"expert_token_num_per_rank": torch.ones(1, 2)}, "cannot be DT_FLOAT"),
        ({"expert_token_num_per_rank": torch.full((1, 2), 3)}, "counts 6 of 4 tokens"),
        ({"per_token_scales": torch.ones(3)}, "one per token"),
        ({"expert_token_num_type": 0}, "expert_token_num_type 0 should be 1"),
        ({"idx_type": 1}, r"idx_type 1 should be in \(0,\)"),
        ({"tokens_dtype": 290}, "tokens_dtype 290 is not emulated"),
        ({"tokens": torch.ones(4, 16384).half()}, "H 16384 should be less"),
    ],
)
def test_refusals_of_regrouping(changed: dict[str, Any], reason: str) -> None:
    arguments = {
        "tokens": torch.ones(4, 2, dtype=torch.float16),
        "expert_token_num_per_rank": torch.full((1, 2), 2),
    }
    with pytest.raises(RuntimeError, match=reason):
        install().npu_moe_re_routing(**(arguments | changed))
