"""DeepGEMM's scores of query rows against dense keys, and the arithmetic of all scores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from mortise_cuda_common.emulator.deep_gemm.checks import (
    poisoned,
    require,
    require_dtype,
    shape_of,
)

if TYPE_CHECKING:
    from mortise_cuda_common.emulator.deep_gemm.fp8_gemm import Scaled
    from mortise_cuda_common.emulator.deep_gemm.state import State

BLOCK_KV: Final = 256
"""Keys of one tile."""


def scores(
    q: torch.Tensor, keys: torch.Tensor, key_scale: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """``scale_j * sum_h relu(q_sh . k_j) * weight_sh`` in float32.

    Args:
        q: e4m3 ``[S, H, D]``, whose scale is part of the weights; float32 where it was cast before.
        keys: e4m3 ``[N, D]``, likewise.
        key_scale: float32 ``[N]``.
        weights: float32 ``[S, H]``.

    Returns:
        Float32 ``[S, N]``.
    """
    products_SHN = q.float() @ keys.float().T
    return (products_SHN.relu() * weights.unsqueeze(-1)).sum(1) * key_scale


def logits(
    state: State,
    q: torch.Tensor,
    kv: Scaled,
    weights: torch.Tensor,
    start: torch.Tensor,
    end: torch.Tensor,
    clean_logits: bool,
    max_seqlen_k: int,
) -> torch.Tensor:
    """Scores of every query row for its own stretch of dense keys.

    Args:
        state: the library.
        q: e4m3 ``[S, H, D]``.
        kv: e4m3 ``[N, D]`` and float32 ``[N]``.
        weights: float32 ``[S, H]``.
        start: int32 ``[S]``, the first key of each row.
        end: int32 ``[S]``, the key behind its last.
        clean_logits: write -inf for keys that are not a row's own.
        max_seqlen_k: above 0 the columns of the result, which then count from ``start``.

    Returns:
        Float32 ``[S, N]`` or ``[S, max_seqlen_k]``, with rows further apart than they are long;
        what is nobody's is poison unless cleaned.

    Raises:
        RuntimeError: an assertion of the library.
    """
    rows, heads, dim = shape_of(q, 3)
    require_query(state, q, heads, dim)
    keys, key_scale = kv
    num_keys = shape_of(keys, 2)[0]
    require(keys.shape[1] == dim, "head_dim == _head_dim")
    require(keys.is_contiguous() and key_scale.is_contiguous(), "kv_fp.is_contiguous()")
    require_dtype(keys, torch.float8_e4m3fn)
    require(shape_of(key_scale, 1) == (num_keys,), "seq_len_kv == _seq_len_kv")
    require_dtype(key_scale, torch.float32)
    require(
        shape_of(weights, 2) == (rows, heads), "seq_len == _seq_len and num_heads == _num_heads"
    )
    require(weights.stride(1) == 1, "weights.stride(1) == 1")
    require_dtype(weights, torch.float32)
    for bound in (start, end):
        require(bound.shape[0] == rows, "cu_seq_len_k_start.size(0) == seq_len")
        require(bound.is_contiguous(), "cu_seq_len_k_start.is_contiguous()")
        require_dtype(bound, torch.int32)
    require(not (max_seqlen_k and clean_logits), "not clean_logits")

    columns = max_seqlen_k or num_keys
    stride = -(-(columns if max_seqlen_k else columns + BLOCK_KV) // BLOCK_KV) * BLOCK_KV
    out = poisoned((rows, stride), torch.float32)[:, :columns]
    if clean_logits:
        out.fill_(-torch.inf)
    for row, (first, stop) in enumerate(zip(start.tolist(), end.tolist(), strict=True)):
        at, stop = (0 if max_seqlen_k else first), min(stop, num_keys)
        length = min(stop - first, columns - at)
        if length > 0:
            own = slice(first, first + length)
            found = scores(q[row, None], keys[own], key_scale[own], weights[row, None])
            out[row, at : at + length] = found[0]
    return out


def require_query(state: State, q: torch.Tensor, heads: int, dim: int) -> None:
    """Query rows have a number of heads and a width that there are kernels for."""
    counts = (32, 64) if state.is_sm90 else (8, 16, 32, 64)
    require(heads in counts, " or ".join(f"num_heads == {count}" for count in counts))
    require(dim in (32, 64, 128), "head_dim == 32 or head_dim == 64 or head_dim == 128")
    require(q.is_contiguous(), "q_fp.is_contiguous()")
    require_dtype(q, torch.float8_e4m3fn)
