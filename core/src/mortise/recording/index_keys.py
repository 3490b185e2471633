"""Recorded pages of index keys as another backend takes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mortise.formats.index_keys import quantise_index_keys
from mortise.recording.differences import difference
from mortise.spec.paged_mqa import IndexKeyDtype, IndexKeyPages

if TYPE_CHECKING:
    from mortise.backends import Ops

_SCALE_BYTES = 4


def served_keys(
    keys: torch.Tensor, scales: torch.Tensor | None, dtype: torch.dtype, ops: Ops
) -> tuple[IndexKeyPages, float, str]:
    """Pages in a key dtype that the backend serves.

    Args:
        keys: ``[P, S, D]`` as they were recorded.
        scales: float32 ``[P, S]`` of float8 keys, else None.
        dtype: compute dtype.
        ops: the backend's hooks.

    Returns:
        The pages on its device, the relative error of converting them, and a note of it.
    """
    recorded = IndexKeyDtype.COMPUTE if scales is None else IndexKeyDtype.FP8_E4M3
    served, device = ops.capabilities.index_key_dtypes, ops.capabilities.device
    if recorded in served:
        return _pages(keys, scales, device), 0.0, ""
    values = keys.float() if scales is None else keys.float() * scales.unsqueeze(-1)
    note = f"{recorded.value} keys were brought into {served[0].value} for it"
    if served[0] is IndexKeyDtype.COMPUTE:
        turned = values.to(dtype)
        error = difference(turned.float().flatten(0, 1), values.flatten(0, 1)).whole
        return _pages(turned, None, device), error, note
    own, own_scales = quantise_index_keys(values)
    back = own.float() * own_scales.unsqueeze(-1)
    error = difference(back.flatten(0, 1), values.flatten(0, 1)).whole
    return _pages(own, own_scales, device), error, note


def _pages(keys: torch.Tensor, scales: torch.Tensor | None, device: torch.device) -> IndexKeyPages:
    """Views of one block a page where there are scales, as the cache has them."""
    if scales is None:
        return IndexKeyPages(keys=keys.to(device))
    num_pages, size, dim = keys.shape
    # One page more, of what is no number: of a single page torch would forget how far pages are
    # apart, and a kernel that reads past the last one is to be seen.
    blocks = torch.full((num_pages + 1, size * (dim + _SCALE_BYTES)), 0xFF, dtype=torch.uint8)
    blocks[:-1, : size * dim] = keys.view(torch.uint8).flatten(1)
    blocks[:-1, size * dim :] = scales.contiguous().view(torch.uint8)
    blocks = blocks.to(device)
    own = blocks[:, : size * dim].unflatten(1, (size, dim)).view(torch.float8_e4m3fn)
    return IndexKeyPages(keys=own[:-1], scales=blocks[:, size * dim :].view(torch.float32)[:-1])
