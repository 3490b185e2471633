"""What must hold before cached index keys are scored, since a wrong kernel may never end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from mortise.plugin import ContractError, ReasonCode

if TYPE_CHECKING:
    from mortise.plugin import IndexKeyPages, PagedMQAMetadata

SCALE_BYTES: Final = 4
"""Of one float32 scale."""


def check_lens(context_lens: torch.Tensor, num_workers: int) -> None:
    """Refuse lengths that a kernel would read as others; their values are not looked at.

    Raises:
        ContractError: they are not contiguous int32 ``[rows, next_n]``, or there is no worker.
    """
    if (
        context_lens.ndim != 2
        or context_lens.dtype is not torch.int32
        or not context_lens.is_contiguous()
        or not context_lens.shape[1]
    ):
        raise _broken(
            f"context_lens is {_text(context_lens)}, strides {tuple(context_lens.stride())}",
            "contiguous int32 [rows, next_n] with next_n of 1 or more",
        )
    if num_workers < 1:
        raise _broken(f"an index schedule for {num_workers} workers", "1 or more")


@dataclass(frozen=True, slots=True)
class Launch:
    """The arguments of ``paged_mqa_logits``: R rows of n tokens, N heads, D numbers a head.

    Args:
        query: ``[R, n, N, D]``.
        key_pages: cached keys.
        weights: float32 ``[R * n, N]``.
        page_table: int32 ``[R, pages]``.
        metadata: the plan.
    """

    query: torch.Tensor
    key_pages: IndexKeyPages
    weights: torch.Tensor
    page_table: torch.Tensor
    metadata: PagedMQAMetadata

    @property
    def schedule(self) -> torch.Tensor:
        """int32 ``[num_workers + 1, 2]``."""
        assert self.metadata.schedule is not None, "not checked"
        return self.metadata.schedule

    @property
    def planned_lens(self) -> torch.Tensor:
        """int32 ``[R, n]``."""
        assert self.metadata.planned_lens is not None, "not checked"
        return self.metadata.planned_lens

    def check(self) -> None:
        """Refuse whatever does not agree with the plan; nothing waits for the device.

        Raises:
            StaleScheduleError: the plan was refreshed since this description of it was made.
            ContractError: shapes, dtypes or strides differ from those that were planned.
        """
        query, weights, metadata = self.query, self.weights, self.metadata
        metadata.check_launch(query.shape[0], self.page_table.shape[0], weights.shape[0])
        rows, next_n = metadata.rows, metadata.next_n
        heads = query.shape[-2]
        _expect("query", query, (rows, next_n, heads, query.shape[-1]), query.dtype)
        _expect("weights", weights, (rows * next_n, heads), torch.float32)
        self._check_keys()
        self._check_pages()
        _check_plan(metadata)

    def _check_keys(self) -> None:
        keys, scales = self.key_pages.keys, self.key_pages.scales
        shape = (keys.shape[0], self.metadata.block_size, self.query.shape[-1])
        if scales is None:
            _expect("key_pages.keys", keys, shape, self.query.dtype)
        else:
            _expect("key_pages.keys", keys, shape, torch.float8_e4m3fn)
            _expect("key_pages.scales", scales, shape[:2], torch.float32)
            _expect_columns_together("key_pages.scales", scales)
        _expect_columns_together("key_pages.keys", keys)

    def _check_pages(self) -> None:
        table, metadata = self.page_table, self.metadata
        _expect("page_table", table, (metadata.rows, table.shape[-1]), torch.int32)
        _expect_columns_together("page_table", table)
        if table.shape[1] * metadata.block_size < metadata.max_context_len:
            raise _broken(
                f"a page table of {table.shape[1]} pages of {metadata.block_size} keys",
                f"pages for the longest length, {metadata.max_context_len}",
            )


def _check_plan(metadata: PagedMQAMetadata) -> None:
    schedule, planned = metadata.schedule, metadata.planned_lens
    if schedule is None or planned is None:
        raise _broken("an index launch without a schedule", "metadata of this backend")
    _expect("schedule", schedule, (metadata.num_workers + 1, 2), torch.int32)
    _expect("planned_lens", planned, (metadata.rows, metadata.next_n), torch.int32)
    _expect("context_lens", metadata.context_lens, (metadata.rows, metadata.next_n), torch.int32)


def fused_kv(key_pages: IndexKeyPages) -> torch.Tensor:
    """The blocks that keys and scales are views of, as DeepGEMM takes them; nothing is copied.

    Args:
        key_pages: e4m3 keys ``[P, B, D]`` and float32 scales ``[P, B]`` of one uint8 block for
            each page: all keys, then all scales.

    Returns:
        uint8 ``[P, B, 1, D + 4]`` over the same memory; the shape is DeepGEMM's, and no key's
        scale lies behind it.

    Raises:
        ContractError: keys or scales lie otherwise.
    """
    keys, scales = key_pages.keys, key_pages.scales
    if scales is None:
        raise _broken(f"index keys of {keys.dtype} without scales", "float8_e4m3fn and scales")
    pages, block, dim = keys.shape
    width = dim + SCALE_BYTES
    is_fused = (
        keys.dtype is torch.float8_e4m3fn
        and scales.dtype is torch.float32
        and keys.stride() == (block * width, dim, 1)
        and scales.stride() == (block * width // SCALE_BYTES, 1)
        and scales.data_ptr() == keys.data_ptr() + block * dim
    )
    if not is_fused:
        raise _broken(
            f"index keys {_text(keys)} of strides {tuple(keys.stride())} and scales "
            f"{_text(scales)} of strides {tuple(scales.stride())}",
            f"views of one block of {block} * {dim} bytes and {block} float32 for each page",
        )
    return keys.view(torch.uint8).as_strided(
        (pages, block, 1, width), (block * width, width, width, 1)
    )


def _expect(name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype is not dtype:
        raise _broken(f"{name} is {_text(tensor)}", f"{dtype} {list(shape)}")


def _expect_columns_together(name: str, tensor: torch.Tensor) -> None:
    if tensor.numel() and tensor.stride(-1) != 1:
        raise _broken(f"{name} has strides {tuple(tensor.stride())}", "1 as the last of them")


def _text(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


def _broken(what: str, expected: str) -> ContractError:
    return ContractError(what, reason=ReasonCode.CONTRACT_BROKEN, expected=expected)
