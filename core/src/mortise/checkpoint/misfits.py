"""Finding every difference between a checkpoint and a model before any data is read."""

from __future__ import annotations

import difflib
import heapq
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch

from mortise.checkpoint.placement import StoredForm
from mortise.errors import (
    MissingTensorError,
    TensorMismatchError,
    UnexpectedTensorError,
    WeightsError,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from mortise.checkpoint.placement import Placement
    from mortise.checkpoint.tensors import CheckpointTensors, StoredTensor

Expected: TypeAlias = StoredForm | torch.Tensor
"""What a stored tensor has to look like: a form of its own, or its target."""

CONVERTIBLE = frozenset({torch.bfloat16, torch.float16, torch.float32})
LISTED_NAMES = 10
NOT_THIS_MODEL = (
    "check that config.json and the safetensors files belong to the same model, and download them"
    " again if in doubt"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Misfit:
    """One kind of difference: the error for it, and the tensors concerned."""

    kind: type[WeightsError]
    what: str
    details: Sequence[str]
    expected: str
    remedy: str


def check_fit(
    tensors: CheckpointTensors,
    wanted: Mapping[str, Sequence[Placement]],
    skipped: Collection[str],
) -> None:
    """Compare all names, shapes and dtypes; one error reports every difference.

    Args:
        tensors: the opened checkpoint.
        wanted: placements by the name of their tensor.
        skipped: names in the checkpoint that are left out on purpose.

    Raises:
        TensorMismatchError: a wrong shape or a dtype that cannot be placed.
        MissingTensorError: a tensor that is not optional is not there.
        UnexpectedTensorError: a tensor is neither placed nor skipped.
    """
    along = read_along(wanted)
    missing = [
        name
        for name, placements in wanted.items()
        if name not in tensors and not all(placement.optional for placement in placements)
    ]
    missing += [name for name in along if name not in tensors and name not in wanted]
    explained = {*wanted, *along, *skipped}
    unexpected = [name for name in tensors.names() if name not in explained]
    # A dtype that cannot be placed comes first: it explains the scales nobody expects beside it.
    misfits = [
        *dtype_misfits(tensors, wanted),
        *shape_misfits(tensors, wanted),
        *missing_misfits(missing, unexpected or list(tensors.names())),
        *unexpected_misfits(unexpected, missing or list(wanted)),
    ]
    if misfits:
        raise one_error(misfits)


def one_error(misfits: Sequence[Misfit]) -> WeightsError:
    """The error of the first kind, which mentions the others."""
    first, *others = misfits
    also = [line for misfit in others for line in (f"also: {misfit.what}", *misfit.details)]
    return first.kind(
        first.what,
        details=[*first.details, *also],
        expected=first.expected,
        remedy=first.remedy,
    )


def read_along(wanted: Mapping[str, Sequence[Placement]]) -> dict[str, StoredForm]:
    """Tensors that are used only through the conversion of another, and what they look like."""
    return {
        name: form
        for placements in wanted.values()
        for placement in placements
        for name, form in placement.also.items()
    }


def dtype_misfits(
    tensors: CheckpointTensors, wanted: Mapping[str, Sequence[Placement]]
) -> Iterable[Misfit]:
    """Tensors whose stored dtype cannot be placed."""
    lines = [
        f"{stored.name} is {short(stored.dtype)}, {dtype_wanted(form)}"
        for stored, form in pairs(tensors, wanted)
        if not is_placeable(stored.dtype, form)
    ]
    if lines:
        yield Misfit(
            kind=TensorMismatchError,
            what=f"{counted(lines, 'tensor')} in a dtype that this model cannot place",
            details=listed(lines),
            expected="bfloat16, float16 or float32, or exactly the dtype of the parameter",
            remedy="a quantised checkpoint must say how its projections are stored, in"
            " quantization_config of config.json (ModelSlim: in quant_model_description.json):"
            " download these files too; embeddings, norms and routers are read unquantised only",
        )


def shape_misfits(
    tensors: CheckpointTensors, wanted: Mapping[str, Sequence[Placement]]
) -> Iterable[Misfit]:
    """Tensors whose shape is not the expected one."""
    lines = [
        f"{stored.name} is {list(stored.shape)} in {stored.path.name}, expected {shapes(form)}"
        for stored, form in pairs(tensors, wanted)
        if stored.shape not in shapes_of(form)
    ]
    if lines:
        yield Misfit(
            kind=TensorMismatchError,
            what=f"{counted(lines, 'tensor')} in a shape that does not fit config.json",
            details=listed(lines),
            expected="the shapes that follow from config.json",
            remedy=NOT_THIS_MODEL,
        )


def missing_misfits(missing: Sequence[str], candidates: Sequence[str]) -> Iterable[Misfit]:
    """Tensors that the model needs and the checkpoint lacks."""
    if missing:
        yield Misfit(
            kind=MissingTensorError,
            what=f"the checkpoint lacks {counted(missing, 'tensor')} that the model needs",
            details=listed(missing, candidates, "nearest in the checkpoint"),
            expected="every tensor of the model",
            remedy=NOT_THIS_MODEL,
        )


def unexpected_misfits(unexpected: Sequence[str], candidates: Sequence[str]) -> Iterable[Misfit]:
    """Tensors that the checkpoint holds and nothing places or skips."""
    if unexpected:
        yield Misfit(
            kind=UnexpectedTensorError,
            what=f"the checkpoint holds {counted(unexpected, 'tensor')} that the model does not"
            " know",
            details=listed(unexpected, candidates, "nearest expected"),
            expected="only tensors that the model places, or that its list of skips explains",
            remedy=f"{NOT_THIS_MODEL}; a tensor that the model can do without needs a skip with its"
            " reason in the model family's weights",
        )


def pairs(
    tensors: CheckpointTensors, wanted: Mapping[str, Sequence[Placement]]
) -> Iterable[tuple[StoredTensor, Expected]]:
    """Each tensor that is there with what it has to look like."""
    for name, placements in wanted.items():
        if name in tensors:
            stored = tensors.stored(name)
            yield from ((stored, placement.stored or placement.target) for placement in placements)
    for name, form in read_along(wanted).items():
        if name in tensors:
            yield tensors.stored(name), form


def is_placeable(stored: torch.dtype, expected: Expected) -> bool:
    """Whether the placement can make its target of the stored numbers and keep their meaning."""
    if isinstance(expected, StoredForm):
        return stored in expected.dtypes
    return stored == expected.dtype or {stored, expected.dtype} <= CONVERTIBLE


def dtype_wanted(expected: Expected) -> str:
    """``placed into bfloat16``, or ``expected int8 or uint8`` where it is converted."""
    if isinstance(expected, StoredForm):
        return f"expected {' or '.join(map(short, expected.dtypes))}"
    return f"placed into {short(expected.dtype)}"


def shapes_of(expected: Expected) -> tuple[tuple[int, ...], ...]:
    """The shapes that a stored tensor may have."""
    return expected.shapes if isinstance(expected, StoredForm) else (tuple(expected.shape),)


def shapes(expected: Expected) -> str:
    """``[4, 3]``, or ``[4, 3] or [4]``."""
    return " or ".join(str(list(shape)) for shape in shapes_of(expected))


def listed(names: Sequence[str], candidates: Sequence[str] = (), label: str = "") -> list[str]:
    """The first names, each with the candidate it resembles most, and how many more there are."""
    lines = []
    for name in names[:LISTED_NAMES]:
        near = nearest(name, candidates)
        lines.append(f"  {name}" + (f" ({label}: {near})" if near else ""))
    if len(names) > LISTED_NAMES:
        lines.append(f"  and {len(names) - LISTED_NAMES} more")
    return lines


def nearest(name: str, candidates: Sequence[str]) -> str | None:
    """The candidate that resembles ``name`` most, if any does.

    difflib is slow and a checkpoint can hold a hundred thousand names, so it only sees those that
    begin and end most like ``name``.
    """

    def shared_ends(other: str) -> int:
        return shared_start(name, other) + shared_start(name[::-1], other[::-1])

    shortlist = heapq.nlargest(50, candidates, key=shared_ends)
    close = difflib.get_close_matches(name, shortlist, n=1, cutoff=0.8)
    return close[0] if close else None


def shared_start(one: str, other: str) -> int:
    """Number of characters at the start of both."""
    unequal = (
        index for index, pair in enumerate(zip(one, other, strict=False)) if len({*pair}) > 1
    )
    return next(unequal, min(len(one), len(other)))


def counted(items: Sequence[object], noun: str) -> str:
    """``1 tensor``, ``2 tensors``."""
    return f"{len(items)} {noun}" + ("" if len(items) == 1 else "s")


def short(dtype: torch.dtype) -> str:
    """``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")
