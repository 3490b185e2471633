"""The order of authority by which a dispatch format is decided, the same on every device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, assert_never

from mortise.errors import BackendUnusableError, ConfigError
from mortise.spec.dispatch import (
    DecisionRule,
    DispatchDecision,
    DispatchDtype,
    DispatchFormat,
    RowLayout,
    ScaleLayout,
)
from mortise.spec.methods import unquantised
from mortise.spec.reasons import ReasonCode
from mortise.spec.weights import ScaleFormat

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mortise.spec.dispatch import DispatchMode, DispatchRequest


@dataclass(frozen=True, slots=True)
class Exact:
    """The device sends rows in the format that was asked for."""


@dataclass(frozen=True, slots=True)
class Substitute:
    """The device sends ``dtype`` instead, which is documented and warned of."""

    dtype: DispatchDtype
    why: str


@dataclass(frozen=True, slots=True)
class Refuse:
    """The device cannot do what was asked for, and nothing else would mean the same."""

    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchPolicy:
    """One device's answers where the order of authority leaves it the word.

    Args:
        device: what to call it in reasons.
        default: what it sends when nobody asks; None is the compute dtype.
        actions: what becomes of each dtype; every member of the enumeration has one.
        row_layouts: how rows arrive in each mode.
        alignment: rows to which groups are padded where the layout is ``GROUPED_ALIGNED``.
    """

    device: str
    default: DispatchDtype | None
    actions: Mapping[DispatchDtype, Exact | Substitute | Refuse]
    row_layouts: Mapping[DispatchMode, RowLayout]
    alignment: int = 1

    def __post_init__(self) -> None:
        missing = [dtype.value for dtype in DispatchDtype if dtype not in self.actions]
        assert not missing, f"policy of {self.device} says nothing of {', '.join(missing)}"


def decide_by_authority(request: DispatchRequest, policy: DispatchPolicy) -> DispatchDecision:
    """Ask the user, the expert method, the runner and the device, in this order.

    Raises:
        ConfigError: the user's override is refused by the device, or the layer's experts cannot
            consume what it becomes.
        BackendUnusableError: the same, of a format that the user did not ask for.
    """
    asked, rule, reason = _asked(request, policy)
    dtype = _by_policy(asked, rule, reason, request, policy)
    if dtype not in request.accepted:
        became = "" if dtype is asked else f", which {policy.device} sends as {dtype.value}"
        raise _refusal(
            request,
            rule,
            f"layer {request.layer}: its experts cannot consume {asked.value} rows{became}"
            f" ({reason})",
        )
    return DispatchDecision(
        format=_format(dtype, request, policy),
        rule=rule,
        reason=reason,
        asked=None if dtype is asked else asked,
        source="" if request.override is None else request.override.source,
    )


def _asked(
    request: DispatchRequest, policy: DispatchPolicy
) -> tuple[DispatchDtype, DecisionRule, str]:
    plain = unquantised(request.compute_dtype)
    if request.override is not None:
        reason = f"asked for by {request.override.source}"
        return request.override.value, DecisionRule.OVERRIDE, reason
    if request.input_global_scale is not None:
        reason = "the checkpoint carries a global scale for the experts' input"
        return DispatchDtype.NVFP4, DecisionRule.EXPERT_METHOD, reason
    if request.requested_in_mode is not None:
        reason = f"the expert method asks for it in mode {request.mode.value}"
        return request.requested_in_mode, DecisionRule.EXPERT_METHOD, reason
    if request.requested is not None:
        reason = f"{request.scheme_w13.value} experts ask for it"
        return request.requested, DecisionRule.EXPERT_METHOD, reason
    if request.runner_quantises:
        return plain, DecisionRule.RUNNER, f"runner {request.runner} quantises by itself"
    reason = f"nobody asks; {policy.device} sends it by default"
    return policy.default or plain, DecisionRule.DEVICE_DEFAULT, reason


def _by_policy(
    asked: DispatchDtype,
    rule: DecisionRule,
    reason: str,
    request: DispatchRequest,
    policy: DispatchPolicy,
) -> DispatchDtype:
    match policy.actions[asked]:
        case Exact():
            return asked
        case Substitute(dtype):
            return dtype
        case Refuse(why):
            raise _refusal(
                request,
                rule,
                f"layer {request.layer}: {policy.device} cannot send {asked.value} rows: {why}"
                f" ({reason})",
            )
        case action:
            assert_never(action)


def _refusal(
    request: DispatchRequest, rule: DecisionRule, what: str
) -> ConfigError | BackendUnusableError:
    expected = f"one of {', '.join(dtype.value for dtype in request.accepted)}"
    if rule is DecisionRule.OVERRIDE:
        return ConfigError(
            what, expected=expected, remedy="remove the override, or choose an accepted format"
        )
    return BackendUnusableError(
        what,
        reason=ReasonCode.REQUEST_UNSUPPORTED,
        expected=expected,
        remedy="choose an accepted format, or a backend whose device can send this one",
    )


def _format(
    dtype: DispatchDtype, request: DispatchRequest, policy: DispatchPolicy
) -> DispatchFormat:
    layout, scales = _scales(dtype, request)
    rows = policy.row_layouts[request.mode]
    return DispatchFormat(
        dtype=dtype,
        scale_layout=layout,
        scale_format=scales,
        global_scale=request.input_global_scale if dtype is DispatchDtype.NVFP4 else None,
        row_layout=rows,
        mode=request.mode,
        alignment=policy.alignment if rows is RowLayout.GROUPED_ALIGNED else 1,
    )


def _scales(
    dtype: DispatchDtype, request: DispatchRequest
) -> tuple[ScaleLayout, ScaleFormat | None]:
    match dtype:
        case DispatchDtype.FP32 | DispatchDtype.BF16:
            return ScaleLayout.NONE, None
        case DispatchDtype.INT8:
            return ScaleLayout.PER_TOKEN, ScaleFormat.FLOAT32
        case DispatchDtype.FP8_E4M3:
            return ScaleLayout.PER_TOKEN_128, request.scale_format or ScaleFormat.FLOAT32
        case DispatchDtype.NVFP4:
            return ScaleLayout.PER_BLOCK_16, ScaleFormat.E4M3
        case _:
            assert_never(dtype)
