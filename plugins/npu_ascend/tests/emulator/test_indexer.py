"""The keys a query looks at, in every layout, against the published sum written out in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mortise_npu_ascend.emulator import EmulatedNpu, Generation, install

HEADS, WIDTH, BLOCK = 8, 128, 16


@pytest.fixture(params=Generation)
def npu(request: pytest.FixtureRequest) -> EmulatedNpu:
    return install(request.param)


def random(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """bfloat16 of few digits: a sum of their products is exact in float32, whatever its order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 3, shape, generator=generator).to(torch.bfloat16)


def indexed(
    query: torch.Tensor, key: torch.Tensor, weights: torch.Tensor, count: int, *, causal: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Of one sequence ``[Q, N, D]``, ``[S, D]``, ``[Q, N]``: indices and rounded scores."""
    queries, keys = query.shape[0], key.shape[0]
    products = np.einsum("qnd,sd->qns", query.double().numpy(), key.double().numpy())
    scores = np.einsum("qns,qn->qs", np.maximum(products, 0), weights.double().numpy())
    rounded = torch.from_numpy(scores).to(torch.bfloat16).double().numpy()
    indices, values = np.full((queries, count), -1), np.full((queries, count), -np.inf)
    for row in range(queries):
        last = keys - queries + row if causal else keys - 1
        seen = list(range(max(last + 1, 0)))
        best = sorted(seen, key=lambda index: -rounded[row, index])[:count]
        indices[row, : len(best)] = best
        values[row, : len(best)] = rounded[row, best]
    return indices, values


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 40)), min_size=1, max_size=3),
    st.integers(1, 48),
    st.booleans(),
    st.sampled_from(["BSND", "TND", "blocks under BSND", "blocks under TND"]),
    st.integers(0, 1000),
)
def test_every_layout(
    lengths: list[tuple[int, int]], count: int, causal: bool, layout: str, seed: int
) -> None:
    queries = [random((length, HEADS, WIDTH), seed + i) for i, (length, _) in enumerate(lengths)]
    weights = [random((length, HEADS), seed + 10 + i) for i, (length, _) in enumerate(lengths)]
    keys = [random((length, WIDTH), seed + 20 + i) for i, (_, length) in enumerate(lengths)]
    query_layout = layout.rpartition(" ")[2]
    arguments: dict[str, Any] = {
        "query": batched(queries, query_layout),
        "weights": batched(weights, query_layout),
        "layout_query": query_layout,
        "actual_seq_lengths_query": ends(queries, query_layout),
    }
    if layout.startswith("blocks"):
        blocks, table = paged(keys, seed)
        arguments |= {"key": blocks, "block_table": table, "layout_key": "PA_BSND"}
        arguments["actual_seq_lengths_key"] = ends(keys, "PA_BSND")
    else:
        arguments |= {"key": batched(keys, layout).unsqueeze(-2), "layout_key": layout}
        arguments["actual_seq_lengths_key"] = ends(keys, layout)
    found, _ = install().npu_lightning_indexer(
        **arguments, sparse_count=count, sparse_mode=3 if causal else 0
    )
    assert found.shape == (*arguments["query"].shape[:-2], 1, count)
    first = 0
    for i, (query, key, weight) in enumerate(zip(queries, keys, weights, strict=True)):
        expected, _ = indexed(query, key, weight, count, causal=causal)
        rows = slice(first, first + len(query))
        own = found[rows, 0] if query_layout == "TND" else found[i, : len(query), 0]
        np.testing.assert_array_equal(own, expected)
        if query_layout == "BSND":
            assert (found[i, len(query) :] == -1).all(), "queries of no sequence"
        first += len(query)


def batched(parts: list[torch.Tensor], layout: str) -> torch.Tensor:
    """In one tensor; queries and keys beyond a sequence are never to be looked at."""
    if layout == "TND":
        whole = torch.cat(parts)
        return torch.cat([whole, whole.new_full((1, *whole.shape[1:]), float("nan"))])
    longest = max(1, *(len(part) for part in parts))
    whole = parts[0].new_full((len(parts), longest, *parts[0].shape[1:]), float("nan"))
    for row, part in zip(whole, parts, strict=True):
        row[: len(part)] = part
    return whole


def ends(parts: list[torch.Tensor], layout: str) -> torch.Tensor:
    lengths = np.array([len(part) for part in parts])
    ends = np.cumsum(lengths) if layout == "TND" else lengths
    return torch.from_numpy(ends.astype(np.int32))


def paged(keys: list[torch.Tensor], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks in a random order, and the table that finds them."""
    width = max(1, *(-(-len(key) // BLOCK) for key in keys))
    order = np.random.default_rng(seed).permutation(width * len(keys)).reshape(len(keys), width)
    blocks = torch.full((order.size, BLOCK, 1, WIDTH), float("nan"), dtype=torch.bfloat16)
    for row, key in zip(order, keys, strict=True):
        for position, vector in enumerate(key):
            blocks[row[position // BLOCK], position % BLOCK, 0] = vector
    return blocks, torch.from_numpy(order.astype(np.int32))


def one_sequence(queries: int, keys: int) -> dict[str, Any]:
    return {
        "query": random((1, queries, HEADS, WIDTH), 1),
        "key": random((1, keys, 1, WIDTH), 2),
        "weights": random((1, queries, HEADS), 3),
    }


def test_scores_come_with_the_indices(npu: EmulatedNpu) -> None:
    arguments = one_sequence(3, 5)
    indices, values = npu.npu_lightning_indexer(**arguments, sparse_count=6, return_value=True)
    expected = indexed(
        arguments["query"][0],
        arguments["key"][0, :, 0],
        arguments["weights"][0],
        6,
        causal=True,
    )
    np.testing.assert_array_equal(indices[0, :, 0], expected[0])
    np.testing.assert_array_equal(values[0, :, 0].double(), expected[1])
    nothing = npu.npu_lightning_indexer(**arguments, sparse_count=6)[1]
    assert (nothing.shape, nothing.dtype, values.dtype) == ((0,), torch.bfloat16, torch.bfloat16)


def test_scores_that_bfloat16_cannot_tell_apart_keep_the_order_of_keys(npu: EmulatedNpu) -> None:
    query = torch.zeros(1, 1, HEADS, WIDTH, dtype=torch.bfloat16)
    query[..., 0, 0] = 1
    key = torch.zeros(1, 3, 1, WIDTH, dtype=torch.bfloat16)
    key[0, :, 0, 0] = 1
    weights = torch.zeros(1, 1, HEADS, dtype=torch.bfloat16)
    weights[..., 0] = 256
    # Adds 1 to the score of the last key only: 257 is 256 in bfloat16.
    query[..., 1, 1], key[0, 2, 0, 1], weights[..., 1] = 1, 1, 1
    indices, _ = npu.npu_lightning_indexer(query, key, weights, sparse_count=3)
    assert indices.flatten().tolist() == [0, 1, 2]


def test_there_is_no_division_and_negative_products_count_nothing(npu: EmulatedNpu) -> None:
    query = torch.ones(1, 1, HEADS, WIDTH, dtype=torch.float16)
    key = torch.stack([torch.ones(WIDTH), -torch.ones(WIDTH)]).half().view(1, 2, 1, WIDTH)
    weights = torch.ones(1, 1, HEADS, dtype=torch.float16)
    indices, values = npu.npu_lightning_indexer(
        query, key, weights, sparse_count=2, return_value=True
    )
    assert indices.flatten().tolist() == [0, 1]
    assert values.flatten().tolist() == [HEADS * WIDTH, 0]


def test_float32_weights_on_the_older_only(npu: EmulatedNpu) -> None:
    arguments = one_sequence(1, 2) | {"weights": torch.ones(1, 1, HEADS)}
    if npu.chip.generation == "A5":
        with pytest.raises(RuntimeError, match=r"weights DT_FLOAT should be DT_BFLOAT16$"):
            npu.npu_lightning_indexer(**arguments)
    else:
        assert npu.npu_lightning_indexer(**arguments)[0].shape == (1, 1, 1, 2048)


def test_rows_of_no_sequence_are_unwritten_in_a_flat_layout() -> None:
    arguments = one_sequence(3, 4)
    flat = {name: tensor[0] for name, tensor in arguments.items()}
    indices, _ = install().npu_lightning_indexer(
        **flat,
        layout_query="TND",
        layout_key="TND",
        actual_seq_lengths_query=torch.tensor([2], dtype=torch.int32),
        actual_seq_lengths_key=torch.tensor([4], dtype=torch.int32),
        sparse_count=4,
    )
    assert (indices[:2] >= -1).all()
    assert (indices[2] == torch.iinfo(torch.int32).min).all()


INT = torch.tensor([1], dtype=torch.int32)
FLAT = {"layout_query": "TND", "layout_key": "TND"}
PAGED = {"layout_key": "PA_BSND", "key": torch.ones(2, 16, 1, WIDTH).bfloat16()}


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"query": torch.ones(1, 0, HEADS, WIDTH).bfloat16()}, "query is empty"),
        ({"sparse_count": 0}, "greater than 0, but now is 0"),
        ({"sparse_count": 2500}, "sparse_count 2500"),
        ({"sparse_mode": 1}, "sparse_mode 1"),
        ({"pre_tokens": 5}, "preTokens"),
        ({"layout_query": "SBND"}, "layout_query SBND"),
        ({"layout_key": "TND"}, "should be the same"),
        ({"return_value": True, **PAGED}, "not supported when layout_key is PA_BSND"),
        ({"key": torch.ones(1, 2, 1, WIDTH)}, "got DT_BFLOAT16 and DT_FLOAT"),
        ({"weights": torch.ones(1, 2, HEADS).half()}, "weights DT_FLOAT16"),
        ({"actual_seq_lengths_query": INT.long()}, "actual_seq_lengths_query DT_INT64"),
        ({"query": torch.ones(2, HEADS, WIDTH).bfloat16()}, "query with 3 dims is not BSND"),
        ({"key": torch.ones(2, 1, WIDTH).bfloat16()}, "key with 3 dims is not BSND"),
        ({"weights": torch.ones(1, 3, HEADS).bfloat16()}, r"should be \(1, 2, 8\)"),
        ({"key": torch.ones(1, 2, 2, WIDTH).bfloat16()}, "N of key 2 should be 1"),
        ({"key": torch.ones(1, 2, 1, 64).bfloat16()}, "D of key 64 should be 128"),
        ({"key": torch.ones(2, 8, 1, WIDTH).bfloat16(), "layout_key": "PA_BSND"}, "block_size 8"),
        ({"query": random((1, HEADS, 2, WIDTH), 0).transpose(1, 2)}, "query should be contiguous"),
        ({"key": torch.ones(2, 2, 1, WIDTH).bfloat16()}, "B of query and key"),
        (PAGED, "actual_seq_lengths_key is required"),
        (PAGED | {"actual_seq_lengths_key": INT}, "block_table is required"),
        ({"block_table": INT.view(1, 1)}, "and only then"),
        (
            PAGED | {"actual_seq_lengths_key": INT, "block_table": INT},
            "blocks of a sequence",
        ),
        ({"actual_seq_lengths_key": INT.repeat(2)}, r"shape \(B,\), B is 1"),
        ({"actual_seq_lengths_key": INT * 3}, r"\[3\] should be in \[0, 2\]"),
        (
            {
                **FLAT,
                "query": random((2, HEADS, WIDTH), 0),
                "key": random((2, 1, WIDTH), 0),
                "weights": random((2, HEADS), 0),
                "actual_seq_lengths_query": torch.tensor([2, 1]).int(),
                "actual_seq_lengths_key": torch.tensor([1, 2]).int(),
            },
            r"\[2, 1\] should be ascending",
        ),
        (
            {
                **FLAT,
                "query": random((2, HEADS, WIDTH), 0),
                "key": random((2, 1, WIDTH), 0),
                "weights": random((2, HEADS), 0),
            },
            "actual_seq_lengths_query is required",
        ),
    ],
)
def test_refusals(npu: EmulatedNpu, changed: dict[str, Any], reason: str) -> None:
    with pytest.raises(RuntimeError, match=reason):
        npu.npu_lightning_indexer(**(one_sequence(2, 2) | changed))


@pytest.mark.parametrize(
    ("generation", "heads", "accepted"),
    [("A2", 3, True), ("A3", 64, True), ("A2", 65, False), ("A5", 24, True), ("A5", 3, False)],
)
def test_heads(generation: str, heads: int, accepted: bool) -> None:
    arguments = one_sequence(1, 1)
    arguments["query"] = torch.ones(1, 1, heads, WIDTH).bfloat16()
    arguments["weights"] = torch.ones(1, 1, heads).bfloat16()
    if accepted:
        assert install(generation).npu_lightning_indexer(**arguments)[0][0, 0, 0, 0] == 0
    else:
        with pytest.raises(RuntimeError, match=f"N of query {heads} should be"):
            install(generation).npu_lightning_indexer(**arguments)
