"""What Blackwell GPUs send; ``tests/plugins`` compares every outcome with the contract."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mortise.plugin import (
    DispatchDtype,
    DispatchMode,
    DispatchRequest,
    ModelRole,
    RowLayout,
    ScaleFormat,
    WeightScheme,
)
from mortise_cuda_blackwell.dispatch import resolve_dispatch_dtype

REQUEST = DispatchRequest(
    role=ModelRole.MAIN,
    layer="model.layers.3.mlp",
    mode=DispatchMode.NORMAL,
    override=None,
    scheme_w13=WeightScheme.FP8_BLOCK,
    scheme_w2=WeightScheme.FP8_BLOCK,
    accepted=tuple(DispatchDtype),
    compute_dtype=torch.bfloat16,
)


def test_nobody_asks() -> None:
    assert resolve_dispatch_dtype(REQUEST).format.dtype is DispatchDtype.FP8_E4M3


@pytest.mark.parametrize(
    ("mode", "layout", "alignment"),
    [
        (DispatchMode.NORMAL, RowLayout.GROUPED_ALIGNED, 128),
        (DispatchMode.LOW_LATENCY, RowLayout.MASKED, 1),
    ],
)
def test_rows_arrive_as_the_mode_arranges_them(
    mode: DispatchMode, layout: RowLayout, alignment: int
) -> None:
    rows = resolve_dispatch_dtype(replace(REQUEST, mode=mode)).format
    assert (rows.row_layout, rows.alignment) == (layout, alignment)


def test_int8_is_sent_as_fp8() -> None:
    decision = resolve_dispatch_dtype(replace(REQUEST, requested=DispatchDtype.INT8))
    assert (decision.asked, decision.format.dtype) == (DispatchDtype.INT8, DispatchDtype.FP8_E4M3)
    assert "Blackwell sends fp8 instead of int8" in decision.reason


def test_nvfp4_is_sent_with_its_global_scale() -> None:
    decision = resolve_dispatch_dtype(replace(REQUEST, input_global_scale=0.5))
    assert (decision.format.dtype, decision.format.global_scale) == (DispatchDtype.NVFP4, 0.5)


def test_a_float32_model_is_not_rounded() -> None:
    request = replace(REQUEST, requested=DispatchDtype.FP32, compute_dtype=torch.float32)
    assert resolve_dispatch_dtype(request).format.dtype is DispatchDtype.FP32


@pytest.mark.parametrize("asked", [None, ScaleFormat.FLOAT32, ScaleFormat.UE8M0])
def test_fp8_rows_are_scaled_by_powers_of_two(asked: ScaleFormat | None) -> None:
    decision = resolve_dispatch_dtype(replace(REQUEST, scale_format=asked))
    assert decision.format.scale_format is ScaleFormat.UE8M0
    assert decision.reason.startswith("nobody asks; Blackwell sends it by default")
    changed = "; Blackwell scales fp8 rows by powers of two" in decision.reason
    assert changed is (asked is not ScaleFormat.UE8M0)


def test_other_rows_keep_their_scales() -> None:
    nvfp4 = resolve_dispatch_dtype(replace(REQUEST, input_global_scale=0.5))
    assert nvfp4.format.scale_format is ScaleFormat.E4M3
    bf16 = resolve_dispatch_dtype(replace(REQUEST, requested=DispatchDtype.BF16))
    assert bf16.format.scale_format is None


def test_groups_are_padded_as_the_product_wants_them() -> None:
    assert resolve_dispatch_dtype(REQUEST, 32).format.alignment == 32
