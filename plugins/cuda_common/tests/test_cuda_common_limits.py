"""Which layers are served, by what, and the reasons why the others are not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from plugins.cuda_common.tests.expert_cases import (
    FORMS,
    NOT_THERE,
    SM90,
    SM100,
    Machine,
    Sizes,
    random_experts,
    random_experts_weight,
)

from mortise.plugin import (
    DispatchDtype,
    ExpertLayerRequest,
    LinearLayerRequest,
    ModelRole,
    ScaleFormat,
    WeightScheme,
    ordinary_method,
)
from mortise_cuda_common.experts import prepare_expert_weights
from mortise_cuda_common.limits import (
    MOST_EXPERTS,
    linear_projection,
    needs_powers_of_two,
    projection_of,
    projections_of,
)

SERVED = (WeightScheme.FLOAT, WeightScheme.FP8_BLOCK, WeightScheme.W4A16)
TRITON, AUTO, DEEP_GEMM = (Machine(SM90, runner) for runner in ("triton", "auto", "deep_gemm"))
bf16 = torch.bfloat16


def experts_of(scheme: WeightScheme, **changes: object) -> ExpertLayerRequest:
    request = ExpertLayerRequest(
        role=ModelRole.MAIN,
        layer="model.layers.3.mlp",
        scheme_w13=scheme,
        scheme_w2=scheme,
        num_experts=256,
        num_experts_per_tok=8,
        hidden_size=7168,
        intermediate_size=2048,
        compute_dtype=bf16,
        num_local_experts=32,
    )
    return replace(request, **changes)  # type: ignore[arg-type]


def linear_of(scheme: WeightScheme, **changes: object) -> LinearLayerRequest:
    request = LinearLayerRequest(
        role=ModelRole.MAIN,
        layer="model.layers.0.self_attn.o_proj",
        scheme=scheme,
        out_features=7168,
        in_features=16384,
        num_groups=1,
        static_input=False,
        compute_dtype=bf16,
    )
    return replace(request, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("machine", [TRITON, AUTO, DEEP_GEMM, Machine(SM100)], ids=str)
@pytest.mark.parametrize("scheme", WeightScheme)
def test_schemes(scheme: WeightScheme, machine: Machine) -> None:
    products = machine.products()
    experts, linear = (
        products.support(experts_of(scheme)),
        products.support_linear(linear_of(scheme)),
    )
    assert experts.ok is linear.ok is (scheme in SERVED)
    if scheme not in SERVED:
        assert experts.reason == f"w13: its weight is stored as {scheme.value}"
        assert linear.reason == f"its weight is stored as {scheme.value}"
        assert experts.method is None


@pytest.mark.parametrize("scheme", SERVED)
def test_rows_are_asked_for_as_the_scheme_ordinarily_takes_them(scheme: WeightScheme) -> None:
    method = AUTO.products().support(experts_of(scheme)).method
    assert method is not None
    assert replace(method, runner="") == ordinary_method(scheme, bf16)
    assert not method.runner_quantises


def test_float8_experts_ask_for_float8_rows() -> None:
    method = AUTO.products().support(experts_of(WeightScheme.FP8_BLOCK)).method
    assert method is not None
    assert method.accepted == (DispatchDtype.FP8_E4M3, DispatchDtype.BF16)
    assert method.requested is DispatchDtype.FP8_E4M3


@pytest.mark.parametrize(
    ("machine", "scheme", "changes", "runner"),
    [
        (AUTO, "fp8_block", {}, "deep_gemm (figures of H100, experts of 2048: vllm-project/"),
        (AUTO, "fp8_block", {"intermediate_size": 256}, "triton (figures of H100, experts of 256"),
        (AUTO, "fp8_block", {"intermediate_size": 72}, "w13: triton (DeepGEMM: 144 rows are no m"),
        (TRITON, "fp8_block", {}, "triton (asked for)"),
        (DEEP_GEMM, "fp8_block", {}, "deep_gemm (asked for)"),
        (Machine(SM90, deep_gemm=False), "fp8_block", {}, f"triton (DeepGEMM: {NOT_THERE})"),
        (Machine(SM100), "fp8_block", {}, "deep_gemm (figures of H100"),
        (AUTO, "float", {}, "triton"),
        (DEEP_GEMM, "float", {}, "deep_gemm (asked for)"),
        (DEEP_GEMM, "float", {"compute_dtype": torch.float32}, "torch"),
        (DEEP_GEMM, "w4a16", {}, "triton"),
        (AUTO, "float", {"scheme_w2": WeightScheme.W4A16}, "triton"),
        (DEEP_GEMM, "float", {"scheme_w2": WeightScheme.W4A16}, "w13: deep_gemm (asked for); w2: "),
    ],
    ids=str,
)
def test_what_multiplies_is_said(
    machine: Machine, scheme: str, changes: dict[str, object], runner: str
) -> None:
    method = machine.products().support(experts_of(WeightScheme(scheme), **changes)).method
    assert method is not None
    assert method.runner.startswith(runner)


def test_what_becomes_of_other_scales_on_blackwell_is_said() -> None:
    request = experts_of(WeightScheme.FP8_BLOCK)
    left, demanded = (
        Machine(SM100, runner).products().support(request).method
        for runner in ("auto", "deep_gemm")
    )
    assert left is not None
    assert left.runner.endswith("; triton where scales are no powers of two")
    assert demanded is not None
    assert demanded.runner.endswith(
        "; weights whose scales are no powers of two are quantised again"
    )
    for architecture, wanted in ((SM90, False), (SM100, True)):
        runtime = Machine(architecture).products().runtime
        stored = projection_of(random_experts_weight("fp8", 256, 128))
        assert needs_powers_of_two(stored, runtime) is wanted
        powers = projection_of(random_experts_weight("fp8 powers", 256, 128))
        assert not needs_powers_of_two(powers, runtime)


@pytest.mark.parametrize(
    ("machine", "changes", "reason"),
    [
        (AUTO, {"compute_dtype": torch.float16}, "the compute dtype is torch.float16"),
        (AUTO, {"compute_dtype": torch.float32}, "the compute dtype is torch.float32, and produ"),
        (AUTO, {"num_local_experts": MOST_EXPERTS + 1}, "1025 experts of a rank are more than"),
        (DEEP_GEMM, {"hidden_size": 200}, "w13: runner is deep_gemm, and DeepGEMM cannot multiply"),
        (DEEP_GEMM, {"intermediate_size": 320}, "w13: runner is deep_gemm, and DeepGEMM cannot mu"),
        (Machine(SM90, "deep_gemm", deep_gemm=False), {}, "w13: runner is deep_gemm, and DeepGEMM"),
        (AUTO, {"static_input": True}, "w13: its input has a static scale, and rows are scaled by"),
    ],
    ids=str,
)
def test_reasons_of_experts(machine: Machine, changes: dict[str, object], reason: str) -> None:
    support = machine.products().support(experts_of(WeightScheme.FP8_BLOCK, **changes))
    assert not support.ok
    assert support.reason.startswith(reason)


@pytest.mark.parametrize(
    ("scheme", "changes", "reason"),
    [
        ("w4a16", {"compute_dtype": torch.float32}, "the compute dtype is torch.float32, and"),
        ("w4a16", {"in_features": 100}, "100"),
        ("w4a16", {"in_features": 96, "num_groups": 8}, "its groups of 12 columns are no whole"),
        ("w4a16", {"in_features": 96, "num_groups": 7}, "96"),
        ("fp8_block", {"static_input": True}, "its input has a static scale"),
    ],
)
def test_reasons_of_projections(scheme: str, changes: dict[str, object], reason: str) -> None:
    support = AUTO.products().support_linear(linear_of(WeightScheme(scheme), **changes))
    assert not support.ok
    assert reason in support.reason


def test_a_part_whose_blocks_do_not_line_up_is_left_to_triton() -> None:
    """DeepGEMM counts blocks of rows through gate and up, and they begin anew with up."""
    request = experts_of(WeightScheme.FP8_BLOCK, intermediate_size=192)
    method = AUTO.products().support(request).method
    assert method is not None
    assert "w13: triton (DeepGEMM: its blocks of 128 rows begin anew after 192" in method.runner


@pytest.mark.parametrize("form", FORMS)
def test_requests_and_stored_weights_are_seen_alike(form: str) -> None:
    sizes = Sizes(hidden=256, intermediate=128)
    experts = random_experts(form, form, sizes)
    request = experts_of(
        FORMS[form].scheme,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_groups_w13=8 if "grouped" in form else 1,
        num_groups_w2=4 if "grouped" in form else 1,
    )
    asked = dict(projections_of(request))
    for name, stored in (("w13", experts.w13), ("w2", experts.w2)):
        assert replace(projection_of(stored), scale_format=None) == asked[name]


def test_what_is_said_to_be_served_is() -> None:
    for machine in (TRITON, AUTO, DEEP_GEMM, Machine(SM100), Machine(SM100, "deep_gemm")):
        for form in FORMS:
            for sizes in (Sizes(), Sizes(160, 72), Sizes(384, 320)):
                products = machine.products()
                request = experts_of(
                    FORMS[form].scheme,
                    hidden_size=sizes.hidden,
                    intermediate_size=sizes.intermediate,
                )
                experts = random_experts(form, form, sizes)
                if products.support(request).ok:
                    assert prepare_expert_weights(products, experts).prepared is not None
                else:
                    assert machine.runner == "deep_gemm"


def test_a_projection_as_it_is_asked_about() -> None:
    projection = linear_projection(linear_of(WeightScheme.FP8_BLOCK))
    assert (projection.out_features, projection.in_features) == (7168, 16384)
    assert projection.scale_format is None
    assert projection_of(random_experts_weight("fp8", 256, 128)).scale_format is ScaleFormat.FLOAT32
