"""What is decided about how a layer's tokens travel to its experts, and the records that travel."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from mortise.spec.roles import ModelRole
    from mortise.spec.weights import ScaleFormat, WeightScheme


class DispatchDtype(StrEnum):
    """Number format of a dispatched row; the name says what the bytes are."""

    FP32 = "fp32"
    """float32, where the whole model is float32."""
    BF16 = "bf16"
    """bfloat16."""
    FP8_E4M3 = "fp8"
    """float8 e4m3, a scale for every 128 columns of a row."""
    INT8 = "int8"
    """int8, a scale for every row."""
    NVFP4 = "nvfp4"
    """float4 e2m1, a scale for every 16 columns under a global one."""


class DispatchMode(StrEnum):
    """The two exchanges of expert parallelism, as DeepEP defines them."""

    NORMAL = "normal"
    """Variable numbers of rows, counted per expert."""
    LOW_LATENCY = "low_latency"
    """Fixed capacity per rank, counts stay on the device."""


class ScaleLayout(StrEnum):
    """Where the scales of a quantised row are."""

    NONE = "none"
    """Nowhere: the rows are not quantised."""
    PER_TOKEN = "per_token"
    """float32, one a row: ``[R]``."""
    PER_TOKEN_128 = "per_token_per_128_columns"
    """float32 ``[R, ceil(H/128)]``, or powers of two packed in int32 ``[R, ceil(H/512)]``."""
    PER_BLOCK_16 = "per_16_elements_with_global_scale"
    """e4m3 ``[R, H/16]``, beside the global scale that the format states."""


class RowLayout(StrEnum):
    """How dispatched rows are arranged."""

    GROUPED = "grouped"
    """Rows sorted by local expert, ``[R, H]``, with a group list."""
    GROUPED_ALIGNED = "grouped_aligned"
    """As ``GROUPED``, each group padded to a multiple of the kernel's alignment.

    Padding is undefined, and the group list counts rows without it.
    """
    MASKED = "masked"
    """``[E_l, capacity, H]`` with a count of valid rows per expert."""


class GroupListKind(StrEnum):
    """What the numbers of a group list are."""

    COUNTS = "counts"
    """How many rows each group has."""
    CUMULATIVE = "cumulative"
    """Where each group ends."""


class RoutingWeightSide(StrEnum):
    """Who multiplies the experts' rows by the routing weights."""

    COMBINE = "combine"
    """Whoever brings the rows home."""
    EXPERTS = "experts"
    """``quantized_moe_apply``, by the weights that come with the rows."""


