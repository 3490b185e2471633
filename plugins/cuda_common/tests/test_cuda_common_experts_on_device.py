"""Experts and projections on a real GPU: the cases of the emulated chip, as DeepGEMM compares."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from plugins.cuda_common.tests.expert_cases import (
    FORMS,
    TILED,
    UNEVEN,
    Sizes,
    arrivals,
    calc_diff,
    defined,
    grouped,
    layouts,
    quantised,
    random_experts,
    random_rows,
)
from tests.fixtures.scheme_storages import random_weight

from mortise.errors import BackendUnusableError
from mortise.plugin import BindContext, LinearWeight, ModelRole, ScaleFormat, StoredWeight
from mortise.reference import moe as reference_moe
from mortise.reference import projections as reference_linear
from mortise.testing.poison import poison_undefined_rows
from mortise_cuda_common import moe
from mortise_cuda_common.chip import Architecture
from mortise_cuda_common.experts import prepare_expert_weights
from mortise_cuda_common.linear import prepare_linear_weight, quantized_linear
from mortise_cuda_common.loading import load_runtime
from mortise_cuda_common.options import CommonOptions
from mortise_cuda_common.products.select import Products

if TYPE_CHECKING:
    from mortise.plugin import DispatchedTokens, ExpertWeights

pytestmark = pytest.mark.device

CLOSE = 1e-3
"""The largest ``calc_diff`` that DeepGEMM's own tests let through."""
AGAIN = 6 * 2.0**-10
"""The same where rows or weights were quantised once more; see the tests of the emulated chip."""
COUNTS = [5, 0, 130]
bf16 = torch.bfloat16
every_form = pytest.mark.parametrize("form", FORMS)


@pytest.fixture(scope="module", params=["triton", "deep_gemm"])
def products(request: pytest.FixtureRequest) -> Products:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    context = BindContext(role=ModelRole.MAIN, device="cuda", engine_version="0")
    options = CommonOptions(runner=request.param, indexer="triton")
    every = tuple(Architecture)
    try:
        runtime = load_runtime("cuda", every, context, options, every[0])
    except BackendUnusableError as error:
        pytest.skip(f"{error.what} ({error.remedy})")
    return Products(runtime, request.param)


def is_requantised(products: Products, *forms: str) -> bool:
    chip, runner = products.runtime.chip, products.runner
    return runner == "deep_gemm" and chip.architecture.is_blackwell and "fp8" in forms


def there(stored: StoredWeight, device: torch.device) -> StoredWeight:
    scale = None if stored.scale is None else stored.scale.to(device)
    return replace(stored, weight=stored.weight.to(device), scale=scale)


def applied(
    products: Products, tokens: DispatchedTokens, experts: ExpertWeights, out_dtype: torch.dtype
) -> torch.Tensor:
    """On the device, from and to the memory of the host; undefined rows are poison."""
    device, poisoned = products.runtime.device, poison_undefined_rows(tokens)
    moved = replace(
        poisoned,
        rows=poisoned.rows.to(device),
        scales=None if poisoned.scales is None else poisoned.scales.to(device),
        group_list=poisoned.group_list.to(device),
    )
    weights = replace(experts, w13=there(experts.w13, device), w2=there(experts.w2, device))
    prepared = prepare_expert_weights(products, weights)
    return moe.quantized_moe_apply(products, moved, prepared, out_dtype).cpu()


@every_form
@pytest.mark.parametrize("other", FORMS)
def test_any_two_schemes_in_every_layout(products: Products, form: str, other: str) -> None:
    experts = random_experts(form, other)
    for plain in layouts(random_rows([*COUNTS[:2], 8], TILED.hidden)).values():
        for tokens in arrivals(experts, plain):
            got = defined(applied(products, tokens, experts, bf16), tokens)
            expected = reference_moe.quantized_moe_apply(tokens, experts, bf16)
            is_again = is_requantised(
                products, form, other, "fp8" if tokens.scales is not None else ""
            )
            assert got.isfinite().all()
            assert calc_diff(got, defined(expected, tokens)) < (AGAIN if is_again else CLOSE)


@every_form
@pytest.mark.parametrize("sizes", [UNEVEN, Sizes(384, 40, 3), Sizes(1024, 512, 3)], ids=str)
def test_other_sizes(products: Products, form: str, sizes: Sizes) -> None:
    experts = random_experts(form, form, sizes)
    try:
        products.of(experts.w13), products.of(experts.w2)
    except BackendUnusableError as error:
        pytest.skip(error.what)
    tokens = grouped(random_rows(COUNTS, sizes.hidden), behind=5)
    got = defined(applied(products, tokens, experts, bf16), tokens)
    expected = defined(reference_moe.quantized_moe_apply(tokens, experts, bf16), tokens)
    is_again = is_requantised(products, form)
    assert calc_diff(got, expected) < (AGAIN if is_again else CLOSE)


def test_float32_experts(products: Products) -> None:
    experts = random_experts("float", "float", dtype=torch.float32)
    for tokens in layouts(
        random_rows([*COUNTS[:2], 8], TILED.hidden, dtype=torch.float32)
    ).values():
        got = defined(applied(products, tokens, experts, torch.float32), tokens)
        expected = reference_moe.quantized_moe_apply(tokens, experts, torch.float32)
        torch.testing.assert_close(got, defined(expected, tokens), rtol=1e-4, atol=1e-4)


def test_what_cannot_wait_for_the_host_does_not(products: Products) -> None:
    """A graph is captured only of what never asks the device for a number."""
    device = products.runtime.device
    experts = random_experts("fp8 powers", "fp8 powers")
    weights = replace(experts, w13=there(experts.w13, device), w2=there(experts.w2, device))
    prepared = prepare_expert_weights(products, weights)
    tokens = quantised(
        layouts(random_rows([5, 0, 3], TILED.hidden))["masked, large slots"], ScaleFormat.UE8M0
    )
    assert tokens.scales is not None
    moved = replace(
        tokens,
        rows=tokens.rows.to(device),
        scales=tokens.scales.to(device),
        group_list=tokens.group_list.to(device),
    )
    first = moe.quantized_moe_apply(products, moved, prepared, bf16)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = moe.quantized_moe_apply(products, moved, prepared, bf16)
    replayed.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(defined(replayed.cpu(), tokens), defined(first.cpu(), tokens))


@pytest.mark.parametrize("form", sorted(set(FORMS) - {"float"}))
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("rows", [1, 17, 300])
def test_projections(products: Products, form: str, with_bias: bool, rows: int) -> None:
    device = products.runtime.device
    stored = random_weight(FORMS[form], 256, 512, num_parts=2)
    bias = torch.randn(256).to(bf16) if with_bias else None
    linear = LinearWeight(
        layer="o_proj", stored=stored, bias=bias, out_features=256, in_features=512
    )
    plain = torch.randn(rows, 512, generator=torch.Generator().manual_seed(3)).to(bf16)
    moved = replace(
        linear, stored=there(stored, device), bias=None if bias is None else bias.to(device)
    )
    prepared = prepare_linear_weight(products, moved)
    got = quantized_linear(products, plain.to(device), prepared, bf16).cpu()
    expected = reference_linear.quantized_linear(plain, linear, bf16)
    assert calc_diff(got, expected) < (AGAIN if is_requantised(products, form) else CLOSE)
