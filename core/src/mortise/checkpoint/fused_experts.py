"""Experts that a checkpoint stores as one tensor a layer, as if they were stored one by one."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from mortise.errors import WeightsError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch

    from mortise.checkpoint.tensors import StoredTensor

FUSED: Final = re.compile(r"(?P<experts>(?:.+\.)?experts)\.(?P<leaf>gate_up_proj|down_proj)")
PROJECTIONS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
)
"""The projections that are equal parts of the rows of each expert, in their order.

As transformers holds the experts of every family, and as Qwen3.5 is published
(``transformers/models/qwen3_5_moe/modeling_qwen3_5_moe.py``, ``Qwen3_5MoeExperts``).
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertPart:
    """Where one projection of one expert is in a tensor ``[E, N * num_parts, K]``.

    Args:
        name: of the tensor in the file.
        expert: which of E.
        part: which of ``num_parts`` equal parts of its rows.
        num_parts: projections in one tensor.
    """

    name: str
    expert: int
    part: int
    num_parts: int

    def of(self, stored: torch.Tensor) -> torch.Tensor:
        """A view ``[N, K]``."""
        return stored[self.expert].chunk(self.num_parts)[self.part]


def experts_apart(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The same tensors, those of all experts replaced by their parts.

    Whatever reads a checkpoint - a model, one that drafts, a rank that has a share of the experts,
    ``mortise quantize`` - then knows one form.

    Args:
        tensors: as the headers of the files name them, in the order of the data.

    Raises:
        WeightsError: a projection is there by itself and in the tensor of all experts.
    """
    apart: dict[str, StoredTensor] = {}
    for stored in tensors.values():
        for one in parts_of(stored):
            if one is not stored and one.name in tensors:
                raise stored_in_both_forms(one.name, tensors[one.name], stored)
            apart[one.name] = one
    return apart


def parts_of(stored: StoredTensor) -> Iterator[StoredTensor]:
    """The projections of the experts in a tensor, or the tensor itself if it holds none."""
    match = FUSED.fullmatch(stored.name)
    projections = () if match is None else PROJECTIONS[match["leaf"]]
    if match is None or len(stored.shape) != 3 or stored.shape[1] % len(projections):
        yield stored
        return
    num_experts, rows, columns = stored.shape
    for expert in range(num_experts):
        for part, projection in enumerate(projections):
            yield replace(
                stored,
                name=f"{match['experts']}.{expert}.{projection}.weight",
                shape=(rows // len(projections), columns),
                within=ExpertPart(
                    name=stored.name, expert=expert, part=part, num_parts=len(projections)
                ),
            )


def stored_in_both_forms(name: str, alone: StoredTensor, fused: StoredTensor) -> WeightsError:
    """The error for values of which nothing says which are meant."""
    return WeightsError(
        f"tensor {name!r} is stored twice",
        details=[
            f"by itself: {alone.path}",
            f"in {fused.name}, which holds it of all experts: {fused.path}",
        ],
        expected="the experts of a layer one by one or as one tensor",
        remedy="remove the file that does not belong to this model, or download the model into an"
        " empty directory",
    )
