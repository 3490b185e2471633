"""One call of ``npu_lightning_indexer``: how its tensors lie, and what of them is refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from mortise_npu_ascend.emulator.chip import current_chip
from mortise_npu_ascend.emulator.generation import Generation
from mortise_npu_ascend.emulator.rejections import device_name, require

if TYPE_CHECKING:
    from collections.abc import Iterator

OPERATOR: Final = "npu_lightning_indexer"
_KERNEL: Final = "aclnnLightningIndexer"

EVERY_TOKEN: Final = 2**63 - 1
CAUSAL: Final = 3

_HEAD_DIM: Final = 128
_MOST_HEADS: Final = 64
_HEADS_OF_A5: Final = (8, 16, 24, 32, 64)
_LARGEST_BLOCK: Final = 1024
_BLOCK_STEP: Final = 16
_SPARSE_COUNTS: Final = (*range(1, 2049), *range(3072, 8193, 1024))


@dataclass(frozen=True)
class OneSequence:
    """Queries ``[Q, N, D]``, their weights ``[Q, N]`` and keys ``[S, D]``; where results go."""

    where: tuple[slice, ...] | tuple[int, slice]
    query: torch.Tensor
    weights: torch.Tensor
    key: torch.Tensor


@dataclass(frozen=True)
class IndexerCall:
    """The tensors of one call, and how they lie; see :func:`npu_lightning_indexer`."""

    query: torch.Tensor
    key: torch.Tensor
    weights: torch.Tensor
    query_lengths: torch.Tensor | None
    key_lengths: torch.Tensor | None
    block_table: torch.Tensor | None
    layout_query: str
    layout_key: str
    sparse_count: int
    sparse_mode: int
    pre_tokens: int
    next_tokens: int
    return_value: bool

    @property
    def batch(self) -> int:
        """Sequences."""
        if self.layout_query == "TND" and self.query_lengths is not None:
            return int(self.query_lengths.shape[0])
        return int(self.query.shape[0])

    def sequences(self) -> Iterator[OneSequence]:
        """One after the other."""
        query_spans, key_spans = self._query_spans(), self._key_spans()
        for index in range(self.batch):
            queries = slice(*query_spans[index])
            where = (queries,) if self.layout_query == "TND" else (index, queries)
            yield OneSequence(
                where=where,
                query=self.query[where],
                weights=self.weights[where],
                key=self._keys(index, slice(*key_spans[index])),
            )

    def _query_spans(self) -> list[tuple[int, int]]:
        return _spans(self.query_lengths, self.layout_query, self.query, self.batch)

    def _key_spans(self) -> list[tuple[int, int]]:
        return _spans(self.key_lengths, self.layout_key, self.key, self.batch)

    def _keys(self, sequence: int, keys: slice) -> torch.Tensor:
        if self.layout_key == "TND":
            return self.key[keys, 0]
        if self.layout_key == "BSND":
            return self.key[sequence, keys, 0]
        assert self.block_table is not None, "check() saw to it"
        blocks = -(-keys.stop // self.key.shape[1])
        return self.key[self.block_table[sequence, :blocks], :, 0].flatten(0, 1)[keys]

    def visible(self, sequence: OneSequence) -> torch.Tensor:
        """Bool ``[Q, S]``: the keys that each query may choose from."""
        queries, keys = sequence.query.shape[0], sequence.key.shape[0]
        every_QS = torch.ones(queries, keys, dtype=torch.bool)
        return every_QS.tril(keys - queries) if self.sparse_mode == CAUSAL else every_QS

    def check(self) -> None:
        """Refuse what torch_npu and the vendor's library refuse.

        Raises:
            RuntimeError: as the device would.
        """
        _check_options(self)
        _check_dtypes(self)
        _check_shapes(self)
        _check_lengths(self)


def _spans(
    lengths: torch.Tensor | None, layout: str, tensor: torch.Tensor, batch: int
) -> list[tuple[int, int]]:
    """Begin and end of each sequence, in its own tensor or row of the batch."""
    if lengths is None:
        return [(0, tensor.shape[1])] * batch
    ends: list[int] = lengths.tolist()
    starts = [0, *ends[:-1]] if layout == "TND" else [0] * batch
    return list(zip(starts, ends, strict=True))


def _need(condition: bool, reason: str) -> None:
    require(condition, OPERATOR, reason, kernel=_KERNEL)


def _check_options(call: IndexerCall) -> None:
    require(call.query.numel() > 0, OPERATOR, "Tensor query is empty.")
    require(call.key.numel() > 0, OPERATOR, "Tensor key is empty.")
    require(
        call.sparse_count > 0,
        OPERATOR,
        f"sparse count should be greater than 0, but now is {call.sparse_count}",
    )
    _need(
        call.sparse_count in _SPARSE_COUNTS,
        f"sparse_count {call.sparse_count} should be in [1, 2048] or 3072, 4096, ... 8192",
    )
    _need(call.sparse_mode in (0, CAUSAL), f"sparse_mode {call.sparse_mode} should be 0 or 3")
    _need(
        (call.pre_tokens, call.next_tokens) == (EVERY_TOKEN, EVERY_TOKEN),
        "preTokens and nextTokens should be 9223372036854775807",
    )
    _need(call.layout_query in ("BSND", "TND"), f"layout_query {call.layout_query}: BSND or TND")
    _need(
        call.layout_key in ("PA_BSND", call.layout_query),
        f"layout_query {call.layout_query} and layout_key {call.layout_key} should be the same "
        "unless layout_key is PA_BSND",
    )
    _need(
        not call.return_value or call.layout_key != "PA_BSND",
        "return_value is not supported when layout_key is PA_BSND",
    )


def _check_dtypes(call: IndexerCall) -> None:
    rows, weights = call.query.dtype, call.weights.dtype
    _need(
        rows == call.key.dtype and rows in (torch.float16, torch.bfloat16),
        "query and key should both be DT_FLOAT16 or DT_BFLOAT16, got "
        f"{device_name(rows)} and {device_name(call.key.dtype)}",
    )
    newest = current_chip().generation is Generation.A5
    _need(
        weights == rows or (weights == torch.float32 and not newest),
        f"weights {device_name(weights)} should be {device_name(rows)}"
        + ("" if newest else " or DT_FLOAT"),
    )
    for name, tensor in (
        ("actual_seq_lengths_query", call.query_lengths),
        ("actual_seq_lengths_key", call.key_lengths),
        ("block_table", call.block_table),
    ):
        if tensor is not None:
            dtype = device_name(tensor.dtype)
            _need(tensor.dtype == torch.int32, f"{name} {dtype} should be DT_INT32")


def _check_shapes(call: IndexerCall) -> None:
    query, key, newest = call.query, call.key, current_chip().generation is Generation.A5
    _need(
        query.ndim == (3 if call.layout_query == "TND" else 4),
        f"query with {query.ndim} dims is not {call.layout_query}",
    )
    _need(
        key.ndim == (3 if call.layout_key == "TND" else 4),
        f"key with {key.ndim} dims is not {call.layout_key}",
    )
    _need(
        call.weights.shape == query.shape[:-1],
        f"weights {tuple(call.weights.shape)} should be {tuple(query.shape[:-1])}",
    )
    heads = query.shape[-2]
    _need(
        heads in _HEADS_OF_A5 if newest else heads <= _MOST_HEADS,
        f"N of query {heads} should be "
        + (f"one of {_HEADS_OF_A5}" if newest else f"at most {_MOST_HEADS}"),
    )
    _need(key.shape[-2] == 1, f"N of key {key.shape[-2]} should be 1")
    for name, tensor in (("query", query), ("key", key)):
        _need(
            tensor.shape[-1] == _HEAD_DIM, f"D of {name} {tensor.shape[-1]} should be {_HEAD_DIM}"
        )
    if call.layout_key == "PA_BSND":
        size = key.shape[1]
        _need(
            size % _BLOCK_STEP == 0 and size <= _LARGEST_BLOCK,
            f"block_size {size} should be a multiple of {_BLOCK_STEP} of at most {_LARGEST_BLOCK}",
        )
    in_blocks = newest and call.layout_key == "PA_BSND"
    for name, tensor in (
        ("query", query),
        ("weights", call.weights),
        ("key", key[0] if in_blocks else key),
    ):
        _need(tensor.is_contiguous(), f"{name} should be contiguous")


def _check_lengths(call: IndexerCall) -> None:
    _need(
        call.layout_query != "TND" or call.query_lengths is not None,
        "actual_seq_lengths_query is required when layout_query is TND",
    )
    _need(
        call.layout_key == "BSND" or call.key_lengths is not None,
        f"actual_seq_lengths_key is required when layout_key is {call.layout_key}",
    )
    _need(
        (call.block_table is not None) == (call.layout_key == "PA_BSND"),
        "block_table is required when layout_key is PA_BSND, and only then",
    )
    for name, lengths in (("query", call.query_lengths), ("key", call.key_lengths)):
        _need(
            lengths is None or lengths.shape == (call.batch,),
            f"actual_seq_lengths_{name} should have the shape (B,), B is {call.batch}",
        )
    if call.layout_key == "BSND":
        _need(call.key.shape[0] == call.batch, "B of query and key should be the same")
    if call.block_table is not None:
        _need(
            call.block_table.ndim == 2 and call.block_table.shape[0] == call.batch,
            "block_table should have the shape (B, blocks of a sequence)",
        )
    _check_ends("query", call.query_lengths, call.query, call.layout_query)
    _check_ends("key", call.key_lengths, call.key, call.layout_key, call.block_table)


def _check_ends(
    name: str,
    lengths: torch.Tensor | None,
    tensor: torch.Tensor,
    layout: str,
    block_table: torch.Tensor | None = None,
) -> None:
    """The device does not look at the values, and reads whatever lies beyond the tensor."""
    if lengths is None:
        return
    most = tensor.shape[0] if layout == "TND" else tensor.shape[1]
    if block_table is not None:
        most = block_table.shape[1] * tensor.shape[1]
    inside = bool(((lengths >= 0) & (lengths <= most)).all())
    _need(inside, f"actual_seq_lengths_{name} {lengths.tolist()} should be in [0, {most}]")
    ascending = layout != "TND" or bool((lengths.diff() >= 0).all())
    _need(ascending, f"actual_seq_lengths_{name} {lengths.tolist()} should be ascending in TND")
