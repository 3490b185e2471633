"""The type of the hidden state, and why it is that."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import torch

from mortise.backends import Decision
from mortise.errors import BackendUnusableError, ConfigError
from mortise.spec.reasons import ReasonCode

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mortise.backends import Ops

DTYPES: Final[Mapping[str, torch.dtype]] = MappingProxyType(
    {"bfloat16": torch.bfloat16, "float32": torch.float32}
)


def decide_dtype(
    asked: str, source: str, stored: str | None, ops: Ops
) -> tuple[torch.dtype, Decision]:
    """Choose the dtype of a run.

    Args:
        asked: ``dtype`` of the configuration.
        source: where that came from.
        stored: what the checkpoint says of itself.
        ops: the bound backend, which serves some dtypes.

    Raises:
        ConfigError: ``auto``, and the checkpoint names a dtype that Mortise does not compute in.
        BackendUnusableError: the backend does not serve it.
    """
    served = ops.capabilities.compute_dtypes
    if asked != "auto":
        name, rule, reason = asked, "override", "configured"
    elif stored is not None:
        name, rule, reason, source = stored, "checkpoint", "config.json says so", "config.json"
    else:
        name, rule = _name(served[0]), "backend"
        reason = f"config.json names none; {ops.backend.name} prefers it"
    dtype = DTYPES.get(name)
    if dtype is None:
        raise ConfigError(
            f"dtype is 'auto', and the checkpoint's is {name!r}",
            expected=f"one of {', '.join(DTYPES)}",
            remedy="set dtype in the engine configuration; the weights are converted as they load",
        )
    if dtype not in served:
        raise BackendUnusableError(
            f"backend {ops.backend.name!r} does not compute in {name}",
            reason=ReasonCode.REQUEST_UNSUPPORTED,
            details=[f"{name}: {reason}"],
            expected=f"one of {', '.join(map(_name, served))}",
            remedy="set dtype in the engine configuration, or use another backend",
        )
    return dtype, Decision(
        role=ops.role, subject="dtype", value=name, rule=rule, reason=reason, source=source
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
