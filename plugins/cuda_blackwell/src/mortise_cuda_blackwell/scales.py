"""Block scales of batches as the vendor's grouped products index them."""

from __future__ import annotations

import torch

from mortise.formats.nvfp4 import swizzle_scales, unswizzle_scales

# A tile is 128 rows by 4 columns: 32 x 4 rows, of which neighbours are 16 bytes apart.
_TILE_ROWS = 32
_ROW_GROUPS = 4
_TILE_COLUMNS = 4


def to_tiles(scales_BMC: torch.Tensor) -> torch.Tensor:
    """Arrange e4m3 scales ``[B, M, C]`` in tiles, seen in the order that products index them.

    Rows and columns are padded with zeros to whole tiles of 128 by 4. In memory it is
    ``[B, M'/128, C'/4, 32, 4, 4]``, which torch calls ``SWIZZLE_32_4_4``.

    Returns:
        A view ``[32, 4, M'/128, 4, C'/4, B]`` in storage of its own.
    """
    batch, rows, columns = scales_BMC.shape
    return tiles_of(swizzle_scales(scales_BMC.view(torch.uint8)), batch, rows, columns).view(
        torch.float8_e4m3fn
    )


def tiles_of(flat: torch.Tensor, batch: int, num_rows: int, num_columns: int) -> torch.Tensor:
    """See scales that are in tiles already, of ``[B, M, C]``, in that order; a view."""
    row_tiles, column_tiles = -(-num_rows // 128), -(-num_columns // _TILE_COLUMNS)
    inner = (_TILE_ROWS, _ROW_GROUPS, _TILE_COLUMNS)
    return flat.view(batch, row_tiles, column_tiles, *inner).permute(3, 4, 1, 5, 2, 0)


def from_tiles(tiles: torch.Tensor, num_rows: int, num_columns: int) -> torch.Tensor:
    """Take e4m3 scales ``[B, M, C]`` out of what :func:`to_tiles` made of them."""
    flat = tiles.view(torch.uint8).permute(5, 2, 4, 0, 1, 3).flatten(1)
    return unswizzle_scales(flat, num_rows, num_columns).view(torch.float8_e4m3fn)
