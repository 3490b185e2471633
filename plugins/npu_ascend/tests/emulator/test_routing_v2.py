"""Rows to experts, the second generation: ranges, both indices, all numbers, and quantised rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mortise_npu_ascend.emulator import EmulatedNpu, Generation, install

OLDER = (Generation.A2, Generation.A3)
UNWRITTEN = np.iinfo(np.int32).min


@dataclass(frozen=True)
class Routing:
    """Experts of tokens; of them those in ``[start, end)`` are this rank's."""

    expert_idx: torch.Tensor
    experts: int
    start: int
    end: int

    @property
    def arguments(self) -> dict[str, Any]:
        return {
            "expert_idx": self.expert_idx,
            "expert_num": self.experts,
            "active_expert_range": [self.start, self.end],
        }

    def active(self) -> list[tuple[int, int]]:
        """(expert, number of the copy), as the manual orders them."""
        copies = enumerate(self.expert_idx.flatten().tolist())
        active = [(expert, copy) for copy, expert in copies if self.start <= expert < self.end]
        return sorted(active, key=lambda pair: pair[0])

    def counts(self) -> np.ndarray:
        experts = np.array([expert for expert, _ in self.active()], dtype=np.int64)
        return np.bincount(experts - self.start, minlength=self.end - self.start)


@st.composite
def routings(draw: st.DrawFn) -> Routing:
    experts = draw(st.integers(1, 6))
    top_k = draw(st.integers(1, experts))
    row = st.permutations(range(experts)).map(lambda order: order[:top_k])
    rows = draw(st.lists(row, min_size=1, max_size=6))
    start = draw(st.integers(0, experts - 1))
    end = draw(st.integers(start + 1, experts))
    return Routing(torch.tensor(rows, dtype=torch.int32), experts, start, end)


