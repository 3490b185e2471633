"""Placing every tensor of a checkpoint into parameters that are already there."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mortise.checkpoint.misfits import check_fit, read_along

if TYPE_CHECKING:
    from mortise.checkpoint.placement import Placement, Skip
    from mortise.checkpoint.tensors import CheckpointTensors

Progress = Callable[[str, int], None]
"""Called after each tensor with its name and its stored bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """What became of every tensor.

    Args:
        placed: names of tensors whose values were used, in the order of the files.
        skipped: names of tensors that were not read, each with the reason.
        absent: names of optional tensors that the checkpoint does not hold.
        bytes: stored bytes that were read.
        seconds: wall time, checks included.
    """

    placed: tuple[str, ...]
    skipped: Mapping[str, str]
    absent: tuple[str, ...]
    bytes: int
    seconds: float


def load_weights(
    tensors: CheckpointTensors,
    placements: Iterable[Placement],
    skips: Sequence[Skip] = (),
    *,
    progress: Progress | None = None,
) -> LoadReport:
    """Copy every tensor of a checkpoint to where it belongs.

    Names, shapes and dtypes of everything are checked first; if anything does not fit, nothing has
    been changed. Then one tensor at a time is mapped and copied, so that beside the parameters no
    second copy of the model exists. bfloat16, float16 and float32 are converted into each other;
    any other dtype must be the target's, unless the placement converts it. Conversions check the
    values they see, so an error of theirs leaves some targets filled: such a model is not to be
    used.

    Args:
        tensors: the opened checkpoint.
        placements: one for each tensor of the model; a tensor that is used twice has two.
        skips: tensors to leave out; a tensor that is placed is never skipped.
        progress: told about each tensor after it has been copied.

    Raises:
        TensorMismatchError: a tensor has the wrong shape or a dtype that cannot be placed.
        MissingTensorError: the checkpoint lacks tensors that are not optional.
        UnexpectedTensorError: the checkpoint holds tensors that are neither placed nor skipped.
        QuantizationConfigError: a quantised tensor's values contradict what is said of them.
        ScaleError: scales are not finite or not positive.
        CorruptFileError: a file was damaged after it had been opened.
    """
    started = time.perf_counter()
    wanted: dict[str, list[Placement]] = defaultdict(list)
    for placement in placements:
        wanted[placement.name].append(placement)
    used = {*wanted, *read_along(wanted)}
    skipped = skipped_names((name for name in tensors.names() if name not in used), skips)
    check_fit(tensors, wanted, skipped)
    placed = [name for name in tensors.names() if name in used]
    num_bytes = 0
    for name in placed:
        if name in wanted:
            place_tensor(tensors, name, wanted[name])
        nbytes = tensors.stored(name).nbytes
        num_bytes += nbytes
        if progress is not None:
            progress(name, nbytes)
    tensors.close()
    return LoadReport(
        placed=tuple(placed),
        skipped=skipped,
        absent=tuple(name for name in wanted if name not in tensors),
        bytes=num_bytes,
        seconds=time.perf_counter() - started,
    )


@torch.no_grad()
def place_tensor(tensors: CheckpointTensors, name: str, placements: Sequence[Placement]) -> None:
    """Read one tensor, fill its targets and let go of it."""
    stored = tensors.read(name)
    for placement in placements:
        convert, target = placement.convert, placement.target
        values = stored if convert is None else convert(stored, tensors.read)
        assert values.shape == target.shape, f"{name} was converted into {list(values.shape)}"
        target.copy_(values)


def skipped_names(names: Iterable[str], skips: Sequence[Skip]) -> dict[str, str]:
    """The names that a skip matches, each with the reason of the first that does."""
    patterns = [(re.compile(skip.pattern), skip.reason) for skip in skips]
    matches = (
        (name, next((reason for pattern, reason in patterns if pattern.fullmatch(name)), None))
        for name in names
    )
    return {name: reason for name, reason in matches if reason is not None}
