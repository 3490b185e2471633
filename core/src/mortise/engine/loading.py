"""From an engine configuration to a model that is ready to run."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import nn

from mortise.backends import Decision, load_backend
from mortise.checkpoint import CheckpointTensors, ModelDirectory, load_weights
from mortise.checkpoint.quantization.plan import QuantizationPlan
from mortise.engine.cache import CacheNeeds, cache_decisions, new_cache
from mortise.engine.compute_dtype import decide_dtype
from mortise.engine.default_sampling import default_sampling
from mortise.engine.dispatch_modes import dispatch_modes
from mortise.engine.dispatch_overrides import dispatch_overrides
from mortise.engine.expert_runners import runner_decisions
from mortise.engine.index_keys import decide_index_key_dtype
from mortise.engine.joining import join_group
from mortise.engine.materialise import materialise
from mortise.engine.threads import decide_threads
from mortise.errors import BackendUnusableError
from mortise.kv.pages import PAGE_SIZE
from mortise.layers.context import LayerContext
from mortise.layers.stored_tensors import StoredTensors
from mortise.models.registry import family_of
from mortise.spec.paged_mqa import IndexKeyDtype
from mortise.spec.reasons import ReasonCode
from mortise.spec.roles import ModelRole

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from mortise.backends import BoundBackend, Ops
    from mortise.checkpoint import LoadReport
    from mortise.config import ResolvedConfig
    from mortise.engine.sampling_params import SamplingParams
    from mortise.env import Launch
    from mortise.models.family import CachePool, CausalLM, ModelFacts, ModelFamily
    from mortise.parallel.group import ExpertParallelGroup
    from mortise.spec.dispatch import DispatchDecision, DispatchMode

    LoadProgress = Callable[[int, int], None]
    """Told the bytes loaded so far and the bytes of all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model of one role with its weights, its cache and every decision on the way.

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
        decisions: in the order in which they were taken.
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
) -> LoadedModel:
    """Bind the backend, build the model without memory, give it memory, fill it.

    The weights are never held twice: each tensor is copied from its file to its place.

    Args:
        resolved: the configuration.
        progress: told the bytes loaded so far and the bytes of all.
        launch: this process's place among those that share the experts; None is it alone.

    Raises:
        MortiseError: directory, architecture, backend, weights or memory; each says which.
    """
    started = time.perf_counter()
    opened = _open(resolved.config.model)
    bound = bind_backend(resolved, launch)
    group = join_group(launch, resolved, bound.ops.capabilities, opened.directory, opened.tensors)
    try:
        return _load_joined(opened, resolved, bound, group, progress, started)
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


def _load_joined(
    opened: _Opened,
    resolved: ResolvedConfig,
    bound: BoundBackend,
    group: ExpertParallelGroup,
    progress: LoadProgress | None,
    started: float,
) -> LoadedModel:
    ops, directory, tensors = bound.ops, opened.directory, opened.tensors
    family, facts, sampling = opened.family, opened.facts, opened.sampling
    modes = dispatch_modes(resolved.config, group)
    dtype, dtype_decision = decide_dtype(
        resolved.config.dtype, resolved.origins["dtype"], facts.dtype, ops
    )
    index_key_dtype, index_key_decisions = _index_keys(facts, resolved, dtype, ops)
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
        decisions=(
            _model_decision(directory, facts),
            *bound.decisions,
            dtype_decision,
            *index_key_decisions,
            threads_decision,
            *_skip_decisions(report),
            *_scheme_decisions(model),
            *runner_decisions(model),
            *_dispatch_decisions(dispatch),
            _sampling_decision(directory, sampling),
            *cache_decisions(needs, resolved),
        ),
        seconds=time.perf_counter() - started,
    )


def bind_backend(resolved: ResolvedConfig, launch: Launch | None = None) -> BoundBackend:
    """The configured backend for the main model.

    Raises:
        BackendError: it cannot be had, or serves no pages of the cache's size.
    """
    config = resolved.config
    bound = load_backend(
        config.backend,
        role=ModelRole.MAIN,
        device=config.device,
        options_by_name=config.backend_options,
        strict=config.strict,
        source=resolved.origins["backend"],
        local_rank=0 if launch is None else launch.local_rank,
    )
    served = bound.ops.capabilities.page_sizes
    if PAGE_SIZE not in served:
        raise BackendUnusableError(
            f"backend {bound.ops.backend.name!r} serves no cache pages of {PAGE_SIZE} tokens",
            reason=ReasonCode.REQUEST_UNSUPPORTED,
            details=[f"it serves: {', '.join(map(str, sorted(served)))}"],
            remedy="use another backend",
        )
    return bound


def _index_keys(
    facts: ModelFacts, resolved: ResolvedConfig, dtype: torch.dtype, ops: Ops
) -> tuple[IndexKeyDtype, tuple[Decision, ...]]:
    if not facts.index_head_dim:
        return IndexKeyDtype.COMPUTE, ()
    chosen, decision = decide_index_key_dtype(
        resolved.config.index_key_dtype, resolved.origins["index_key_dtype"], dtype, ops
    )
    return chosen, (decision,)


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


def _model_decision(directory: ModelDirectory, facts: ModelFacts) -> Decision:
    return Decision(
        role=ModelRole.MAIN,
        subject="model",
        value=facts.architecture,
        rule="checkpoint",
        reason="the family that answers to model_type",
        source=str(directory.path / "config.json"),
    )


def _skip_decisions(report: LoadReport) -> Iterator[Decision]:
    for reason, count in Counter(report.skipped.values()).items():
        yield Decision(
            role=ModelRole.MAIN,
            subject="weights",
            value=f"{count} tensors not loaded",
            rule="skip",
            reason=reason,
        )


def _scheme_decisions(model: nn.Module) -> Iterator[Decision]:
    """How the quantised projections are stored; those that are stored alike in one line."""
    alike = Counter(
        module.stored
        for module in model.modules()
        if isinstance(module, StoredTensors) and module.stored.dialect
    )
    for stored, count in alike.items():
        groups = "" if stored.group_size is None else f" in groups of {stored.group_size}"
        yield Decision(
            role=ModelRole.MAIN,
            subject="weights",
            value=f"{count} projections {stored.scheme}{groups}",
            rule="checkpoint",
            reason=stored.reason,
            source=stored.dialect,
        )


def _dispatch_decisions(
    dispatch: Mapping[str, tuple[DispatchDecision, ...]],
) -> Iterator[Decision]:
    for layer, decisions in dispatch.items():
        for decision in decisions:
            rows = decision.format
            value = f"{rows.dtype}, {rows.row_layout}, {rows.mode}"
            asked = decision.asked
            yield Decision(
                role=ModelRole.MAIN,
                subject=layer,
                value=value if asked is None else f"{value} instead of {asked}",
                rule=decision.rule,
                reason=decision.reason,
                source=decision.source,
            )


def _sampling_decision(directory: ModelDirectory, sampling: SamplingParams) -> Decision:
    filters = f"temperature {sampling.temperature:g}, top_p {sampling.top_p:g}"
    value = "greedy" if sampling.is_greedy else f"{filters}, top_k {sampling.top_k}"
    is_default = sampling.is_greedy and not sampling.token_healing
    return Decision(
        role=ModelRole.MAIN,
        subject="sampling",
        value=f"{value}, token healing" if sampling.token_healing else value,
        rule="default" if is_default else "checkpoint",
        reason="generation_config.json does not ask for sampling"
        if is_default
        else "generation_config.json recommends it; a request can ask otherwise",
        source=str(directory.path),
    )
