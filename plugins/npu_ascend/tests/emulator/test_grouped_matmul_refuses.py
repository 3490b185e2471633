"""What grouped products refuse, in the words of the device's own errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mortise_npu_ascend.emulator import EmulatedNpu, Generation, install

OLDER = (Generation.A2, Generation.A3)
E, M, K, N = 2, 4, 256, 64
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
Arguments = dict[str, Any]


@pytest.fixture(params=Generation)
def npu(request: pytest.FixtureRequest) -> EmulatedNpu:
    return install(request.param)


def of_rows(dtype: torch.dtype) -> torch.Tensor:
    """Rows; int32 is int4 words."""
    return torch.zeros(M, K // 8 if dtype == torch.int32 else K, dtype=dtype)


def of_weights(dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(E, K, N // 8 if dtype == torch.int32 else N, dtype=dtype)


def arguments(x: torch.dtype, weight: torch.dtype, /, **given: Any) -> Arguments:
    common: Arguments = {
        "x": [of_rows(x)],
        "weight": [of_weights(weight)],
        "group_list": torch.tensor([1, M]),
        "split_item": 2,
        "group_type": 0,
    }
    return common | given


def floats(**given: Any) -> Arguments:
    return arguments(torch.bfloat16, torch.bfloat16, **given)


def a8w8(**given: Any) -> Arguments:
    scales: Arguments = {
        "scale": [torch.ones(E, N, dtype=torch.bfloat16)],
        "per_token_scale": [torch.ones(M)],
        "output_dtype": torch.bfloat16,
    }
    return arguments(torch.int8, torch.int8, **(scales | given))


def a4w4(**given: Any) -> Arguments:
    scales: Arguments = {
        "scale": [torch.ones(E, N, dtype=torch.int64)],
        "per_token_scale": [torch.ones(M)],
        "output_dtype": torch.bfloat16,
    }
    return arguments(torch.int32, torch.int32, **(scales | given))


def a8w4(**given: Any) -> Arguments:
    scales: Arguments = {
        "scale": [torch.ones(E, 1, N, dtype=torch.int64)],
        "per_token_scale": [torch.ones(M)],
        "bias": [torch.zeros(E, N)],
        "group_list": torch.tensor([1, M - 1]),
        "group_list_type": 1,
        "output_dtype": torch.bfloat16,
    }
    return arguments(torch.int8, torch.int32, **(scales | given))


def a16w4(**given: Any) -> Arguments:
    scale = torch.ones(E, N, dtype=torch.bfloat16)
    return arguments(torch.bfloat16, torch.int32, **({"antiquant_scale": [scale]} | given))


def refused(npu: EmulatedNpu, given: Arguments, words: str) -> None:
    with pytest.raises(RuntimeError, match="emulated Ascend") as caught:
        npu.npu_grouped_matmul(**given)
    assert words in str(caught.value)


def taken(npu: EmulatedNpu, given: Arguments) -> torch.Tensor:
    (result,) = npu.npu_grouped_matmul(**given)
    return result


PAIRS = {
    **{(dtype, dtype): floats() for dtype in FLOATS},
    (torch.int8, torch.int8): a8w8(),
    (torch.int8, torch.int32): a8w4(),
    (torch.int32, torch.int32): a4w4(),
    **{
        (dtype, weight): {
            "antiquant_scale": [torch.ones(E, N, dtype=dtype)],
            "antiquant_offset": [torch.ones(E, N, dtype=dtype)],
        }
        for dtype in (torch.bfloat16, torch.float16)
        for weight in (torch.int8, torch.int32)
    },
}
"""What else goes with rows and weights of two dtypes; a pair that is not here goes with nothing."""


@pytest.mark.parametrize("weight", [*FLOATS, torch.int8, torch.int32])
@pytest.mark.parametrize("x", [*FLOATS, torch.int8, torch.int32])
def test_every_pair_of_dtypes(npu: EmulatedNpu, x: torch.dtype, weight: torch.dtype) -> None:
    """A5 takes no int4 rows; its int4 weights with int8 rows have a test of their own."""
    newest = npu.chip.generation is Generation.A5
    given = PAIRS.get((x, weight))
    if given is None or (x == torch.int32 and newest):
        refused(npu, arguments(x, weight), "there is no matching x dtype DT_")
    elif not (newest and (x, weight) == (torch.int8, torch.int32)):
        operands = {"x": [of_rows(x)], "weight": [of_weights(weight)]}
        assert taken(npu, arguments(x, weight) | given | operands).shape == (M, N)


def test_int8_rows_never_meet_bf16_weights(npu: EmulatedNpu) -> None:
    """The failure in the field: a quantised model, an unquantised draft."""
    words = (
        "In op [aclnnGroupedMatmulV5], the data types of [x, weight...] are mismatched, the reason "
        "is: [there is no matching x dtype DT_INT8 and weight dtype DT_BFLOAT16 pattern. Supported "
        "scenarios include A8W8 quant, A8W4 weight quant, A4W4 quant, A16W8 antiquant, A16W4 "
        "antiquant and non-quant]"
    )
    refused(npu, arguments(torch.int8, torch.bfloat16), words)
    refused(
        npu,
        arguments(torch.int8, torch.bfloat16, per_token_scale=[torch.ones(M)]),
        "call aclnnGroupedMatmulV5 failed, error code is 161002, EZ1001",
    )


def test_the_same_of_tiled_weights() -> None:
    npu = install("A2")
    tiled = npu.npu_format_cast(of_weights(torch.bfloat16), npu.Format.FRACTAL_NZ)
    refused(
        npu,
        arguments(torch.int8, torch.bfloat16, weight=[tiled]),
        "x dtype DT_INT8 and weight dtype DT_BFLOAT16 do not match with required dtype when",
    )
    refused(
        npu,
        arguments(torch.int8, torch.bfloat16, weight=[tiled]),
        "Only supported scenarios: A8W8 quant, non-quant BF16/FP16, A8W4 weight quant, A4W4 quant "
        "and A16W4 antiquant]",
    )


def test_a5_refuses_int4_rows() -> None:
    refused(install("A5"), a4w4(), "no matching x dtype DT_INT4 and weight dtype DT_INT4 pattern")


def test_a5_says_that_float8_is_not_emulated() -> None:
    given = arguments(torch.float8_e4m3fn, torch.float8_e4m3fn)
    with pytest.raises(NotImplementedError, match="is not emulated"):
        install("A5").npu_grouped_matmul(**given)
    refused(install("A2"), given, "no matching x dtype DT_FLOAT8_E4M3FN")


WORD, BF16, FP32 = torch.int64, torch.bfloat16, torch.float32
FP16, INT8, INT32 = torch.float16, torch.int8, torch.int32


def scaled(scale: torch.dtype, out: torch.dtype | None, *, by_row: bool) -> Arguments:
    given = a8w8(scale=[torch.ones(E, N).to(scale)], output_dtype=out)
    return given if by_row else given | {"per_token_scale": None}


@pytest.mark.parametrize("out", [BF16, FP16, None])
@pytest.mark.parametrize("scale", [BF16, FP32, WORD, FP16])
def test_scales_of_rows_fix_the_result(
    npu: EmulatedNpu, scale: torch.dtype, out: torch.dtype | None
) -> None:
    accepted = {(BF16, BF16), (FP32, FP16)}
    if npu.chip.generation is Generation.A5:
        accepted.add((FP32, BF16))
    given = scaled(scale, out, by_row=True)
    if (scale, out) in accepted:
        assert taken(npu, given).dtype == out
    else:
        refused(npu, given, "are not supported when A8W8 per-token quant")
        refused(npu, given, "scale[0] dtype DT_")


@pytest.mark.parametrize("out", [BF16, FP16, None])
@pytest.mark.parametrize("scale", [BF16, FP32, WORD, FP16])
def test_scales_of_columns_alone(
    npu: EmulatedNpu, scale: torch.dtype, out: torch.dtype | None
) -> None:
    accepted = {(BF16, BF16), (FP32, FP16), (WORD, None)}
    if npu.chip.generation is Generation.A5:
        accepted |= {(FP32, BF16), (WORD, BF16), (WORD, FP16)}
    given = scaled(scale, out, by_row=False)
    if (scale, out) in accepted:
        assert taken(npu, given).dtype == (out or INT8)
    else:
        refused(npu, given, "are not supported when A8W8 per-channel quant")


FLOAT_BIASES = {
    Generation.A2: {(BF16, FP32), (FP16, FP16), (FP32, FP32)},
    Generation.A3: {(BF16, FP32), (FP16, FP16), (FP32, FP32)},
    Generation.A5: {(BF16, FP32), (BF16, BF16), (FP16, FP16), (FP16, FP32), (FP32, FP32)},
}


@pytest.mark.parametrize("bias", [FP32, BF16, FP16, INT32])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_bias_by_generation(npu: EmulatedNpu, dtype: torch.dtype, bias: torch.dtype) -> None:
    given = arguments(dtype, dtype, bias=[torch.zeros(E, N, dtype=bias)])
    if (dtype, bias) in FLOAT_BIASES[npu.chip.generation]:
        assert taken(npu, given).dtype == dtype
    else:
        refused(npu, given, "[bias dtype should be ")


@pytest.mark.parametrize("bias", [FP32, BF16, FP16, INT32])
def test_a_bias_of_int8_by_generation(npu: EmulatedNpu, bias: torch.dtype) -> None:
    accepted = {INT32, BF16} | ({FP32} if npu.chip.generation is Generation.A5 else set())
    given = a8w8(bias=[torch.zeros(E, N, dtype=bias)])
    if bias in accepted:
        taken(npu, given)
    else:
        refused(npu, given, "[bias dtype should be ")


EVERYWHERE = [
    (floats(split_item=4), "Invalid value of split_item [4], which should only be one of 0/1/2/3."),
    (floats(group_type=None), "Requires manual passing group_type, current is None."),
    (floats(group_type=1), "group_type only supports -1, 0 and 2, but got 1"),
    (floats(group_list=None), "[groupListOptional] must not be nullptr."),
    (
        floats(group_list=torch.tensor([1, 4], dtype=torch.int32)),
        "Invalid dtype: Only int64 is supported for groupList.",
    ),
    (
        floats(group_list=torch.tensor([1.0, 4.0])),
        "Invalid dtype: Only int64 is supported for groupList.",
    ),
    (floats(group_list_type=3), "[groupListType] is not supported, got [3]."),
    (a8w8(group_list_type=2), "[dim num should be 2 when groupListType is 2]"),
    (floats(group_list=torch.tensor([1, 2, 4])), "should be equal to weight dim 0 2"),
    (floats(group_list=torch.tensor([1, 5])), "must not exceed x shape (4)"),
    (floats(group_list=torch.tensor([3, 2])), "group_list gives expert 1 of 2 -1 rows"),
    (floats(act_type=3), "[actType] is not supported, got [3]."),
    (floats(act_type=5), "Constraint:[activation is not supported]."),
    (floats(output_dtype=FP32), "Constraint:[y dtype should be DT_BFLOAT16]."),
    (floats(output_dtype=torch.float64), "is not supported for now."),
    (floats(scale=[torch.ones(E, N)]), "when non-quant, [scale] must be nullptr."),
    (floats(per_token_scale=[torch.ones(M)]), "when non-quant, [per_token_scale] must be nullptr."),
    (floats(activation_input=[torch.ones(1)]), "activationInputOptional must be nullptr."),
    (floats(x=[]), "The number of x and weight should be greater than 0"),
    (floats(x=[torch.zeros(M, 8, dtype=BF16)]), "should be equal with K of weight 256"),
    (floats(x=[torch.zeros(1, M, K, dtype=BF16)]), "dim num should be 2 in this case"),
    (floats(split_item=0), "[splitItem should be 2 or 3]"),
    (floats(group_type=-1), "[splitItem should be 0 or 1]"),
    (floats(group_type=-1, split_item=0), "[groupListOptional] must be nullptr."),
    (floats(group_type=-1, split_item=0, group_list=None), "tensor list lengths are mismatched"),
    (a8w8(scale=None), "when A8W8 quant, [scale] must not be nullptr."),
    (
        a8w8(output_dtype=FP32),
        "[y dtype should be DT_BFLOAT16 or DT_FLOAT16 or DT_INT32 or DT_INT8]",
    ),
    (
        a8w8(per_token_scale=[torch.ones(M, 1)]),
        "PerTokenScaleOptional dim num must be 1 when x is single tensor",
    ),
    (
        a8w8(per_token_scale=[torch.ones(M - 1)]),
        "MDim[3] of perTokenScaleOptional should be equal with MDim[4] of x.",
    ),
    (a8w8(per_token_scale=[torch.ones(M, dtype=FP16)]), "the data type of [per_token_scale]"),
    (
        a8w8(scale=[torch.ones(E, N // 2, dtype=BF16)]),
        "NDim[32] of scale should be equal with NDim[64] of weight.",
    ),
    (a8w8(scale=[torch.ones(E, 1, N, dtype=BF16)]), "scale Dim must be 2, but now is 3."),
    (a8w8(scale=[torch.ones(E + 1, N, dtype=BF16)]), "scale batch size[3] should be equal"),
    (
        a8w8(weight=[torch.zeros(K, N, dtype=INT8)] * 2),
        "when A8W8 quant with separated x, weight or y",
    ),
    (a8w8(offset=[torch.ones(E, N)]), "when A8W8 quant, [offset] must be nullptr."),
    (
        a8w8(group_type=2, weight=[torch.zeros(K, N, dtype=INT8)]),
        "when groupType == 2(split-K), [A8W8 quant] is not supported.",
    ),
    (a16w4(antiquant_scale=None), "when A16W4 antiquant, [antiquant_scale] must not be nullptr."),
    (
        a16w4(antiquant_scale=[torch.ones(E, N, dtype=FP16)]),
        "[antiquant_scale dtype should be DT_BFLOAT16]",
    ),
    (
        arguments(BF16, INT8),
        "when A16W8 antiquant, [antiquant_scale] must not be nullptr.",
    ),
]


@pytest.mark.parametrize(("given", "words"), EVERYWHERE)
def test_refused_by_every_generation(npu: EmulatedNpu, given: Arguments, words: str) -> None:
    refused(npu, given, words)


BY_OLDER = [
    (
        a4w4(bias=[torch.zeros(E, N)]),
        "when A4W4 quant, [bias] is not supported. Constraint:[bias must be nullptr]",
    ),
    (
        a4w4(offset=[torch.zeros(E, 1, N)]),
        "when A4W4 quant, [offset] is not supported. Constraint:[offset must be nullptr]",
    ),
    (a4w4(scale=None), "when A4W4 quant, [scale] must not be nullptr"),
    (a4w4(scale=[torch.ones(E, N)]), "when A4W4 quant, the data type of [scale] is not supported"),
    (a4w4(output_dtype=None), "when A4W4 quant, the data type of [y] is not supported"),
    (a4w4(scale=[torch.ones(E, 3, N, dtype=WORD)]), "but k is 256 and G is 3"),
    (
        a4w4(scale=[torch.ones(E, 256, N, dtype=WORD)]),
        "per-group num k/G should be divisible by 2",
    ),
    (
        a4w4(weight=[torch.zeros(E, N, K // 8, dtype=INT32).mT]),
        "a transposed weight must be in FRACTAL_NZ",
    ),
    (a8w4(bias=None), "when A8W4 weight quant, [bias] must not be nullptr."),
    (a8w4(bias=[torch.zeros(E, N, dtype=INT32)]), "[bias dtype should be DT_FLOAT]"),
    (a8w4(per_token_scale=None), "[per_token_scale] must not be nullptr."),
    (
        a8w4(scale=[torch.ones(E, 1, N)]),
        "[scale] is not supported, got [DT_FLOAT]",
    ),
    (a8w4(scale=[torch.ones(E, 2, N, dtype=WORD)]), "multiple of quantGroupSize, which is 256"),
    (a8w4(weight=[torch.zeros(E, N, K // 8, dtype=INT32).mT]), "weight cannot be transposed"),
    (
        a8w4(
            x=[torch.zeros(M, 18688, dtype=INT8)],
            weight=[torch.zeros(E, 18688, 1, dtype=INT32)],
            scale=[torch.ones(E, 1, 8, dtype=WORD)],
            bias=[torch.zeros(E, 8)],
        ),
        "k should be less than or equal to 18432",
    ),
    (
        a8w4(offset=[torch.zeros(E, 1, N)], per_token_scale=[torch.ones(M, 1)]),
        "when A8W4 asymmetric quant, the data type of [y] is not supported, got [DT_BFLOAT16]",
    ),
    (arguments(BF16, INT8, antiquant_scale=[torch.ones(E, N, dtype=BF16)]), "[antiquant_offset]"),
]


@pytest.mark.parametrize("generation", OLDER)
@pytest.mark.parametrize(("given", "words"), BY_OLDER)
def test_refused_by_older_chips(generation: Generation, given: Arguments, words: str) -> None:
    refused(install(generation), given, words)


def a5_a8w4(npu: EmulatedNpu, **given: Any) -> Arguments:
    npu.config.allow_internal_format = True
    tiled = npu.npu_format_cast(of_weights(INT32), npu.Format.FRACTAL_NZ)
    scales: Arguments = {
        "weight": [tiled],
        "bias": None,
        "scale": [torch.ones(E, N)],
        "antiquant_scale": [torch.ones(E, 1, N, dtype=FP16)],
    }
    return a8w4(**(scales | given))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"weight": [of_weights(INT32)]}, "weight must be in FRACTAL_NZ"),
        ({"antiquant_scale": None}, "[antiquant_scale] must not be nullptr"),
        ({"scale": [torch.ones(E, N, dtype=WORD)]}, "the data type of [scale] is not supported"),
        (
            {"antiquant_scale": [torch.ones(E, 4, N, dtype=FP16)]},
            "antiquantGroupSize should be one of (128, 192, 256, 512)",
        ),
        ({"bias": [torch.zeros(E, N, dtype=INT32)]}, "[bias dtype should be DT_FLOAT]"),
    ],
)
def test_refused_by_a5_of_int4_weights(given: Arguments, words: str) -> None:
    npu = install("A5")
    assert taken(npu, a5_a8w4(npu)).dtype == BF16
    refused(npu, a5_a8w4(npu, **given), words)


def test_a5_takes_words_and_assist_bias_for_a_mistake() -> None:
    refused(install("A5"), a8w4(), "weight must be in FRACTAL_NZ")


def test_a5_limits_groups_and_pairs() -> None:
    npu = install("A5")
    refused(
        npu,
        a16w4(antiquant_scale=[torch.ones(E, 16, N, dtype=BF16)]),
        "antiquantGroupSize should be one of [32, 64, 128, 256], but k is 256 and G is 16",
    )
    pairs = torch.tensor([[0, 1], [1, 2]])
    refused(npu, floats(group_list=pairs, group_list_type=2), "[sparse groupListType]")
    taken(npu, a8w8(group_list=pairs, group_list_type=2))


def test_a5_refuses_activations_that_its_kernels_lack() -> None:
    refused(install("A5"), a8w8(act_type=5, output_dtype=INT32), "[activeType] is not supported")


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [(BF16, (E, 24, 16)), (FP16, (E, 16, 24)), (INT8, (E, 16, 16)), (INT32, (E, 16, 4))],
)
def test_tiles_divide_the_weight(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    npu = install("A2")
    tiled = npu.npu_format_cast(torch.zeros(shape, dtype=dtype), npu.Format.FRACTAL_NZ)
    x = torch.zeros(M, shape[1], dtype=INT8 if dtype == INT32 else dtype)
    refused(
        npu,
        arguments(dtype, dtype, x=[x], weight=[tiled]),
        "should be divisible by the following shape: INT8:[16, 32],BF16/FP16[16, 16],INT4[16, 64]",
    )


def test_the_longest_inner_axis(npu: EmulatedNpu) -> None:
    for size, is_taken in ((65535, True), (65536, False)):
        given = arguments(
            INT8,
            INT8,
            x=[torch.zeros(1, size, dtype=INT8)],
            weight=[torch.zeros(1, size, 1, dtype=INT8)],
            group_list=torch.tensor([1]),
            output_dtype=INT32,
        )
        if is_taken:
            taken(npu, given)
        else:
            refused(npu, given, "should less or equal to 65535, but now is 65536")


def test_the_most_groups(npu: EmulatedNpu) -> None:
    """1024 in one weight, 128 weights in a list."""
    x = torch.zeros(1, 8, dtype=FP16)
    for experts, stacked, is_taken in (
        (1024, True, True),
        (1025, True, False),
        (128, False, True),
        (129, False, False),
    ):
        weight = torch.zeros(experts, 8, 8, dtype=FP16)
        given = arguments(
            FP16,
            FP16,
            x=[x],
            weight=[weight] if stacked else list(weight),
            group_list=torch.ones(experts, dtype=torch.int64),
        )
        if is_taken:
            taken(npu, given)
        else:
            refused(npu, given, "should be less than or equal to")


def test_none_in_a_list_is_torchs_own_error(npu: EmulatedNpu) -> None:
    """The wording that users reported."""
    with pytest.raises(RuntimeError, match=r"Optional\[List\[Tensor\]\]' for argument 'per_token"):
        npu.npu_grouped_matmul(**a8w8(per_token_scale=[None]))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"group_list": [2, 1]}, "should be non-negative and incremental"),
        ({"group_list": [4]}, "its length not 1"),
        ({"group_list": [2, 4], "group_type": 0}, "group_type must be nullptr"),
        ({"group_list": [2, 4], "group_list_type": 1}, "is cumulative"),
        ({"group_list": [2, 4], "per_token_scale": [torch.ones(M)]}, "must be nullptr"),
    ],
)
def test_the_overload_of_numbers_takes_less(npu: EmulatedNpu, given: Arguments, words: str) -> None:
    operands = {"x": [of_rows(BF16)], "weight": list(of_weights(BF16)), "split_item": 2}
    refused(npu, operands | given, words)


def test_nothing_was_computed_before_a_refusal() -> None:
    """A strict chip overwrites the rows of int4 weights; not of a call that it refuses."""
    x = torch.from_numpy(np.arange(M * K).reshape(M, K).astype(np.int8))
    before = x.clone()
    refused(install("A2", strict=True), a8w4(x=[x], bias=None), "[bias]")
    assert torch.equal(x, before)
