"""Keys of the indexer in float8 e4m3 with one scale each, and the turn before they are rounded."""

from __future__ import annotations

from typing import Final

import torch

from mortise.formats.fp8 import E4M3_MAX, to_e4m3

SMALLEST_KEY_AMAX: Final = 1e-4
"""Keys of zeros, or nearly so, are scaled as if this was their largest magnitude."""


def quantise_index_keys(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise each key by its largest magnitude, with the rule of DeepGEMM's key cache.

    In float32: amax is at least 1e-4; scale = amax / 448; values = x * (1 / scale), saturating
    at 448 (``tests/test_attention.py`` of DeepGEMM, ``kv_cache_cast_to_fp8``).

    Args:
        keys: float32 or bfloat16 ``[..., D]``.

    Returns:
        float8_e4m3fn ``[..., D]`` and float32 scales ``[...]``.
    """
    values = keys.float()
    amax = values.abs().amax(dim=-1).clamp(min=SMALLEST_KEY_AMAX)
    # By a tensor: dividing by a Python number may be done as multiplying by its reciprocal.
    scale = amax / amax.new_full((), E4M3_MAX)
    return to_e4m3(values * scale.reciprocal().unsqueeze(-1)), scale


def hadamard(size: int, device: torch.device) -> torch.Tensor:
    """Sylvester's Hadamard matrix, orthonormal and symmetric: float32 ``[size, size]``.

    Multiplied by it, queries and keys have the same products as before, and an outlier of one
    dimension is spread over all of them, so that eight bits suffice (DeepSeek-V3.2-Exp,
    ``inference/model.py``, ``rotate_activation``).

    Args:
        size: a power of two.
        device: where it is made.
    """
    assert size.bit_count() == 1
    # On the host: of a meta tensor torch joins parts in Python, for which it loads its compiler.
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        above = torch.cat([matrix, matrix], dim=1)
        matrix = torch.cat([above, torch.cat([matrix, -matrix], dim=1)])
    return matrix.mul_(float(size) ** -0.5).to(device)
