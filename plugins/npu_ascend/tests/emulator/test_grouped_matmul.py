"""Grouped products that are not quantised: group lists, lists of tensors, and what is unwritten."""

from __future__ import annotations

from itertools import accumulate, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fixtures.ascend_numbers import numpy_of

from mortise_npu_ascend.emulator import EmulatedNpu, Generation, install

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.fixture(params=Generation)
def npu(request: pytest.FixtureRequest) -> EmulatedNpu:
    return install(request.param)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def by_definition(
    x: torch.Tensor, weight: torch.Tensor, counts: list[int], bias: torch.Tensor | None = None
) -> np.ndarray:
    """x_i @ w_i + b_i for each group i of consecutive rows, in float64."""
    ends = [0, *accumulate(counts)]
    rows, weights = numpy_of(x).astype(np.float64), numpy_of(weight).astype(np.float64)
    parts = [
        rows[start:end] @ weights[e] + (0 if bias is None else numpy_of(bias)[e])
        for e, (start, end) in enumerate(pairwise(ends))
    ]
    return np.concatenate(parts)


def ends_of(counts: list[int]) -> torch.Tensor:
    return torch.tensor(counts).cumsum(0)


counts_of_experts = st.lists(st.integers(0, 4), min_size=1, max_size=5)


@settings(max_examples=40, deadline=None)
@given(counts_of_experts, st.integers(0, 3), st.sampled_from(FLOATS), st.sampled_from(Generation))
def test_every_expert_multiplies_its_rows(
    counts: list[int], trailing: int, dtype: torch.dtype, generation: Generation
) -> None:
    """Empty experts, one expert, no rows at all, and rows behind the last group."""
    x = normal(sum(counts) + trailing, 12, dtype=dtype)
    weight = normal(len(counts), 12, 8, dtype=dtype, seed=1)
    (result,) = install(generation).npu_grouped_matmul(
        [x], [weight], group_list=ends_of(counts), split_item=3, group_type=0
    )
    assert (result.dtype, result.shape) == (dtype, (len(x), 8))
    written = numpy_of(result[: sum(counts)])
    expected = by_definition(x, weight, counts)
    np.testing.assert_allclose(written, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert result[sum(counts) :].isnan().all()


@settings(max_examples=30, deadline=None)
@given(counts_of_experts)
def test_the_three_kinds_of_lists_agree(counts: list[int]) -> None:
    npu = install()
    x, weight = normal(sum(counts), 4), normal(len(counts), 4, 8, seed=1)
    pairs = sorted(enumerate(counts), key=lambda pair: pair[1] == 0)
    results = [
        npu.npu_grouped_matmul(
            [x], [weight], group_list=group_list, split_item=2, group_type=0, group_list_type=kind
        )[0]
        for kind, group_list in enumerate(
            (ends_of(counts), torch.tensor(counts), torch.tensor(pairs))
        )
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_pairs_name_the_expert() -> None:
    """The second expert's rows may come first."""
    x, weight = normal(3, 4), normal(3, 4, 8, seed=1)
    (result,) = install().npu_grouped_matmul(
        [x],
        [weight],
        group_list=torch.tensor([[2, 1], [0, 2], [1, 0]]),
        split_item=2,
        group_type=0,
        group_list_type=2,
    )
    torch.testing.assert_close(result[:1], x[:1] @ weight[2])
    torch.testing.assert_close(result[1:], x[1:] @ weight[0])


def test_one_expert_has_all_rows(npu: EmulatedNpu) -> None:
    x, weight = normal(6, 4), normal(3, 4, 8, seed=1)
    (result,) = npu.npu_grouped_matmul(
        [x], [weight], group_list=torch.tensor([0, 6, 6]), split_item=2, group_type=0
    )
    torch.testing.assert_close(result, x @ weight[1])


def test_a_transposed_weight_is_known_by_its_strides(npu: EmulatedNpu) -> None:
    x, stored = normal(4, 6), normal(2, 8, 6, seed=1)
    (result,) = npu.npu_grouped_matmul(
        [x], [stored.mT], group_list=torch.tensor([2, 4]), split_item=2, group_type=0
    )
    np.testing.assert_allclose(result, by_definition(x, stored.mT, [2, 2]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "bias_dtype"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float16),
        (torch.float32, torch.float32),
    ],
)
def test_a_bias_of_each_expert(
    npu: EmulatedNpu, dtype: torch.dtype, bias_dtype: torch.dtype
) -> None:
    x, weight = normal(4, 6, dtype=dtype), normal(2, 6, 8, dtype=dtype, seed=1)
    bias = normal(2, 8, dtype=bias_dtype, seed=2)
    (result,) = npu.npu_grouped_matmul(
        [x], [weight], bias=[bias], group_list=torch.tensor([1, 4]), split_item=2, group_type=0
    )
    expected = by_definition(x, weight, [1, 3], bias)
    np.testing.assert_allclose(
        numpy_of(result), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
    )


def test_the_sum_is_rounded_once() -> None:
    """256 + 1 is no bf16; were partial sums bf16, the 1s would all be lost."""
    x = torch.tensor([[256.0] + [1.0] * 15], dtype=torch.bfloat16)
    weight = torch.ones(1, 16, 8, dtype=torch.bfloat16)
    (result,) = install().npu_grouped_matmul(
        [x], [weight], group_list=torch.tensor([1]), split_item=2, group_type=0
    )
    assert result.tolist() == [[272.0] * 8]  # 271 lies between 270 and 272; the tie is even


def test_a_list_of_weights_for_one_row_tensor(npu: EmulatedNpu) -> None:
    x, weights = normal(5, 4), [normal(4, 8, seed=seed) for seed in (1, 2)]
    (result,) = npu.npu_grouped_matmul(
        [x], weights, group_list=torch.tensor([2, 4]), split_item=2, group_type=0
    )
    np.testing.assert_allclose(
        result[:4], by_definition(x, torch.stack(weights), [2, 2]), rtol=1e-5, atol=1e-5
    )
    assert result[4:].isnan().all()


@pytest.mark.parametrize("listed", [True, False])
def test_a_list_of_rows_for_one_result(npu: EmulatedNpu, listed: bool) -> None:
    rows, weights = [normal(2, 4), normal(3, 4, seed=3)], [normal(4, 8, seed=s) for s in (1, 2)]
    group_list = torch.tensor([2, 5]) if listed else None
    (result,) = npu.npu_grouped_matmul(
        rows, weights, group_list=group_list, split_item=2, group_type=0
    )
    expected = torch.cat([a @ b for a, b in zip(rows, weights, strict=True)])
    torch.testing.assert_close(result, expected)


def test_without_groups_every_weight_has_its_result(npu: EmulatedNpu) -> None:
    rows, weights = [normal(2, 4), normal(3, 6, seed=3)], [normal(4, 8), normal(6, 5)]
    results = npu.npu_grouped_matmul(rows, weights, split_item=0, group_type=-1)
    for result, x, weight in zip(results, rows, weights, strict=True):
        torch.testing.assert_close(result, x @ weight)


def test_groups_of_the_inner_axis(npu: EmulatedNpu) -> None:
    """Training's gradient of weights: one result for each group, zeros for an empty one."""
    x, weight = normal(7, 3).T, normal(7, 8, seed=1)
    (result,) = npu.npu_grouped_matmul(
        [x], [weight], group_list=torch.tensor([2, 2, 6]), split_item=3, group_type=2
    )
    torch.testing.assert_close(result[0], x[:, :2] @ weight[:2])
    assert not result[1].any()
    torch.testing.assert_close(result[2], x[:, 2:6] @ weight[2:6])


@pytest.mark.parametrize("split_item", [0, 3])
def test_a_list_of_numbers_is_another_overload(npu: EmulatedNpu, split_item: int) -> None:
    """It takes no ``group_type``, and gives one result or one for each weight."""
    x = normal(5, 4, dtype=torch.bfloat16)
    weights = [normal(4, 8, dtype=torch.bfloat16, seed=seed) for seed in (1, 2)]
    results = npu.npu_grouped_matmul([x], weights, group_list=[2, 5], split_item=split_item)
    assert [len(result) for result in results] == ([2, 3] if split_item == 0 else [5])
    expected = by_definition(x, torch.stack(weights), [2, 3])
    np.testing.assert_allclose(numpy_of(torch.cat(results)), expected, rtol=8e-3, atol=8e-3)


def test_a_list_of_numbers_and_no_groups() -> None:
    npu = install()
    rows = [normal(2, 4, dtype=torch.float16), normal(3, 4, dtype=torch.float16, seed=3)]
    weights = [normal(4, 8, dtype=torch.float16, seed=seed) for seed in (1, 2)]
    with npu.active():
        results = torch.ops.npu.npu_grouped_matmul.List(rows, weights, split_item=0)
    for result, x, weight in zip(results, rows, weights, strict=True):
        torch.testing.assert_close(result.float(), x.float() @ weight.float(), rtol=1e-3, atol=1e-3)


def test_tiled_weights_have_the_same_numbers() -> None:
    npu = install()
    npu.config.allow_internal_format = True
    x = normal(4, 16, dtype=torch.bfloat16)
    weight = normal(2, 16, 32, dtype=torch.bfloat16, seed=1)
    arguments = {"group_list": torch.tensor([1, 4]), "split_item": 2, "group_type": 0}
    tiled = npu.npu_format_cast(weight, npu.Format.FRACTAL_NZ)
    (plain,) = npu.npu_grouped_matmul([x], [weight], **arguments)
    (result,) = npu.npu_grouped_matmul([x], [tiled], **arguments)
    assert torch.equal(plain, result)


def test_counts_of_a_single_tiled_expert_are_a_trap() -> None:
    """The manual rules them out, and the device does not look."""
    x, weight = normal(2, 16, dtype=torch.bfloat16), normal(1, 16, 16, dtype=torch.bfloat16)
    arguments = {"group_list": torch.tensor([2]), "split_item": 2, "group_type": 0}
    for strict in (False, True):
        npu = install("A2", strict=strict)
        tiled = npu.npu_format_cast(weight, npu.Format.FRACTAL_NZ)
        if strict:
            with pytest.raises(RuntimeError, match="must not have length 1"):
                npu.npu_grouped_matmul([x], [tiled], group_list_type=1, **arguments)
        else:
            with pytest.warns(RuntimeWarning, match="must not have length 1"):
                npu.npu_grouped_matmul([x], [tiled], group_list_type=1, **arguments)
        npu.npu_grouped_matmul([x], [tiled], group_list_type=0, **arguments)
        npu.npu_grouped_matmul([x], [weight], group_list_type=1, **arguments)