class DecisionRule(StrEnum):
    """Which rule of the order of authority decided; highest first."""

    OVERRIDE = "override"
    """The user said so."""
    EXPERT_METHOD = "expert_method"
    """What runs the experts asks for it."""
    RUNNER = "runner"
    """The kernel runner quantises by itself, and wants rows as they are."""
    DEVICE_DEFAULT = "device_default"
    """Nobody asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchFormat:
    """Completely what arrives at the experts.

    Args:
        dtype: number format of the rows; fp8 rows are float8_e4m3fn ``[R, H]``, nvfp4 rows uint8
            ``[R, H/2]`` with the even column in the low nibble.
        scale_layout: where their scales are.
        scale_format: what their scales are; None where there are none.
        global_scale: NVFP4: the factor common to all scales of this layer (amax / 2688 of the
            calibration); a row is ``values * scales * global_scale``.
        row_layout: how they are arranged.
        mode: the exchange they come through.
        alignment: rows to which each group is padded (``GROUPED_ALIGNED``).
    """

    dtype: DispatchDtype
    scale_layout: ScaleLayout = ScaleLayout.NONE
    scale_format: ScaleFormat | None = None
    global_scale: float | None = None
    row_layout: RowLayout = RowLayout.GROUPED
    mode: DispatchMode = DispatchMode.NORMAL
    alignment: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Override:
    """A format that the user asked for.

    Args:
        value: the format.
        source: where that was said (``command line --dispatch-dtype``).
    """

    value: DispatchDtype
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchRequest:
    """Everything ``resolve_dispatch_dtype`` may look at.

    Args:
        role: the model the layer belongs to.
        layer: dotted module name of the layer.
        mode: the exchange the format is for.
        override: the user's explicit choice for this role; None is "unset" (``auto``).
        scheme_w13, scheme_w2: schemes of the expert weights, read from the checkpoint.
        accepted: formats the layer's expert method can consume, in order of preference.
        requested_in_mode: the format the expert method asks for in this mode, if it does.
        requested: the format it asks for in general, if it does.
        input_global_scale: the layer's static scale of NVFP4 input (a factor, amax / 2688); its
            presence asks for NVFP4.
        scale_format: what the scales of fp8 rows are to be.
        runner: name of the kernel runner that will consume the rows.
        runner_quantises: that runner quantises its input by itself.
        compute_dtype: dtype of the hidden state, ``torch.float32`` or ``torch.bfloat16``.
    """

    role: ModelRole
    layer: str
    mode: DispatchMode
    override: Override | None
    scheme_w13: WeightScheme
    scheme_w2: WeightScheme
    accepted: tuple[DispatchDtype, ...]
    requested_in_mode: DispatchDtype | None = None
    requested: DispatchDtype | None = None
    input_global_scale: float | None = None
    scale_format: ScaleFormat | None = None
    runner: str = ""
    runner_quantises: bool = False
    compute_dtype: torch.dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchDecision:
    """A dispatch format and its reason; decided once per layer and mode, then immutable.

    Args:
        format: what every dispatch of the layer in this mode is given.
        rule: which rule decided.
        reason: why, in words.
        asked: what the rule asked for, when the device's documented policy made it another format.
        source: where an override came from.
    """

    format: DispatchFormat
    rule: DecisionRule
    reason: str
    asked: DispatchDtype | None = None
    source: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchedTokens:
    """Rows as they arrive at the experts of this rank.

    Args:
        rows: ``[R, H]`` (grouped) or ``[E_l, capacity, H]`` (masked).
        scales: scales of quantised rows, or None.
        group_list: int64 ``[E_l]``, counts or cumulative ends as ``group_list_kind`` says; rows
            past the last group are undefined and must not be read.
        group_list_kind: which of the two.
        group_counts: the same counts as Python integers where the host knows them, else None;
            saves a device synchronisation.
        format: what the rows are.
        routing_weight_side: who multiplies by the routing weights.
        row_weights: float32, one a row in the layout of the rows, where the experts multiply.
        receive: second stage of an exchange that is still under way: until it was called, rows,
            scales and counts are undefined. None where everything has arrived. May be called again.
    """

    rows: torch.Tensor
    scales: torch.Tensor | None
    group_list: torch.Tensor
    group_list_kind: GroupListKind
    group_counts: tuple[int, ...] | None
    format: DispatchFormat
    routing_weight_side: RoutingWeightSide = RoutingWeightSide.COMBINE
    row_weights: torch.Tensor | None = None
    receive: Callable[[], None] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """The router's choice.

    Args:
        topk_ids: int64 ``[T, K]``, experts of all ranks; -1 is no expert.
        topk_weights: float32 ``[T, K]``.
    """

    topk_ids: torch.Tensor
    topk_weights: torch.Tensor


class DispatchHandle(Protocol):
    """What ``combine`` needs to bring rows home; opaque to everybody else."""


class TokenDispatcher(Protocol):
    """Sends tokens to their experts and brings the results back; keeps no state between calls."""

    def dispatch(
        self, hidden_TH: torch.Tensor, routing: Routing, format: DispatchFormat
    ) -> tuple[DispatchedTokens, DispatchHandle]:
        """Group ``hidden_TH`` ``[T, H]`` by expert in the format decided for the layer."""
        ...

    def combine(self, rows_RH: torch.Tensor, handle: DispatchHandle) -> torch.Tensor:
        """Sum the experts' rows ``[R, H]`` per token by routing weight, ``[T, H]``."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenDispatcherRequest:
    """What a device's own expert-parallel exchange must serve.

    Args:
        role, layer: who asks.
        num_experts: experts of all ranks; rank r holds the r-th of ``world_size`` equal parts.
        num_experts_per_tok: K.
        hidden_size: H.
        world_size, rank: ranks that share the experts, and this one.
        mode: the exchange.
        max_tokens_per_rank: capacity of the low-latency exchange; the same on every rank.
        two_stage: whether ``DispatchedTokens.receive`` may be used.
        format: what was decided for this layer and mode, and what every dispatch will be given;
            None where it is not known yet.
        process_group: the torch.distributed group of the ranks; None for one process.
    """

    role: ModelRole
    layer: str
    num_experts: int
    num_experts_per_tok: int
    hidden_size: int
    world_size: int = 1
    rank: int = 0
    mode: DispatchMode = DispatchMode.NORMAL
    max_tokens_per_rank: int = 0
    two_stage: bool = False
    format: DispatchFormat | None = None
    process_group: object | None = field(default=None, repr=False)
