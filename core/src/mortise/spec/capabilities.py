"""What a backend says of itself, and what it is given when it is bound to a model role."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mortise.spec.paged_mqa import IndexKeyDtype

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from mortise.spec.dispatch import DispatchDtype, DispatchMode
    from mortise.spec.roles import ModelRole
    from mortise.spec.weights import WeightScheme


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
        index_key_dtypes: how it serves cached keys of the indexer, best first.
        process_group_backend: name of the torch.distributed backend that joins its devices.
        graph_capture: experts of low-latency rows can be captured in a graph of the device and
            replayed; the conformance kit then does it.
    """

    device: torch.device
    emulated: bool
    schemes: frozenset[WeightScheme]
    dispatch_dtypes: frozenset[DispatchDtype]
    compute_dtypes: tuple[torch.dtype, ...]
    page_sizes: frozenset[int]
    num_workers: int
    max_native_next_n: int = 1
    index_key_dtypes: tuple[IndexKeyDtype, ...] = (IndexKeyDtype.COMPUTE,)
    process_group_backend: str = "gloo"
    graph_capture: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class BindContext:
    """Everything a backend may know when it is created for one model role.

    Args:
        role: which model of the run.
        device: the configured device (``cpu``, ``emulated``, ...), or None for the backend's own.
        options: the backend's own table of the engine configuration, unvalidated.
        engine_version: version of the core.
        local_rank: number of this process among those of its machine; it chooses the device where
            ``device`` names none.
    """

    role: ModelRole
    device: str | None
    options: Mapping[str, object] = field(default_factory=dict)
    engine_version: str
    local_rank: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertMethod:
    """What the code that runs a layer's experts takes, and asks for.

    Args:
        accepted: formats of dispatched rows it can consume, in order of preference.
        requested: the format it asks for, if it does.
        requested_in_mode: what it asks for in one mode, which goes before ``requested``.
        runner: name of the kernel runner, shown in decisions.
        runner_quantises: the runner quantises unquantised rows by itself.
    """

    accepted: tuple[DispatchDtype, ...]
    requested: DispatchDtype | None = None
    requested_in_mode: Mapping[DispatchMode, DispatchDtype] = field(default_factory=dict)
    runner: str = ""
    runner_quantises: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Support:
    """Answer of ``supports``: whether a layer can be served, and why not.

    Args:
        ok: it can.
        reason: why not.
        method: how the experts will be run; None is the ordinary method of their scheme
            (``mortise.spec.methods``).
    """

    ok: bool
    reason: str = ""
    method: ExpertMethod | None = None


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
    """One layer of experts that a backend is asked about before the layer is built.

    Args:
        role, layer: who asks.
        scheme_w13, scheme_w2: how the projections are stored.
        num_experts: experts of all ranks.
        num_experts_per_tok: K.
        hidden_size, intermediate_size: H and I.
        compute_dtype: dtype of the hidden state.
        num_local_experts: E_l, experts of this rank.
        static_input: the checkpoint holds scales for the input of w13.
        num_groups_w13, num_groups_w2: groups of columns that share a scale, of H and of I.
    """

    role: ModelRole
    layer: str
    scheme_w13: WeightScheme
    scheme_w2: WeightScheme
    num_experts: int
    num_experts_per_tok: int
    hidden_size: int
    intermediate_size: int
    compute_dtype: torch.dtype
    num_local_experts: int = 0
    static_input: bool = False
    num_groups_w13: int = 1
    num_groups_w2: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearLayerRequest:
    """One quantised projection outside the experts that a backend is asked about.

    Args:
        role, layer: who asks.
        scheme: how the weight is stored.
        out_features, in_features: N and K.
        num_groups: G, groups of columns that share a scale.
        static_input: the checkpoint holds a scale for the input.
        compute_dtype: dtype of the hidden state.
    """

    role: ModelRole
    layer: str
    scheme: WeightScheme
    out_features: int
    in_features: int
    num_groups: int
    static_input: bool
    compute_dtype: torch.dtype
