"""What Ascend devices send; ``tests/plugins`` compares every outcome with the contract."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mortise.errors import BackendUnusableError
from mortise.plugin import (
    DispatchDtype,
    DispatchMode,
    DispatchRequest,
    ModelRole,
    RowLayout,
    WeightScheme,
)
from mortise_npu_ascend.dispatch import Generation, policy, resolve_dispatch_dtype

REQUEST = DispatchRequest(
    role=ModelRole.MAIN,
    layer="model.layers.3.mlp",
    mode=DispatchMode.NORMAL,
    override=None,
    scheme_w13=WeightScheme.W8A8,
    scheme_w2=WeightScheme.W8A8,
    accepted=tuple(DispatchDtype),
    compute_dtype=torch.bfloat16,
)
OLDER = (Generation.A2, Generation.A3)


@pytest.mark.parametrize("generation", Generation)
def test_nobody_asks(generation: Generation) -> None:
    assert resolve_dispatch_dtype(REQUEST, generation).format.dtype is DispatchDtype.BF16


@pytest.mark.parametrize("generation", Generation)
@pytest.mark.parametrize("mode", DispatchMode)
def test_rows_come_without_gaps_in_both_modes(generation: Generation, mode: DispatchMode) -> None:
    rows = resolve_dispatch_dtype(replace(REQUEST, mode=mode), generation).format
    assert (rows.row_layout, rows.alignment) == (RowLayout.GROUPED, 1)


@pytest.mark.parametrize("generation", OLDER)
def test_fp8_is_int8_where_the_chip_has_none(generation: Generation) -> None:
    decision = resolve_dispatch_dtype(
        replace(REQUEST, requested=DispatchDtype.FP8_E4M3), generation
    )
    assert (decision.asked, decision.format.dtype) == (DispatchDtype.FP8_E4M3, DispatchDtype.INT8)
    assert "Ascend A2/A3 sends int8 instead of fp8" in decision.reason


def test_the_newest_generation_keeps_fp8_and_int8_apart() -> None:
    """An int8 request that became fp8 on the wire met int8 weights elsewhere."""
    for dtype in (DispatchDtype.FP8_E4M3, DispatchDtype.INT8):
        decision = resolve_dispatch_dtype(replace(REQUEST, requested=dtype), Generation.A5)
        assert (decision.asked, decision.format.dtype) == (None, dtype)


@pytest.mark.parametrize("generation", Generation)
def test_nvfp4_is_refused(generation: Generation) -> None:
    with pytest.raises(BackendUnusableError, match="cannot send nvfp4 rows"):
        resolve_dispatch_dtype(replace(REQUEST, input_global_scale=0.5), generation)


@pytest.mark.parametrize("generation", Generation)
def test_a_float32_model_is_not_rounded(generation: Generation) -> None:
    request = replace(REQUEST, requested=DispatchDtype.FP32, compute_dtype=torch.float32)
    assert resolve_dispatch_dtype(request, generation).format.dtype is DispatchDtype.FP32


def test_generations_with_one_policy_share_it() -> None:
    assert policy(Generation.A2) is policy(Generation.A3)
    assert policy(Generation.A3) is not policy(Generation.A5)
