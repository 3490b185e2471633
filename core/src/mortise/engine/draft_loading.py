"""The model that drafts: opened beside the main model, loaded after it, and sharing its pages."""

from __future__ import annotations

import time
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import nn

from mortise.checkpoint import CheckpointTensors, ModelDirectory, load_weights
from mortise.checkpoint.quantization.plan import QuantizationPlan
from mortise.engine.cache import CacheNeeds, cache_decisions, new_cache
from mortise.engine.dispatch_overrides import dispatch_overrides
from mortise.engine.expert_runners import runner_decisions
from mortise.engine.index_keys import index_key_decision
from mortise.engine.load_decisions import (
    dispatch_decisions,
    model_decision,
    scheme_decisions,
    skip_decisions,
    unquantised_decisions,
)
from mortise.engine.materialise import materialise
from mortise.errors import ConfigError, ModelConfigError
from mortise.layers.context import LayerContext
from mortise.models.registry import family_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from mortise.backends import BoundBackend, Decision
    from mortise.checkpoint.placement import Placement
    from mortise.config import DraftConfig, ResolvedConfig
    from mortise.engine.loading import LoadedModel
    from mortise.models.family import CachePool, DraftModel, ModelFacts, ModelFamily
    from mortise.spec.dispatch import DispatchDecision
    from mortise.spec.paged_mqa import IndexKeyDtype


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedDraft:
    """The model of the draft role, with nothing of the main model's but what it shares on purpose.

    Args:
        directory: where it came from; often the main model's.
        facts: what the family says of that directory.
        model: ready to run.
        pool: its empty cache, of as many pages as the main model's.
        bound: the backend, bound once more for this role.
        index_key_dtype: how its indexer's keys are cached, if it has one.
        dispatch: what was decided for its layers of experts.
        decisions: in the order in which they were taken.
        seconds: wall time of loading it.
    """

    directory: ModelDirectory
    facts: ModelFacts
    model: DraftModel
    pool: CachePool
    bound: BoundBackend
    index_key_dtype: IndexKeyDtype
    dispatch: Mapping[str, tuple[DispatchDecision, ...]]
    decisions: tuple[Decision, ...]
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedDraft:
    """The directory of a draft, found to belong to the main model."""

    directory: ModelDirectory
    family: ModelFamily
    facts: ModelFacts


def open_draft(
    config: DraftConfig, main: ModelDirectory, family: ModelFamily, facts: ModelFacts
) -> OpenedDraft:
    """Open the directory that the draft is read from, before anything is loaded.

    Args:
        config: which directory; unset is the main model's.
        main: directory of the main model.
        family: of the main model.
        facts: of the main model.

    Raises:
        ModelError: the directory is none, or not of a model like the main one.
    """
    if config.model is None:
        return OpenedDraft(directory=main, family=family, facts=facts)
    directory = ModelDirectory.open(config.model)
    own = family_of(directory.config)
    own_facts = own.facts(directory.config)
    differences = [
        f"{name}: {here}, and {there} of the main model"
        for name, here, there in (
            ("family", type(own).__name__, type(family).__name__),
            ("hidden_size", own_facts.hidden_size, facts.hidden_size),
            ("vocab_size", own_facts.vocab_size, facts.vocab_size),
        )
        if here != there
    ]
    if differences:
        raise ModelConfigError(
            f"the model in {directory.path} cannot draft for the one in {main.path}",
            details=differences,
            expected="a model directory of the same release, whose embedding and head are the same",
            remedy="correct draft.model (--draft-model), or leave it out",
        )
    return OpenedDraft(directory=directory, family=own, facts=own_facts)


def load_draft(
    opened: OpenedDraft, resolved: ResolvedConfig, bound: BoundBackend, main: LoadedModel
) -> LoadedDraft:
    """Build the draft without memory, give it memory, fill it from its own checkpoint.

    Args:
        opened: its directory.
        resolved: the configuration.
        bound: the backend, bound for the draft role.
        main: the main model, loaded.

    Raises:
        MortiseError: configuration, weights or memory; each says which.
    """
    started = time.perf_counter()
    ops, directory, family = bound.ops, opened.directory, opened.family
    _require_one_device(bound, main)
    tensors = CheckpointTensors(directory.weight_files())
    index_key_dtype, index_key_decisions = index_key_decision(
        opened.facts.index_head_dim, resolved, main.dtype, ops
    )
    plan = QuantizationPlan.read_draft(directory, tensors, resolved.config.draft.quantization)
    context = LayerContext(
        ops=ops,
        schemes=plan,
        overrides=dispatch_overrides(resolved, ops.role),
        modes=main.modes,
        group=main.group,
        max_tokens_per_rank=resolved.config.dispatch.max_tokens_per_rank,
        index_key_dtype=index_key_dtype,
    )
    with torch.device("meta"):
        model = family.build_draft(directory.config, context)
    assert isinstance(model, nn.Module)
    materialise(model, main.dtype, ops.capabilities.device)
    placements = tuple(family.draft_placements(model, main.model))
    _require_some(placements, tensors, directory)
    plan.check_names(placement.name.removesuffix(".weight") for placement in placements)
    report = load_weights(
        tensors, placements, (*family.draft_skips(directory.config, main.group), *plan.skips())
    )
    dispatch = model.finish_loading()
    needs = CacheNeeds.of(model, resolved, main.dtype)
    return LoadedDraft(
        directory=directory,
        facts=opened.facts,
        model=model,
        pool=new_cache(model, needs, main.dtype, ops.capabilities.device),
        bound=bound,
        index_key_dtype=index_key_dtype,
        dispatch=MappingProxyType(dict(dispatch)),
        decisions=(
            model_decision(ops.role, directory, opened.facts.architecture),
            *bound.decisions,
            *index_key_decisions,
            *skip_decisions(ops.role, report),
            *scheme_decisions(ops.role, model),
            *unquantised_decisions(ops.role, plan.notable()),
            *runner_decisions(ops.role, model),
            *dispatch_decisions(ops.role, dispatch),
            *cache_decisions(ops.role, needs, resolved),
        ),
        seconds=time.perf_counter() - started,
    )


def _require_one_device(bound: BoundBackend, main: LoadedModel) -> None:
    device = bound.ops.capabilities.device
    if device != main.device:
        raise ConfigError(
            f"the draft runs on {device} and the main model on {main.device}",
            expected="one device, since the draft reads what the main model computes",
            remedy="leave the device out of draft.backend_options",
        )


def _require_some(
    placements: Iterable[Placement], tensors: CheckpointTensors, directory: ModelDirectory
) -> None:
    wanted: Sequence[str] = [one.name for one in placements if not one.optional]
    if not any(name in tensors for name in wanted):
        raise ModelConfigError(
            f"the checkpoint in {directory.path} has no multi-token prediction layer",
            details=[f"none of its {len(wanted)} tensors is there, such as {wanted[0]}"],
            expected="a checkpoint with the layer that drafts",
            remedy="set draft.num_tokens to 0 (leave out --draft), or name a directory that has"
            " the layer in draft.model (--draft-model)",
        )
