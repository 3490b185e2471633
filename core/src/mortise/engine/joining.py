"""Several processes that come together to run one model, and what they must have in common."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Final

from mortise.backends.discover import engine_version
from mortise.checkpoint import CheckpointTensors
from mortise.parallel.agreement import agree
from mortise.parallel.group import ExpertParallelGroup, join

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mortise.checkpoint import ModelDirectory
    from mortise.config import ResolvedConfig
    from mortise.env import Launch
    from mortise.spec.capabilities import Capabilities

OWN_AFFAIRS: Final = frozenset({"model", "draft.model", "threads", "warmup_threads", "device"})
"""Keys of the configuration that may differ: each machine has its own paths and processors."""


def join_group(
    launch: Launch | None,
    resolved: ResolvedConfig,
    capabilities: Capabilities,
    directory: ModelDirectory,
    tensors: CheckpointTensors,
    draft: ModelDirectory | None = None,
) -> ExpertParallelGroup:
    """Meet the other processes, and see that all are about to do the same.

    Raises:
        RankLostError: one of them did not come in time.
        RankDisagreementError: version, configuration or checkpoint differ.
    """
    if launch is None or launch.world_size == 1:
        return ExpertParallelGroup()
    group = join(
        launch,
        backend=capabilities.process_group_backend,
        timeout_seconds=resolved.config.parallel.timeout_seconds,
    )
    try:
        agree(group, common_facts(resolved, directory, tensors, draft))
    except BaseException as error:
        group.close(error)
        raise
    return group


def common_facts(
    resolved: ResolvedConfig,
    directory: ModelDirectory,
    tensors: CheckpointTensors,
    draft: ModelDirectory | None,
) -> dict[str, str]:
    """What must be the same everywhere, each under the name that a message should give it.

    Args:
        resolved: the configuration.
        directory: of the model.
        tensors: of the model.
        draft: the directory that a draft is read from, if one is.
    """
    values = resolved.config.model_dump(mode="json")
    keys = [key for key in resolved.origins if key not in OWN_AFFAIRS]
    facts = {
        "version of mortise": engine_version(),
        "config.json of the model": _digest(directory.config),
        "tensors of the model": _digest(_shapes(tensors)),
        **{key: json.dumps(_value(values, key)) for key in keys},
    }
    if draft is not None and draft.path != directory.path:
        facts["config.json of the draft"] = _digest(draft.config)
        facts["tensors of the draft"] = _digest(_shapes(CheckpointTensors(draft.weight_files())))
    return facts


def _shapes(tensors: CheckpointTensors) -> dict[str, list[object]]:
    stored = [tensors.stored(name) for name in tensors.names()]
    return {tensor.name: [list(tensor.shape), str(tensor.dtype)] for tensor in stored}


def _value(values: Mapping[str, object], key: str) -> object:
    value: object = values
    for name in key.split("."):
        assert isinstance(value, dict)
        value = value[name]
    return value


def _digest(value: object) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
