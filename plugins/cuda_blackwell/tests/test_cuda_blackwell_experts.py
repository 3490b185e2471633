"""Experts and projections in NVFP4, whole, beside the core's reference."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from plugins.cuda_common.tests.expert_cases import defined, layouts, random_rows, runtime_of
from tests.fixtures.scheme_storages import Storage, random_weight

from mortise.formats.nvfp4 import quantise_nvfp4
from mortise.plugin import (
    BackendUnusableError,
    DispatchDtype,
    DispatchFormat,
    ExpertLayerRequest,
    ExpertWeights,
    LinearWeight,
    ModelRole,
    ScaleFormat,
    ScaleLayout,
    WeightScheme,
)
from mortise.reference import moe as reference
from mortise.reference import projections as reference_linear
from mortise.testing.poison import with_poison
from mortise_cuda_blackwell.products.nvfp4 import Nvfp4Product, Nvfp4WeightOnlyProduct
from mortise_cuda_blackwell.select import BlackwellProducts
from mortise_cuda_common.chip import Architecture
from mortise_cuda_common.linear import prepare_linear_weight, quantized_linear
from mortise_cuda_common.moe import quantized_moe_apply

if TYPE_CHECKING:
    from mortise.plugin import DispatchedTokens

HIDDEN, INTERMEDIATE = 272, 144
BF16 = torch.bfloat16
FORMS = {
    "nvfp4": Storage(WeightScheme.NVFP4, static_input=True),
    "weights": Storage(WeightScheme.NVFP4),
    "fp8": Storage(WeightScheme.FP8_BLOCK),
    "float": Storage(WeightScheme.FLOAT),
}
PAIRS = (
    ("nvfp4", "nvfp4"),
    ("nvfp4", "weights"),
    ("weights", "nvfp4"),
    ("weights", "weights"),
    ("nvfp4", "fp8"),
    ("fp8", "nvfp4"),
    ("nvfp4", "float"),
    ("float", "nvfp4"),
)
COUNTS = [5, 0, 3]

PRODUCTS = BlackwellProducts(runtime_of(Architecture.SM100, deep_gemm=False))


def experts_of(w13: str, w2: str) -> ExpertWeights:
    leading, dtype = (len(COUNTS),), BF16
    return ExpertWeights(
        layer="model.layers.3.mlp",
        w13=random_weight(
            *(FORMS[w13], 2 * INTERMEDIATE, HIDDEN),
            num_parts=2,
            leading=leading,
            seed=1,
            float_dtype=dtype,
        ),
        w2=random_weight(
            *(FORMS[w2], HIDDEN, INTERMEDIATE),
            leading=leading,
            seed=2,
            float_dtype=dtype,
        ),
        num_local_experts=len(COUNTS),
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
    )


def as_nvfp4(tokens: DispatchedTokens, global_scale: float) -> DispatchedTokens:
    """As an exchange quantises them."""
    rows, scales = quantise_nvfp4(tokens.rows, global_scale)
    stated = DispatchFormat(
        dtype=DispatchDtype.NVFP4,
        scale_layout=ScaleLayout.PER_BLOCK_16,
        scale_format=ScaleFormat.E4M3,
        global_scale=global_scale,
        row_layout=tokens.format.row_layout,
        mode=tokens.format.mode,
        alignment=tokens.format.alignment,
    )
    return replace(tokens, rows=rows, scales=scales, format=stated)


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Of two results, as a share of their size."""
    assert found.isfinite().all()
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


CLOSE = 1e-2
"""Where both round in the same places.

A sum next to the edge of a bfloat16 falls to its other side now and then, and the fp4 code made of
it likewise, by up to a third of its value: at most one code in a thousand.
"""

ONE_ROUNDING = 6e-2
"""Where the rows between the products have one rounding to bfloat16 more or fewer.

Of values between 2 and 3, whose codes are 1 apart, 2 * 2.5 * 2**-8 are so near the edge that a
rounding takes them over: the root of that share is 0.14, of which the values are the 2.5-fold.
"""
ROUNDED_OTHERWISE = frozenset({("weights", "nvfp4"), ("float", "nvfp4"), ("fp8", "nvfp4")})


def check(tokens: DispatchedTokens, experts: ExpertWeights, most: float = CLOSE) -> None:
    def apply(
        tokens: DispatchedTokens, experts: ExpertWeights, out_dtype: torch.dtype
    ) -> torch.Tensor:
        return quantized_moe_apply(PRODUCTS, tokens, experts, out_dtype)

    found = defined(with_poison(apply)(tokens, experts, BF16), tokens)
    wanted = defined(reference.quantized_moe_apply(tokens, experts, BF16), tokens)
    assert distance(found, wanted) < most


@pytest.mark.parametrize(("w13", "w2"), PAIRS)
@pytest.mark.parametrize("layout", ["grouped", "aligned to less", "masked"])
def test_experts_in_every_pair_of_schemes(w13: str, w2: str, layout: str) -> None:
    most = ONE_ROUNDING if (w13, w2) in ROUNDED_OTHERWISE else CLOSE
    check(layouts(random_rows(COUNTS, HIDDEN))[layout], experts_of(w13, w2), most)


@pytest.mark.parametrize("w2", ["nvfp4", "fp8"])
@pytest.mark.parametrize(
    "layout", ["grouped, counts on the device", "grouped, ends", "aligned", "masked, large slots"]
)
def test_rows_that_arrive_as_nvfp4(layout: str, w2: str) -> None:
    tokens = as_nvfp4(layouts(random_rows(COUNTS, HIDDEN))[layout], 2e-3)
    check(tokens, experts_of("nvfp4", w2))


