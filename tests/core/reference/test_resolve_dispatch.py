"""The reference's own word on dispatch formats: everything can be sent, and nothing is quantised
unless somebody asks.

The order of authority is tested in ``tests/core/spec/test_authority.py``, and its outcome for every
device in ``tests/plugins/test_dispatch_decisions.py``.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mortise.reference.dispatch import resolve_dispatch_dtype
from mortise.spec.dispatch import (
    DecisionRule,
    DispatchDtype,
    DispatchMode,
    DispatchRequest,
    Override,
    RowLayout,
    ScaleLayout,
)
from mortise.spec.roles import ModelRole
from mortise.spec.weights import WeightScheme

PLAIN = DispatchRequest(
    role=ModelRole.MAIN,
    layer="model.layers.3.mlp",
    mode=DispatchMode.NORMAL,
    override=None,
    scheme_w13=WeightScheme.FLOAT,
    scheme_w2=WeightScheme.FLOAT,
    accepted=tuple(DispatchDtype),
    compute_dtype=torch.bfloat16,
)


@pytest.mark.parametrize(
    ("compute_dtype", "dtype"),
    [(torch.bfloat16, DispatchDtype.BF16), (torch.float32, DispatchDtype.FP32)],
)
def test_nobody_asks(compute_dtype: torch.dtype, dtype: DispatchDtype) -> None:
    decision = resolve_dispatch_dtype(replace(PLAIN, compute_dtype=compute_dtype))
    assert (decision.format.dtype, decision.rule) == (dtype, DecisionRule.DEVICE_DEFAULT)
    assert decision.reason == "nobody asks; the reference sends it by default"
    assert decision.format.scale_layout is ScaleLayout.NONE


@pytest.mark.parametrize("dtype", DispatchDtype)
def test_it_sends_whatever_is_asked_for(dtype: DispatchDtype) -> None:
    scale = 0.5 if dtype is DispatchDtype.NVFP4 else None
    asked = replace(PLAIN, requested=dtype, input_global_scale=scale)
    decision = resolve_dispatch_dtype(asked)
    assert (decision.format.dtype, decision.asked) == (dtype, None)


def test_an_explicit_bf16_is_not_the_same_as_unset() -> None:
    asked = replace(PLAIN, requested=DispatchDtype.FP8_E4M3)
    explicit = replace(asked, override=Override(value=DispatchDtype.BF16, source="engine.toml"))
    assert resolve_dispatch_dtype(asked).format.dtype is DispatchDtype.FP8_E4M3
    assert resolve_dispatch_dtype(explicit).format.dtype is DispatchDtype.BF16
    assert resolve_dispatch_dtype(explicit).rule is DecisionRule.OVERRIDE


@pytest.mark.parametrize(
    ("mode", "layout"),
    [(DispatchMode.NORMAL, RowLayout.GROUPED), (DispatchMode.LOW_LATENCY, RowLayout.MASKED)],
)
def test_rows_arrive_as_the_mode_arranges_them(mode: DispatchMode, layout: RowLayout) -> None:
    decided = resolve_dispatch_dtype(replace(PLAIN, mode=mode)).format
    assert (decided.mode, decided.row_layout, decided.alignment) == (mode, layout, 1)
