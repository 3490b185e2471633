"""Experts and weights from router scores, against the published definition in float64."""

from __future__ import annotations

from dataclasses import dataclass
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


@dataclass(frozen=True)
class Choice:
    """Arguments of one call, with logits whose order no rounding can change."""

    logits: np.ndarray
    bias: np.ndarray | None
    k: int
    k_group: int
    group_count: int
    group_select_mode: int
    norm_type: int
    renorm: int
    routed_scaling_factor: float

    def normalised(self) -> np.ndarray:
        x = self.logits.astype(np.float64)
        if self.norm_type == 0:
            exponents = np.exp(x - x.max(1, keepdims=True))
            return exponents / exponents.sum(1, keepdims=True)
        if self.norm_type == 1:
            return 1 / (1 + np.exp(-x))
        return np.sqrt(np.log1p(np.exp(x)))

    def expected(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        weights = self.normalised()
        chosen = np.array(
            [self._choose(row if self.bias is None else row + self.bias) for row in weights]
        )
        kept = np.take_along_axis(weights, chosen, 1)
        if self.norm_type != 0 or self.renorm == 1:
            kept = kept / kept.sum(1, keepdims=True)
        return kept * self.routed_scaling_factor, chosen, weights

    def _choose(self, scores: np.ndarray) -> list[int]:
        groups = scores.reshape(self.group_count, -1)
        best = 1 if self.group_select_mode == 0 else 2
        score = [np.sort(group)[-best:].sum() for group in groups]
        taken = sorted(range(self.group_count), key=lambda group: -score[group])[: self.k_group]
        size = groups.shape[1]
        open_ = [expert for expert in range(len(scores)) if expert // size in taken]
        return sorted(open_, key=lambda expert: -scores[expert])[: self.k]


@st.composite
def choices(draw: st.DrawFn) -> Choice:
    group_count, size = draw(st.integers(1, 3)), draw(st.integers(3, 5))
    k_group = draw(st.integers(1, group_count))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    experts = group_count * size
    # No two logits are close, and no two cancel in a sum of sigmoids: rounding changes no order.
    logits = np.array([rng.permutation(experts) for _ in range(3)]) / 4 - 0.9
    bias = rng.permutation(experts) * 2.0 if draw(st.booleans()) else None
    return Choice(
        logits=logits.astype(np.float32),
        bias=bias,
        k=draw(st.integers(1, k_group * size)),
        k_group=k_group,
        group_count=group_count,
        group_select_mode=draw(st.sampled_from([0, 1])),
        norm_type=draw(st.sampled_from([0, 1, 2])),
        renorm=draw(st.sampled_from([0, 1])),
        routed_scaling_factor=draw(st.sampled_from([1.0, 2.5])),
    )


@settings(max_examples=80, deadline=None)
@given(choices())
def test_chosen_experts_and_their_weights(choice: Choice) -> None:
    weights, experts, everything = install(
        "A5" if choice.norm_type == 2 else "A2"
    ).npu_moe_gating_top_k(
        torch.from_numpy(choice.logits),
        choice.k,
        bias=None if choice.bias is None else torch.from_numpy(choice.bias).float(),
        k_group=choice.k_group,
        group_count=choice.group_count,
        group_select_mode=choice.group_select_mode,
        norm_type=choice.norm_type,
        renorm=choice.renorm,
        routed_scaling_factor=choice.routed_scaling_factor,
        out_flag=True,
    )
    expected = choice.expected()
    np.testing.assert_array_equal(experts, expected[1])
    np.testing.assert_allclose(weights, expected[0], rtol=1e-5)
    np.testing.assert_allclose(everything, expected[2], rtol=1e-5)
    assert (weights.dtype, experts.dtype) == (torch.float32, torch.int32)


def test_of_equal_scores_the_lower_expert_comes_first(npu: EmulatedNpu) -> None:
    x = torch.zeros(1, 12, dtype=torch.bfloat16)
    weights, experts, everything = npu.npu_moe_gating_top_k(
        x, 4, k_group=2, group_count=4, norm_type=1
    )
    assert experts.tolist() == [[0, 1, 2, 3]]
    assert weights.tolist() == [[0.25] * 4]
    assert weights.dtype == torch.bfloat16
    assert everything.isnan().all(), "it was not asked for"
    assert npu.npu_moe_gating_top_k_softmax(x, None, 3)[1].tolist() == [[0, 1, 2]]


def test_softmax_weights_do_not_sum_to_one_unless_asked(npu: EmulatedNpu) -> None:
    x = torch.zeros(1, 4)
    assert npu.npu_moe_gating_top_k(x, 2)[0].tolist() == [[0.25, 0.25]]
    assert npu.npu_moe_gating_top_k(x, 2, renorm=1)[0].tolist() == [[0.5, 0.5]]


def test_a_bias_chooses_and_is_not_part_of_the_weights(npu: EmulatedNpu) -> None:
    bias = torch.tensor([0.0, 0.0, 5.0])
    weights, experts, _ = npu.npu_moe_gating_top_k(torch.zeros(1, 3), 1, bias=bias)
    assert experts.tolist() == [[2]]
    torch.testing.assert_close(weights, torch.tensor([[1 / 3]]))


def test_experts_from_a_table_of_tokens(npu: EmulatedNpu) -> None:
    x = torch.tensor([[1.0, 2.0, 3.0], [1.0, 1.0, 1.0]])
    table = torch.tensor([[2, 0], [1, 2], [0, 1]], dtype=torch.int32)
    weights, experts, _ = npu.npu_moe_gating_top_k(
        x, 2, input_ids=torch.tensor([2, 0]), tid2eid=table, norm_type=1
    )
    assert experts.tolist() == [[0, 1], [2, 0]]
    sigmoid = 1 / (1 + np.exp(-x.numpy()))
    kept = np.take_along_axis(sigmoid, experts.numpy().astype(np.int64), 1)
    np.testing.assert_allclose(weights, kept / kept.sum(1, keepdims=True), rtol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.data())
def test_softmax_with_numbers_of_the_copies(tokens: int, experts: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, experts))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    logits = np.array([rng.permutation(experts) for _ in range(tokens)]) / 4
    finished = rng.random(tokens) < 0.3
    weights, chosen, copies = install().npu_moe_gating_top_k_softmax(
        torch.from_numpy(logits.astype(np.float32)), torch.from_numpy(finished), k
    )
    exponents = np.exp(logits)
    best = np.argsort(-logits, axis=1)[:, :k]
    kept = np.take_along_axis(exponents / exponents.sum(1, keepdims=True), best, 1)
    np.testing.assert_allclose(weights, kept, rtol=1e-5)
    np.testing.assert_array_equal(chosen, np.where(finished[:, None], experts, best))
    np.testing.assert_array_equal(copies, np.arange(tokens * k).reshape(k, tokens).T)


def test_three_axes(npu: EmulatedNpu) -> None:
    x = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    weights, experts, copies = npu.npu_moe_gating_top_k_softmax(x, None, 2)
    flat = npu.npu_moe_gating_top_k_softmax(x.flatten(0, 1), None, 2)
    for found, expected in zip((weights, experts, copies), flat, strict=True):
        assert torch.equal(found, expected.view(2, 3, 2))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"x": torch.ones(3)}, "The x should be 2D"),
        ({"x": torch.ones(2, 4).long()}, "dtype: torch.int64"),
        ({"x": torch.ones(1, 2049)}, "at most 2048"),
        ({"k": 0}, r"k 0 should be in \[1, 4\]"),
        ({"k": 5}, r"k 5 should be in \[1, 4\]"),
        ({"bias": torch.ones(4).half()}, "dtype of x and bias should be same"),
        ({"bias": torch.ones(4, 1)}, "The bias should be 1D"),
        ({"bias": torch.ones(3)}, "bias first dim should be same as x second dim"),
        ({"norm_type": 3}, "norm_type 3"),
        ({"renorm": 2}, "renorm 2"),
        ({"group_count": 0}, "group_count 0"),
        ({"k_group": 2}, r"k_group 2 should be in \[1, 1\]"),
        ({"group_select_mode": 2}, "group_select_mode 2"),
        ({"group_count": 3}, "4 must be divisible by group_count"),
        ({"group_count": 2}, "2 should be greater than 2"),
        ({"x": torch.ones(1, 396), "group_count": 132}, "group_expert_count_align 4224"),
        ({"x": torch.ones(1, 8), "group_count": 2, "k": 5}, "k_group"),
        ({"input_ids": torch.zeros(2).int()}, "both provided"),
        (
            {"input_ids": torch.zeros(2), "tid2eid": torch.zeros(1, 2).int()},
            "int64 tensor expected for input_ids, got DT_FLOAT",
        ),
        (
            {"input_ids": torch.zeros(3).int(), "tid2eid": torch.zeros(1, 2).int()},
            "input_ids first dim",
        ),
        (
            {"input_ids": torch.zeros(2).int(), "tid2eid": torch.zeros(1, 3).int()},
            "tid2eid second dim should be same as k",
        ),
    ],
)
def test_refusals(npu: EmulatedNpu, changed: dict[str, Any], reason: str) -> None:
    with pytest.raises(RuntimeError, match=reason):
        npu.npu_moe_gating_top_k(**({"x": torch.ones(2, 4), "k": 2} | changed))


@pytest.mark.parametrize("generation", [Generation.A2, Generation.A3])
def test_the_root_of_softplus_is_of_the_newest_only(generation: Generation) -> None:
    with pytest.raises(RuntimeError, match=r"norm_type 2 should be in \(0, 1\)"):
        install(generation).npu_moe_gating_top_k(torch.ones(2, 4), 2, norm_type=2)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((torch.ones(3), None, 1), "2D or 3D"),
        ((torch.ones(2, 3).int(), None, 1), "dtype: torch.int32"),
        ((torch.ones(2, 3), None, 4), r"k should be in \[0, 3\]"),
        ((torch.ones(1, 1100), None, 1025), "at most 1024"),
        ((torch.ones(2, 3), torch.zeros(2), 1), "bool tensor expected"),
        ((torch.ones(2, 3), torch.zeros(3).bool(), 1), "Input rows should be same"),
    ],
)
def test_refusals_of_softmax(npu: EmulatedNpu, arguments: tuple[Any, ...], reason: str) -> None:
    with pytest.raises(RuntimeError, match=reason):
        npu.npu_moe_gating_top_k_softmax(*arguments)
