"""How weights lie in the device's memory: transposed, in tiles, in words along N."""

# E_l local experts, N rows and K columns of a stored weight, G groups of columns.

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.nn.functional as F

from mortise.formats.integer import pack_int4_bytes, unpack_int4

if TYPE_CHECKING:
    from collections.abc import Mapping

FRACTAL_NZ: Final = 29
"""Number of the format of tiles."""

_LOW_WORD: Final = (1 << 32) - 1

# Tiles are 16 rows of 32 bytes; of other dtypes the grouped product takes no tiles.
_TILE_ROWS: Final = 16
_TILE_COLUMNS: Final[Mapping[torch.dtype, int]] = MappingProxyType(
    {torch.int8: 32, torch.bfloat16: 16, torch.float16: 16}
)


def fits_tiles(weight_KN: torch.Tensor) -> bool:
    """Whether ``[..., K, N]`` is made of whole tiles.

    Others the operators refuse, those of a single row or column among them.
    """
    columns_of_tile = _TILE_COLUMNS.get(weight_KN.dtype)
    if columns_of_tile is None:
        return False
    rows, columns = weight_KN.shape[-2:]
    return not rows % _TILE_ROWS and not columns % columns_of_tile


def in_tiles(torch_npu: Any, weight_KN: torch.Tensor, *, wanted: bool) -> torch.Tensor:
    """Store ``[..., K, N]`` in tiles where that is wanted and possible.

    Returns:
        The same numbers in the same shape; nothing may slice, copy or transpose them any more.
    """
    if not (wanted and fits_tiles(weight_KN)):
        return weight_KN
    tiled = torch_npu.npu_format_cast(weight_KN, FRACTAL_NZ)
    assert isinstance(tiled, torch.Tensor)
    return tiled


def transposed(weight_NK: torch.Tensor) -> torch.Tensor:
    """``[..., N, K]`` to ``[..., K, N]`` in memory of its own."""
    return weight_NK.transpose(-1, -2).contiguous()


def int4_values(packed: torch.Tensor, num_groups: int, group_size: int) -> torch.Tensor:
    """The values of a stored int4 weight, each group of columns padded with zeros.

    Args:
        packed: int32 ``[..., N, K/8]``, packed along K.
        num_groups: G.
        group_size: columns that a group is to have, at least K/G.

    Returns:
        int8 ``[..., N, G * group_size]``.
    """
    return pad_groups(unpack_int4(packed), num_groups, group_size)


def padded_group(columns: int, num_groups: int, operator_group: int) -> int:
    """Columns of a group that was padded to whole groups of the size that an operator takes."""
    return -(-(columns // num_groups) // operator_group) * operator_group


def pad_groups(values: torch.Tensor, num_groups: int, group_size: int) -> torch.Tensor:
    """Pad each of G groups of the last dimension with zeros to ``group_size``.

    Zeros in rows and weights alike add nothing to a product.
    """
    padding = group_size - values.shape[-1] // num_groups
    if not padding:
        return values
    return F.pad(values.unflatten(-1, (num_groups, -1)), (0, padding)).flatten(-2)


def int4_words(torch_npu: Any, values_NK: torch.Tensor, *, tiles: bool) -> torch.Tensor:
    """Pack int4 ``[..., N, K]`` along N as the operators read it.

    Tiles are made of bytes and the words seen in them afterwards: tiles made of int32 words have
    another width, which is not that of int4.

    Args:
        torch_npu: the operators.
        values_NK: int8 in -8..7; N is a multiple of 8.
        tiles: store in tiles where possible.

    Returns:
        int32 ``[..., K, N/8]``.
    """
    bytes_KN = pack_int4_bytes(transposed(values_NK), -1)
    return in_tiles(torch_npu, bytes_KN, wanted=tiles).view(torch.int32)


def scale_words(scale: torch.Tensor) -> torch.Tensor:
    """Float32 scales as the operators of int4 weights take them: their bits in int64."""
    return scale.float().contiguous().view(torch.int32).to(torch.int64) & _LOW_WORD


def columns_last(scale_NG: torch.Tensor) -> torch.Tensor:
    """Copy scales ``[..., N, G]`` to ``[..., G, N]``, or ``[..., N]`` where G is 1, in float32."""
    scale_GN = scale_NG.float().transpose(-1, -2).clone(memory_format=torch.contiguous_format)
    return scale_GN.squeeze(-2) if scale_GN.shape[-2] == 1 else scale_GN
