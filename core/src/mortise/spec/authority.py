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
    DispatchMode,
    RowLayout,
    ScaleLayout,
)
from mortise.spec.methods import unquantised
from mortise.spec.reasons import ReasonCode
from mortise.spec.weights import ScaleFormat

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mortise.spec.dispatch import DispatchRequest


@dataclass(frozen=True, slots=True)
class Exact:
    """The device sends rows in the format that was asked for."""


@dataclass(frozen=True, slots=True)
class Substitute:
    """The device sends another format instead, which is documented and warned of.

    Args:
        dtype: the format that it sends.
        why: for the decision's reason.
    """

    dtype: DispatchDtype
    why: str


@dataclass(frozen=True, slots=True)
class Refuse:
    """The device cannot do what was asked for, and nothing else would mean the same.

    Args:
        why: for the error.
    """

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
        said = {*self.actions, *self.row_layouts}
        missing = [one.value for one in (*DispatchDtype, *DispatchMode) if one not in said]
        assert not missing, f"policy of {self.device} says nothing of {', '.join(missing)}"
        sent = {action.dtype for action in self.actions.values() if isinstance(action, Substitute)}
        for dtype in sent | ({self.default} if self.default else set()):
            assert isinstance(self.actions[dtype], Exact), f"{self.device} cannot send {dtype}"


@dataclass(frozen=True, slots=True)
class _Wish:
    """The format that the strongest rule asks for, before the device has its word."""

    dtype: DispatchDtype
    rule: DecisionRule
    reason: str


def decide_by_authority(request: DispatchRequest, policy: DispatchPolicy) -> DispatchDecision:
    """Ask the user, the expert method, the runner and the device, in this order.

    Raises:
        ConfigError: the user's override is refused by the device, or the layer's experts cannot
            consume what it becomes, or lack the global scale that it needs.
        BackendUnusableError: the same, of a format that the user did not ask for.
    """
    wish = _wish(request, policy)
    dtype, why = _by_policy(wish, request, policy)
    _require_consumed(dtype, wish, request, policy)
    return DispatchDecision(
        format=_format(dtype, request, policy),
        rule=wish.rule,
        reason=f"{wish.reason}; {why}" if why else wish.reason,
        asked=None if dtype is wish.dtype else wish.dtype,
        source="" if request.override is None else request.override.source,
    )


def _wish(request: DispatchRequest, policy: DispatchPolicy) -> _Wish:
    plain = unquantised(request.compute_dtype)
    if request.override is not None:
        reason = f"asked for by {request.override.source}"
        return _Wish(request.override.value, DecisionRule.OVERRIDE, reason)
    if request.input_global_scale is not None:
        reason = "the checkpoint carries a global scale for the experts' input"
        return _Wish(DispatchDtype.NVFP4, DecisionRule.EXPERT_METHOD, reason)
    if request.requested_in_mode is not None:
        reason = f"the expert method asks for it in mode {request.mode.value}"
        return _Wish(request.requested_in_mode, DecisionRule.EXPERT_METHOD, reason)
    if request.requested is not None:
        reason = f"{request.scheme_w13.value} experts ask for it"
        return _Wish(request.requested, DecisionRule.EXPERT_METHOD, reason)
    if request.runner_quantises:
        return _Wish(plain, DecisionRule.RUNNER, f"runner {request.runner} quantises by itself")
    reason = f"nobody asks; {policy.device} sends it by default"
    return _Wish(policy.default or plain, DecisionRule.DEVICE_DEFAULT, reason)


def _by_policy(
    wish: _Wish, request: DispatchRequest, policy: DispatchPolicy
) -> tuple[DispatchDtype, str]:
    """What the device makes of a format, and why where that is another one."""
    match policy.actions[wish.dtype]:
        case Exact():
            return wish.dtype, ""
        case Substitute(dtype, why):
            instead = f"{dtype.value} instead of {wish.dtype.value}"
            return dtype, f"{policy.device} sends {instead}: {why}"
        case Refuse(why):
            what = f"{policy.device} cannot send {wish.dtype.value} rows: {why}"
            raise _refusal(wish, request, what)
        case action:
            assert_never(action)


def _require_consumed(
    dtype: DispatchDtype, wish: _Wish, request: DispatchRequest, policy: DispatchPolicy
) -> None:
    if dtype not in request.accepted:
        became = "" if dtype is wish.dtype else f", which {policy.device} sends as {dtype.value}"
        what = f"its experts cannot consume {wish.dtype.value} rows{became}"
        raise _refusal(wish, request, what)
    if dtype is DispatchDtype.NVFP4 and request.input_global_scale is None:
        what = f"{dtype.value} rows need a global scale, and the checkpoint carries none for them"
        raise _refusal(wish, request, what)


def _refusal(
    wish: _Wish, request: DispatchRequest, what: str
) -> ConfigError | BackendUnusableError:
    what = f"layer {request.layer}: {what} ({wish.reason})"
    others = [dtype.value for dtype in request.accepted if dtype is not wish.dtype]
    expected = f"one of {', '.join(others)}" if others else f"a device for {wish.dtype.value} rows"
    if wish.rule is DecisionRule.OVERRIDE:
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
