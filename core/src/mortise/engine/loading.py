"""From an engine configuration to a model that is ready to run."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from mortise.backends import Decision, load_backend
from mortise.checkpoint import CheckpointTensors, ModelDirectory, load_weights
from mortise.engine.compute_dtype import decide_dtype
from mortise.engine.default_sampling import default_sampling
from mortise.engine.materialise import materialise
from mortise.engine.memory import memory_for, size_text
from mortise.engine.threads import decide_threads
from mortise.errors import BackendUnusableError
from mortise.kv.pages import PAGE_SIZE
from mortise.models.registry import family_of
from mortise.spec.dispatch import DispatchDtype, Override
from mortise.spec.reasons import ReasonCode
from mortise.spec.roles import ModelRole

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from mortise.backends import BoundBackend
    from mortise.checkpoint import LoadReport
    from mortise.config import ResolvedConfig
    from mortise.engine.sampling_params import SamplingParams
    from mortise.models.family import CachePool, CausalLM, ModelFacts
    from mortise.spec.dispatch import DispatchDecision

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
        threads: of one operation on the processor; None leaves torch's choice.
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
    threads: int | None
    default_sampling: SamplingParams
    decisions: tuple[Decision, ...]
    seconds: float

    @property
    def device(self) -> torch.device:
        """Where parameters and cache are."""
        return self.bound.ops.capabilities.device


def load_model(resolved: ResolvedConfig, progress: LoadProgress | None = None) -> LoadedModel:
    """Bind the backend, build the model without memory, give it memory, fill it.

    The weights are never held twice: each tensor is copied from its file to its place.

    Raises:
        MortiseError: directory, architecture, backend, weights or memory; each says which.
    """
    started = time.perf_counter()
    directory = ModelDirectory.open(resolved.config.model)
    family = family_of(directory.config)
    facts = family.facts(directory.config)
    sampling = default_sampling(directory.generation_config)
    tensors = CheckpointTensors(directory.weight_files())
    bound = bind_backend(resolved)
    ops = bound.ops
    dtype, dtype_decision = decide_dtype(
        resolved.config.dtype, resolved.origins["dtype"], facts.dtype, ops
    )
    with torch.device("meta"):
        model = family.build(directory.config, ops, dispatch_override(resolved))
    assert isinstance(model, nn.Module)
    device = ops.capabilities.device
    materialise(model, dtype, device)
    report = load_weights(
        tensors,
        family.placements(model),
        family.skips(directory.config),
        progress=_counting(tensors, progress),
    )
    dispatch = model.finish_loading()
    threads, threads_decision = decide_threads(
        resolved.config.threads,
        resolved.origins["threads"],
        sum(parameter.nbytes for parameter in model.parameters()),
    )
    num_pages = resolved.config.cache.capacity_pages
    pool = _new_pool(model, num_pages, dtype, device)
    return LoadedModel(
        directory=directory,
        facts=facts,
        model=model,
        pool=pool,
        bound=bound,
        dtype=dtype,
        threads=threads,
        default_sampling=sampling,
        decisions=(
            _model_decision(directory, facts),
            *bound.decisions,
            dtype_decision,
            threads_decision,
            *_skip_decisions(report),
            *_dispatch_decisions(dispatch, resolved),
            _sampling_decision(directory, sampling),
            _cache_decision(pool, resolved),
        ),
        seconds=time.perf_counter() - started,
    )


def bind_backend(resolved: ResolvedConfig) -> BoundBackend:
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


def dispatch_override(resolved: ResolvedConfig) -> Override | None:
    """The dispatch format that the user set for the main model; ``auto`` is none."""
    asked = resolved.config.dispatch.dtype
    if asked == "auto":
        return None
    return Override(value=DispatchDtype(asked), source=resolved.origins["dispatch.dtype"])


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


def _new_pool(
    model: CausalLM, num_pages: int, dtype: torch.dtype, device: torch.device
) -> CachePool:
    # One page tells what all of them take.
    needed = model.new_pool(1, dtype, torch.device("meta")).num_bytes * num_pages
    remedy = "lower cache.max_num_tokens (or cache.num_pages) in the engine configuration"
    with memory_for(f"a cache of {num_pages} pages", needed, device, remedy):
        return model.new_pool(num_pages, dtype, device)


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


def _dispatch_decisions(
    dispatch: Mapping[str, DispatchDecision], resolved: ResolvedConfig
) -> Iterator[Decision]:
    for layer, decision in dispatch.items():
        rows = decision.format
        value = f"{rows.dtype}, {rows.row_layout}, {rows.mode}"
        asked = decision.asked
        yield Decision(
            role=ModelRole.MAIN,
            subject=layer,
            value=value if asked is None else f"{value} instead of {asked}",
            rule=decision.rule,
            reason=decision.reason,
            source=resolved.origins["dispatch.dtype"] if decision.rule == "override" else "",
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


def _cache_decision(pool: CachePool, resolved: ResolvedConfig) -> Decision:
    cache = resolved.config.cache
    key = "cache.max_num_tokens" if cache.num_pages is None else "cache.num_pages"
    return Decision(
        role=ModelRole.MAIN,
        subject="cache",
        value=f"{pool.num_pages} pages, {size_text(pool.num_bytes)}",
        rule="configuration",
        reason=f"{key} is {cache.num_pages or cache.max_num_tokens}; a page is {PAGE_SIZE} tokens",
        source=resolved.origins[key],
    )
