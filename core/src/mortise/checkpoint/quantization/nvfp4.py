"""Tensors of float4 weights, which two dialects share but for names and direction of scales."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from mortise.checkpoint.placement import Placement, StoredForm
from mortise.checkpoint.quantization.conversions import scale_of, values_of
from mortise.errors import QuantizationConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from mortise.checkpoint.placement import Conversion
    from mortise.checkpoint.tensors import StoredTensor
    from mortise.spec.weights import StoredWeight

BLOCK: Final = 16
SCALAR: Final = StoredForm(shapes=((1,), ()), dtypes=(torch.float32,))


@dataclass(frozen=True, slots=True, kw_only=True)
class Nvfp4Names:
    """What a dialect calls its tensors.

    Args:
        weight: two values to a byte.
        global_scale: of the weight.
        input_scale: the global scale of the input.
        scalar: makes a multiplier of what either of them holds.
    """

    weight: str
    global_scale: str
    input_scale: str
    scalar: Callable[[str, Sequence[int]], Conversion]


def nvfp4_placements(module: str, names: Nvfp4Names, target: StoredWeight) -> Iterator[Placement]:
    """Values, scales of their blocks, and the global scales of weight and input."""
    weight, scale = f"{module}.{names.weight}", f"{module}.weight_scale"
    assert target.scale is not None and target.global_scale is not None
    yield Placement(weight, target.weight)
    yield Placement(
        scale,
        target.scale,
        convert=scale_of(scale, target.scale.shape, values=values_of(weight)),
    )
    scalars = {names.global_scale: target.global_scale, names.input_scale: target.input_scale}
    for leaf, place in scalars.items():
        if place is not None:
            name = f"{module}.{leaf}"
            yield Placement(name, place, stored=SCALAR, convert=names.scalar(name, place.shape))


def require_whole_blocks(leaves: Mapping[str, StoredTensor], weight: StoredTensor) -> None:
    """Require that the scales of blocks cover the packed columns, which come in pairs.

    Raises:
        QuantizationConfigError: naming the packed tensor.
    """
    scale = leaves.get("weight_scale")
    if scale is None or len(scale.shape) != 2 or len(weight.shape) != 2:
        return
    columns, blocks = 2 * weight.shape[1], scale.shape[1]
    if columns != BLOCK * blocks:
        raise QuantizationConfigError(
            f"tensor {weight.name} holds {columns} columns, its weight_scale {blocks} blocks of"
            f" {BLOCK}",
            expected=f"{BLOCK} columns to a scale, two to a byte",
            remedy="download the checkpoint again; if it is whole, its columns cannot be divided"
            " into blocks: leave the module unquantised",
        )
