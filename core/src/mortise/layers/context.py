"""What every layer of one model is given when it is built."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

from mortise.checkpoint.quantization.module_scheme import SchemeLookup, Unquantised
from mortise.parallel.group import ExpertParallelGroup
from mortise.spec.dispatch import DispatchMode
from mortise.spec.paged_mqa import IndexKeyDtype

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mortise.backends.ops import Ops
    from mortise.spec.dispatch import Override


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerContext:
    """The surroundings of a model of one role; a value, shared by all its layers.

    Args:
        ops: the hooks bound for this role.
        schemes: how the checkpoint stores each module.
        overrides: the user's dispatch formats for this role, by mode.
        modes: exchanges that passes of this run may use.
        group: the ranks that share the experts.
        max_tokens_per_rank: capacity of the low-latency exchange.
        index_key_dtype: how the indexer's keys are cached.
    """

    ops: Ops
    schemes: SchemeLookup = field(default_factory=Unquantised)
    overrides: Mapping[DispatchMode, Override] = field(default_factory=lambda: MappingProxyType({}))
    modes: tuple[DispatchMode, ...] = (DispatchMode.NORMAL,)
    group: ExpertParallelGroup = field(default_factory=ExpertParallelGroup)
    max_tokens_per_rank: int = 0
    index_key_dtype: IndexKeyDtype = IndexKeyDtype.COMPUTE
