"""The one place that imports DeepGEMM, and calls it the same way whichever version it is."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.utils.dlpack import from_dlpack

from mortise.plugin import BackendUnusableError, ContractError, ReasonCode
from mortise_cuda_common.chip import Architecture
from mortise_cuda_common.emulator.deep_gemm.fork import ForkDeepGEMM
from mortise_cuda_common.libraries.deep_gemm_health import failure_of_import, look
from mortise_cuda_common.libraries.deep_gemm_names import resolve
from mortise_cuda_common.libraries.deep_gemm_scales import (
    dense_strides,
    pack_row_scales,
    require_powers_of_two,
)
from mortise_cuda_common.libraries.deep_gemm_smoke import require_right_products
from mortise_cuda_common.rows import Kind, Rows

if TYPE_CHECKING:
    from mortise_cuda_common.chip import Chip
    from mortise_cuda_common.libraries.deep_gemm_names import Resolved

BLOCK: Final = 128
"""Rows and columns of a weight under one scale; columns of a row under one."""


@dataclass(frozen=True, slots=True)
class DeepGEMM:
    """DeepGEMM on one chip; nothing that the library keeps for the process is changed.

    Shapes: R rows, E groups, C rows of a slot, N outputs, K columns; B, next_n, H and D are
    requests, query rows of each, heads and their width. Everything is on the chip's device.

    Args:
        chip: that it computes on.
        version: of the library.
        resolved: its functions by the names that this version has.
        is_emulated: whether it is the emulation.
    """

    chip: Chip
    version: str
    resolved: Resolved
    is_emulated: bool = False

    # ---- where it comes from

    @classmethod
    def load(cls, chip: Chip, device: torch.device) -> DeepGEMM:
        """Import the library and multiply by it once in each way, before anything relies on it.

        Args:
            chip: the chip.
            device: where tensors live.

        Raises:
            BackendUnusableError: it is missing, made for another torch, finds no CUDA toolkit or
                not the functions that are called, or multiplies wrongly; root cause first.
        """
        look(chip)
        return cls.of(import_library(), chip, device)

    @classmethod
    def of(cls, library: Any, chip: Chip, device: torch.device) -> DeepGEMM:
        """Use a library that is imported already.

        Raises:
            BackendUnusableError: it lacks a function or multiplies wrongly.
        """
        version = str(getattr(library, "__version__", "unknown"))
        found = cls(chip=chip, version=version, resolved=resolve(library, version, device))
        require_right_products(found, device)
        return found

    @classmethod
    def emulated(cls, chip: Chip) -> DeepGEMM:
        """The fork's functions on a CPU, with the rules of a chip."""
        library = ForkDeepGEMM(chip)
        version = library.__version__
        resolved = resolve(library, version)
        return cls(chip=chip, version=version, resolved=resolved, is_emulated=True)

    @staticmethod
    def imported_version() -> str:
        """Import the library and say which version it is, without touching a device.

        Raises:
            BackendUnusableError: it is missing, or cannot be imported.
        """
        look()
        return str(getattr(import_library(), "__version__", "unknown"))

    def describe(self) -> tuple[tuple[str, str], ...]:
        """What is called, with the name that it has in this version; ``-`` for none."""
        return self.resolved.rows

    # ---- what it takes

    @property
    def packs_scales(self) -> bool:
        """Whether scales are powers of two in one byte each, as on Blackwell."""
        return self.chip.architecture is not Architecture.SM90

    def alignment(self) -> int:
        """Rows that contiguous groups begin at multiples of; asked of the library every time."""
        return int(self.resolved.functions.alignment())

    def num_sms(self) -> int:
        """Multiprocessors that a schedule of paged scores must be made for."""
        return int(self.resolved.functions.num_sms())

    def slot_multiple(self) -> int:
        """Rows that slots of masked groups must be a multiple of.

        A tile is stored whole, over the rows of the next group where the slot is shorter: results
        are then wrong without an error (deepseek-ai/DeepGEMM#268). SM90 takes tiles of 64 or 128
        rows as it likes, SM100 those of :meth:`alignment`.
        """
        return self.alignment() if self.packs_scales else BLOCK

    @property
    def no_paged_mqa(self) -> str:
        """Why :meth:`paged_mqa_logits` is not to be called; empty if it may be."""
        return self.resolved.no_paged_mqa

    @property
    def head_counts(self) -> tuple[int, ...]:
        """Heads that paged scores take; others are padded with zeros."""
        return (8, 16, 32, 64) if self.packs_scales else (32, 64)

    @property
    def head_dims(self) -> tuple[int, ...]:
        """Widths of a head that paged scores take."""
        return (32, 64, 128)

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """Tokens of a page that paged scores take."""
        return (32, 64) if self.packs_scales else (64,)

    @property
    def most_native_next_n(self) -> int:
        """Query rows of a request that paged scores take at once."""
        any_number = self.packs_scales and self.resolved.takes_any_next_n
        return sys.maxsize if any_number else 2

    # ---- layouts

    def prepare_weight_scale(
        self, scale: torch.Tensor, num_rows: int, num_columns: int
    ) -> torch.Tensor:
        """Bring the scales of a weight into the layout of the kernels, once at loading.

        Args:
            scale: float32 ``[(E,) ceil(N/128), ceil(K/128)]``; on Blackwell powers of two.
            num_rows: N.
            num_columns: K.

        Returns:
            Hopper: the same, dense. Blackwell: int32 ``[(E,) N, ceil(K/512)]``, four to a word.

        Raises:
            ContractError: not one scale for each block of 128 x 128, or on Blackwell one that is
                no power of two: the kernels would cut it off or trap.
        """
        wanted = (-(-num_rows // BLOCK), -(-num_columns // BLOCK))
        if tuple(scale.shape[-2:]) != wanted:
            raise ContractError(
                f"scales of a weight {num_rows} x {num_columns} for DeepGEMM are"
                f" {' x '.join(map(str, scale.shape[-2:]))}",
                reason=ReasonCode.CONTRACT_BROKEN,
                expected=f"{wanted[0]} x {wanted[1]}, one for each block of {BLOCK} x {BLOCK}",
            )
        if not self.packs_scales:
            return dense_strides(scale.contiguous())
        require_powers_of_two(scale)
        groups = scale.shape[0] if scale.dim() == 3 else None
        transform = self.resolved.functions.transform_scales
        recipe = (1, BLOCK, BLOCK)
        return _as_torch(transform(scale, num_rows, num_columns, recipe, groups, False))

    def prepare_row_scales(self, scales: torch.Tensor) -> torch.Tensor:
        """Bring the scales of rows into the layout of the kernels; nothing is copied twice.

        Args:
            scales: float32 ``[R, C]`` or ``[E, R, C]`` of any strides; on Blackwell powers of two
                wherever a row is defined.

        Returns:
            Hopper: float32 with rows side by side, the same tensor where it lay so already.
            Blackwell: int32 ``[.., R, ceil(C/4)]`` with rows side by side.
        """
        if self.packs_scales:
            return scales if scales.dtype == torch.int32 else pack_row_scales(scales)
        return _as_torch(self.resolved.functions.tma_aligned(scales))

    # ---- products

    def fp8_linear(
        self,
        rows: Rows,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        out_dtype: torch.dtype = torch.bfloat16,
    ) -> torch.Tensor:
        """Multiply e4m3 rows ``[R, K]`` by an e4m3 weight ``[N, K]``.

        Args:
            rows: ``fp8``, or on Blackwell ``fp8_ue8m0``; scales prepared or not.
            weight: the weight.
            weight_scale: prepared.
            out_dtype: bfloat16.

        Returns:
            ``[R, N]``.

        Raises:
            ContractError: another dtype, or rows of another kind.
        """
        self._require_bf16(out_dtype)
        out = rows.values.new_empty((rows.values.shape[0], weight.shape[0]), dtype=out_dtype)
        if out.numel():
            # All rows are defined: the library packs their scales by one kernel of its own.
            a = (rows.values, self._scales_of(rows, packed=False))
            self.resolved.functions.fp8_linear(a, (weight, weight_scale), out)
        return out

    def fp8_contiguous(
        self,
        rows: Rows,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        row_experts: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Multiply e4m3 rows of groups that begin at multiples of :meth:`alignment`.

        Args:
            rows: ``[R, K]``, ``fp8``, or on Blackwell ``fp8_ue8m0``; scales prepared or not.
            weight: e4m3 ``[E, N, K]``.
            weight_scale: prepared.
            row_experts: int32 ``[R]``, the group of each row, -1 for none. Only the first row of
                each tile is looked at.
            out: bfloat16 ``[R, N]``; rows of no group are undefined.

        Raises:
            ContractError: another dtype, or rows of another kind.
        """
        self._require_bf16(out.dtype)
        if out.numel():
            a = (rows.values, self._scales_of(rows))
            b = (dense_strides(weight), weight_scale)
            self.resolved.functions.fp8_contiguous(a, b, out, row_experts)

    def fp8_masked(
        self,
        values: torch.Tensor,
        scales: torch.Tensor,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        counts: torch.Tensor,
        expected: int,
        out: torch.Tensor,
    ) -> None:
        """Multiply e4m3 rows that lie in a slot for each group.

        Args:
            values: e4m3 ``[E, C, K]``.
            scales: of the rows, prepared or not.
            weight: e4m3 ``[E, N, K]``.
            weight_scale: prepared.
            counts: int32 ``[E]``, the rows of each slot that are there.
            expected: rows that a group is expected to have; only the speed depends on it.
            out: bfloat16 ``[E, C, N]``; further rows of a slot are undefined.

        Raises:
            ContractError: another dtype, or slots that are no multiple of :meth:`slot_multiple`.
        """
        self._require_bf16(out.dtype)
        self._require_slots(values)
        a = (dense_strides(values), self.prepare_row_scales(scales))
        b = (dense_strides(weight), weight_scale)
        self.resolved.functions.fp8_masked(a, b, dense_strides(out), counts, max(1, expected))

    def bf16_contiguous(
        self,
        rows: torch.Tensor,
        weight: torch.Tensor,
        row_experts: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """As :meth:`fp8_contiguous`, of bfloat16 ``[R, K]`` and ``[E, N, K]`` without scales."""
        self._require_bf16(out.dtype)
        if out.numel():
            self.resolved.functions.bf16_contiguous(rows, dense_strides(weight), out, row_experts)

    def bf16_masked(
        self,
        values: torch.Tensor,
        weight: torch.Tensor,
        counts: torch.Tensor,
        expected: int,
        out: torch.Tensor,
    ) -> None:
        """As :meth:`fp8_masked`, of bfloat16 ``[E, C, K]`` and ``[E, N, K]`` without scales."""
        self._require_bf16(out.dtype)
        self._require_slots(values)
        a, b, d = dense_strides(values), dense_strides(weight), dense_strides(out)
        self.resolved.functions.bf16_masked(a, b, d, counts, max(1, expected))

    # ---- scores of the indexer

    def paged_mqa_metadata(
        self, context_lens: torch.Tensor, block_size: int, num_sms: int
    ) -> torch.Tensor:
        """Plan paged scores: which multiprocessor begins where.

        Args:
            context_lens: int32 ``[B, next_n]``, dense, each at least 1; the last column is the
                longest.
            block_size: tokens of a page.
            num_sms: :meth:`num_sms`.

        Returns:
            Int32 ``[num_sms + 1, 2]``, for these lengths and no others: shorter ones at the launch
            make a chip run on for ever.

        Raises:
            BackendUnusableError: this version's paged scores are not used.
        """
        function = self.resolved.functions.paged_metadata
        if self.no_paged_mqa or function is None:
            raise self._no_paged_mqa()
        return _as_torch(function(context_lens, block_size, num_sms))

    def paged_mqa_logits(
        self,
        q: torch.Tensor,
        fused_kv: torch.Tensor,
        weights: torch.Tensor,
        context_lens: torch.Tensor,
        block_table: torch.Tensor,
        schedule: torch.Tensor,
        max_context_len: int,
    ) -> torch.Tensor:
        """Scores ``scale_j * sum_h relu(q_h . k_j) * weight_h`` against the keys of pages.

        Args:
            q: e4m3 ``[B, next_n, H, D]``, dense; its scale is part of the weights.
            fused_kv: uint8 ``[P, block, 1, D + 4]``: within a page all e4m3 keys, then all float32
                scales.
            weights: float32 ``[B * next_n, H]``, dense.
            context_lens: the tensor that the schedule was made from.
            block_table: int32 ``[B, pages]``.
            schedule: of :meth:`paged_mqa_metadata`.
            max_context_len: columns of the result.

        Returns:
            Float32 ``[B * next_n, max_context_len]``, whose rows may lie further apart than they
            are long. Columns from a row's length on are undefined: mask them.

        Raises:
            BackendUnusableError: this version's paged scores are not used.
        """
        function = self.resolved.functions.paged_logits
        if self.no_paged_mqa or function is None:
            raise self._no_paged_mqa()
        return _as_torch(
            function(
                q, fused_kv, weights, context_lens, block_table, schedule, max_context_len, False
            )
        )

    # ---- what is refused

    def _scales_of(self, rows: Rows, *, packed: bool = True) -> torch.Tensor:
        kinds = (Kind.FP8_UE8M0,) if self.packs_scales else (Kind.FP8, Kind.FP8_UE8M0)
        if rows.kind not in kinds or rows.scales is None:
            raise ContractError(
                f"rows of kind {rows.kind.value} reached a product of e4m3 by DeepGEMM on"
                f" {self.chip.name}",
                reason=ReasonCode.CONTRACT_BROKEN,
                expected=f"{' or '.join(kind.value for kind in kinds)}, with their scales",
            )
        if self.packs_scales and not packed:
            return rows.scales
        return self.prepare_row_scales(rows.scales)

    def _require_bf16(self, dtype: torch.dtype) -> None:
        if dtype != torch.bfloat16:
            raise ContractError(
                f"DeepGEMM was asked for results of {dtype}",
                reason=ReasonCode.CONTRACT_BROKEN,
                expected="torch.bfloat16, which is all that its grouped kernels write",
            )

    def _require_slots(self, values: torch.Tensor) -> None:
        groups, capacity = values.shape[:2]
        multiple = self.slot_multiple()
        if groups > 1 and capacity % multiple:
            raise ContractError(
                f"slots of {capacity} rows reached DeepGEMM's masked product",
                reason=ReasonCode.CONTRACT_BROKEN,
                expected=f"a multiple of {multiple}: the last tile of a shorter slot is written"
                " over the next one",
            )

    def _no_paged_mqa(self) -> BackendUnusableError:
        return BackendUnusableError(
            f"DeepGEMM cannot score pages here: {self.no_paged_mqa}",
            reason=ReasonCode.REQUEST_UNSUPPORTED,
            remedy='set option indexer to "triton", or pip install "sgl-deep-gemm==0.1.5.post1"',
        )


def _as_torch(found: Any) -> torch.Tensor:
    """What the library gives back; the fork may give a tensor of another library's."""
    if isinstance(found, torch.Tensor):
        return found
    tensor: torch.Tensor = from_dlpack(found)
    return tensor


def require_installed() -> str:
    """Say what is installed, by the look of it: nothing is imported.

    Raises:
        BackendUnusableError: it is missing, made for another torch, or there is no compiler.
    """
    return str(look())


def import_library() -> Any:
    """Import ``deep_gemm``, after everything about it that can be known beforehand.

    Raises:
        BackendUnusableError: it cannot be imported, root cause first.
    """
    try:
        import deep_gemm  # type: ignore[import-not-found, unused-ignore]
    except Exception as error:
        raise failure_of_import(error) from error
    return deep_gemm
