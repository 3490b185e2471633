"""Experts of any two schemes are their two projections, in every layout in which rows can come."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product as pairs
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fixtures import scheme_definitions as definitions
from tests.fixtures.scheme_storages import QUANTISED, STORAGES, Storage, random_weight

from mortise.errors import ContractError
from mortise.formats.rows import quantise_rows
from mortise.reference.moe import prepare_expert_weights, quantized_moe_apply
from mortise.reference.projections import quantized_linear
from mortise.spec.dispatch import (
    DecisionRule,
    DispatchDecision,
    DispatchDtype,
    DispatchedTokens,
    DispatchFormat,
    GroupListKind,
    RoutingWeightSide,
    RowLayout,
    ScaleLayout,
)
from mortise.spec.experts import ExpertWeights
from mortise.spec.weights import LinearWeight, ScaleFormat, StoredWeight, WeightScheme
from mortise.testing.poison import defined_rows, poison_undefined_rows, with_poison

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

LAYER = "model.layers.3.mlp"
HIDDEN, INTERMEDIATE, EXPERTS = 144, 80, 3
DTYPES = (torch.float32, torch.bfloat16)
INT8 = DispatchFormat(
    dtype=DispatchDtype.INT8,
    scale_layout=ScaleLayout.PER_TOKEN,
    scale_format=ScaleFormat.FLOAT32,
)
FP8 = DispatchFormat(
    dtype=DispatchDtype.FP8_E4M3,
    scale_layout=ScaleLayout.PER_TOKEN_128,
    scale_format=ScaleFormat.FLOAT32,
)
FP8_POWERS = replace(FP8, scale_format=ScaleFormat.UE8M0)
NVFP4 = DispatchFormat(
    dtype=DispatchDtype.NVFP4,
    scale_layout=ScaleLayout.PER_BLOCK_16,
    scale_format=ScaleFormat.E4M3,
    global_scale=5 / 2688,
)
DECISION = DispatchDecision(
    format=DispatchFormat(dtype=DispatchDtype.FP32), rule=DecisionRule.DEVICE_DEFAULT, reason=""
)

every_storage = pytest.mark.parametrize("storage", STORAGES, ids=str)


def plain(dtype: torch.dtype = torch.float32) -> DispatchFormat:
    return DispatchFormat(
        dtype=DispatchDtype.FP32 if dtype is torch.float32 else DispatchDtype.BF16
    )


def consumable(storage: Storage) -> list[DispatchFormat]:
    """Every format that a first projection stored so multiplies."""
    match storage.scheme:
        case WeightScheme.FP8_BLOCK:
            return [plain(), FP8, FP8_POWERS]
        case WeightScheme.W8A8 if not storage.static_input:
            return [plain(), INT8]
        case WeightScheme.W4A8:
            return [plain(), INT8]
        case WeightScheme.NVFP4 if storage.static_input:
            return [plain(), NVFP4]
        case _:
            return [plain()]


def experts_of(
    first: Storage,
    second: Storage,
    *,
    num_experts: int = EXPERTS,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> ExpertWeights:
    leading = (num_experts,)
    return ExpertWeights(
        layer=LAYER,
        w13=random_weight(
            first,
            2 * INTERMEDIATE,
            HIDDEN,
            num_parts=2,
            leading=leading,
            seed=seed,
            float_dtype=dtype,
        ),
        w2=random_weight(
            second, HIDDEN, INTERMEDIATE, leading=leading, seed=seed + 1, float_dtype=dtype
        ),
        num_local_experts=num_experts,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
    )


def of_expert(stored: StoredWeight, expert: int) -> StoredWeight:
    tensors = ("weight", "scale", "global_scale", "input_scale", "input_offset")
    found = {name: getattr(stored, name) for name in tensors}
    return replace(stored, **{name: one[expert] for name, one in found.items() if one is not None})


def rows_of(counts: Sequence[int], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """The rows of each group, the same whatever layout they will come in."""
    generator = torch.Generator().manual_seed(len(counts))
    return [torch.randn(count, HIDDEN, generator=generator).to(dtype) for count in counts]


@dataclass(frozen=True)
class Arrangement:
    """How groups of rows are laid out, and where one finds them again."""

    layout: RowLayout
    kind: GroupListKind
    host_counts: bool

    def __str__(self) -> str:
        host = "host" if self.host_counts else "device"
        return f"{self.layout.value}-{self.kind.value}-{host}"


ARRANGEMENTS = tuple(
    Arrangement(layout, kind, host_counts)
    for layout, kind, host_counts in pairs(RowLayout, GroupListKind, (False, True))
    if (layout, kind) != (RowLayout.GROUPED_ALIGNED, GroupListKind.CUMULATIVE)
)
PLAINEST = Arrangement(RowLayout.GROUPED, GroupListKind.COUNTS, host_counts=True)


def tokens_of(
    groups: Sequence[torch.Tensor],
    format: DispatchFormat,
    arrangement: Arrangement = PLAINEST,
    *,
    row_weights: Sequence[torch.Tensor] | None = None,
    spare_rows: int = 3,
) -> DispatchedTokens:
    """Rows in their format and layout; what is undefined is zero, and someone else poisons it."""
    counts = [len(group) for group in groups]
    alignment = 8 if arrangement.layout is RowLayout.GROUPED_ALIGNED else 1
    arranged_format = replace(format, row_layout=arrangement.layout, alignment=alignment)
    quantised = [quantise_rows(group, format) for group in groups]

    def arranged(parts: Sequence[torch.Tensor]) -> torch.Tensor:
        capacity = max([0, *counts]) + spare_rows
        trailing = parts[0].shape[1:]
        if arrangement.layout is RowLayout.MASKED:
            whole = parts[0].new_zeros(len(parts), capacity, *trailing)
            for expert, part in enumerate(parts):
                whole[expert, : len(part)] = part
            return whole
        padded = [
            torch.cat([part, part.new_zeros(-len(part) % alignment, *trailing)]) for part in parts
        ]
        return torch.cat([*padded, parts[0].new_zeros(spare_rows, *trailing)])

    group_list = torch.tensor(counts, dtype=torch.int64)
    cumulative = arrangement.kind is GroupListKind.CUMULATIVE
    scales = [scale for _, scale in quantised if scale is not None]
    return DispatchedTokens(
        rows=arranged([rows for rows, _ in quantised]),
        scales=arranged(scales) if scales else None,
        group_list=group_list.cumsum(0) if cumulative else group_list,
        group_list_kind=arrangement.kind,
        group_counts=tuple(counts) if arrangement.host_counts else None,
        format=arranged_format,
        routing_weight_side=RoutingWeightSide.EXPERTS
        if row_weights is not None
        else RoutingWeightSide.COMBINE,
        row_weights=arranged(row_weights) if row_weights is not None else None,
    )


def groups_in(results: torch.Tensor, tokens: DispatchedTokens) -> torch.Tensor:
    """The rows of all groups one after the other."""
    return results[defined_rows(tokens)]


def expert_by_hand(
    rows: torch.Tensor, experts: ExpertWeights, expert: int, out_dtype: torch.dtype
) -> torch.Tensor:
    """Two projections with SwiGLU between them, gate first."""
    floats = [one.weight.dtype for one in (experts.w2, experts.w13) if one.scale is None]
    middle = floats[0] if floats else out_dtype
    first = quantized_linear(rows, linear_of(experts.w13, expert, HIDDEN), middle)
    gate, up = first[:, :INTERMEDIATE], first[:, INTERMEDIATE:]
    second = linear_of(experts.w2, expert, INTERMEDIATE)
    return quantized_linear(F.silu(gate) * up, second, out_dtype)


def linear_of(stored: StoredWeight, expert: int, columns: int) -> LinearWeight:
    one = of_expert(stored, expert)
    return LinearWeight(
        layer=LAYER,
        stored=one,
        bias=None,
        out_features=one.weight.shape[0],
        in_features=columns,
    )


@pytest.mark.parametrize(("first", "second"), list(pairs(STORAGES, STORAGES)), ids=str)
def test_experts_of_any_two_schemes(first: Storage, second: Storage) -> None:
    counts = [2, 0, 3]
    for dtype in DTYPES:
        experts, groups = experts_of(first, second, dtype=dtype), rows_of(counts, dtype)
        tokens = tokens_of(groups, plain(dtype))
        prepared = prepare_expert_weights(experts, DECISION)
        got = quantized_moe_apply(tokens, prepared, dtype)
        assert got.shape == tokens.rows.shape
        assert got.dtype is dtype
        by_hand = [
            expert_by_hand(group, experts, expert, dtype) for expert, group in enumerate(groups)
        ]
        assert torch.equal(groups_in(got, tokens), torch.cat(by_hand))


def defined_expert(
    inputs: Callable[[StoredWeight, int], np.ndarray], experts: ExpertWeights, expert: int
) -> tuple[np.ndarray, np.ndarray]:
    """Result in float64, and how far one step of quantising the middle may move it."""
    w13, w2 = of_expert(experts.w13, expert), of_expert(experts.w2, expert)
    halves = np.split(definitions.weight(w13, torch.float32), 2)
    gate, up = (inputs(w13, part) @ half.T for part, half in enumerate(halves))
    middle = torch.from_numpy(gate / (1 + np.exp(-gate)) * up).float()
    exact, magnitudes = definitions.product(middle, w2)
    largest = abs(definitions.weight(w2, torch.float32)).max(axis=1)
    # A middle that rounds to the other neighbour: 2 of 6 in float4, 1 of 7 in int4, less elsewhere.
    step = abs(middle.numpy()).max(axis=1, keepdims=True) * 0.36
    coarse = w2.scheme in {WeightScheme.NVFP4, WeightScheme.W4A4}
    return exact, step * largest * (1 if coarse else 0.4) + 1e-5 * magnitudes


@every_storage
@pytest.mark.parametrize("second", [STORAGES[0], STORAGES[1], STORAGES[3], STORAGES[-1]], ids=str)
def test_the_definition(storage: Storage, second: Storage) -> None:
    experts, groups = experts_of(storage, second), rows_of([4, 1, 2])
    tokens = tokens_of(groups, plain())
    got = groups_in(quantized_moe_apply(tokens, experts, torch.float32), tokens)
    start = 0
    for expert, group in enumerate(groups):

        def inputs(stored: StoredWeight, part: int, group: torch.Tensor = group) -> np.ndarray:
            return definitions.input_of_part(group, stored, part)

        exact, bound = defined_expert(inputs, experts, expert)
        found = got[start : start + len(group)].double().numpy()
        start += len(group)
        assert (abs(found - exact) <= bound + 1e-5).all()
        # The bound is for one element that rounds otherwise; nearly all must not need it.
        assert np.median(abs(found - exact)) < 1e-3 * abs(exact).max()


@pytest.mark.parametrize(
    ("storage", "format"),
    [(one, sent) for one in QUANTISED for sent in consumable(one)[1:]],
    ids=str,
)
def test_rows_that_arrive_quantised_are_multiplied_as_they_are(
    storage: Storage, format: DispatchFormat
) -> None:
    experts, groups = experts_of(storage, STORAGES[0]), rows_of([3, 2, 4])
    tokens = tokens_of(groups, format)
    got = groups_in(quantized_moe_apply(tokens, experts, torch.float32), tokens)
    start = 0
    for expert, group in enumerate(groups):
        x = group.numpy()
        if format.dtype is DispatchDtype.INT8:
            arrived = definitions.int_rows(x, 127)
        elif format.dtype is DispatchDtype.FP8_E4M3:
            powers = format.scale_format is ScaleFormat.UE8M0
            arrived = definitions.fp8_rows(x, powers_of_two=powers)
        else:
            arrived = definitions.nvfp4_rows(x, np.float32(format.global_scale))
        exact, bound = defined_expert(lambda *_, rows=arrived: rows, experts, expert)
        found = got[start : start + len(group)].double().numpy()
        assert (abs(found - exact) <= bound * 1e-3 + 1e-5).all()
        start += len(group)


@pytest.mark.parametrize(
    ("storage", "format"),
    [
        (Storage(WeightScheme.W8A8), INT8),
        (Storage(WeightScheme.W4A8, group_size=16), INT8),
        (Storage(WeightScheme.FP8_BLOCK, scale_format=ScaleFormat.UE8M0), FP8_POWERS),
    ],
    ids=str,
)
def test_it_does_not_matter_who_quantises(storage: Storage, format: DispatchFormat) -> None:
    experts, groups = experts_of(storage, storage), rows_of([3, 0, 4])
    sent, kept = tokens_of(groups, format), tokens_of(groups, plain())
    assert torch.equal(
        groups_in(quantized_moe_apply(sent, experts, torch.float32), sent),
        groups_in(quantized_moe_apply(kept, experts, torch.float32), kept),
    )


@every_storage
@pytest.mark.parametrize("arrangement", ARRANGEMENTS, ids=str)
def test_every_layout_gives_the_same_bits_and_reads_no_undefined_row(
    storage: Storage, arrangement: Arrangement
) -> None:
    experts = prepare_expert_weights(experts_of(storage, storage), DECISION)
    groups = rows_of([5, 0, 2])
    for sent in consumable(storage):
        plainest = tokens_of(groups, sent, spare_rows=0)
        expected = quantized_moe_apply(plainest, experts, torch.float32)
        tokens = tokens_of(groups, sent, arrangement)
        got = with_poison(quantized_moe_apply)(tokens, experts, torch.float32)
        assert got.shape == (*tokens.rows.shape[:-1], HIDDEN)
        assert torch.equal(groups_in(got, tokens), expected)
        assert expected.isfinite().all()
        assert got[~defined_rows(tokens)].isnan().all()


def test_poison_shows_whoever_reads_an_undefined_row() -> None:
    def careless(
        tokens: DispatchedTokens, experts: ExpertWeights, out_dtype: torch.dtype
    ) -> torch.Tensor:
        assert tokens.scales is not None
        return tokens.rows.to(out_dtype) * tokens.scales[..., None] + tokens.scales.sum()

    experts = experts_of(Storage(WeightScheme.W8A8), STORAGES[0])
    for arrangement in ARRANGEMENTS:
        tokens = tokens_of(rows_of([2, 1, 4]), INT8, arrangement)
        assert careless(tokens, experts, torch.float32).isfinite().all()
        assert with_poison(careless)(tokens, experts, torch.float32).isnan().all()
        poisoned, defined = poison_undefined_rows(tokens), defined_rows(tokens)
        assert torch.equal(poisoned.rows[defined], tokens.rows[defined])
        assert int(defined.sum()) == 7
        assert tokens.scales is not None
        assert tokens.scales.isfinite().all(), "the original is left alone"


@every_storage
def test_the_experts_multiply_by_routing_weights_where_they_are_told_to(storage: Storage) -> None:
    experts, groups = experts_of(storage, storage), rows_of([2, 0, 3])
    weights = [torch.rand(len(group)) for group in groups]
    unweighted = tokens_of(groups, plain())
    expected = groups_in(quantized_moe_apply(unweighted, experts, torch.float32), unweighted)
    expected = expected * torch.cat(weights).unsqueeze(1)
    for arrangement in ARRANGEMENTS:
        tokens = tokens_of(groups, plain(), arrangement, row_weights=weights)
        for out_dtype in DTYPES:
            if out_dtype is torch.bfloat16 and storage.scheme is not WeightScheme.FLOAT:
                continue  # the middle would be rounded to it as well
            got = with_poison(quantized_moe_apply)(tokens, experts, out_dtype)
            assert torch.equal(groups_in(got, tokens), expected.to(out_dtype))


@every_storage
def test_what_is_still_under_way_is_received_first(storage: Storage) -> None:
    experts, groups = experts_of(storage, storage), rows_of([2, 1, 3])
    arrived = tokens_of(groups, consumable(storage)[-1])
    calls = []
    rows = torch.zeros_like(arrived.rows)
    scales = None if arrived.scales is None else torch.zeros_like(arrived.scales)
    counts = torch.zeros_like(arrived.group_list)

    def receive() -> None:
        calls.append(1)
        rows.copy_(arrived.rows)
        counts.copy_(arrived.group_list)
        if scales is not None and arrived.scales is not None:
            scales.copy_(arrived.scales)

    under_way = replace(
        arrived, rows=rows, scales=scales, group_list=counts, group_counts=None, receive=receive
    )
    got = quantized_moe_apply(under_way, experts, torch.float32)
    assert calls == [1]
    expected = quantized_moe_apply(arrived, experts, torch.float32)
    assert torch.equal(groups_in(got, arrived), groups_in(expected, arrived))


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(STORAGES),
    st.lists(st.integers(0, 6), min_size=1, max_size=5),
    st.sampled_from(ARRANGEMENTS),
    st.integers(0, 3),
    st.sampled_from(DTYPES),
    st.data(),
)
def test_any_routing(
    storage: Storage,
    counts: list[int],
    arrangement: Arrangement,
    spare_rows: int,
    dtype: torch.dtype,
    data: st.DataObject,
) -> None:
    sent = data.draw(st.sampled_from([plain(dtype), *consumable(storage)[1:]]))
    experts = experts_of(storage, storage, num_experts=len(counts), dtype=dtype)
    groups = rows_of(counts, dtype)
    tokens = tokens_of(groups, sent, arrangement, spare_rows=spare_rows)
    got = with_poison(quantized_moe_apply)(tokens, experts, dtype)
    assert got.shape == (*tokens.rows.shape[:-1], HIDDEN)
    assert got.dtype is dtype
    alone = []
    for expert, group in enumerate(groups):
        only = [group if one == expert else group[:0] for one in range(len(counts))]
        lonely = tokens_of(only, sent)
        alone.append(groups_in(quantized_moe_apply(lonely, experts, dtype), lonely))
    assert torch.equal(groups_in(got, tokens), torch.cat(alone))


@every_storage
def test_preparing_changes_no_result_and_can_be_done_again(storage: Storage) -> None:
    experts, groups = experts_of(storage, storage), rows_of([2, 0, 3])
    tokens = tokens_of(groups, consumable(storage)[-1])

    def run(experts: ExpertWeights) -> torch.Tensor:
        return groups_in(quantized_moe_apply(tokens, experts, torch.float32), tokens)

    expected = run(experts)
    once = prepare_expert_weights(experts, DECISION)
    assert torch.equal(run(once), expected)
    assert torch.equal(run(prepare_expert_weights(once, DECISION)), expected)

    update = experts_of(storage, storage, seed=9)
    for projection in ("w13", "w2"):
        old, new = getattr(once, projection), getattr(update, projection)
        for name in ("weight", "scale", "global_scale", "input_scale", "input_offset"):
            if getattr(old, name) is not None:
                getattr(old, name).copy_(getattr(new, name))
    again = prepare_expert_weights(once, DECISION)
    assert torch.equal(run(again), run(update))
    assert not torch.equal(run(again), expected)


def test_unquantised_experts_are_left_alone() -> None:
    experts = experts_of(STORAGES[0], STORAGES[0])
    assert prepare_expert_weights(experts, DECISION) is experts


@pytest.mark.parametrize(
    ("storage", "format", "message"),
    [
        (STORAGES[0], INT8, "int8 rows met torch.float32 weights"),
        (Storage(WeightScheme.W4A16), INT8, "int8 rows met w4a16 weights"),
        (Storage(WeightScheme.FP8_BLOCK), INT8, "int8 rows met fp8_block weights"),
        (Storage(WeightScheme.W8A8), FP8, "fp8 rows met w8a8 weights"),
        (Storage(WeightScheme.W4A4), INT8, "int8 rows met w4a4 weights"),
        (
            Storage(WeightScheme.W8A8, static_input=True),
            INT8,
            "int8 rows met w8a8 weights with a static scale",
        ),
        (Storage(WeightScheme.NVFP4), NVFP4, "nvfp4 rows met nvfp4 weights"),
    ],
    ids=str,
)
def test_rows_that_the_first_projection_cannot_multiply(
    storage: Storage, format: DispatchFormat, message: str
) -> None:
    tokens = tokens_of(rows_of([1, 1, 1]), format)
    with pytest.raises(ContractError, match=message) as caught:
        quantized_moe_apply(tokens, experts_of(storage, STORAGES[0]), torch.float32)
    assert f"layer {LAYER}" in caught.value.what


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scales": None}, "int8 rows came without scales"),
        ({"scales": torch.ones(6, dtype=torch.float64)}, "came with scales of torch.float64"),
        ({"rows": torch.zeros(6, HIDDEN)}, "rows of torch.float32 are said to be int8"),
        ({"rows": torch.zeros(1, 6, HIDDEN, dtype=torch.int8)}, "grouped rows have 3 dimensions"),
        ({"group_list": torch.ones(3, dtype=torch.int32)}, "the group list is torch.int32"),
        ({"row_weights": torch.ones(6)}, "routing weights do not come with the rows"),
    ],
)
def test_tokens_that_contradict_themselves(change: dict[str, torch.Tensor], message: str) -> None:
    tokens = replace(tokens_of(rows_of([1, 1, 1]), INT8), **change)  # type: ignore[arg-type]
    with pytest.raises(ContractError, match=message) as caught:
        quantized_moe_apply(
            tokens, experts_of(Storage(WeightScheme.W8A8), STORAGES[0]), torch.float32
        )
    assert f"layer {LAYER}" in caught.value.what
