"""From stored tensors to those of a ``StoredWeight``, with every value checked on the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import torch

from mortise.errors import QuantizationConfigError, ScaleError
from mortise.formats.integer import from_offset_binary, pack_int4, unpack_int4, unpack_int4_bytes
from mortise.formats.nvfp4 import multiplier_from_divisor
from mortise.formats.scales import check_scale

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mortise.checkpoint.placement import Conversion, Read

QUANTISE_ANEW = "download the checkpoint again; if it is whole, quantise the model anew"

Values: TypeAlias = Callable[["Read"], torch.Tensor]
"""What scales multiply, read where a scale is zero and may be so only over zeros."""


def values_of(name: str, unpack: Callable[[torch.Tensor], torch.Tensor] | None = None) -> Values:
    """The values of a stored weight, one int8 to a value where ``unpack`` makes it so."""

    def values(read: Read) -> torch.Tensor:
        return read(name) if unpack is None else unpack(read(name))

    return values


def unpack_words(packed: torch.Tensor) -> torch.Tensor:
    """int4 values ``[N, K]`` of words whose nibbles hold value + 8."""
    return unpack_int4(from_offset_binary(packed))


def unpack_rows(packed: torch.Tensor) -> torch.Tensor:
    """int4 values ``[N, K]`` of bytes that hold two output rows each."""
    return unpack_int4_bytes(packed, -2)


def check(name: str, scale: torch.Tensor, values: Values | None, read: Read) -> None:
    """Require scales that are finite and positive, zero only over zeros.

    The values are read only where a scale is zero: they are the bulk of the checkpoint.

    Raises:
        ScaleError: naming the tensor.
    """
    needed = values is not None and bool((scale.float() == 0).any())
    under = values(read) if needed and values is not None else None
    check_scale(name, scale, scale.shape, values=under)


def scale_of(
    name: str,
    shape: Sequence[int],
    *,
    values: Values | None = None,
    zero_offsets: Sequence[str] = (),
) -> Conversion:
    """Stored scales as they are, in the shape of the target.

    Args:
        name: of the tensor of scales.
        shape: of the target.
        values: what is under them.
        zero_offsets: tensors that have to be zero, since the scheme has no offsets.
    """

    def convert(stored: torch.Tensor, read: Read) -> torch.Tensor:
        scale = stored.reshape(tuple(shape))
        check(name, scale, values, read)
        for offset in zero_offsets:
            require_zero(offset, read(offset))
        return scale

    return convert


def power_of_two_of(name: str, shape: Sequence[int], *, values: Values) -> Conversion:
    """Stored scales that are said to be powers of two."""
    plain = scale_of(name, shape, values=values)

    def convert(stored: torch.Tensor, read: Read) -> torch.Tensor:
        scale = plain(stored, read).float()
        mantissa, _ = scale.frexp()
        wrong = (mantissa != 0.5) & (scale != 0)
        if bool(wrong.any()):
            raise ScaleError(
                f"scale {name} holds {int(wrong.sum())} of {wrong.numel()} values that are no"
                f" powers of two, the first {float(scale[wrong][0]):g}",
                expected="powers of two, because scale_fmt is ue8m0",
                remedy="remove scale_fmt from quantization_config of config.json, and the scales"
                " are taken for what they are",
            )
        return scale

    return convert


def two_stage_scale_of(
    name: str,
    second: str,
    shape: Sequence[int],
    *,
    values: Values,
    zero_offsets: Sequence[str] = (),
) -> Conversion:
    """One scale for a row times one for each group of its columns."""
    first_stage = scale_of(name, (shape[0], 1), values=values, zero_offsets=zero_offsets)
    second_stage = scale_of(second, shape, values=values)

    def convert(stored: torch.Tensor, read: Read) -> torch.Tensor:
        return first_stage(stored, read).float() * second_stage(read(second), read).float()

    return convert


def multiplier_of(name: str, shape: Sequence[int]) -> Conversion:
    """The reciprocal of a stored divisor."""

    def convert(stored: torch.Tensor, _: Read) -> torch.Tensor:
        divisor = stored.reshape(tuple(shape)).float()
        check_scale(name, divisor, shape)
        multiplier = multiplier_from_divisor(divisor)
        check_scale(f"1 / {name}", multiplier, shape)
        return multiplier

    return convert


def offset_of(name: str, shape: Sequence[int]) -> Conversion:
    """A stored offset of the input, which may be any number."""

    def convert(stored: torch.Tensor, _: Read) -> torch.Tensor:
        offset = stored.reshape(tuple(shape)).float()
        if not bool(offset.isfinite().all()):
            raise ScaleError(
                f"offset {name} is not finite",
                expected="finite numbers",
                remedy=QUANTISE_ANEW,
            )
        return offset

    return convert


def words_from_offset_binary(stored: torch.Tensor, _: Read) -> torch.Tensor:
    """Two's complement of int32 words whose nibbles hold value + 8."""
    return from_offset_binary(stored)


def words_from_bytes(name: str) -> Conversion:
    """int32 words of int4 values that are stored one to a byte."""

    def convert(stored: torch.Tensor, _: Read) -> torch.Tensor:
        outside = (stored < -8) | (stored > 7)
        if bool(outside.any()):
            raise QuantizationConfigError(
                f"tensor {name} holds {int(outside.sum())} values outside -8..7,"
                f" the first {int(stored[outside][0])}",
                expected="int4 values, one to a byte, as the checkpoint says",
                remedy=QUANTISE_ANEW,
            )
        return pack_int4(stored)

    return convert


def words_from_rows(stored: torch.Tensor, _: Read) -> torch.Tensor:
    """int32 words along K of bytes that hold two output rows each."""
    return pack_int4(unpack_rows(stored))


def require_zero(name: str, offset: torch.Tensor) -> None:
    """Require a stored offset to be zero.

    Raises:
        QuantizationConfigError: it is not, so the weight is asymmetric.
    """
    if bool((offset != 0).any()):
        raise QuantizationConfigError(
            f"offset {name} is not zero",
            expected="symmetric weights, whose offsets are zero",
            remedy="quantise the model symmetrically",
        )
