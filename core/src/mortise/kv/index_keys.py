"""The pages in which the indexer's keys live, as kernels read them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mortise.formats.index_keys import hadamard, quantise_index_keys
from mortise.kv.pages import PAGE_SIZE
from mortise.spec.paged_mqa import IndexKeyDtype, IndexKeyPages

if TYPE_CHECKING:
    from collections.abc import Sequence

_SCALE_BYTES = 4


class IndexKeyCache:
    """Cached index keys of every layer that has an indexer, D wide.

    In float8, queries and keys are multiplied by a Hadamard matrix before keys are rounded, which
    changes no product and spreads outliers; where D is no power of two there is no such matrix,
    and they stay as they are.

    Args:
        layers: the layers that have an indexer.
        num_pages: pages per layer.
        dim: D.
        key_dtype: how keys are stored.
        dtype: of the hidden state.
    """

    def __init__(
        self,
        *,
        layers: Sequence[int],
        num_pages: int,
        dim: int,
        key_dtype: IndexKeyDtype,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.key_dtype = key_dtype
        self._dim = dim
        quantised = key_dtype is IndexKeyDtype.FP8_E4M3
        turned = quantised and dim.bit_count() == 1
        self._turn_DD = hadamard(dim, device) if turned else None
        page_bytes = PAGE_SIZE * (dim + _SCALE_BYTES)
        # Zeros, not garbage: rows that no token ever wrote are masked, and must be finite.
        self._pages = torch.zeros(
            (len(layers), num_pages, page_bytes if quantised else PAGE_SIZE * dim),
            dtype=torch.uint8 if quantised else dtype,
            device=device,
        )
        self._layers = dict(zip(layers, map(self._views, self._pages), strict=True))

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that have an indexer."""
        return tuple(self._layers)

    @property
    def num_bytes(self) -> int:
        """Memory of all pages."""
        return self._pages.nbytes

    def pages(self, layer: int) -> IndexKeyPages:
        """The keys of one layer as the hook takes them; views."""
        return self._layers[layer]

    def _views(self, pages: torch.Tensor) -> IndexKeyPages:
        keys = pages[:, : PAGE_SIZE * self._dim].unflatten(1, (PAGE_SIZE, self._dim))
        if self.key_dtype is IndexKeyDtype.COMPUTE:
            return IndexKeyPages(keys=keys)
        # A page, and its bytes before the scales, are multiples of 64: the view is aligned.
        scales = pages[:, PAGE_SIZE * self._dim :].view(torch.float32)
        return IndexKeyPages(keys=keys.view(torch.float8_e4m3fn), scales=scales)

    def turned(self, rows: torch.Tensor) -> torch.Tensor:
        """Queries ``[..., D]`` or keys in the basis in which keys are cached, dtype of the rows."""
        if self._turn_DD is None:
            return rows
        return (rows.float() @ self._turn_DD).to(rows.dtype)

    def write(self, layer: int, slots_T: torch.Tensor, keys_TD: torch.Tensor) -> None:
        """Cache keys ``[T, D]``, not turned yet, in rows int64 ``[T]`` of the flattened pages."""
        pages = self.pages(layer)
        if pages.scales is None:
            pages.keys.view(-1, self._dim).index_copy_(0, slots_T, keys_TD.to(pages.keys.dtype))
            return
        values_TD, scale_T = quantise_index_keys(self.turned(keys_TD))
        places = (slots_T // PAGE_SIZE, slots_T % PAGE_SIZE)
        # As bytes: not every operator of torch takes float8.
        pages.keys.view(torch.uint8)[places] = values_TD.view(torch.uint8)
        pages.scales[places] = scale_T
