"""What ``npu_moe_init_routing_v2`` is asked for, and what of it a generation refuses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from mortise_npu_ascend.emulator.chip import current_chip
from mortise_npu_ascend.emulator.generation import Generation
from mortise_npu_ascend.emulator.numbers import INT4
from mortise_npu_ascend.emulator.rejections import device_name, require

OPERATOR: Final = "npu_moe_init_routing_v2"
_KERNEL: Final = "aclnnMoeInitRoutingV3"

UNQUANTISED: Final = -1
STATIC: Final = 0
DYNAMIC: Final = 1
DYNAMIC_INT4: Final = 13

CUMULATIVE: Final = 0
COUNTS: Final = 1
PAIRS: Final = 2

_MOST_EXPERTS: Final = 10240
_MOST_EXPERTS_IN_PAIRS: Final = 5120

_ROWS_OF_MODE: Final = (
    (UNQUANTISED, (torch.float16, torch.bfloat16, torch.float32, torch.int8)),
    (STATIC, (torch.float16, torch.bfloat16, torch.float32)),
    (DYNAMIC, (torch.float16, torch.bfloat16, torch.float32)),
    (DYNAMIC_INT4, (torch.bfloat16, torch.float32)),
)


@dataclass(frozen=True)
class RoutingRequest:
    """One call; the attributes are the operator's own arguments.

    Attributes:
        x: ``[T, H]``.
        expert_idx: int32 ``[T, K]``.
        scale: whatever ``quant_mode`` makes of it.
        offset: with static quantisation.
        active_num: rows that are wanted, 0 or -1 for all.
        expert_capacity: rows of an expert, where they are padded.
        expert_num: experts there are.
        drop_pad_mode: 1 gives every expert ``expert_capacity`` rows.
        expert_tokens_num_type: cumulative ends, counts, or pairs.
        expert_tokens_num_flag: whether they are written.
        quant_mode: what becomes of the rows.
        active_expert_range: experts whose rows are wanted, ``[start, end)``; empty for all.
        row_idx_type: 0 gives the place of each copy, 1 the copy at each place.
        x_dtype: None, or int4 with dynamic int4.
    """

    x: torch.Tensor
    expert_idx: torch.Tensor
    scale: torch.Tensor | None
    offset: torch.Tensor | None
    active_num: int
    expert_capacity: int
    expert_num: int
    drop_pad_mode: int
    expert_tokens_num_type: int
    expert_tokens_num_flag: bool
    quant_mode: int
    active_expert_range: tuple[int, ...]
    row_idx_type: int
    x_dtype: int | None

    @property
    def start(self) -> int:
        """The first active expert."""
        return self.active_expert_range[0] if self.active_expert_range else 0

    @property
    def end(self) -> int:
        """The expert after the last active one."""
        return self.active_expert_range[1] if self.active_expert_range else self.expert_num

    @property
    def padded(self) -> bool:
        """Whether every expert has as many rows."""
        return self.drop_pad_mode == 1

    @property
    def rows(self) -> int:
        """Rows of the result, where they are not padded."""
        copies = self.expert_idx.numel()
        return copies if self.active_num <= 0 else min(self.active_num, copies)

    def check(self) -> None:
        """Refuse what torch_npu and the vendor's library refuse, in their order.

        Raises:
            RuntimeError: as the device would.
        """
        for part in (
            _check_shapes,
            _check_int4,
            _check_modes,
            _check_experts,
            _check_padding,
            _check_scale,
            _check_newest,
        ):
            part(self)


def _need(condition: bool, reason: str) -> None:
    require(condition, OPERATOR, reason, kernel=_KERNEL)


def _check_shapes(request: RoutingRequest) -> None:
    for name, tensor in (("x", request.x), ("expert_idx", request.expert_idx)):
        require(
            tensor.ndim == 2,
            OPERATOR,
            f"The {name} should be 2-Dimension, current is {tensor.ndim}-Dimension.",
        )
    require(
        len(request.active_expert_range) in (0, 2),
        OPERATOR,
        "The length of list active_expert_range should be 2, current is "
        f"{len(request.active_expert_range)}.",
    )
    _need(
        request.expert_idx.dtype == torch.int32,
        f"expert_idx should be DT_INT32, got {device_name(request.expert_idx.dtype)}",
    )
    _need(
        request.x.shape[0] == request.expert_idx.shape[0],
        "the first dim of expert_idx and x should be the same",
    )


def _check_int4(request: RoutingRequest) -> None:
    def need(condition: bool, reason: str) -> None:
        require(condition, OPERATOR, reason)

    need(
        request.quant_mode != DYNAMIC or request.x_dtype != INT4,
        "INT4 dynamic quantization uses quant_mode=13. quant_mode=1 only supports INT8 dynamic "
        "quantization.",
    )
    if request.quant_mode != DYNAMIC_INT4:
        _need(request.x_dtype is None, f"x_dtype {request.x_dtype} is not emulated")
        return
    need(not request.padded, "INT4 dynamic quantization only supports drop_pad_mode=0.")
    need(request.offset is None, "INT4 dynamic quantization does not support offset.")
    need(
        request.x.shape[1] % 2 == 0,
        "INT4 dynamic quantization requires the hidden size of x to be even.",
    )
    need(
        request.x_dtype in (None, INT4),
        "The optional parameter x_dtype must be torch_npu.int4 or None when quant_mode=13.",
    )


def _check_modes(request: RoutingRequest) -> None:
    known = current_chip().facts.routing_quant_modes
    _need(
        request.quant_mode in known,
        f"quant_mode {request.quant_mode} should be in {sorted(known)}"
        + (
            "; the chip has more, which are not emulated"
            if current_chip().generation is Generation.A5
            else ""
        ),
    )
    _need(request.drop_pad_mode in (0, 1), f"drop_pad_mode {request.drop_pad_mode}, 0 or 1")
    _need(
        request.expert_tokens_num_type in (CUMULATIVE, COUNTS, PAIRS),
        f"expert_tokens_num_type {request.expert_tokens_num_type} should be 0, 1 or 2",
    )
    _need(request.row_idx_type in (0, 1), f"row_idx_type {request.row_idx_type} should be 0 or 1")
    rows = dict(_ROWS_OF_MODE)[request.quant_mode]
    _need(
        request.x.dtype in rows,
        f"dtype of x {device_name(request.x.dtype)} unsupported under quant_mode "
        f"{request.quant_mode}",
    )


def _check_experts(request: RoutingRequest) -> None:
    most = _MOST_EXPERTS_IN_PAIRS if request.expert_tokens_num_type == PAIRS else _MOST_EXPERTS
    _need(
        0 < request.expert_num <= most, f"expert_num {request.expert_num} should be in [1, {most}]"
    )
    _need(request.start >= 0, f"expert_start {request.start} should be at least 0")
    _need(request.start < request.end, "expert_start should be less than expert_end")
    _need(
        request.end <= request.expert_num,
        f"expert_end {request.end} should be at most expert_num({request.expert_num})",
    )


def _check_padding(request: RoutingRequest) -> None:
    if not request.padded:
        _need(request.active_num >= -1, f"active_num {request.active_num} should be at least -1")
        return
    tokens = request.x.shape[0]
    _need(
        0 < request.expert_capacity <= tokens,
        f"expert_capacity {request.expert_capacity} should be in [1, {tokens}]",
    )
    _need(request.row_idx_type == 0, "row_idx_type should be 0 when drop_pad_mode is 1")
    _need(
        (request.start, request.end) == (0, request.expert_num),
        "active_expert_range should be [0, expert_num] when drop_pad_mode is 1",
    )
    _need(
        request.expert_tokens_num_type == COUNTS or not request.expert_tokens_num_flag,
        "expert_tokens_num_type should be 1 when drop_pad_mode is 1",
    )


def _check_scale(request: RoutingRequest) -> None:
    scale, offset = request.scale, request.offset
    for name, tensor in (("scale", scale), ("offset", offset)):
        if tensor is not None:
            dtype = device_name(tensor.dtype)
            _need(tensor.dtype == torch.float32, f"{name} should be DT_FLOAT, got {dtype}")
    if request.quant_mode == STATIC:
        for name, tensor in (("scale", scale), ("offset", offset)):
            _need(tensor is not None, f"{name} is required when quant_mode is 0")
            _need(tensor is None or tensor.shape == (1,), f"the shape of {name} should be 1")
        return
    _need(offset is None, f"offset is not taken when quant_mode is {request.quant_mode}")
    if scale is not None:
        tokens, hidden = request.x.shape
        wanted: dict[int, tuple[tuple[int, ...], ...]] = {
            UNQUANTISED: ((tokens,),),
            DYNAMIC: ((1, hidden), (request.end - request.start, hidden)),
            DYNAMIC_INT4: ((1, hidden),),
        }
        _need(
            tuple(scale.shape) in wanted[request.quant_mode],
            f"the shape of scale {tuple(scale.shape)} should be one of "
            f"{wanted[request.quant_mode]} when quant_mode is {request.quant_mode}",
        )


def _check_newest(request: RoutingRequest) -> None:
    if current_chip().generation is not Generation.A5:
        return
    copies = request.expert_idx.numel()
    _need(request.expert_tokens_num_flag, "expert_tokens_num_flag False should be True")
    _need(
        request.active_num in (-1, copies) or copies == 0,
        f"active_num {request.active_num} should be bs*k({copies})",
    )
    _need(
        not request.padded or request.quant_mode == UNQUANTISED,
        f"quant_mode {request.quant_mode} should be -1 when drop_pad_mode is 1",
    )
