"""From an engine configuration to a model that is ready to run."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import nn

from mortise.checkpoint import CheckpointTensors, ModelDirectory, load_weights
from mortise.checkpoint.quantization.plan import QuantizationPlan
from mortise.engine.binding import bind_backend
from mortise.engine.cache import CacheNeeds, cache_decisions, new_cache
from mortise.engine.compute_dtype import decide_dtype
from mortise.engine.default_sampling import default_sampling
from mortise.engine.dispatch_modes import dispatch_modes
from mortise.engine.dispatch_overrides import dispatch_overrides
from mortise.engine.draft_loading import LoadedDraft, load_draft, open_draft
from mortise.engine.expert_runners import runner_decisions
from mortise.engine.index_keys import index_key_decision
from mortise.engine.joining import join_group
from mortise.engine.load_decisions import (
    dispatch_decisions,
    model_decision,
    sampling_decision,
    scheme_decisions,
    skip_decisions,
)
from mortise.engine.materialise import materialise
from mortise.engine.threads import decide_threads
from mortise.layers.context import LayerContext
from mortise.models.registry import family_of
from mortise.spec.roles import ModelRole

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from mortise.backends import BoundBackend, Decision
    from mortise.config import ResolvedConfig
    from mortise.engine.binding import WrapOps
    from mortise.engine.sampling_params import SamplingParams
    from mortise.env import Launch
    from mortise.models.family import CachePool, CausalLM, ModelFacts, ModelFamily
    from mortise.parallel.group import ExpertParallelGroup
    from mortise.spec.dispatch import DispatchDecision, DispatchMode
    from mortise.spec.paged_mqa import IndexKeyDtype

    LoadProgress = Callable[[int, int], None]
    """Told the bytes loaded so far and the bytes of all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A main model with its weights, its cache and every decision on the way.

    Args:
        directory: where it came from.
        facts: what its family says of it.
        model: ready to run.
        pool: its empty cache.
        bound: the backend that answers its hooks.
        dtype: of parameters and hidden state.
        index_key_dtype: how the indexer's keys are cached, if it has one.
        threads: of one operation on the processor; None leaves torch's choice.
        group: the ranks that share its experts.
        modes: exchanges that its passes may use.
        dispatch: what was decided for each layer of experts, one for each mode.
        default_sampling: how the model wants its tokens chosen when the user says nothing.
        draft: the model that drafts, if one does.
        decisions: in the order in which they were taken; the draft's are its own.
        seconds: wall time from opening the directory.
    """

    directory: ModelDirectory
    facts: ModelFacts
    model: CausalLM
    pool: CachePool
    bound: BoundBackend
    dtype: torch.dtype
    index_key_dtype: IndexKeyDtype
    threads: int | None
    group: ExpertParallelGroup
    modes: tuple[DispatchMode, ...]
    dispatch: Mapping[str, tuple[DispatchDecision, ...]]
    default_sampling: SamplingParams
    draft: LoadedDraft | None
    decisions: tuple[Decision, ...]
    seconds: float

    @property
    def device(self) -> torch.device:
        """Where parameters and cache are."""
        return self.bound.ops.capabilities.device


def load_model(
    resolved: ResolvedConfig,
    progress: LoadProgress | None = None,
    launch: Launch | None = None,
    wrap_ops: WrapOps | None = None,
) -> LoadedModel:
    """Bind the backend, build the model without memory, give it memory, fill it.

    The weights are never held twice: each tensor is copied from its file to its place.

    Args:
        resolved: the configuration.
        progress: told the bytes loaded so far and the bytes of all.
        launch: this process's place among those that share the experts; None is it alone.
        wrap_ops: given the hooks of each role, gives those that its model is to call.

    Raises:
        MortiseError: directory, architecture, backend, weights or memory; each says which.
    """
    started = time.perf_counter()
    opened = _open(resolved.config.model)
    draft = None
    if resolved.config.draft.num_tokens:
        draft = open_draft(resolved.config.draft, opened.directory, opened.family, opened.facts)
    bound = bind_backend(resolved, launch, wrap_ops=wrap_ops)
    draft_bound = None
    if draft is not None:
        draft_bound = bind_backend(resolved, launch, ModelRole.DRAFT, wrap_ops)
    group = join_group(
        launch,
        resolved,
        bound.ops.capabilities,
        opened.directory,
        opened.tensors,
        None if draft is None else draft.directory,
    )
    try:
        loaded = _load_main(opened, resolved, bound, group, progress)
        if draft is not None and draft_bound is not None:
            loaded = replace(loaded, draft=load_draft(draft, resolved, draft_bound, loaded))
        return replace(loaded, seconds=time.perf_counter() - started)
    except BaseException as error:
        # The others would wait for a process that is not coming.
        group.close(error)
        raise


@dataclass(frozen=True, slots=True, kw_only=True)
class _Opened:
    """A model directory whose files have been read as far as they are small."""

    directory: ModelDirectory
    family: ModelFamily
    facts: ModelFacts
    sampling: SamplingParams
    tensors: CheckpointTensors


def _open(model: str) -> _Opened:
    directory = ModelDirectory.open(model)
    family = family_of(directory.config)
    return _Opened(
        directory=directory,
        family=family,
        facts=family.facts(directory.config),
        sampling=default_sampling(directory.generation_config),
        tensors=CheckpointTensors(directory.weight_files()),
    )


def _load_main(
    opened: _Opened,
    resolved: ResolvedConfig,
    bound: BoundBackend,
    group: ExpertParallelGroup,
    progress: LoadProgress | None,
) -> LoadedModel:
    ops, directory, tensors = bound.ops, opened.directory, opened.tensors
    family, facts, sampling = opened.family, opened.facts, opened.sampling
    modes = dispatch_modes(resolved.config, group)
    dtype, dtype_decision = decide_dtype(
        resolved.config.dtype, resolved.origins["dtype"], facts.dtype, ops
    )
    index_key_dtype, index_key_decisions = index_key_decision(
        facts.index_head_dim, resolved, dtype, ops
    )
    plan = QuantizationPlan.read(directory, tensors)
    context = LayerContext(
        ops=ops,
        schemes=plan,
        overrides=dispatch_overrides(resolved, ops.role),
        modes=modes,
        group=group,
        max_tokens_per_rank=resolved.config.dispatch.max_tokens_per_rank,
        index_key_dtype=index_key_dtype,
    )
    with torch.device("meta"):
        model = family.build(directory.config, context)
    assert isinstance(model, nn.Module)
    device = ops.capabilities.device
    materialise(model, dtype, device)
    placements = tuple(family.placements(model))
    plan.check_names(placement.name.removesuffix(".weight") for placement in placements)
    report = load_weights(
        tensors,
        placements,
        (*family.skips(directory.config, group), *plan.skips()),
        progress=_counting(tensors, progress),
    )
    dispatch = model.finish_loading()
    threads, threads_decision = decide_threads(
        resolved.config.threads,
        resolved.origins["threads"],
        sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())),
    )
    needs = CacheNeeds.of(model, resolved, dtype)
    pool = new_cache(model, needs, dtype, device)
    return LoadedModel(
        directory=directory,
        facts=facts,
        model=model,
        pool=pool,
        bound=bound,
        dtype=dtype,
        index_key_dtype=index_key_dtype,
        threads=threads,
        group=group,
        modes=modes,
        dispatch=MappingProxyType(dict(dispatch)),
        default_sampling=sampling,
        draft=None,
        decisions=(
            model_decision(ops.role, directory, facts.architecture),
            *bound.decisions,
            dtype_decision,
            *index_key_decisions,
            threads_decision,
            *skip_decisions(ops.role, report),
            *scheme_decisions(ops.role, model),
            *runner_decisions(ops.role, model),
            *dispatch_decisions(ops.role, dispatch),
            sampling_decision(directory, sampling),
            *cache_decisions(ops.role, needs, resolved),
        ),
        seconds=0.0,
    )


def _counting(
    tensors: CheckpointTensors, progress: LoadProgress | None
) -> Callable[[str, int], None] | None:
    if progress is None:
        return None
    total = sum(tensors.stored(name).nbytes for name in tensors.names())
    done = 0

    def count(_: str, num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        progress(done, total)

    return count