def rows_of(routing: Routing, hidden: int = 4, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(routing.expert_idx.shape[0], hidden, generator=generator)


FIXED = Routing(torch.tensor([[3, 0], [1, 2], [2, 1], [0, 2]], dtype=torch.int32), 4, 1, 3)


@pytest.fixture(params=Generation)
def npu(request: pytest.FixtureRequest) -> EmulatedNpu:
    return install(request.param)


@settings(max_examples=60, deadline=None)
@given(routings(), st.sampled_from(Generation))
def test_rows_and_both_indices(routing: Routing, generation: Generation) -> None:
    npu, x = install(generation), rows_of(routing)
    top_k, active = routing.expert_idx.shape[1], routing.active()
    asked = routing.arguments | {"expert_tokens_num_flag": True}
    rows, gather, *_ = npu.npu_moe_init_routing_v2(x, **asked)
    same, scatter, *_ = npu.npu_moe_init_routing_v2(x, **asked, row_idx_type=1)
    torch.testing.assert_close(rows, same, equal_nan=True)
    expected = np.full((routing.expert_idx.numel(), 4), np.nan, dtype=np.float32)
    places = np.full(routing.expert_idx.numel(), -1)
    copies = np.full(routing.expert_idx.numel(), UNWRITTEN)
    for place, (_, copy) in enumerate(active):
        expected[place] = x[copy // top_k].numpy()
        places[copy] = place
        copies[place] = copy
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_array_equal(gather, places)
    np.testing.assert_array_equal(scatter, copies)
    assert gather.dtype == scatter.dtype == torch.int32
    # One index is the inverse of the other, where either has a value.
    assert all(scatter[gather[copy]] == copy for _, copy in active)


@settings(max_examples=40, deadline=None)
@given(routings())
def test_numbers_of_rows(routing: Routing) -> None:
    npu, x, counts = install(), rows_of(routing), routing.counts()

    def numbers(kind: int) -> np.ndarray:
        asked = {"expert_tokens_num_flag": True, "expert_tokens_num_type": kind}
        found = npu.npu_moe_init_routing_v2(x, **routing.arguments, **asked)[2]
        assert found.dtype == torch.int64
        return found.numpy()

    np.testing.assert_array_equal(numbers(0), np.cumsum(counts))
    np.testing.assert_array_equal(numbers(1), counts)
    pairs = [(routing.start + i, count) for i, count in enumerate(counts) if count]
    pairs += [(0, 0)] * (routing.experts - len(pairs))
    np.testing.assert_array_equal(numbers(2), pairs)


@settings(max_examples=30, deadline=None)
@given(routings())
def test_both_generations_of_the_operator_agree(routing: Routing) -> None:
    """On all experts: the same rows; the index of one, column by column, is that of the other."""
    npu, x = install(), rows_of(routing)
    tokens, top_k = routing.expert_idx.shape
    numbers = torch.arange(tokens * top_k, dtype=torch.int32).view(top_k, tokens).T.contiguous()
    first, by_column, _ = npu.npu_moe_init_routing(x, numbers, routing.expert_idx, tokens)
    second, by_row, *_ = npu.npu_moe_init_routing_v2(
        x, routing.expert_idx, expert_num=routing.experts
    )
    assert torch.equal(first, second)
    assert torch.equal(by_column.view(top_k, tokens).T, by_row.view(tokens, top_k))


@settings(max_examples=40, deadline=None)
@given(routings(), st.booleans(), st.integers(1, 127))
def test_dynamic_int8(routing: Routing, smooth: bool, seed: int) -> None:
    npu, x = install(), rows_of(routing, hidden=8, seed=seed)
    x[0] = 0
    width = routing.end - routing.start
    scale = np.linspace(0.5, 2, width * 8, dtype=np.float32).reshape(width, 8)
    rows, _, _, scales = npu.npu_moe_init_routing_v2(
        x, **routing.arguments, quant_mode=1, scale=torch.from_numpy(scale) if smooth else None
    )
    assert (rows.dtype, scales.dtype) == (torch.int8, torch.float32)
    for place, (expert, copy) in enumerate(routing.active()):
        row = x[copy // routing.expert_idx.shape[1]].numpy()
        row = row * scale[expert - routing.start] if smooth else row
        amax = np.abs(row).max()
        expected = np.rint(row.astype(np.float64) / (amax / 127)) if amax else np.zeros(8)
        # The division is done in float32: a quotient near a half may round the other way.
        assert np.abs(rows[place].numpy() - expected).max() <= 1
        np.testing.assert_allclose(scales[place], amax / 127, rtol=1e-6)
    beyond = len(routing.active())
    assert scales[beyond:].isnan().all()
    assert (rows[beyond:] == -128).all()


def test_dynamic_int8_rounds_halves_to_even_and_leaves_zero_rows_zero(npu: EmulatedNpu) -> None:
    """With a largest value of 127 the scale is 1 and the rows are their own quotients."""
    x = torch.tensor([[127, 0.5, 1.5, 2.5, -0.5, -1.5], [0] * 6], dtype=torch.bfloat16)
    rows, _, _, scales = npu.npu_moe_init_routing_v2(
        x,
        torch.zeros(2, 1, dtype=torch.int32),
        expert_num=1,
        quant_mode=1,
        expert_tokens_num_flag=True,
    )
    assert rows.tolist() == [[127, 0, 2, 2, 0, -2], [0] * 6]
    assert scales.tolist() == [1, 0]


def test_static_int8(npu: EmulatedNpu) -> None:
    x = torch.tensor([[0.25, -0.75, 100.0, -100.0]])
    rows, _, _, scales = npu.npu_moe_init_routing_v2(
        x,
        torch.zeros(1, 1, dtype=torch.int32),
        expert_num=1,
        quant_mode=0,
        scale=torch.tensor([2.0]),
        offset=torch.tensor([1.0]),
        expert_tokens_num_flag=True,
    )
    # 1.5 and -0.5 are halfway; the others saturate.
    assert rows.tolist() == [[2, 0, 127, -128]]
    assert scales.isnan().all()


def test_scales_of_quantised_rows_move_with_them(npu: EmulatedNpu) -> None:
    """How rows that were quantised before keep their scales."""
    x = torch.arange(16, dtype=torch.int8).view(4, 4)
    scale = torch.tensor([1.0, 2.0, 3.0, 4.0])
    rows, _, _, scales = npu.npu_moe_init_routing_v2(
        x, **FIXED.arguments, scale=scale, expert_tokens_num_flag=True
    )
    tokens = [copy // 2 for _, copy in FIXED.active()]
    assert tokens == [1, 2, 1, 2, 3]
    assert torch.equal(rows[:5], x[tokens])
    assert scales[:5].tolist() == [2, 3, 2, 3, 4]
    assert scales[5:].isnan().all()


def test_fewer_rows_than_copies_are_wanted() -> None:
    x = rows_of(FIXED)
    for generation in OLDER:
        rows, gather, counts, scales = install(generation).npu_moe_init_routing_v2(
            x, **FIXED.arguments, active_num=3, expert_tokens_num_flag=True
        )
        assert torch.equal(rows, x[[1, 2, 1]])
        assert scales.shape == (3,)
        # The index and the numbers still speak of all rows.
        assert (gather >= 0).sum() == counts[-1] == 5


@settings(max_examples=40, deadline=None)
@given(routings(), st.data())
def test_padded_experts(routing: Routing, data: st.DataObject) -> None:
    x = rows_of(routing)
    tokens, top_k = routing.expert_idx.shape
    capacity = data.draw(st.integers(1, tokens))
    everything = Routing(routing.expert_idx, routing.experts, 0, routing.experts)
    rows, places, counts, _ = install().npu_moe_init_routing_v2(
        x,
        **everything.arguments,
        drop_pad_mode=1,
        expert_capacity=capacity,
        expert_tokens_num_type=1,
        expert_tokens_num_flag=True,
    )
    expected = np.zeros((routing.experts, capacity, 4), dtype=np.float32)
    where = np.full(tokens * top_k, -1)
    filled = [0] * routing.experts
    for expert, copy in everything.active():
        if filled[expert] < capacity:
            expected[expert, filled[expert]] = x[copy // top_k].numpy()
            where[copy] = expert * capacity + filled[expert]
            filled[expert] += 1
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_array_equal(places, where)
    np.testing.assert_array_equal(counts, everything.counts())
    ones = torch.ones(tokens, top_k)
    out = install().npu_moe_finalize_routing(
        rows, None, None, None, ones, places, None, drop_pad_mode=3
    )
    kept = (where >= 0).reshape(tokens, top_k).sum(1, keepdims=True)
    np.testing.assert_allclose(out, x.numpy() * kept, rtol=1e-5, atol=1e-6)


def test_int4_two_a_byte_on_the_newest() -> None:
    x = torch.tensor([[7.0, -7.0, 0.5, 1.5, -1.0, 3.0], [0.0] * 6])
    npu = install("A5")
    rows, _, _, scales = npu.npu_moe_init_routing_v2(
        x,
        torch.zeros(2, 1, dtype=torch.int32),
        expert_num=1,
        quant_mode=13,
        x_dtype=npu.int4,
        expert_tokens_num_flag=True,
    )
    # 7, -7 | 0, 2 | -1, 3: the first of two in the lower four bits, two's complement.
    assert rows.dtype == torch.uint8
    assert rows.tolist() == [[0x97, 0x20, 0x3F], [0, 0, 0]]
    assert scales.tolist() == [1, 0]


def test_int4_asked_for_in_the_wrong_mode(npu: EmulatedNpu) -> None:
    with pytest.raises(RuntimeError, match="quant_mode=1 only supports INT8 dynamic quantization"):
        npu.npu_moe_init_routing_v2(
            rows_of(FIXED), **FIXED.arguments, quant_mode=1, x_dtype=npu.int4
        )


def test_nothing_asked_is_nothing_written() -> None:
    _, _, numbers, scales = install().npu_moe_init_routing_v2(rows_of(FIXED), **FIXED.arguments)
    assert (numbers == torch.iinfo(torch.int64).min).all()
    assert scales.isnan().all()


def test_no_tokens() -> None:
    rows, index, numbers, scales = install().npu_moe_init_routing_v2(
        torch.ones(0, 4), torch.zeros(0, 2, dtype=torch.int32), expert_num=3
    )
    assert (rows.shape, index.shape, scales.shape) == ((0, 4), (0,), (0,))
    assert numbers.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"active_num": 3}, r"active_num 3 should be bs\*k\(8\)"),
        ({"expert_tokens_num_flag": False}, "expert_tokens_num_flag False should be True"),
        ({"quant_mode": 3}, "quant_mode 3 .* not emulated"),
        (
            {
                "drop_pad_mode": 1,
                "expert_capacity": 2,
                "quant_mode": 1,
                "active_expert_range": [],
                "expert_tokens_num_type": 1,
            },
            "quant_mode 1 should be -1 when drop_pad_mode is 1",
        ),
        ({"quant_mode": 13, "offset": torch.ones(1)}, "does not support offset"),
        ({"quant_mode": 13, "x_dtype": 1}, "must be torch_npu.int4 or None"),
        ({"quant_mode": 13, "x": torch.ones(4, 3)}, "hidden size of x to be even"),
        ({"quant_mode": 13, "x": torch.ones(4, 4).half()}, "DT_FLOAT16 unsupported"),
        ({"quant_mode": 13, "drop_pad_mode": 1}, "only supports drop_pad_mode=0"),
        ({"quant_mode": 13, "scale": torch.ones(2, 4)}, r"shape of scale \(2, 4\)"),
    ],
)
def test_refusals_of_the_newest(changed: dict[str, Any], reason: str) -> None:
    arguments = {"x": rows_of(FIXED), **FIXED.arguments, "expert_tokens_num_flag": True}
    with pytest.raises(RuntimeError, match=rf"Ascend A5: .*{reason}"):
        install("A5").npu_moe_init_routing_v2(**(arguments | changed))


@pytest.mark.parametrize("generation", OLDER)
@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"x": torch.ones(4)}, "The x should be 2-Dimension, current is 1"),
        ({"expert_idx": torch.zeros(4).int()}, "The expert_idx should be 2-Dimension"),
        ({"expert_idx": torch.zeros(4, 2).long()}, "expert_idx should be DT_INT32, got DT_INT64"),
        ({"x": torch.ones(3, 4)}, "first dim of expert_idx and x should be the same"),
        ({"active_num": -2}, "active_num -2 should be at least -1"),
        ({"quant_mode": 13}, r"quant_mode 13 should be in \[-1, 0, 1\]$"),
        ({"quant_mode": 1, "x": torch.ones(4, 4).char()}, "DT_INT8 unsupported under quant_mode 1"),
        ({"expert_num": 0}, "expert_num 0"),
        ({"expert_num": 6000, "expert_tokens_num_type": 2}, r"should be in \[1, 5120\]"),
        ({"active_expert_range": [2, 2]}, "expert_start should be less than expert_end"),
        ({"active_expert_range": [-1, 2]}, "expert_start -1"),
        ({"active_expert_range": [0, 5]}, r"expert_end 5 should be at most expert_num\(4\)"),
        ({"active_expert_range": [1, 2, 3]}, "should be 2, current is 3"),
        ({"expert_tokens_num_type": 3}, "expert_tokens_num_type 3"),
        ({"row_idx_type": 2}, "row_idx_type 2"),
        ({"drop_pad_mode": 2}, "drop_pad_mode 2"),
        ({"drop_pad_mode": 1}, "expert_capacity -1"),
        ({"drop_pad_mode": 1, "expert_capacity": 2}, r"should be \[0, expert_num\]"),
        ({"drop_pad_mode": 1, "expert_capacity": 2, "row_idx_type": 1}, "row_idx_type should be 0"),
        ({"scale": torch.ones(3)}, r"shape of scale \(3,\)"),
        ({"scale": torch.ones(4).half()}, "scale should be DT_FLOAT, got DT_FLOAT16"),
        ({"offset": torch.ones(1)}, "offset is not taken"),
        ({"quant_mode": 0, "scale": torch.ones(1)}, "offset is required"),
        ({"quant_mode": 0, "scale": torch.ones(2), "offset": torch.ones(1)}, "scale should be 1"),
        ({"quant_mode": 1, "scale": torch.ones(3, 4)}, r"shape of scale \(3, 4\)"),
        ({"x_dtype": 290}, "x_dtype 290 is not emulated"),
    ],
)
def test_refusals_of_the_older(
    generation: Generation, changed: dict[str, Any], reason: str
) -> None:
    arguments = {"x": rows_of(FIXED), **FIXED.arguments}
    with pytest.raises(RuntimeError, match=reason):
        install(generation).npu_moe_init_routing_v2(**(arguments | changed))
