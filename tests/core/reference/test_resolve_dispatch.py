"""Who decides the format of rows: the user, then the experts, the runner and last the device."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mortise.errors import BackendUnusableError, ConfigError
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
OVERRIDE = Override(value=DispatchDtype.INT8, source="command line --dispatch-dtype")


@pytest.mark.parametrize(
    ("request_", "dtype", "rule", "reason"),
    [
        (PLAIN, DispatchDtype.BF16, DecisionRule.DEVICE_DEFAULT, "nobody asks"),
        (
            replace(PLAIN, compute_dtype=torch.float32),
            DispatchDtype.FP32,
            DecisionRule.DEVICE_DEFAULT,
            "nobody asks",
        ),
        (
            replace(PLAIN, runner="cutlass", runner_quantises=True),
            DispatchDtype.BF16,
            DecisionRule.RUNNER,
            "runner cutlass quantises",
        ),
        (
            replace(PLAIN, requested=DispatchDtype.FP8_E4M3),
            DispatchDtype.FP8_E4M3,
            DecisionRule.EXPERT_METHOD,
            "float experts ask",
        ),
        (
            replace(PLAIN, input_global_scale=0.5),
            DispatchDtype.NVFP4,
            DecisionRule.EXPERT_METHOD,
            "global scale",
        ),
        (
            replace(PLAIN, override=OVERRIDE),
            DispatchDtype.INT8,
            DecisionRule.OVERRIDE,
            "command line --dispatch-dtype",
        ),
    ],
)
def test_each_rule_decides_where_nothing_outranks_it(
    request_: DispatchRequest, dtype: DispatchDtype, rule: DecisionRule, reason: str
) -> None:
    decision = resolve_dispatch_dtype(request_)
    assert (decision.format.dtype, decision.rule) == (dtype, rule)
    assert reason in decision.reason


@pytest.mark.parametrize(
    ("overridden", "scale", "requested", "runner"), list(product([False, True], repeat=4))
)
def test_the_order_of_authority(
    overridden: bool, scale: bool, requested: bool, runner: bool
) -> None:
    decision = resolve_dispatch_dtype(
        replace(
            PLAIN,
            override=OVERRIDE if overridden else None,
            input_global_scale=0.5 if scale else None,
            requested=DispatchDtype.FP8_E4M3 if requested else None,
            runner_quantises=runner,
        )
    )
    expected = (
        (DispatchDtype.INT8, DecisionRule.OVERRIDE)
        if overridden
        else (DispatchDtype.NVFP4, DecisionRule.EXPERT_METHOD)
        if scale
        else (DispatchDtype.FP8_E4M3, DecisionRule.EXPERT_METHOD)
        if requested
        else (DispatchDtype.BF16, DecisionRule.RUNNER if runner else DecisionRule.DEVICE_DEFAULT)
    )
    assert (decision.format.dtype, decision.rule) == expected


def test_an_explicit_bf16_is_not_the_same_as_unset() -> None:
    asked = replace(PLAIN, requested=DispatchDtype.FP8_E4M3)
    explicit = replace(asked, override=Override(value=DispatchDtype.BF16, source="engine.toml"))
    assert resolve_dispatch_dtype(asked).format.dtype is DispatchDtype.FP8_E4M3
    assert resolve_dispatch_dtype(explicit).format.dtype is DispatchDtype.BF16
    assert resolve_dispatch_dtype(explicit).rule is DecisionRule.OVERRIDE


@pytest.mark.parametrize("mode", DispatchMode)
def test_rows_are_plain_and_of_the_mode_that_was_asked_about(mode: DispatchMode) -> None:
    decided = resolve_dispatch_dtype(replace(PLAIN, mode=mode)).format
    assert decided.mode is mode
    assert decided.scale_layout is ScaleLayout.NONE
    masked = mode is DispatchMode.LOW_LATENCY
    assert decided.row_layout is (RowLayout.MASKED if masked else RowLayout.GROUPED)


@given(
    st.sets(st.sampled_from(DispatchDtype), min_size=1),
    st.none() | st.sampled_from(DispatchDtype),
    st.none() | st.sampled_from(DispatchDtype),
    st.booleans(),
)
def test_a_value_that_the_experts_cannot_take_is_an_error_that_names_everything(
    accepted: set[DispatchDtype],
    override: DispatchDtype | None,
    requested: DispatchDtype | None,
    scale: bool,
) -> None:
    request_ = replace(
        PLAIN,
        accepted=tuple(sorted(accepted)),
        override=None if override is None else Override(value=override, source="engine.toml"),
        requested=requested,
        input_global_scale=0.5 if scale else None,
    )
    wanted = resolve_dispatch_dtype(replace(request_, accepted=tuple(DispatchDtype)))
    if wanted.format.dtype in accepted:
        assert resolve_dispatch_dtype(request_) == wanted
        return
    # What the user asked for is the user's to mend; anything else is between model and backend.
    kind = BackendUnusableError if override is None else ConfigError
    with pytest.raises(kind) as caught:
        resolve_dispatch_dtype(request_)
    error = caught.value
    assert "model.layers.3.mlp" in error.what
    assert wanted.format.dtype.value in error.what
    assert wanted.reason in error.what
    assert all(dtype.value in (error.expected or "") for dtype in accepted)


def test_a_decision_depends_on_the_request_alone() -> None:
    first = resolve_dispatch_dtype(PLAIN)
    resolve_dispatch_dtype(replace(PLAIN, override=OVERRIDE, role=ModelRole.DRAFT))
    assert resolve_dispatch_dtype(PLAIN) == first
    assert "bf16" in repr(first)
