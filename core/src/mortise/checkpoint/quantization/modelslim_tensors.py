"""Tensors of ModelSlim's quantised modules, and what each of them becomes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from mortise.checkpoint.placement import Placement, StoredForm
from mortise.checkpoint.quantization.conversions import (
    QUANTISE_ANEW,
    check,
    offset_of,
    require_zero,
    scale_of,
    two_stage_scale_of,
    unpack_rows,
    values_of,
    words_from_bytes,
    words_from_rows,
)
from mortise.checkpoint.quantization.modelslim_scale_bias import (
    agreeing_with_scale_bias,
    scale_bias_form,
)
from mortise.checkpoint.quantization.stored_modules import FLOATS
from mortise.errors import QuantizationConfigError
from mortise.spec.weights import WeightScheme

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from mortise.checkpoint.placement import Conversion, Read
    from mortise.checkpoint.tensors import StoredTensor
    from mortise.spec.weights import StoredWeight

VALUES_PER_WORD: Final = 8
OFFSET_DTYPES: Final = (*FLOATS, torch.int8, torch.int32, torch.int64)
SCALAR: Final = StoredForm(shapes=((1,), ()), dtypes=FLOATS)


def dynamic_placements(
    module: str, target: StoredWeight, leaves: Mapping[str, StoredTensor]
) -> Iterator[Placement]:
    """Values and scales where the input is quantised as it comes.

    Weights of W4A8 hold two output rows to a byte, those of old versions and of W4A4 one value.
    Old versions quantise W4A8 in two stages: a scale for the row times one for each group.

    Args:
        module: its name.
        target: views to fill.
        leaves: the tensors it has.
    """
    weight, scales = f"{module}.weight", scale_placement(module, target, leaves)
    if target.scheme is WeightScheme.W8A8:
        yield Placement(weight, target.weight)
    else:
        yield int4_placement(module, target, leaves, scales)
    yield scales


def int4_placement(
    module: str,
    target: StoredWeight,
    leaves: Mapping[str, StoredTensor],
    scales: Placement,
) -> Placement:
    """Values of int4, compared with the ``scale_bias`` that newer versions store.

    Args:
        module: its name.
        target: views to fill.
        leaves: the tensors it has.
        scales: where its scales go.
    """
    weight, bias = f"{module}.weight", f"{module}.scale_bias"
    assert target.scale is not None and scales.convert is not None
    rows, columns = target.scale.shape[0], VALUES_PER_WORD * target.weight.shape[1]
    packed = is_packed(target, leaves)
    stored_rows = rows // 2 if packed else rows
    convert = words_from_rows if packed else words_from_bytes(weight)
    also = {}
    if target.scheme is WeightScheme.W4A8 and "scale_bias" in leaves:
        also[bias] = scale_bias_form(rows, columns)
        scale_of_stored = scales.convert
        convert = agreeing_with_scale_bias(
            bias,
            convert,
            values=unpack_rows if packed else lambda stored: stored.view(torch.int8),
            scale=lambda read: scale_of_stored(read(scales.name), read),
            two_stages="weight_scale_second" in leaves,
        )
    return Placement(
        weight,
        target.weight,
        stored=StoredForm(shapes=((stored_rows, columns),), dtypes=(torch.int8, torch.uint8)),
        convert=convert,
        also=also,
    )


def scale_placement(
    module: str, target: StoredWeight, leaves: Mapping[str, StoredTensor]
) -> Placement:
    """Scales of one stage or of two, once the offsets beside them have been found to be zero.

    Args:
        module: its name.
        target: views to fill.
        leaves: the tensors it has.
    """
    scale, second = f"{module}.weight_scale", f"{module}.weight_scale_second"
    assert target.scale is not None
    rows, groups = target.scale.shape
    packed = is_packed(target, leaves)
    values = values_of(f"{module}.weight", unpack_rows if packed else None)
    offsets = offset_forms(module, leaves)
    if "weight_scale_second" in leaves:
        return Placement(
            scale,
            target.scale,
            stored=row_scales(rows),
            convert=two_stage_scale_of(
                scale, second, target.scale.shape, values=values, zero_offsets=tuple(offsets)
            ),
            also={second: StoredForm(shapes=((rows, groups),), dtypes=FLOATS), **offsets},
        )
    return Placement(
        scale,
        target.scale,
        stored=row_scales(rows, groups),
        convert=scale_of(scale, target.scale.shape, values=values, zero_offsets=tuple(offsets)),
        also=offsets,
    )


def static_placements(
    module: str, target: StoredWeight, leaves: Mapping[str, StoredTensor]
) -> Iterator[Placement]:
    """Values, scales and the input's scale and offset where all of them are fixed beforehand.

    ``deq_scale`` is the weight's scale times the input's. ``quant_bias`` is what the offset adds to
    every product, with the bias where there is one: it follows from the others, and is compared.

    Args:
        module: its name.
        target: views to fill.
        leaves: the tensors it has.
    """
    assert target.scale is not None
    assert target.input_scale is not None and target.input_offset is not None
    rows = target.scale.shape[0]
    names = StaticNames(module, leaves)
    per_row = ((rows,), (rows, 1))
    yield Placement(
        names.weight,
        target.weight,
        convert=agreeing_with_bias(names),
        also={names.bias: StoredForm(shapes=per_row, dtypes=(torch.int32,))},
    )
    along = offset_forms(module, leaves)
    if "weight_scale" in leaves:
        along[names.weight_scale] = row_scales(rows)
    yield Placement(
        names.product,
        target.scale,
        stored=StoredForm(shapes=per_row, dtypes=(torch.float32, torch.int64)),
        convert=weight_scale_of(names, along),
        also=along,
    )
    yield Placement(
        names.input_scale,
        target.input_scale,
        stored=SCALAR,
        convert=scale_of(names.input_scale, target.input_scale.shape),
    )
    yield Placement(
        names.input_offset,
        target.input_offset,
        stored=StoredForm(shapes=SCALAR.shapes, dtypes=OFFSET_DTYPES),
        convert=offset_of(names.input_offset, target.input_offset.shape),
    )


class StaticNames:
    """Names of the tensors of a module that is quantised statically.

    Args:
        module: its name.
        leaves: the tensors it has.
    """

    def __init__(self, module: str, leaves: Mapping[str, StoredTensor]) -> None:
        self.weight = f"{module}.weight"
        self.product = f"{module}.deq_scale"
        self.bias = f"{module}.quant_bias"
        self.input_scale = f"{module}.input_scale"
        self.input_offset = f"{module}.input_offset"
        self.weight_scale = f"{module}.weight_scale"
        self.float_bias = f"{module}.bias" if "bias" in leaves else None


def weight_scale_of(names: StaticNames, along: Mapping[str, StoredForm]) -> Conversion:
    """The weight's scale, which is stored times the input's.

    Args:
        names: of the module's tensors.
        along: offsets that have to be zero and, in old versions, the weight's scale itself.
    """

    def convert(stored: torch.Tensor, read: Read) -> torch.Tensor:
        product = float_bits(names.product, stored).reshape(-1, 1)
        scale = product / read(names.input_scale).float().reshape(1, 1)
        check(names.product, scale, values_of(names.weight), read)
        for name in along:
            if name == names.weight_scale:
                require_close(name, read(name).float().reshape(-1, 1), scale)
            else:
                require_zero(name, read(name))
        return scale

    return convert


def agreeing_with_bias(names: StaticNames) -> Conversion:
    """The values, once the integer bias has been found to follow from them and the offset.

    ``quant_bias = round(bias / deq_scale - sum_k(weight) * input_offset)``, in float32.
    (``msmodelslim/core/quant_service/modelslim_v1/save/ascendv1.py``, ``on_w8a8_static``.)
    """

    def convert(stored: torch.Tensor, read: Read) -> torch.Tensor:
        offset = read(names.input_offset).float().reshape(1)
        expected = -(stored.sum(dim=1, dtype=torch.int64).float() * offset)
        if names.float_bias is not None:
            product = float_bits(names.product, read(names.product)).reshape(-1)
            expected = read(names.float_bias).float() / product + expected
        found = read(names.bias).reshape(-1).double()
        # One for the rounding; float32 sums of that size are coarser than one.
        wrong = (found - expected.round().double()).abs() > 1 + expected.abs() * 2.0**-22
        if bool(wrong.any()):
            first = int(wrong.nonzero()[0])
            raise QuantizationConfigError(
                f"tensor {names.bias} differs from what weight and input_offset make of it in"
                f" {int(wrong.sum())} of {len(found)} rows, the first {first}:"
                f" {int(found[first])} instead of {int(expected[first].round())}",
                expected="round(bias / deq_scale - sum of the row's weights * input_offset)",
                remedy=QUANTISE_ANEW,
            )
        return stored

    return convert


def float_bits(name: str, stored: torch.Tensor) -> torch.Tensor:
    """float32 numbers, also where their bits are the lower half of int64 words.

    Raises:
        QuantizationConfigError: an upper half says something too.
    """
    if stored.dtype != torch.int64:
        return stored.float()
    low, high = stored.flatten().view(torch.int32).unflatten(0, (-1, 2)).unbind(1)
    if bool((high != 0).any()):
        raise QuantizationConfigError(
            f"tensor {name} holds more than the 32 bits of a float in int64 words",
            expected="float32, or its bits in the lower half of int64 words",
            remedy="write the scales as float32",
        )
    bits: torch.Tensor = low.contiguous().view(torch.float32)
    return bits


def require_close(name: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    """Require two scales of the same weight to agree but for rounding.

    Raises:
        QuantizationConfigError: they do not.
    """
    if not torch.allclose(found, expected, rtol=1e-5, atol=0.0):
        raise QuantizationConfigError(
            f"scale {name} is not deq_scale / input_scale",
            expected="one scale for the weight, in both ways of writing it",
            remedy=QUANTISE_ANEW,
        )


def is_packed(target: StoredWeight, leaves: Mapping[str, StoredTensor]) -> bool:
    """Whether a byte holds two output rows: W4A8 where the rows are not as many as the scales."""
    assert target.scale is not None
    weight = leaves.get("weight")
    rows = None if weight is None else weight.shape[0]
    return target.scheme is WeightScheme.W4A8 and rows != target.scale.shape[0]


def row_scales(rows: int, groups: int = 1) -> StoredForm:
    """Scales of rows, or of groups of their columns."""
    flat = ((rows,),) if groups == 1 else ()
    return StoredForm(shapes=((rows, groups), *flat), dtypes=FLOATS)


def offset_forms(module: str, leaves: Mapping[str, StoredTensor]) -> dict[str, StoredForm]:
    """The offsets of the weight that the module has; all of them are to be zero."""
    return {
        f"{module}.{leaf}": StoredForm(shapes=(leaves[leaf].shape,), dtypes=OFFSET_DTYPES)
        for leaf in ("weight_offset", "weight_offset_second")
        if leaf in leaves
    }
