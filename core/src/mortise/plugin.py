"""Everything the author of a backend imports: base class, hook marker and records."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Final

import pluggy

from mortise.errors import (
    BackendUnusableError,
    ConfigError,
    ContractError,
    MortiseError,
    StaleScheduleError,
)
from mortise.spec.authority import (
    DispatchPolicy,
    Exact,
    Refuse,
    Substitute,
    decide_by_authority,
)
from mortise.spec.capabilities import (
    BindContext,
    Capabilities,
    DeviceProbe,
    ExpertLayerRequest,
    ExpertMethod,
    LinearLayerRequest,
    Support,
)
from mortise.spec.choices import BackendChoice
from mortise.spec.consumer import check_dispatched_tokens
from mortise.spec.dispatch import (
    DecisionRule,
    DispatchDecision,
    DispatchDtype,
    DispatchedTokens,
    DispatchFormat,
    DispatchHandle,
    DispatchMode,
    DispatchRequest,
    GroupListKind,
    Override,
    Routing,
    RoutingWeightSide,
    RowLayout,
    ScaleLayout,
    TokenDispatcher,
    TokenDispatcherRequest,
)
from mortise.spec.doctor import DoctorRequest, Finding, Verdict
from mortise.spec.experts import ExpertWeights
from mortise.spec.hooks import (
    HOOKS,
    NOT_SUPPORTED,
    PAIRED_HOOKS,
    PROJECT,
    HookSpec,
    NotSupported,
)
from mortise.spec.methods import ordinary_method
from mortise.spec.paged_mqa import (
    SPLIT_TOKENS,
    IndexKeyDtype,
    IndexKeyPages,
    PagedMQABuffers,
    PagedMQAMetadata,
    refresh_paged_mqa_metadata,
)
from mortise.spec.qkv import QKVLayout, QKVParts, QKVShape
from mortise.spec.reasons import ReasonCode
from mortise.spec.roles import ForwardMode, ModelRole, Phase
from mortise.spec.warmup import WarmupJob, WarmupRequest
from mortise.spec.weights import LinearWeight, ScaleFormat, StoredWeight, WeightScheme

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "HOOKS",
    "NOT_SUPPORTED",
    "PAIRED_HOOKS",
    "SPLIT_TOKENS",
    "Backend",
    "BackendChoice",
    "BackendUnusableError",
    "BindContext",
    "Capabilities",
    "ConfigError",
    "ContractError",
    "DecisionRule",
    "DeviceProbe",
    "DispatchDecision",
    "DispatchDtype",
    "DispatchFormat",
    "DispatchHandle",
    "DispatchMode",
    "DispatchPolicy",
    "DispatchRequest",
    "DispatchedTokens",
    "DoctorRequest",
    "Exact",
    "ExpertLayerRequest",
    "ExpertMethod",
    "ExpertWeights",
    "Finding",
    "ForwardMode",
    "GroupListKind",
    "HookSpec",
    "IndexKeyDtype",
    "IndexKeyPages",
    "LinearLayerRequest",
    "LinearWeight",
    "ModelRole",
    "MortiseError",
    "NotSupported",
    "Override",
    "PagedMQABuffers",
    "PagedMQAMetadata",
    "Phase",
    "QKVLayout",
    "QKVParts",
    "QKVShape",
    "ReasonCode",
    "Refuse",
    "Routing",
    "RoutingWeightSide",
    "RowLayout",
    "ScaleFormat",
    "ScaleLayout",
    "StaleScheduleError",
    "StoredWeight",
    "Substitute",
    "Support",
    "TokenDispatcher",
    "TokenDispatcherRequest",
    "Verdict",
    "WarmupJob",
    "WarmupRequest",
    "WeightScheme",
    "check_dispatched_tokens",
    "decide_by_authority",
    "hookimpl",
    "ordinary_method",
    "refresh_paged_mqa_metadata",
]

hookimpl: Final = pluggy.HookimplMarker(PROJECT)
"""Marks a method as the answer to the hook of its name; no option but ``specname`` is allowed."""


class Backend(ABC):
    """A chip's answers for one model role.

    A subclass adds one ``@hookimpl`` method for each hook that its ``backend.toml`` lists under
    ``implements``: same name, same parameters in the same order, no defaults. The class is imported
    only when its backend was chosen, and one object is created per model role; what it keeps, it
    keeps on that object. The vendor's libraries are imported in ``create``, not at the top of the
    module, so that a machine without them gets a clear answer.
    """

    @classmethod
    def probe(cls) -> DeviceProbe:
        """Say whether the device is here; asked in a process of its own, for ``auto`` alone.

        A crash or an endless wait of the vendor's driver stays in that process. A backend that
        needs no device keeps this answer.
        """
        return DeviceProbe(found=True, reason="needs no device")

    @classmethod
    def doctor(cls, request: DoctorRequest) -> Sequence[Finding]:  # noqa: ARG003
        """Look for what would go wrong in a run, for ``mortise doctor``; nothing is created.

        Asked of the backend that the configuration names, in the process of ``doctor``: look at
        versions, files and variables, and leave what may crash or hang to :meth:`probe`. What
        needs no word is no finding; a backend without checks of its own keeps this answer.
        """
        return ()

    @classmethod
    @abstractmethod
    def create(cls, context: BindContext) -> Backend:
        """Make the backend of one model role.

        Raises:
            BackendUnusableError: the device or a library is missing or too old; say which.
            ConfigError: ``context.options`` or ``context.device`` is wrong.
        """

    @abstractmethod
    def capabilities(self) -> Capabilities:
        """Facts that the core plans with; the same answer every time."""

    @abstractmethod
    def supports(self, request: ExpertLayerRequest) -> Support:
        """Say before a layer of experts is built whether it can be served, and if not, why not."""

    def choices(self) -> Sequence[BackendChoice]:
        """Tell what was decided at creation: which library serves, which does not and why.

        Shown by ``mortise explain`` among all decisions. A backend that has nothing to choose keeps
        this answer.
        """
        return ()

    def supports_linear(self, request: LinearLayerRequest) -> Support:
        """Say before a quantised projection outside the experts is built whether it can be served.

        Unless a backend says otherwise, it serves projections of every scheme that its
        capabilities list.
        """
        if request.scheme in self.capabilities().schemes:
            return Support(ok=True)
        return Support(ok=False, reason=f"its weight is stored as {request.scheme.value}")

    def warmup(self, request: WarmupRequest) -> Sequence[WarmupJob]:  # noqa: ARG002
        """Say what has to be compiled before the model runs, and only what is in use.

        Asked once every layer is prepared; answering compiles nothing. The core runs jobs of
        different keys, several at a time, and is not ready before all of them have ended. A
        backend that compiles nothing keeps this answer.
        """
        return ()
