"""How weights lie in the device's memory, judged by numpy and by the device's own operators."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plugins.npu_ascend.tests.balls import Chip
from plugins.npu_ascend.tests.experts import (
    FORMS,
    Sizes,
    on,
    plain_tokens,
    random_experts,
)
from tests.fixtures.scheme_storages import Storage, random_weight

from mortise.errors import BackendUnusableError
from mortise.formats.integer import pack_int4
from mortise.plugin import ReasonCode, StoredWeight, WeightScheme
from mortise_npu_ascend import layout
from mortise_npu_ascend.dispatch import Generation
from mortise_npu_ascend.groups import Groups
from mortise_npu_ascend.moe import quantized_moe_apply
from mortise_npu_ascend.products.base import quantise
from mortise_npu_ascend.products.floating import FloatProduct
from mortise_npu_ascend.products.fp16_range import LARGEST, shrinking
from mortise_npu_ascend.products.int4 import Int4Product
from mortise_npu_ascend.products.int4_by_int8 import Int4ByInt8Product
from mortise_npu_ascend.products.int4_made_int8 import Int4MadeInt8Product, split_scale
from mortise_npu_ascend.products.int8 import Int8Product
from mortise_npu_ascend.products.select import grouped_product
from mortise_npu_ascend.products.weight_only import WeightOnlyProduct
from mortise_npu_ascend.weights import PreparedExperts, prepare_expert_weights

if TYPE_CHECKING:
    from mortise_npu_ascend.products.base import Product
    from mortise_npu_ascend.vendor import Vendor

A2, A3, A5 = (Chip(generation) for generation in Generation)
ND, FRACTAL_NZ = 2, 29
bf16 = torch.bfloat16


def stored(form: str, rows: int, columns: int, experts: int = 2) -> StoredWeight:
    return random_weight(FORMS[form], rows, columns, leading=(experts,), seed=7, float_dtype=bf16)


def numbers(weight: torch.Tensor) -> np.ndarray:
    """int4 of packed words ``[..., K, N/8]``, lowest nibble first, as numpy unpacks them."""
    words = weight.numpy().astype(np.int64) & 0xFFFFFFFF
    nibbles = (words[..., None] >> (4 * np.arange(8))) & 15
    return np.where(nibbles > 7, nibbles - 16, nibbles).reshape(*words.shape[:-1], -1)


def stored_numbers(weight: StoredWeight) -> np.ndarray:
    """``[E, N, K]``, which the checkpoint packs along K in the same way."""
    return numbers(weight.weight)


def storage_format(loaded: Vendor, weight: torch.Tensor) -> int:
    return int(loaded.torch_npu.get_npu_format(weight))


@pytest.mark.parametrize(
    ("form", "chip", "kind"),
    [
        ("w4a8", A2, Int4ByInt8Product),
        ("w4a8", A5, Int4MadeInt8Product),
        ("w4a4", A2, Int4Product),
        ("w4a16", A2, WeightOnlyProduct),
        ("w4a16", A5, WeightOnlyProduct),
    ],
)
def test_int4_is_packed_along_the_output_rows(form: str, chip: Chip, kind: type) -> None:
    weight = stored(form, 64, 256)
    product = grouped_product(on(chip), weight)
    assert type(product) is kind
    assert product.weight.dtype is torch.int32
    assert product.weight.shape == (2, 256, 8)
    assert (numbers(product.weight) == stored_numbers(weight).swapaxes(1, 2)).all()


@settings(deadline=None, derandomize=True, max_examples=25)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_the_words_are_those_that_the_devices_packer_writes(k: int, n: int, seed: int) -> None:
    """``npu_convert_weight_to_int4pack``, which A2 and A3 have for one matrix at a time."""
    loaded = on(A2)
    generator = torch.Generator().manual_seed(seed)
    values_NK = torch.randint(-8, 8, (8 * n, k), dtype=torch.int8, generator=generator)
    words = layout.int4_words(loaded.torch_npu, values_NK, tiles=False)
    transposed = values_NK.T.contiguous().to(torch.int32)
    assert torch.equal(words, loaded.torch_npu.npu_convert_weight_to_int4pack(transposed))


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.floats(width=32, min_value=2.0**-126, max_value=2.0**127))
def test_scales_travel_as_their_bits_and_not_as_the_words_of_other_products(scale: float) -> None:
    words = layout.scale_words(torch.tensor([scale]))
    assert words.dtype is torch.int64
    assert words.item() == int(np.float32(scale).view(np.uint32))
    quant_param = on(A2).torch_npu.npu_trans_quant_param(torch.tensor([scale]))
    assert words.item() != quant_param.item()


@pytest.mark.parametrize("form", ["w4a8", "w4a8 grouped"])
def test_the_assist_bias_is_eight_times_the_sum_of_each_output_row(form: str) -> None:
    weight = stored(form, 64, 256)
    product = grouped_product(on(A2), weight)
    assert isinstance(product, Int4ByInt8Product)
    assert weight.scale is not None
    scale = np.repeat(weight.scale.double().numpy(), 256 // weight.scale.shape[-1], axis=-1)
    expected = 8 * (stored_numbers(weight) * scale).sum(axis=-1)
    np.testing.assert_allclose(product.assist_bias.numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("group_size", "padded", "groups"), [(0, 256, 1), (32, 256, 3), (96, 256, 1), (48, 256, 2)]
)
def test_groups_of_columns_are_padded_to_those_of_the_operator(
    group_size: int, padded: int, groups: int
) -> None:
    weight = random_weight(
        Storage(WeightScheme.W4A8, group_size=group_size), 64, 96, leading=(2,), seed=3
    )
    product = grouped_product(on(A2), weight)
    assert isinstance(product, Int4ByInt8Product)
    assert (product.group_size, product.num_groups) == (padded, groups)
    assert product.scale.shape == (2, groups, 64)
    laid_out = numbers(product.weight).reshape(2, groups, padded, 64)
    own = stored_numbers(weight).swapaxes(1, 2).reshape(2, groups, 96 // groups, 64)
    assert (laid_out[:, :, : 96 // groups] == own).all()
    assert not laid_out[:, :, 96 // groups :].any()


def test_large_groups_are_several_of_the_operator() -> None:
    weight = random_weight(
        Storage(WeightScheme.W4A8, group_size=384), 64, 768, leading=(2,), seed=3
    )
    product = grouped_product(on(A2), weight)
    assert isinstance(product, Int4ByInt8Product)
    assert weight.scale is not None
    expected = layout.scale_words(weight.scale).transpose(1, 2).repeat_interleave(2, dim=1)
    assert torch.equal(product.scale, expected)


def test_the_newest_chips_scales_are_split_into_a_factor_and_a_rest() -> None:
    scale = torch.tensor([[[0.5, 0.25, 0.03125]]])
    factor, rest = split_scale(scale)
    assert factor.dtype is torch.float16
    assert factor.tolist() == [[[15.875, 7.9375, 0.9921875]]]
    assert (8 * factor).max() == 127, "the largest int4 becomes the largest int8"
    torch.testing.assert_close(factor.float() * rest.unsqueeze(-1), scale)
    one, same = split_scale(scale[..., :1])
    assert (one.item(), same.item()) == (1.0, 0.5), "a single group stays what it is"


TILED = {"float": (32, 48), "w8a8": (64, 32), "w4a8": (64, 256), "w4a4": (64, 16)}


@pytest.mark.parametrize("form", TILED)
@pytest.mark.parametrize("chip", [A2, A3], ids=str)
def test_tiles_where_they_come_out_even(form: str, chip: Chip) -> None:
    rows, columns = TILED[form]
    even = stored(form, rows, columns)
    product: Product = grouped_product(on(chip), even)
    assert storage_format(on(chip), product.weight) == FRACTAL_NZ
    asked_not = grouped_product(on(chip, weight_format="nd"), even)
    assert storage_format(on(chip), asked_not.weight) == ND


@pytest.mark.parametrize(
    ("form", "rows", "columns"),
    [
        ("float", 1, 32),
        ("float", 24, 32),
        ("w8a8", 48, 32),
        ("w8a8", 32, 1),
        ("w8a8", 1, 16),
        ("w4a8", 48, 256),
        ("w4a4", 64, 8),
    ],
)
def test_no_tiles_where_they_would_be_padded_or_of_one_row(
    form: str, rows: int, columns: int
) -> None:
    product = grouped_product(on(A2), stored(form, rows, columns))
    assert storage_format(on(A2), product.weight) == ND


@pytest.mark.parametrize("form", ["float", "w8a8"])
def test_one_row_or_column_can_be_multiplied(form: str) -> None:
    for rows, columns in ((1, 32), (32, 1)):
        loaded = on(Chip(Generation.A2, strict=True))
        product = grouped_product(loaded, stored(form, rows, columns))
        plain = torch.ones(3, columns, dtype=bf16)
        taken = quantise(loaded.torch_npu, plain, product.takes)
        assert product.multiply(taken, Groups(torch.tensor([1, 2]))).shape == (3, rows)


def test_float32_weights_are_not_tiled_and_not_copied() -> None:
    weight = random_weight(FORMS["float"], 32, 48, leading=(2,))
    product = grouped_product(on(A2), weight)
    assert isinstance(product, FloatProduct)
    assert product.weight.data_ptr() == weight.weight.data_ptr()
    assert torch.equal(product.weight, weight.weight.transpose(1, 2))


@pytest.mark.parametrize("generation", Generation)
def test_scales_of_int8_products(generation: Generation) -> None:
    """bfloat16 where the device gives bfloat16 for no others, beside the stored ones."""
    weight = stored("w8a8", 64, 32)
    product = grouped_product(on(Chip(generation)), weight)
    assert isinstance(product, Int8Product)
    assert weight.scale is not None
    assert torch.equal(product.scale, weight.scale.squeeze(-1))
    wanted = torch.float32 if generation is Generation.A5 else bf16
    assert torch.equal(product.product_scale, product.scale.to(wanted))
    assert product.product_scale.dtype is wanted


@pytest.mark.parametrize("form", sorted(FORMS))
def test_preparing_again_gives_the_same_and_after_a_reload_the_new(form: str) -> None:
    sizes = Sizes(64, 32, 2)
    loaded = on(A2)
    experts, others = (random_experts(form, form, sizes, seed=seed) for seed in (0, 5))
    tokens = plain_tokens([2, 3], sizes.hidden)

    def results(prepared: object) -> torch.Tensor:
        return quantized_moe_apply(loaded, tokens, prepared, bf16)

    first = prepare_expert_weights(loaded, experts)
    assert torch.equal(results(first), results(prepare_expert_weights(loaded, first)))
    for ours, theirs in ((experts.w13, others.w13), (experts.w2, others.w2)):
        for name in ("weight", "scale"):
            if (tensor := getattr(ours, name)) is not None:
                tensor.copy_(getattr(theirs, name))
    again = prepare_expert_weights(loaded, first)
    expected = results(prepare_expert_weights(loaded, others))
    assert torch.equal(results(again), expected)
    assert isinstance(again.prepared, PreparedExperts)


def test_what_was_said_to_be_unserved_is_refused_by_name_when_it_comes() -> None:
    experts = random_experts("w8a8", "w8a8", Sizes())
    static = replace(experts, w2=replace(experts.w2, input_scale=torch.ones(3, 1)))
    with pytest.raises(BackendUnusableError, match="w2: its input has a static scale") as caught:
        prepare_expert_weights(on(A2), static)
    assert caught.value.reason is ReasonCode.REQUEST_UNSUPPORTED
    assert caught.value.what.startswith(f"layer {experts.layer}: ")


@settings(deadline=None, derandomize=True, max_examples=25)
@given(st.floats(min_value=1e-6, max_value=1e6), st.sampled_from([1, 2, 4]), st.integers(0, 99))
def test_scales_shrink_no_more_than_they_must(size: float, groups: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-8, 8, (2, 16, 64), dtype=torch.int8, generator=generator)
    scale = size * (0.5 + torch.rand(2, 16, groups, generator=generator))
    exponent = shrinking(values, scale, 7)
    spread = np.repeat(scale.double().numpy(), 64 // groups, axis=-1)
    most = 7 * (abs(values.numpy().astype(np.float64)) * spread).sum(axis=-1).max()
    assert most * 2.0**-exponent <= LARGEST * (1 + 1e-5)
    assert exponent == 0 or most * 2.0 ** -(exponent - 1) > LARGEST * (1 - 1e-5)


def test_weights_of_zeros_do_not_shrink() -> None:
    zeros = torch.zeros(2, 8, 8, dtype=torch.int8)
    assert shrinking(zeros, torch.ones(2, 8, 1), 7) == 0
    assert torch.equal(pack_int4(zeros), torch.zeros(2, 8, 1, dtype=torch.int32))
