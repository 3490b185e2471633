"""What was decided while a model was loaded, as ``explain`` shows it."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from mortise.backends import Decision
from mortise.layers.stored_tensors import StoredTensors
from mortise.spec.roles import ModelRole

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import nn

    from mortise.checkpoint import LoadReport, ModelDirectory
    from mortise.engine.sampling_params import SamplingParams
    from mortise.spec.dispatch import DispatchDecision


def model_decision(role: ModelRole, directory: ModelDirectory, architecture: str) -> Decision:
    """Which family answers for a model."""
    return Decision(
        role=role,
        subject="model",
        value=architecture,
        rule="checkpoint",
        reason="the family that answers to model_type",
        source=str(directory.path / "config.json"),
    )


def skip_decisions(role: ModelRole, report: LoadReport) -> Iterator[Decision]:
    """Tensors that were left in the file, by reason."""
    for reason, count in Counter(report.skipped.values()).items():
        yield Decision(
            role=role,
            subject="weights",
            value=f"{count} tensors not loaded",
            rule="skip",
            reason=reason,
        )


def scheme_decisions(role: ModelRole, model: nn.Module) -> Iterator[Decision]:
    """How the quantised projections are stored; those that are stored alike in one line."""
    alike = Counter(
        module.stored
        for module in model.modules()
        if isinstance(module, StoredTensors) and module.stored.dialect
    )
    for stored, count in alike.items():
        groups = "" if stored.group_size is None else f" in groups of {stored.group_size}"
        yield Decision(
            role=role,
            subject="weights",
            value=f"{count} projections {stored.scheme}{groups}",
            rule="checkpoint",
            reason=stored.reason,
            source=stored.dialect,
        )


def unquantised_decisions(role: ModelRole, notable: Mapping[str, int]) -> Iterator[Decision]:
    """Projections that are floats against what the checkpoint says, or because the user says so.

    Args:
        role: of the model.
        notable: how many there are for each reason.
    """
    for reason, count in notable.items():
        yield Decision(
            role=role,
            subject="weights",
            value=f"{count} projections float",
            rule="override",
            reason=reason,
        )


def dispatch_decisions(
    role: ModelRole, dispatch: Mapping[str, tuple[DispatchDecision, ...]]
) -> Iterator[Decision]:
    """The format of each layer of experts and exchange."""
    for layer, decisions in dispatch.items():
        for decision in decisions:
            rows = decision.format
            value = f"{rows.dtype}, {rows.row_layout}, {rows.mode}"
            asked = decision.asked
            yield Decision(
                role=role,
                subject=layer,
                value=value if asked is None else f"{value} instead of {asked}",
                rule=decision.rule,
                reason=decision.reason,
                source=decision.source,
            )


def sampling_decision(directory: ModelDirectory, sampling: SamplingParams) -> Decision:
    """How tokens are chosen when a request does not say."""
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