@pytest.mark.parametrize("layout", ["grouped", "aligned to less", "masked"])
def test_rows_that_deep_gemm_wants_elsewhere_are_moved(layout: str) -> None:
    """w2 is DeepGEMM's, whose groups begin at multiples of 128; w13 takes its rows there, too."""
    runtime = runtime_of(Architecture.SM100)
    products = BlackwellProducts(runtime, "deep_gemm")
    leading = (len(COUNTS),)
    powers = replace(FORMS["fp8"], scale_format=ScaleFormat.UE8M0)
    experts = ExpertWeights(
        layer="model.layers.3.mlp",
        w13=random_weight(FORMS["nvfp4"], 256, 128, num_parts=2, leading=leading, seed=1),
        w2=random_weight(powers, 128, 128, leading=leading, seed=2),
        num_local_experts=len(COUNTS),
        hidden_size=128,
        intermediate_size=128,
    )
    tokens = as_nvfp4(layouts(random_rows(COUNTS, 128))[layout], 2e-3)
    found = defined(quantized_moe_apply(products, tokens, experts, BF16), tokens)
    wanted = defined(reference.quantized_moe_apply(tokens, experts, BF16), tokens)
    assert distance(found, wanted) < CLOSE


def test_nobody_has_a_row() -> None:
    tokens = layouts(random_rows([0, 0, 0], HIDDEN))["masked"]
    out = quantized_moe_apply(PRODUCTS, tokens, experts_of("nvfp4", "nvfp4"), BF16)
    assert out.shape == (3, 8, HIDDEN)


def test_each_half_keeps_its_own_global_scale() -> None:
    """A tenfold scale of up alone is a tenfold result: nothing is shared with gate."""
    experts = experts_of("nvfp4", "float")
    assert experts.w13.global_scale is not None
    factor = torch.tensor([1.0, 8.0])
    larger = replace(
        experts, w13=replace(experts.w13, global_scale=experts.w13.global_scale * factor)
    )
    tokens = layouts(random_rows(COUNTS, HIDDEN))["grouped"]
    small, large = (
        defined(quantized_moe_apply(PRODUCTS, tokens, one, BF16), tokens)
        for one in (experts, larger)
    )
    # A power of two changes no rounding.
    assert torch.equal(large, small * 8)


@pytest.mark.parametrize("form", ["nvfp4", "weights"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("parts", [1, 3])
def test_projections(form: str, bias: bool, parts: int) -> None:
    linear = LinearWeight(
        layer="model.layers.0.self_attn.qkv",
        stored=random_weight(FORMS[form], 3 * 48, 80, num_parts=parts, seed=4),
        bias=torch.randn(3 * 48, generator=torch.Generator().manual_seed(0)).to(BF16)
        if bias
        else None,
        out_features=3 * 48,
        in_features=80,
    )
    rows = torch.cat(random_rows([7], 80))
    prepared = prepare_linear_weight(PRODUCTS, linear)
    found = quantized_linear(PRODUCTS, rows, prepared, BF16)
    wanted = reference_linear.quantized_linear(rows, linear, BF16)
    # The weights-only reference rounds its weights to bfloat16, and nothing here does.
    assert distance(found, wanted) < 2.0**-8
    assert torch.equal(found, quantized_linear(PRODUCTS, rows, linear, BF16)), "prepared or not"


def request(**changes: object) -> ExpertLayerRequest:
    values: dict[str, object] = {
        "role": ModelRole.MAIN,
        "layer": "model.layers.3.mlp",
        "scheme_w13": WeightScheme.NVFP4,
        "scheme_w2": WeightScheme.NVFP4,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "hidden_size": 256,
        "intermediate_size": 128,
        "compute_dtype": BF16,
        "num_local_experts": 8,
        "static_input": True,
    }
    return ExpertLayerRequest(**{**values, **changes})  # type: ignore[arg-type]


def test_what_multiplies_is_named() -> None:
    method = PRODUCTS.support(request()).method
    assert method is not None
    assert method.accepted == (DispatchDtype.NVFP4, DispatchDtype.BF16)
    assert method.runner == "triton (fp4 units)"
    method = PRODUCTS.support(request(static_input=False)).method
    assert method is not None
    assert method.accepted == (DispatchDtype.BF16,)
    assert "no scale for the input" in method.runner


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"intermediate_size": 120}, "no multiple of 16"),
        ({"compute_dtype": torch.float32}, "the compute dtype is torch.float32"),
        ({"scheme_w2": WeightScheme.W8A8}, "w2: its weight is stored as w8a8"),
    ],
)
def test_what_is_refused_is_named(changes: dict[str, object], reason: str) -> None:
    answer = PRODUCTS.support(request(**changes))
    assert not answer.ok
    assert reason in answer.reason


def test_a_weight_that_nothing_multiplies_is_refused() -> None:
    # 24 columns: one block of 16 and a half.
    stored = replace(
        random_weight(FORMS["nvfp4"], 32, 32), weight=torch.zeros(32, 12, dtype=torch.uint8)
    )
    with pytest.raises(BackendUnusableError, match="no multiple of 16"):
        PRODUCTS.of(stored)


def test_the_stored_values_are_held_once() -> None:
    stored = experts_of("nvfp4", "weights")
    w13, w2 = PRODUCTS.of(stored.w13), PRODUCTS.of(stored.w2)
    assert isinstance(w13, Nvfp4Product)
    assert isinstance(w2, Nvfp4WeightOnlyProduct)
    assert w13.weight.values.data_ptr() == stored.w13.weight.data_ptr()
    assert w2.weight.values.data_ptr() == stored.w2.weight.data_ptr()
