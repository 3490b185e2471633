"""Hook arguments and answers as JSON, their tensors beside it."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from enum import Enum
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import torch

from mortise.errors import RecordingError
from mortise.spec.capabilities import ExpertLayerRequest, ExpertMethod, LinearLayerRequest, Support
from mortise.spec.dispatch import (
    DecisionRule,
    DispatchDecision,
    DispatchDtype,
    DispatchFormat,
    DispatchMode,
    DispatchRequest,
    GroupListKind,
    Override,
    RoutingWeightSide,
    RowLayout,
    ScaleLayout,
    TokenDispatcherRequest,
)
from mortise.spec.qkv import QKVLayout, QKVShape
from mortise.spec.roles import ForwardMode, ModelRole
from mortise.spec.weights import LinearWeight, ScaleFormat, StoredWeight, WeightScheme

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    KeepTensor = Callable[[torch.Tensor], str]
    """Stores a tensor and gives its name."""
    ReadTensor = Callable[[str], torch.Tensor]

RECORDS: Final[Mapping[str, type]] = MappingProxyType(
    {
        kind.__name__: kind
        for kind in (
            DispatchDecision,
            DispatchFormat,
            DispatchRequest,
            ExpertLayerRequest,
            ExpertMethod,
            LinearLayerRequest,
            LinearWeight,
            Override,
            QKVShape,
            StoredWeight,
            Support,
            TokenDispatcherRequest,
        )
    }
)
"""Records that a recording may hold, by the name under ``"record"``."""

ENUMERATIONS: Final[Mapping[str, type[Enum]]] = MappingProxyType(
    {
        kind.__name__: kind
        for kind in (
            DecisionRule,
            DispatchDtype,
            DispatchMode,
            ForwardMode,
            GroupListKind,
            ModelRole,
            QKVLayout,
            RoutingWeightSide,
            RowLayout,
            ScaleFormat,
            ScaleLayout,
            WeightScheme,
        )
    }
)

DTYPES: Final[Mapping[str, torch.dtype]] = MappingProxyType(
    {
        str(dtype).removeprefix("torch."): dtype
        for dtype in (
            torch.bfloat16,
            torch.bool,
            torch.float32,
            torch.float8_e4m3fn,
            torch.int8,
            torch.int32,
            torch.int64,
            torch.uint8,
        )
    }
)
"""Dtypes of the contract, as a recording names them."""

LEFT_OUT: Final = frozenset({"prepared", "process_group", "receive"})
"""Fields that only their owner can read: they are None in a recording."""


def encode(value: Any, keep: KeepTensor) -> Any:
    """A value of a hook as JSON.

    Args:
        value: of a type that the contract knows.
        keep: stores each tensor.
    """
    match value:
        case torch.Tensor():
            name = keep(value)
            shape, dtype = list(value.shape), str(value.dtype).removeprefix("torch.")
            return {"tensor": name, "shape": shape, "dtype": dtype}
        case torch.dtype():
            return {"dtype": str(value).removeprefix("torch.")}
        case Enum():
            return {"enum": type(value).__name__, "value": value.value}
        case None | bool() | int() | float() | str():
            return value
        case tuple() | list():
            return [encode(one, keep) for one in value]
        case _ if hasattr(value, "items"):
            return {"pairs": [[encode(one, keep) for one in pair] for pair in value.items()]}
    assert is_dataclass(value) and type(value).__name__ in RECORDS, f"no record: {type(value)}"
    own = {one.name: getattr(value, one.name) for one in fields(value)}
    return {"record": type(value).__name__} | {
        name: None if name in LEFT_OUT else encode(one, keep) for name, one in own.items()
    }


def decode(value: Any, read: ReadTensor) -> Any:
    """What :func:`encode` was given; lists are tuples.

    Raises:
        RecordingError: it is nothing that :func:`encode` gives.
    """
    try:
        match value:
            case None | bool() | int() | float() | str():
                return value
            case list():
                return tuple(decode(one, read) for one in value)
            case {"tensor": str(name)}:
                return read(name)
            case {"dtype": str(name)}:
                return DTYPES[name]
            case {"enum": str(name), "value": found}:
                return ENUMERATIONS[name](found)
            case {"pairs": [*pairs]}:
                return {decode(one, read): decode(other, read) for one, other in pairs}
            case {"record": str(name), **own}:
                found = {str(field): decode(one, read) for field, one in own.items()}
                return RECORDS[name](**found)
    except (KeyError, TypeError, ValueError) as error:
        raise RecordingError(
            f"a value of the recording cannot be read: {error}",
            expected="values as this version of Mortise writes them",
            remedy="record again",
        ) from None
    raise RecordingError(
        f"a value of the recording is nothing known: {str(value)[:80]}",
        expected="values as this version of Mortise writes them",
        remedy="record again",
    )
