"""Launches of the indexer, and their scores by definition in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mortise.formats.index_keys import quantise_index_keys
from mortise.plugin import ForwardMode, IndexKeyPages
from mortise_cuda_common.chip import EMULATED, Architecture
from mortise_cuda_common.libraries.deep_gemm import DeepGEMM
from mortise_cuda_common.programs.emulated import EmulatedPrograms
from mortise_cuda_common.runtime import Runtime

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from mortise.plugin import PagedMQAMetadata
    from mortise_cuda_common.indexer import Indexer
    from mortise_cuda_common.programs.base import Programs

BLOCK = 64
FP32 = 2.0**-24
"""Largest relative error of one rounding."""


class RecordedPrograms(EmulatedPrograms):
    """Runs programs, keeps the launches, and can replay them, as a captured graph would."""

    __slots__ = ("launches",)

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []

    def launch(
        self,
        source: Callable[..., None],
        grid: int,
        arguments: Sequence[Any],
        constants: Mapping[str, int | float | bool],
        *,
        num_warps: int = 4,
        num_stages: int = 3,
    ) -> None:
        self.launches.append((source, grid, tuple(arguments), dict(constants)))
        super().launch(source, grid, arguments, constants)

    @property
    def names(self) -> list[str]:
        return [source.__name__ for source, *_ in self.launches]

    def replay(self) -> None:
        """The same launches on the same storage."""
        for source, grid, arguments, constants in self.launches:
            super().launch(source, grid, arguments, constants)


def runtime(
    architecture: Architecture, *, deep_gemm: bool = False, programs: Programs | None = None
) -> Runtime:
    """An emulated chip."""
    chip = EMULATED[architecture]
    return Runtime(
        chip=chip,
        device=torch.device("cpu"),
        emulated=True,
        programs=programs or EmulatedPrograms(),
        deep_gemm=DeepGEMM.emulated(chip) if deep_gemm else None,
    )


@dataclass(frozen=True, kw_only=True)
class Case:
    """One launch: R rows of n tokens, N heads of D numbers.

    Args:
        query: ``[R, n, N, D]``.
        pages: cached keys.
        plain_keys: float32 ``[P, 64, D]``, what they were before any quantisation.
        weights: float32 ``[R * n, N]``.
        table: int32 ``[R, pages]``.
        lens: int32 ``[R, n]``.
    """

    query: torch.Tensor
    pages: IndexKeyPages
    plain_keys: torch.Tensor
    weights: torch.Tensor
    table: torch.Tensor
    lens: torch.Tensor

    def plan(
        self, indexer: Indexer, num_workers: int, mode: ForwardMode = ForwardMode.DECODE
    ) -> PagedMQAMetadata:
        return indexer.metadata(self.lens, BLOCK, num_workers, mode)

    def launch(self, indexer: Indexer, metadata: PagedMQAMetadata) -> torch.Tensor:
        return indexer.logits(self.query, self.pages, self.weights, self.table, metadata)

    def scores(
        self, indexer: Indexer, num_workers: int, mode: ForwardMode = ForwardMode.DECODE
    ) -> torch.Tensor:
        return self.launch(indexer, self.plan(indexer, num_workers, mode))

    def on(self, device: torch.device) -> Case:
        """The same on a device; the fused pages stay fused."""
        keys, scales = self.pages.keys, self.pages.scales
        pages = IndexKeyPages(keys=keys.to(device))
        if scales is not None:
            fused = fuse(keys, scales).to(device)
            pages = unfuse(fused, keys.shape[-1])
        return replace(
            self,
            query=self.query.to(device),
            pages=pages,
            weights=self.weights.to(device),
            table=self.table.to(device),
            lens=self.lens.to(device),
        )


def case(
    lens: Sequence[Sequence[int]],
    *,
    heads: int = 4,
    dim: int = 32,
    fp8: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    num_pages: int = 7,
    tables: Sequence[Sequence[int]] | None = None,
    seed: int = 0,
) -> Case:
    """Random numbers for given lengths; pages are drawn too unless they are given."""
    generator = torch.Generator().manual_seed(seed)
    rows, next_n = len(lens), len(lens[0]) if lens else 1
    longest = max((max(row) for row in lens), default=0)
    keys = torch.randn(num_pages, BLOCK, dim, generator=generator)
    width = max(-(-longest // BLOCK), 1)
    table = torch.randint(num_pages, (rows, width), generator=generator, dtype=torch.int32)
    if tables is not None:
        table = torch.tensor(tables, dtype=torch.int32)
    return Case(
        query=torch.randn(rows, next_n, heads, dim, generator=generator).to(dtype),
        pages=fused_pages(keys) if fp8 else IndexKeyPages(keys=keys.to(dtype)),
        plain_keys=keys,
        weights=torch.randn(rows * next_n, heads, generator=generator),
        table=table,
        lens=torch.tensor(lens, dtype=torch.int32).view(rows, next_n),
    )


def fused_pages(keys_PBD: torch.Tensor) -> IndexKeyPages:
    """Quantised keys as views of one block a page."""
    values, scales = quantise_index_keys(keys_PBD)
    return unfuse(fuse(values, scales), keys_PBD.shape[-1])


def fuse(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """uint8 ``[P, 64 * (D + 4)]``: all keys of a page, then all its scales."""
    parts = [values.contiguous().view(torch.uint8), scales.contiguous().view(torch.uint8)]
    return torch.cat([part.flatten(1) for part in parts], dim=1)


def unfuse(fused: torch.Tensor, dim: int) -> IndexKeyPages:
    """Views of keys and scales."""
    keys = fused[:, : BLOCK * dim].view(torch.float8_e4m3fn)
    return IndexKeyPages(
        keys=keys.unflatten(1, (BLOCK, dim)), scales=fused[:, BLOCK * dim :].view(torch.float32)
    )


@dataclass(frozen=True)
class Scores:
    """By definition: ``values`` float64 ``[R * n, C]``, each within ``bound`` of what is summed."""

    values: np.ndarray
    bound: np.ndarray


def by_definition(
    one: Case, *, as_cached: bool = True, query: torch.Tensor | None = None
) -> Scores:
    """``scale_j * sum_h w[h] * relu(q[h] . k[j])``.

    The bound is that of float32 sums in any order: D products and N heads, each rounded once for
    every number that is added, and a few roundings of weights and scales.

    Args:
        one: the launch.
        as_cached: of the keys as they are cached, or as they were before.
        query: in place of the case's own.
    """
    heads, dim = one.query.shape[-2:]
    keys = one.plain_keys if not as_cached else dequantised(one.pages)
    cached_RCD = keys[one.table.long()].flatten(1, 2).double().numpy()
    next_n = one.query.shape[1]
    cached = np.repeat(cached_RCD, next_n, axis=0)
    rows = (one.query if query is None else query).flatten(0, 1).double().numpy()
    weights = one.weights.double().numpy()
    products = np.einsum("thd,tcd->thc", rows, cached)
    magnitudes = np.einsum("thd,tcd->thc", abs(rows), abs(cached))
    values = np.einsum("th,thc->tc", weights, np.maximum(products, 0))
    bound = np.einsum("th,thc->tc", abs(weights), magnitudes) * (dim + heads + 8) * FP32
    return Scores(values, bound)


def dequantised(pages: IndexKeyPages) -> torch.Tensor:
    """float32 ``[P, 64, D]``."""
    keys = pages.keys.float()
    return keys if pages.scales is None else keys * pages.scales.unsqueeze(-1)


def quantised_query(one: Case) -> torch.Tensor:
    """The query as float8 keys are multiplied by: one scale for each row and head, in float64."""
    query = one.query.float()
    scale = query.abs().amax(dim=-1, keepdim=True).clamp(min=1e-4) / query.new_full((), 448.0)
    values = (query * scale.reciprocal()).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
    return values.double() * scale.double()


def visible(one: Case, columns: int) -> np.ndarray:
    """bool ``[R * n, columns]``: the keys that a row sees."""
    return np.arange(columns) < one.lens.flatten().numpy()[:, None]


def calc_diff(found: np.ndarray, expected: np.ndarray) -> float:
    """DeepGEMM's measure: 1 - 2 * sum(xy) / sum(x^2 + y^2)."""
    return float(1 - 2 * (found * expected).sum() / (found**2 + expected**2).sum())
