"""Rows to experts and back: the operators of the first generation, and the sum of the results."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mortise_npu_ascend.emulator import EmulatedNpu, Generation, install


@pytest.fixture(params=Generation)
def npu(request: pytest.FixtureRequest) -> EmulatedNpu:
    return install(request.param)


def column_numbers(tokens: int, top_k: int) -> torch.Tensor:
    """``row_idx`` as ``npu_moe_gating_top_k_softmax`` gives it: column after column."""
    return torch.arange(tokens * top_k, dtype=torch.int32).view(top_k, tokens).T.contiguous()


def rows_like(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@st.composite
def routings(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    """Experts ``[T, K]`` of tokens, distinct in a row, and how many there are."""
    experts = draw(st.integers(1, 6))
    top_k = draw(st.integers(1, experts))
    row = st.permutations(range(experts)).map(lambda order: order[:top_k])
    rows = draw(st.lists(row, min_size=1, max_size=7))
    return torch.tensor(rows, dtype=torch.int32), experts


def test_the_example_of_the_manual(npu: EmulatedNpu) -> None:
    """Its inputs; what comes out was worked out by hand."""
    x = torch.tensor([[0.1] * 4, [0.2] * 4, [0.3] * 4])
    expert_idx = torch.tensor([[1, 2], [0, 1], [0, 2]], dtype=torch.int32)
    rows, places, experts = npu.npu_moe_init_routing(x, column_numbers(3, 2), expert_idx, 3)
    # Row by row the copies are (token, expert): 0,1 0,2 1,0 1,1 2,0 2,2; by expert 1 2 0 1 0 2.
    np.testing.assert_allclose(rows[:, 0], [0.2, 0.3, 0.1, 0.2, 0.1, 0.3])
    assert experts.tolist() == [0, 0, 1, 1, 2, 2]
    # Copy j * 3 + i is slot j of token i.
    assert places.tolist() == [2, 0, 1, 4, 3, 5]


@settings(max_examples=40, deadline=None)
@given(routings(), st.integers(0, 8), st.integers(0, 2**32 - 1))
def test_first_generation(routing: tuple[torch.Tensor, int], wanted: int, seed: int) -> None:
    expert_idx, _ = routing
    tokens, top_k = expert_idx.shape
    x = rows_like((tokens, 3), seed, torch.bfloat16)
    rows, places, experts = install().npu_moe_init_routing(
        x, column_numbers(tokens, top_k), expert_idx, wanted
    )
    copies = sorted(
        ((int(expert_idx[i, j]), i, j) for i in range(tokens) for j in range(top_k)),
        key=lambda copy: copy[0],
    )
    kept = copies[: min(wanted, tokens) * top_k]
    assert torch.equal(rows, x[[token for _, token, _ in kept]])
    assert experts.tolist() == [expert for expert, _, _ in copies]
    expected = np.empty(tokens * top_k, dtype=np.int32)
    for place, (_, token, slot) in enumerate(copies):
        expected[slot * tokens + token] = place
    np.testing.assert_array_equal(places, expected)
    assert sorted(places.tolist()) == list(range(tokens * top_k)), "it permutes"


@settings(max_examples=30, deadline=None)
@given(routings())
def test_ends_of_experts_are_counts_summed(routing: tuple[torch.Tensor, int]) -> None:
    expert_idx, experts = routing
    in_order = expert_idx.flatten().sort().values
    ends = install().npu_moe_compute_expert_tokens(in_order, experts)
    expected = np.cumsum(np.bincount(in_order.numpy(), minlength=experts))
    assert ends.dtype == torch.int32
    np.testing.assert_array_equal(ends, expected)


@settings(max_examples=40, deadline=None)
@given(routings(), st.integers(0, 2**32 - 1), st.sampled_from([0, 2]))
def test_routed_and_summed_is_the_row_times_its_weights(
    routing: tuple[torch.Tensor, int], seed: int, mode: int
) -> None:
    expert_idx, experts = routing
    tokens, top_k = expert_idx.shape
    x = rows_like((tokens, 4), seed, torch.float32)
    weights = rows_like((tokens, top_k), seed + 1, torch.float32).abs()
    npu = install()
    if mode == 0:
        numbers = column_numbers(tokens, top_k)
        rows, places, _ = npu.npu_moe_init_routing(x, numbers, expert_idx, tokens)
    else:
        rows, places, *_ = npu.npu_moe_init_routing_v2(x, expert_idx, expert_num=experts)
    out = npu.npu_moe_finalize_routing(
        rows, None, None, None, weights, places, expert_idx, drop_pad_mode=mode
    )
    np.testing.assert_allclose(out, x * weights.sum(1, keepdim=True), rtol=1e-5, atol=1e-6)


def summed(
    rows: np.ndarray,
    skips: tuple[np.ndarray, ...],
    bias: np.ndarray,
    weights: np.ndarray,
    places: np.ndarray,
    experts: np.ndarray,
) -> np.ndarray:
    """``places`` is ``[T, K]`` here, whatever the order that the operator was given."""
    out = sum(skips) + np.zeros((len(places), rows.shape[1]))
    for token, slots in enumerate(places):
        for slot, place in enumerate(slots):
            if place >= 0:
                row = rows[place] + bias[experts[token, slot]]
                out[token] += weights[token, slot] * row
    return out


@pytest.mark.parametrize("mode", [0, 1, 2, 3])
def test_finalize_with_everything(npu: EmulatedNpu, mode: int) -> None:
    rng = np.random.default_rng(mode)
    tokens, top_k, experts, capacity, hidden = 5, 2, 3, 4, 6
    padded = mode in (1, 3)
    count = experts * capacity if padded else tokens * top_k
    rows = rng.standard_normal((count, hidden)).astype(np.float32)
    skips = tuple(rng.standard_normal((tokens, hidden)).astype(np.float32) for _ in range(2))
    bias = rng.standard_normal((experts, hidden)).astype(np.float32)
    weights = rng.random((tokens, top_k)).astype(np.float32)
    places = rng.permutation(count)[: tokens * top_k].reshape(tokens, top_k).astype(np.int32)
    if padded:
        places[1, 0] = places[4, 1] = -1
    chosen = rng.integers(0, experts, (tokens, top_k)).astype(np.int32)
    in_order = places.T if mode in (0, 1) else places
    out = npu.npu_moe_finalize_routing(
        torch.from_numpy(rows.reshape((experts, capacity, hidden) if padded else rows.shape)),
        torch.from_numpy(skips[0]),
        torch.from_numpy(skips[1]),
        torch.from_numpy(bias),
        torch.from_numpy(weights),
        torch.from_numpy(np.ascontiguousarray(in_order).reshape(-1)),
        torch.from_numpy(chosen),
        drop_pad_mode=mode,
    )
    np.testing.assert_allclose(
        out, summed(rows, skips, bias, weights, places, chosen), rtol=1e-5, atol=1e-6
    )


def test_the_other_order_gives_another_sum() -> None:
    """What the two modes are confused for: the same index, read column by column and row by row."""
    rows = torch.eye(4)
    places = torch.arange(4, dtype=torch.int32)
    weights = torch.ones(2, 2)
    by_mode = {
        mode: install().npu_moe_finalize_routing(
            rows, None, None, None, weights, places, None, drop_pad_mode=mode
        )
        for mode in (0, 2)
    }
    assert by_mode[0].tolist() == [[1, 0, 1, 0], [0, 1, 0, 1]]
    assert by_mode[2].tolist() == [[1, 1, 0, 0], [0, 0, 1, 1]]


def test_finalize_without_weights_sums_k_rows(npu: EmulatedNpu) -> None:
    rows = torch.arange(12.0).view(6, 2)
    places = torch.arange(6, dtype=torch.int32)
    out = npu.npu_moe_finalize_routing(
        rows, None, None, None, None, places, None, drop_pad_mode=2, k=3
    )
    assert out.tolist() == [[6, 9], [24, 27]]


def test_finalize_rounds_once(npu: EmulatedNpu) -> None:
    """One and twice half of its last digit."""
    rows = torch.tensor([[1.0], [2.0**-8], [2.0**-8]], dtype=torch.bfloat16)
    places = torch.arange(3, dtype=torch.int32)
    weights = torch.ones(1, 3, dtype=torch.bfloat16)
    out = npu.npu_moe_finalize_routing(
        rows, None, None, None, weights, places, None, drop_pad_mode=2
    )
    # Rounding after each addition would stay at 1: a half goes to the even neighbour.
    assert out.item() == 1 + 2.0**-7


@pytest.mark.parametrize("mode", [0, 2])
@pytest.mark.parametrize("generation", Generation)
def test_a_missing_row_without_padding(generation: Generation, mode: int) -> None:
    """A5 leaves it out; A2 and A3 add whatever the buffer holds, which must not go unnoticed."""
    places = torch.tensor([0, -1], dtype=torch.int32)
    out = install(generation).npu_moe_finalize_routing(
        torch.ones(2, 3), None, None, None, torch.ones(2, 1), places, None, drop_pad_mode=mode
    )
    assert out[0].tolist() == [1, 1, 1]
    assert torch.equal(out[1], torch.zeros(3)) if generation == "A5" else out[1].isnan().all()


@pytest.mark.parametrize(
    ("rows", "weights", "accepted"),
    [
        (torch.bfloat16, torch.bfloat16, {"A2", "A3", "A5"}),
        (torch.bfloat16, torch.float32, {"A2", "A3", "A5"}),
        (torch.float16, torch.float32, {"A5"}),
        (torch.float32, torch.bfloat16, {"A5"}),
    ],
)
def test_dtypes_of_weights(
    npu: EmulatedNpu, rows: torch.dtype, weights: torch.dtype, accepted: set[str]
) -> None:
    def call() -> torch.Tensor:
        return npu.npu_moe_finalize_routing(
            torch.ones(2, 3, dtype=rows),
            None,
            None,
            None,
            torch.ones(2, 1, dtype=weights),
            torch.arange(2, dtype=torch.int32),
            None,
        )

    if npu.chip.generation in accepted:
        assert call().dtype == rows
    else:
        with pytest.raises(RuntimeError, match=r"scalesOptional DT_\w+ does not go with expandedX"):
            call()


INT = torch.zeros(2, 1, dtype=torch.int32)


@pytest.mark.parametrize(
    ("x", "row_idx", "expert_idx", "active_num", "reason"),
    [
        (torch.ones(2), INT, INT, 1, "The x should be 2D"),
        (INT.char(), INT, INT, 1, "dtype: torch.int8"),
        (torch.ones(2, 3), INT, INT.long(), 1, r"int32 tensor expected.*torch.int64"),
        (torch.ones(2, 3), INT.flatten(), INT, 1, "The row_idx should be 2D"),
        (torch.ones(2, 3), INT, INT, -1, "non-negative"),
        (torch.ones(3, 3), INT, INT, 1, "Input rows should be same"),
        (torch.ones(2, 3), INT.T, INT, 1, "shape of expert_idx and row_idx"),
    ],
)
def test_refusals_of_the_first_generation(
    npu: EmulatedNpu,
    x: torch.Tensor,
    row_idx: torch.Tensor,
    expert_idx: torch.Tensor,
    active_num: int,
    reason: str,
) -> None:
    with pytest.raises(RuntimeError, match=rf"emulated Ascend {npu.chip.generation}: .*{reason}"):
        npu.npu_moe_init_routing(x, row_idx, expert_idx, active_num)


@pytest.mark.parametrize(
    ("experts", "count", "reason"),
    [
        (INT.flatten().long(), 2, "DT_INT32, got DT_INT64"),
        (INT, 2, "should be 1D"),
        (INT.flatten(), 2049, "2049 should be in"),
    ],
)
def test_refusals_of_the_ends(
    npu: EmulatedNpu, experts: torch.Tensor, count: int, reason: str
) -> None:
    with pytest.raises(RuntimeError, match=reason):
        npu.npu_moe_compute_expert_tokens(experts, count)


FLAT = torch.arange(2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"drop_pad_mode": 4}, "dropPadMode 4"),
        ({"drop_pad_mode": 1}, "should be 3D"),
        ({"expanded_permuted_rows": INT.char()}, "cannot be DT_INT8"),
        ({"expanded_src_to_dst_row": FLAT.long()}, "DT_INT32 and 1D, got DT_INT64"),
        ({"expanded_src_to_dst_row": torch.arange(3, dtype=torch.int32), "k": 2}, "multiple of K"),
        ({"skip2": torch.ones(2, 3)}, "without x1Optional"),
        ({"skip1": torch.ones(2, 2)}, "the shape of out"),
        ({"skip1": torch.ones(2, 3, dtype=torch.float16)}, "the dtype of expandedX"),
        ({"bias": torch.ones(1, 3)}, "biasOptional needs expertIdxOptional"),
        ({"bias": torch.ones(1, 3).half()}, "bias should have the dtype"),
        ({"export_for_source_row": INT.long()}, "expertIdxOptional should be DT_INT32"),
        ({"scales": torch.ones(3, 1)}, r"\(NUM_ROWS, K\)"),
    ],
)
def test_refusals_of_finalize(npu: EmulatedNpu, changed: dict[str, object], reason: str) -> None:
    arguments = {
        "expanded_permuted_rows": torch.ones(2, 3),
        "skip1": None,
        "skip2": None,
        "bias": None,
        "scales": None,
        "expanded_src_to_dst_row": FLAT,
        "export_for_source_row": None,
    }
    with pytest.raises(RuntimeError, match=reason):
        npu.npu_moe_finalize_routing(**(arguments | changed))
