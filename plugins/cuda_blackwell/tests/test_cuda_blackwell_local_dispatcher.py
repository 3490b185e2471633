"""NVFP4 rows within one process: what the core's own exchange makes, by the chip's programs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plugins.cuda_common.tests.expert_cases import runtime_of

from mortise.backends import load_backend
from mortise.errors import CapacityError
from mortise.formats.rows import dequantise_rows
from mortise.plugin import (
    DispatchDtype,
    DispatchedTokens,
    DispatchFormat,
    DispatchMode,
    ModelRole,
    Routing,
    RowLayout,
    ScaleFormat,
    ScaleLayout,
    TokenDispatcherRequest,
)
from mortise.reference.dispatch import LocalDispatcher
from mortise.testing.poison import defined_rows
from mortise_cuda_blackwell.local import Nvfp4Dispatcher, carries
from mortise_cuda_common.chip import Architecture

EXPERTS, CHOICES, HIDDEN, CAPACITY = 5, 3, 192, 9
LAYOUTS = {
    "aligned": (DispatchMode.NORMAL, RowLayout.GROUPED_ALIGNED, 8),
    "grouped": (DispatchMode.NORMAL, RowLayout.GROUPED, 1),
    "masked": (DispatchMode.LOW_LATENCY, RowLayout.MASKED, 1),
}
NVFP4 = DispatchFormat(
    dtype=DispatchDtype.NVFP4,
    scale_layout=ScaleLayout.PER_BLOCK_16,
    scale_format=ScaleFormat.E4M3,
    global_scale=1.5e-3,
)
REQUEST = TokenDispatcherRequest(
    role=ModelRole.MAIN,
    layer="model.layers.3.mlp",
    num_experts=EXPERTS,
    num_experts_per_tok=CHOICES,
    hidden_size=HIDDEN,
    max_tokens_per_rank=CAPACITY,
    format=NVFP4,
)
RUNTIME = runtime_of(Architecture.SM100, deep_gemm=False)


def format_of(layout: str) -> DispatchFormat:
    mode, row_layout, alignment = LAYOUTS[layout]
    return replace(NVFP4, mode=mode, row_layout=row_layout, alignment=alignment)


def inputs(ids: list[list[int]]) -> tuple[torch.Tensor, Routing]:
    generator = torch.Generator().manual_seed(len(ids))
    hidden = torch.randn(len(ids), HIDDEN, generator=generator).to(torch.bfloat16)
    return hidden, Routing(
        topk_ids=torch.tensor(ids, dtype=torch.int64).view(len(ids), CHOICES),
        topk_weights=torch.rand(len(ids), CHOICES, generator=generator),
    )


def experts(tokens: DispatchedTokens) -> torch.Tensor:
    """Experts that multiply by their number plus one; what is in no group is not a number."""
    made = torch.full((*tokens.rows.shape[:-1], HIDDEN), torch.nan)
    plain = dequantise_rows(tokens.rows, tokens.scales, tokens.format, torch.float32)
    numbers = torch.arange(1, EXPERTS + 1).repeat_interleave(tokens.group_list)
    defined = defined_rows(tokens)
    made[defined] = plain[defined] * numbers.unsqueeze(1)
    return made.to(torch.bfloat16)


ids_of_tokens = st.lists(
    st.lists(st.integers(-1, EXPERTS - 1), min_size=CHOICES, max_size=CHOICES, unique=True),
    max_size=CAPACITY,
)


@settings(max_examples=30, deadline=None)
@given(ids_of_tokens, st.sampled_from(sorted(LAYOUTS)))
def test_it_is_the_cores_exchange(ids: list[list[int]], layout: str) -> None:
    hidden, routing = inputs(ids)
    stated = format_of(layout)
    tokens, handle = Nvfp4Dispatcher(RUNTIME, REQUEST).dispatch(hidden, routing, stated)
    core = LocalDispatcher(EXPERTS, max_tokens_per_rank=CAPACITY, poison=True)
    wanted, wanted_handle = core.dispatch(hidden, routing, stated)
    assert tokens.format == stated
    assert torch.equal(tokens.group_list, wanted.group_list)
    assert tokens.scales is not None and wanted.scales is not None
    for found, right in ((tokens.rows, wanted.rows), (tokens.scales, wanted.scales)):
        assert found.dtype is right.dtype
        ours, theirs = (
            part.contiguous().view(torch.uint8)[defined_rows(whose)]
            for part, whose in ((found, tokens), (right, wanted))
        )
        assert torch.equal(ours, theirs)
    back = Nvfp4Dispatcher(RUNTIME, REQUEST).combine(experts(tokens), handle)
    # Both sum in float32, in another order, and round once.
    of_core = core.combine(experts(wanted), wanted_handle)
    torch.testing.assert_close(back, of_core, rtol=8e-3, atol=1e-4)


def test_more_tokens_than_there_is_room_for() -> None:
    hidden, routing = inputs([[0, 1, 2]] * (CAPACITY + 1))
    with pytest.raises(CapacityError, match=r"model\.layers\.3\.mlp"):
        Nvfp4Dispatcher(RUNTIME, REQUEST).dispatch(hidden, routing, format_of("masked"))


def test_what_it_carries() -> None:
    assert carries(REQUEST)
    assert not carries(replace(REQUEST, world_size=2))
    assert not carries(replace(REQUEST, hidden_size=HIDDEN + 16)), "left to the core"
    assert not carries(replace(REQUEST, format=DispatchFormat(dtype=DispatchDtype.BF16)))
    assert not carries(replace(REQUEST, format=None))
    bound = load_backend("cuda_blackwell", role=ModelRole.MAIN, device="emulated")
    made = bound.ops.create_token_dispatcher(REQUEST)
    assert isinstance(made, Nvfp4Dispatcher)
