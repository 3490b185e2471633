"""What a backend says of itself, and what it is given when it is bound to a model role."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from mortise.spec.dispatch import DispatchDtype
    from mortise.spec.experts import ExpertScheme
    from mortise.spec.roles import ModelRole


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """Facts about a bound backend that the core plans with; never a device name.

    Args:
        device: the torch device tensors live on.
        emulated: numerics of a chip computed elsewhere; every output says so.
        schemes: schemes of expert weights it serves.
        dispatch_dtypes: formats of dispatched rows it serves.
        compute_dtypes: dtypes of the hidden state it serves, best first.
        page_sizes: tokens per cache page it serves.
        num_workers: workers among which the indexer's schedule is split.
        max_native_next_n: rows of one request that the indexer's kernel takes natively; 1 means
            every token is a row of its own.
    """

    device: torch.device
    emulated: bool
    schemes: frozenset[ExpertScheme]
    dispatch_dtypes: frozenset[DispatchDtype]
    compute_dtypes: tuple[torch.dtype, ...]
    page_sizes: frozenset[int]
    num_workers: int
    max_native_next_n: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class BindContext:
    """Everything a backend may know when it is created for one model role.

    Args:
        role: which model of the run.
        device: the configured device (``cpu``, ``emulated``, ...), or None for the backend's own.
        options: the backend's own table of the engine configuration, unvalidated.
        engine_version: version of the core.
    """

    role: ModelRole
    device: str | None
    options: Mapping[str, object] = field(default_factory=dict)
    engine_version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Support:
    """Answer of ``supports``: whether a layer can be served, and why not."""

    ok: bool
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceProbe:
    """Answer of ``probe``: whether the backend's device is in this machine.

    Args:
        found: the device is here and answers.
        arch: its architecture, compared with the manifest's ``arch``; empty where there is none.
        reason: why not, or what was seen.
    """

    found: bool
    arch: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertLayerRequest:
    """One layer of experts that a backend is asked about before the layer is built."""

    role: ModelRole
    layer: str
    scheme_w13: ExpertScheme
    scheme_w2: ExpertScheme
    num_experts: int
    num_experts_per_tok: int
    hidden_size: int
    intermediate_size: int
    compute_dtype: torch.dtype
