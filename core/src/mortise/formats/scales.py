"""Whether scales can be used: the right shape, finite, positive."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
from torch.nn.functional import pad

from mortise.errors import ScaleError
from mortise.formats.fp8 import GROUP

if TYPE_CHECKING:
    from collections.abc import Sequence

# What is not sign, as a negative zero is zero: of two e2m1 codes, and of an e4m3 code.
_E2M1_MAGNITUDES: Final = 0x77
_E4M3_MAGNITUDE: Final = 0x7F


def check_scale(
    name: str, scale: torch.Tensor, shape: Sequence[int], *, values: torch.Tensor | None = None
) -> None:
    """Require scales that are finite and positive.

    A zero passes where ``values`` are given and all of those under it are zero: quantisers store
    such blocks.

    Args:
        name: the tensor's name in the checkpoint, for the message.
        scale: float32, bfloat16, float8_e4m3fn or float8_e8m0fnu.
        shape: what its shape has to be.
        values: what the scales multiply, as stored: e4m3 ``[..., N, K]`` with scales of blocks of
            128 x 128; int8 ``[..., N, K]``, packed int4 ``[..., N, K/8]`` or packed e2m1
            ``[..., N, K/2]`` with scales ``[..., N, G]`` of equal groups of columns.

    Raises:
        ScaleError: naming the tensor, how many scales are wrong, and the first of them.
    """
    if tuple(scale.shape) != tuple(shape):
        raise ScaleError(
            f"scale {name} has the shape {list(scale.shape)}",
            expected=f"shape {list(shape)}",
            remedy="check that the checkpoint is whole and its quantisation is the declared one",
        )
    problems = [
        problem
        for what, wrong in _wrong(scale, values)
        if (problem := _describe(what, wrong, scale))
    ]
    if problems:
        raise ScaleError(
            f"scale {name} is unusable: {problems[0]}",
            details=problems[1:],
            expected="finite, positive scales; zero only over values that are all zero",
            remedy="download the checkpoint again; if it is whole, quantise the model anew",
        )


def _wrong(
    scale: torch.Tensor, values: torch.Tensor | None
) -> tuple[tuple[str, torch.Tensor], ...]:
    """What can be wrong, and a mask of the scales that it is true of."""
    numbers = scale.float()
    zero = numbers == 0
    if values is not None and bool(zero.any()):
        zero &= _covers_nonzero(values, scale.shape)
    return (
        ("NaN", numbers.isnan()),
        ("infinite", numbers.isinf()),
        ("negative", numbers < 0),
        ("zero", zero),
    )


def _describe(what: str, wrong: torch.Tensor, scale: torch.Tensor) -> str | None:
    count = int(wrong.sum())
    if not count:
        return None
    first = wrong.nonzero()[0].tolist()
    shown = float(scale[tuple(first)].float())
    return f"{count} of {scale.numel()} values are {what}, the first at {first}: {shown:g}"


def _covers_nonzero(values: torch.Tensor, scale_shape: torch.Size) -> torch.Tensor:
    """Whether anything under each scale is not zero, in the shape of the scales."""
    assert values.ndim == len(scale_shape), "values have as many dimensions as their scales"
    nonzero = _nonzero(values)
    for dim in (-2, -1)[-values.ndim :]:
        nonzero = _any_in_blocks(nonzero, dim, scale_shape[dim], values.dtype)
    return nonzero


def _nonzero(values: torch.Tensor) -> torch.Tensor:
    match values.dtype:
        case torch.uint8:
            return values & _E2M1_MAGNITUDES != 0
        case torch.float8_e4m3fn:
            return values.view(torch.uint8) & _E4M3_MAGNITUDE != 0
        case _:
            return values != 0


def _any_in_blocks(nonzero: torch.Tensor, dim: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """Combine ``dim`` into ``count`` blocks: of 128 where e4m3 says so, else equal ones."""
    size = nonzero.shape[dim]
    block = size // count
    if dtype == torch.float8_e4m3fn and -(-size // GROUP) == count:
        block = GROUP
    missing = block * count - size
    assert 0 <= missing < block, f"{count} scales cannot share {size} values equally"
    padded = pad(nonzero, (0, missing) if dim == -1 else (0, 0, 0, missing))
    blocks: torch.Tensor = padded.unflatten(dim, (count, block))
    return blocks.any(dim=dim)
