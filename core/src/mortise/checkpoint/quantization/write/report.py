"""What quantising did to each kind of projection."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mortise.checkpoint.quantization.write.projections import LAYER, MTP
from mortise.checkpoint.quantization.write.recipe import scheme_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import torch

    from mortise.checkpoint.quantization.write.projections import Projection


@dataclass(frozen=True, slots=True, kw_only=True)
class KindReport:
    """Projections of one kind that were quantised alike.

    Args:
        kind: their name within a layer.
        scheme: name of the scheme.
        group_size: columns that share a scale; None where the scheme has no groups, or one.
        projections: how many there are.
        bytes_before, bytes_after: of their weights, scales included.
        relative_error: root of the squared differences to the weights before, over the root of the
            squared weights.
    """

    kind: str
    scheme: str
    group_size: int | None
    projections: int
    bytes_before: int
    bytes_after: int
    relative_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftReport:
    """Projections of one kind that stay unquantised for one reason."""

    kind: str
    projections: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantisationReport:
    """Everything that was written.

    Args:
        kinds: in the order of the checkpoint.
        left: likewise.
        bytes_before, bytes_after: of all tensors.
    """

    kinds: tuple[KindReport, ...]
    left: tuple[LeftReport, ...]
    bytes_before: int
    bytes_after: int


@dataclass(slots=True)
class Tally:
    """Sums over the projections of one kind, in double precision."""

    projections: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    squared_error: float = 0.0
    squared_weight: float = 0.0

    def add(
        self, before: torch.Tensor, after: torch.Tensor, written: Mapping[str, torch.Tensor]
    ) -> None:
        """Count one projection.

        Args:
            before: the weight.
            after: float32, what is left of it.
            written: the tensors that hold it.
        """
        self.projections += 1
        self.bytes_before += before.nbytes
        self.bytes_after += sum(tensor.nbytes for tensor in written.values())
        self.squared_error += squared(after - before.float())
        self.squared_weight += squared(before.float())

    @property
    def relative_error(self) -> float:
        """Zero for weights that are zero, since every scheme keeps a zero."""
        return math.sqrt(self.squared_error / self.squared_weight) if self.squared_weight else 0.0


def squared(values: torch.Tensor) -> float:
    """The sum of the squares."""
    return float(values.double().square().sum())


@dataclass(slots=True)
class Tallies:
    """One tally for each kind and scheme."""

    tallies: dict[tuple[str, str, int | None], Tally] = field(default_factory=dict)

    def of(self, projection: Projection) -> Tally:
        """The tally that a quantised projection belongs to."""
        scheme = projection.scheme
        key = projection.kind, scheme_name(scheme), scheme.group_size
        return self.tallies.setdefault(key, Tally())

    def reports(self) -> tuple[KindReport, ...]:
        """What they amount to."""
        return tuple(
            KindReport(
                kind=kind,
                scheme=scheme,
                group_size=group_size,
                projections=tally.projections,
                bytes_before=tally.bytes_before,
                bytes_after=tally.bytes_after,
                relative_error=tally.relative_error,
            )
            for (kind, scheme, group_size), tally in self.tallies.items()
        )


def left_reports(projections: Sequence[Projection]) -> tuple[LeftReport, ...]:
    """The projections that stay as they are, by kind and reason."""
    counts: dict[tuple[str, str], int] = {}
    for kind, reason in reasons(projections):
        counts[kind, reason] = counts.get((kind, reason), 0) + 1
    return tuple(
        LeftReport(kind=kind, projections=count, reason=reason)
        for (kind, reason), count in counts.items()
    )


def reasons(projections: Sequence[Projection]) -> Iterator[tuple[str, str]]:
    """Kind and reason of every projection that stays; a layer that stays whole is one kind."""
    for projection in projections:
        if not projection.is_quantised:
            reason = projection.scheme.reason
            layer = LAYER.search(projection.module) if reason == MTP else None
            yield (projection.kind if layer is None else f"layers.{layer[1]}.*"), reason
