"""The order of authority itself; every device's outcome is in ``tests/plugins``."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mortise.errors import BackendUnusableError, ConfigError, MortiseError
from mortise.spec.authority import DispatchPolicy, Exact, Refuse, Substitute, decide_by_authority
from mortise.spec.dispatch import (
    DecisionRule,
    DispatchDtype,
    DispatchMode,
    DispatchRequest,
    Override,
    RowLayout,
    ScaleLayout,
)
from mortise.spec.reasons import ReasonCode
from mortise.spec.roles import ModelRole
from mortise.spec.weights import ScaleFormat, WeightScheme

if TYPE_CHECKING:
    from collections.abc import Callable

LAYOUTS = MappingProxyType(dict.fromkeys(DispatchMode, RowLayout.GROUPED_ALIGNED))
CHIP = DispatchPolicy(
    device="a chip",
    default=DispatchDtype.BF16,
    actions=MappingProxyType(
        {
            DispatchDtype.FP32: Exact(),
            DispatchDtype.BF16: Exact(),
            DispatchDtype.INT8: Exact(),
            DispatchDtype.FP8_E4M3: Substitute(DispatchDtype.INT8, "it counts in integers"),
            DispatchDtype.NVFP4: Refuse("it has no float4"),
        }
    ),
    row_layouts=LAYOUTS,
    alignment=16,
)
ANYTHING = replace(CHIP, actions=MappingProxyType(dict.fromkeys(DispatchDtype, Exact())))
PLAIN = DispatchRequest(
    role=ModelRole.MAIN,
    layer="model.layers.3.mlp",
    mode=DispatchMode.NORMAL,
    override=None,
    scheme_w13=WeightScheme.W8A8,
    scheme_w2=WeightScheme.W8A8,
    accepted=tuple(DispatchDtype),
    compute_dtype=torch.bfloat16,
)


def by_option(value: DispatchDtype) -> Override:
    return Override(value=value, source="command line --dispatch-dtype")


@pytest.mark.parametrize(
    ("changes", "dtype", "rule", "reason"),
    [
        (
            {"override": by_option(DispatchDtype.BF16)},
            DispatchDtype.BF16,
            DecisionRule.OVERRIDE,
            "asked for by command line --dispatch-dtype",
        ),
        (
            {"input_global_scale": 0.5},
            DispatchDtype.NVFP4,
            DecisionRule.EXPERT_METHOD,
            "the checkpoint carries a global scale for the experts' input",
        ),
        (
            {"requested_in_mode": DispatchDtype.FP8_E4M3, "mode": DispatchMode.LOW_LATENCY},
            DispatchDtype.FP8_E4M3,
            DecisionRule.EXPERT_METHOD,
            "the expert method asks for it in mode low_latency",
        ),
        (
            {"requested": DispatchDtype.INT8},
            DispatchDtype.INT8,
            DecisionRule.EXPERT_METHOD,
            "w8a8 experts ask for it",
        ),
        (
            {"runner_quantises": True, "runner": "fused"},
            DispatchDtype.BF16,
            DecisionRule.RUNNER,
            "runner fused quantises by itself",
        ),
        (
            {},
            DispatchDtype.BF16,
            DecisionRule.DEVICE_DEFAULT,
            "nobody asks; a chip sends it by default",
        ),
    ],
)
def test_each_rule_gives_its_reason(
    changes: dict[str, Any], dtype: DispatchDtype, rule: DecisionRule, reason: str
) -> None:
    decision = decide_by_authority(replace(PLAIN, **changes), ANYTHING)
    assert (decision.format.dtype, decision.rule, decision.reason) == (dtype, rule, reason)
    assert decision.asked is None
    override = changes.get("override")
    assert decision.source == ("" if override is None else override.source)


def test_a_default_of_none_is_the_compute_dtype() -> None:
    policy = replace(CHIP, default=None)
    for compute_dtype, dtype in (
        (torch.float32, DispatchDtype.FP32),
        (torch.bfloat16, DispatchDtype.BF16),
    ):
        decision = decide_by_authority(replace(PLAIN, compute_dtype=compute_dtype), policy)
        assert decision.format.dtype is dtype


def test_a_substitute_says_what_was_asked_for_and_why_it_is_another() -> None:
    decision = decide_by_authority(replace(PLAIN, requested=DispatchDtype.FP8_E4M3), CHIP)
    assert decision.asked is DispatchDtype.FP8_E4M3
    assert decision.format.dtype is DispatchDtype.INT8
    assert decision.format.scale_layout is ScaleLayout.PER_TOKEN
    assert decision.reason == (
        "w8a8 experts ask for it; a chip sends int8 instead of fp8: it counts in integers"
    )


# What is asked for, what the experts accept, and how the refusal reads.
REFUSALS = (
    (
        DispatchDtype.NVFP4,
        (DispatchDtype.NVFP4, DispatchDtype.BF16),
        "a chip cannot send nvfp4 rows: it has no float4",
        "one of bf16",
    ),
    (
        DispatchDtype.INT8,
        (DispatchDtype.FP8_E4M3, DispatchDtype.BF16),
        "its experts cannot consume int8 rows",
        "one of fp8, bf16",
    ),
    (
        DispatchDtype.FP8_E4M3,
        (DispatchDtype.FP8_E4M3,),
        "its experts cannot consume fp8 rows, which a chip sends as int8",
        "a device for fp8 rows",
    ),
)


@pytest.mark.parametrize(("asked", "accepted", "what", "expected"), REFUSALS)
def test_the_one_who_asked_is_told_what_else_would_do(
    asked: DispatchDtype, accepted: tuple[DispatchDtype, ...], what: str, expected: str
) -> None:
    request = replace(PLAIN, accepted=accepted)
    with pytest.raises(ConfigError) as of_user:
        decide_by_authority(replace(request, override=by_option(asked)), CHIP)
    assert str(of_user.value).splitlines() == [
        f"layer model.layers.3.mlp: {what} (asked for by command line --dispatch-dtype)",
        f"  expected: {expected}",
        "  remedy: remove the override, or choose an accepted format",
    ]
    with pytest.raises(BackendUnusableError) as of_method:
        decide_by_authority(replace(request, requested=asked), CHIP)
    assert of_method.value.reason is ReasonCode.REQUEST_UNSUPPORTED
    assert str(of_method.value).splitlines() == [
        f"layer model.layers.3.mlp: {what} (w8a8 experts ask for it)",
        f"  expected: {expected}",
        "  remedy: choose an accepted format, or a backend whose device can send this one",
    ]


def test_nvfp4_without_a_global_scale_is_refused_before_rows_are_made_of_it() -> None:
    with pytest.raises(ConfigError, match="nvfp4 rows need a global scale"):
        decide_by_authority(replace(PLAIN, override=by_option(DispatchDtype.NVFP4)), ANYTHING)
    with pytest.raises(BackendUnusableError, match="nvfp4 rows need a global scale"):
        decide_by_authority(replace(PLAIN, requested=DispatchDtype.NVFP4), ANYTHING)
    # An override for anything else is heard although the checkpoint asks for nvfp4.
    scaled = replace(PLAIN, input_global_scale=0.5, override=by_option(DispatchDtype.BF16))
    assert decide_by_authority(scaled, ANYTHING).format.global_scale is None


@pytest.mark.parametrize(
    "broken",
    [
        lambda: replace(CHIP, actions={}),
        lambda: replace(CHIP, actions={**CHIP.actions, DispatchDtype.INT8: Refuse("no")}),
        lambda: replace(CHIP, default=DispatchDtype.NVFP4),
        lambda: replace(CHIP, default=DispatchDtype.FP8_E4M3),
        lambda: replace(CHIP, row_layouts={DispatchMode.NORMAL: RowLayout.GROUPED}),
    ],
    ids=["no actions", "refused substitute", "refused default", "unsent default", "no mode"],
)
def test_a_policy_without_an_answer_cannot_be_made(broken: Callable[[], object]) -> None:
    with pytest.raises(AssertionError, match="a chip"):
        broken()


requests = st.builds(
    DispatchRequest,
    role=st.sampled_from(ModelRole),
    layer=st.just("model.layers.3.mlp"),
    mode=st.sampled_from(DispatchMode),
    override=st.none() | st.sampled_from(DispatchDtype).map(by_option),
    scheme_w13=st.sampled_from(WeightScheme),
    scheme_w2=st.sampled_from(WeightScheme),
    accepted=st.lists(st.sampled_from(DispatchDtype), min_size=1, unique=True).map(tuple),
    requested=st.none() | st.sampled_from(DispatchDtype),
    requested_in_mode=st.none() | st.sampled_from(DispatchDtype),
    input_global_scale=st.none() | st.just(0.5),
    scale_format=st.sampled_from([None, ScaleFormat.FLOAT32, ScaleFormat.UE8M0]),
    runner_quantises=st.booleans(),
    compute_dtype=st.sampled_from([torch.bfloat16, torch.float32]),
)


@given(requests, st.sampled_from([CHIP, ANYTHING]))
def test_what_is_decided_can_be_consumed_and_says_everything_of_itself(
    request_: DispatchRequest, policy: DispatchPolicy
) -> None:
    try:
        decision = decide_by_authority(request_, policy)
    except MortiseError:
        return
    rows = decision.format
    assert rows.dtype in request_.accepted
    unquantised = rows.dtype in {DispatchDtype.FP32, DispatchDtype.BF16}
    assert (rows.scale_layout is ScaleLayout.NONE) is unquantised
    assert (rows.scale_format is None) is unquantised
    assert (rows.global_scale is not None) is (rows.dtype is DispatchDtype.NVFP4)
    assert rows.mode is request_.mode
    assert decide_by_authority(request_, policy) == decision
    # Who asks changes nothing: neither the model's role nor the layer's name is a rule.
    role = ModelRole.DRAFT if request_.role is ModelRole.MAIN else ModelRole.MAIN
    assert decide_by_authority(replace(request_, role=role, layer="x"), policy) == decision
