"""A quantised projection is the product that its scheme defines, however its weight is prepared."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fixtures import scheme_definitions as definitions
from tests.fixtures.scheme_storages import QUANTISED, STORAGES, Storage, random_weight

from mortise.errors import ContractError
from mortise.reference.products.integer import EXACT_COLUMNS, integer_sums
from mortise.reference.projections import prepare_linear_weight, quantized_linear
from mortise.spec.weights import LinearWeight, StoredWeight, WeightScheme

if TYPE_CHECKING:
    from collections.abc import Callable

LAYER = "model.layers.0.self_attn.o_proj"
# Several blocks of 128 with partial ones at both edges, of every part too.
N, K, PARTS = 320, 272, 2
DTYPES = (torch.float32, torch.bfloat16)

every_storage = pytest.mark.parametrize("storage", STORAGES, ids=str)


def linear_of(stored: StoredWeight, bias: torch.Tensor | None = None) -> LinearWeight:
    packed = {torch.int32: 8, torch.uint8: 2}.get(stored.weight.dtype, 1)
    return LinearWeight(
        layer=LAYER,
        stored=stored,
        bias=bias,
        out_features=stored.weight.shape[0],
        in_features=stored.weight.shape[1] * packed,
    )


def normal(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weight_of(storage: Storage, dtype: torch.dtype = torch.float32) -> StoredWeight:
    return random_weight(storage, N, K, num_parts=PARTS, float_dtype=dtype)


def assert_defined(
    got: torch.Tensor, rows: torch.Tensor, stored: StoredWeight, bias: float = 0.0
) -> None:
    """As the float64 definition says, up to what rounding float32 sums may change."""
    exact, magnitudes = definitions.product(rows, stored)
    exact, magnitudes = exact + bias, magnitudes + abs(bias)
    bound = definitions.rounding_bound(exact, magnitudes, rows.shape[1], got.dtype)
    assert (abs(got.double().numpy() - exact) <= bound).all()


@every_storage
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [None, 0.75])
def test_the_definition(storage: Storage, dtype: torch.dtype, bias: float | None) -> None:
    stored, rows = weight_of(storage, dtype), normal(7, K, dtype=dtype)
    bias_N = None if bias is None else torch.full((N,), bias, dtype=dtype)
    got = quantized_linear(rows, linear_of(stored, bias_N), dtype)
    assert got.dtype is dtype
    assert_defined(got, rows, stored, bias or 0.0)


@pytest.mark.parametrize("storage", QUANTISED, ids=str)
def test_the_sums_are_rounded_once(storage: Storage) -> None:
    linear, rows = linear_of(weight_of(storage), torch.full((N,), 0.01)), normal(5, K)
    precise = quantized_linear(rows, linear, torch.float32)
    rounded = quantized_linear(rows, linear, torch.bfloat16)
    assert torch.equal(rounded, precise.to(torch.bfloat16))


@every_storage
@pytest.mark.parametrize("dtype", DTYPES)
def test_preparing_changes_nothing_and_is_idempotent(storage: Storage, dtype: torch.dtype) -> None:
    linear, rows = linear_of(weight_of(storage, dtype)), normal(4, K, dtype=dtype)
    once = prepare_linear_weight(linear)
    twice = prepare_linear_weight(once)
    expected = quantized_linear(rows, linear, dtype)
    for prepared in (once, twice):
        assert prepared.stored is linear.stored
        assert torch.equal(quantized_linear(rows, prepared, dtype), expected)


@every_storage
def test_preparing_again_follows_an_update_of_the_stored_tensors(storage: Storage) -> None:
    linear, rows = linear_of(weight_of(storage)), normal(4, K)
    prepared = prepare_linear_weight(linear)
    update = random_weight(storage, N, K, num_parts=PARTS, seed=5)
    expected = quantized_linear(rows, linear_of(update), torch.float32)
    assert not torch.equal(quantized_linear(rows, prepared, torch.float32), expected)
    for name in ("weight", "scale", "global_scale", "input_scale", "input_offset"):
        tensor = getattr(prepared.stored, name)
        if tensor is not None:
            tensor.copy_(getattr(update, name))
    again = prepare_linear_weight(prepared)
    assert torch.equal(quantized_linear(rows, again, torch.float32), expected)


@pytest.mark.parametrize("storage", QUANTISED, ids=str)
def test_what_is_prepared_is_storage_of_its_own(storage: Storage) -> None:
    """Clearing the stored tensors must not reach it: a weight update is not half seen."""
    linear, rows = prepare_linear_weight(linear_of(weight_of(storage))), normal(4, K)
    before = quantized_linear(rows, linear, torch.float32)
    linear.stored.weight.zero_()
    if linear.stored.scale is not None:
        linear.stored.scale.zero_()
    assert torch.equal(quantized_linear(rows, linear, torch.float32), before)


@every_storage
def test_rows_of_any_layout_and_number(storage: Storage) -> None:
    linear = prepare_linear_weight(linear_of(weight_of(storage)))
    rows = normal(6, 2 * K)[::2, ::2]
    before = rows.clone()
    assert not rows.is_contiguous()
    got = quantized_linear(rows, linear, torch.float32)
    assert torch.equal(got, quantized_linear(rows.contiguous(), linear, torch.float32))
    assert got.untyped_storage().data_ptr() != rows.untyped_storage().data_ptr()
    assert torch.equal(rows, before)
    nothing = quantized_linear(rows[:0], linear, torch.bfloat16)
    assert nothing.shape == (0, N)
    assert nothing.dtype is torch.bfloat16


@pytest.mark.parametrize("storage", QUANTISED, ids=str)
def test_rows_of_zeros_give_the_bias(storage: Storage) -> None:
    linear = linear_of(weight_of(storage), torch.full((N,), 0.5))
    got = quantized_linear(torch.zeros(2, K), linear, torch.float32)
    # A static offset is added and taken off again, exactly.
    assert torch.equal(got, torch.full((2, N), 0.5))


def step_of(storage: Storage, rows: np.ndarray, stored: StoredWeight) -> np.ndarray:
    """How far quantising may move each element of the rows, at most."""
    amax = abs(rows).max(axis=1, keepdims=True)
    match storage.scheme:
        case WeightScheme.FP8_BLOCK:  # half of the last of three bits; half of the least subnormal
            scale = amax / 448 * (2 if str(storage).endswith("powers") else 1)
            return np.maximum(abs(rows) / 16, scale * 2.0**-10)
        case WeightScheme.W8A8 | WeightScheme.W4A8:
            return amax / 254
        case WeightScheme.W4A4:
            return amax / 14
        case WeightScheme.NVFP4 if stored.input_scale is not None:
            # Half of 4 to 6, or what lies past 6 where the block's scale was rounded down.
            least = float(stored.input_scale.max()) * 2.0**-9
            return amax / 6 * 1.0625 + least
        case _:
            return np.zeros_like(rows)


@pytest.mark.parametrize(
    "storage",
    [one for one in QUANTISED if one.scheme is not WeightScheme.W8A8 or not one.static_input],
    ids=str,
)
def test_it_is_near_the_product_of_the_dequantised_weight(storage: Storage) -> None:
    """A wrong scale, nibble or block would be far outside of what quantising the rows may move."""
    stored, rows = weight_of(storage), normal(9, K)
    got = quantized_linear(rows, linear_of(stored), torch.float32).double().numpy()
    x, w = rows.double().numpy(), definitions.weight(stored, torch.float32)
    step = np.broadcast_to(step_of(storage, x, stored), x.shape)
    bound = 1.01 * step @ abs(w).T
    assert (abs(got - x @ w.T) <= bound + 1e-4 * (abs(x) @ abs(w).T)).all()


@pytest.mark.parametrize("columns", [8, EXACT_COLUMNS, EXACT_COLUMNS + 1, 5 * EXACT_COLUMNS + 7])
@pytest.mark.parametrize("extreme", [False, True])
def test_integer_sums_are_exact(columns: int, extreme: bool) -> None:
    generator = torch.Generator().manual_seed(columns)
    low, high = (-128, -125) if extreme else (-128, 128)
    values = torch.randint(low, high, (3, columns), generator=generator)
    weight = torch.randint(low, high, (5, columns), generator=generator)
    got = integer_sums(values.float(), weight.float())
    assert torch.equal(got.long(), (values[:, None] * weight).sum(-1))
    # Torch's own product of int8 matrices, which accumulates in int32.
    product = torch._int_mm(values.to(torch.int8), weight.to(torch.int8).T)
    assert torch.equal(got.double(), product.double())


def test_large_sums_are_rounded_once_on_their_way_to_float32() -> None:
    """As a device converts its int32 accumulator."""
    columns = 3 * EXACT_COLUMNS
    weight = torch.full((1, columns), 127, dtype=torch.int8)
    stored = StoredWeight(scheme=WeightScheme.W8A8, weight=weight, scale=torch.ones(1, 1))
    rows = torch.full((1, columns), 127.0)
    rows[0, :3] = torch.tensor([126.0, 1.0, 1.0])
    exact = sum(int(value) * 127 for value in rows[0])
    assert exact > 2**24
    assert float(torch.tensor(exact, dtype=torch.float32)) != exact
    got = quantized_linear(rows, linear_of(stored), torch.float32)
    assert float(got) == float(torch.tensor(exact, dtype=torch.float32))


def test_blocks_of_float8_are_scaled_before_they_are_added() -> None:
    """Two levels: a large block does not swallow what the small ones add up to first."""
    ones = torch.ones(1, 256).to(torch.float8_e4m3fn)
    scale = torch.tensor([[1.0, 2.0**-20]])
    stored = StoredWeight(scheme=WeightScheme.FP8_BLOCK, weight=ones, scale=scale)
    got = quantized_linear(torch.full((1, 256), 448.0), linear_of(stored), torch.float32)
    assert float(got) == 448 * 128 * (1 + 2.0**-20)


def test_parts_keep_their_global_scales() -> None:
    """Gate and up under scales that differ by a factor that no e4m3 scale could take over."""
    stored = weight_of(Storage(WeightScheme.NVFP4, static_input=True))
    assert stored.global_scale is not None
    rows = normal(3, K)
    together = quantized_linear(rows, linear_of(stored), torch.float32)
    for part, scale in enumerate(stored.global_scale):
        half = replace(
            stored,
            weight=stored.weight.chunk(2)[part],
            scale=stored.scale.chunk(2)[part],  # type: ignore[union-attr]
            global_scale=scale[None],
            input_scale=stored.input_scale.amax()[None],  # type: ignore[union-attr]
            num_parts=1,
        )
        alone = quantized_linear(rows, linear_of(half), torch.float32)
        torch.testing.assert_close(together.chunk(2, dim=1)[part], alone, rtol=1e-5, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(STORAGES),
    st.integers(0, 4),
    st.integers(1, 5),
    st.integers(1, 12),
    st.integers(0, 2**16),
)
def test_any_shape(storage: Storage, tokens: int, half: int, blocks: int, seed: int) -> None:
    rows, columns = normal(tokens, 16 * blocks, seed=seed), 16 * blocks
    stored = random_weight(storage, 2 * half, columns, num_parts=2, seed=seed)
    got = quantized_linear(rows, prepare_linear_weight(linear_of(stored)), torch.float32)
    assert got.shape == (tokens, 2 * half)
    if tokens:
        assert_defined(got, rows, stored)


@every_storage
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.zeros(2, K, dtype=torch.int8), "torch.int8 rows met"),
        (torch.zeros(2, K, dtype=torch.float16), "torch.float16 rows met"),
        (torch.zeros(2, K + 8), f"rows of shape .2, {K + 8}. met a projection of {K} columns"),
        (torch.zeros(2, 1, K), "rows of shape"),
    ],
)
def test_rows_that_cannot_be_multiplied(storage: Storage, rows: torch.Tensor, message: str) -> None:
    with pytest.raises(ContractError, match=message) as caught:
        quantized_linear(rows, linear_of(weight_of(storage)), torch.float32)
    assert LAYER in caught.value.what


def test_float_rows_are_of_the_dtype_of_float_weights() -> None:
    linear = linear_of(weight_of(STORAGES[0], torch.bfloat16))
    with pytest.raises(ContractError, match=r"torch.float32 rows met float weights"):
        quantized_linear(torch.zeros(2, K), linear, torch.float32)


def _channel_wise(bits: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """What compressed-tensors makes of a row or an output channel: quantised and back."""
    from compressed_tensors.quantization import QuantizationArgs, fake_quantize

    args = QuantizationArgs(num_bits=bits, type="int", symmetric=True, strategy="channel")

    def there_and_back(x: torch.Tensor) -> torch.Tensor:
        scale = x.abs().amax(dim=-1, keepdim=True) / (2 ** (bits - 1) - 1)
        return fake_quantize(x, scale, torch.zeros_like(scale), args)

    return there_and_back


@pytest.mark.parametrize(("scheme", "bits"), [(WeightScheme.W8A8, 8), (WeightScheme.W4A16, 4)])
def test_int_weights_multiply_as_compressed_tensors_has_them(
    scheme: WeightScheme, bits: int
) -> None:
    from mortise.formats.weights import quantise_weight

    weight, rows = normal(24, 64) / 8, normal(5, 64, seed=3)
    theirs = _channel_wise(8)(rows) if scheme is WeightScheme.W8A8 else rows
    expected = F.linear(theirs, _channel_wise(bits)(weight))
    got = quantized_linear(rows, linear_of(quantise_weight(weight, scheme)), torch.float32)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("static_input", [True, False])
def test_nvfp4_weights_multiply_as_compressed_tensors_has_them(static_input: bool) -> None:
    from compressed_tensors.quantization import QuantizationArgs, fake_quantize
    from compressed_tensors.quantization.utils import generate_gparam

    from mortise.formats.weights import quantise_weight

    args = QuantizationArgs(
        num_bits=4, type="float", symmetric=True, strategy="tensor_group", group_size=16
    )

    def there_and_back(x: torch.Tensor, divisor: torch.Tensor) -> torch.Tensor:
        amax = x.unflatten(-1, (-1, 16)).abs().amax(-1)
        scale = (divisor * (amax / 6)).to(torch.float8_e4m3fn).float()
        return fake_quantize(x, scale, torch.zeros_like(scale), args, global_scale=divisor)

    weight, rows = normal(24, 64) / 8, normal(5, 64, seed=3)
    divisor = generate_gparam(rows.min(), rows.max())
    theirs = there_and_back(rows, divisor) if static_input else rows
    expected = F.linear(theirs, there_and_back(weight, generate_gparam(weight.min(), weight.max())))
    stored = quantise_weight(
        weight, WeightScheme.NVFP4, input_scale=1 / divisor.reshape(1) if static_input else None
    )
    got = quantized_linear(rows, linear_of(stored), torch.float32)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
