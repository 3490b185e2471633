"""How one module of a checkpoint is stored, and how that was found out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from mortise.spec.weights import ScaleFormat, WeightScheme

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mortise.checkpoint.placement import Placement
    from mortise.spec.weights import StoredWeight


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleScheme:
    """The stored form of one projection, or of several that agree.

    Args:
        scheme: number format of weights and input.
        group_size: columns that share a scale (int4, int8); None is per channel.
        static_input: the checkpoint holds a scale for the input.
        asymmetric_input: and an offset (int8).
        scale_format: FP8_BLOCK: what the scales are.
        dialect: who defined the names: ``fp8``, ``compressed-tensors``, ``modelopt``,
            ``modelslim``; empty where nothing is quantised.
        reason: which entry of which file says so.
        notable: worth a line in reports though nothing is quantised: the tensors, or the user,
            went before what the checkpoint says of the module.
    """

    scheme: WeightScheme = WeightScheme.FLOAT
    group_size: int | None = None
    static_input: bool = False
    asymmetric_input: bool = False
    scale_format: ScaleFormat = ScaleFormat.FLOAT32
    dialect: str = ""
    reason: str = "the checkpoint is not quantised"
    notable: bool = False

    def num_groups(self, in_features: int) -> int:
        """Groups of columns of a projection with ``in_features`` columns."""
        return 1 if self.group_size is None else -(-in_features // self.group_size)


class SchemeLookup(Protocol):
    """What the layers of a model ask while they are built and filled."""

    def common_scheme(self, modules: Sequence[str]) -> ModuleScheme:
        """The scheme of modules that are stored apart and computed together.

        Args:
            modules: dotted names as in the checkpoint, without ``.weight``.

        Raises:
            QuantizationConfigError: they do not agree; names two that differ.
        """
        ...

    def placements(
        self, module: str, target: StoredWeight, scheme: ModuleScheme
    ) -> Iterator[Placement]:
        """Where the tensors of one quantised module go.

        Args:
            module: dotted name in the checkpoint, without ``.weight``.
            target: views of this module's share ``[N, K]`` of the tensors to fill.
            scheme: what :meth:`common_scheme` answered for it.
        """
        ...


class Unquantised:
    """The lookup for a checkpoint without quantisation: every module is ``FLOAT``."""

    __slots__ = ()

    def common_scheme(self, modules: Sequence[str]) -> ModuleScheme:  # noqa: ARG002
        """See :class:`SchemeLookup`."""
        return ModuleScheme()

    def placements(
        self,
        module: str,
        target: StoredWeight,  # noqa: ARG002
        scheme: ModuleScheme,  # noqa: ARG002
    ) -> Iterator[Placement]:
        """See :class:`SchemeLookup`; nothing is quantised, so nobody asks."""
        raise AssertionError(f"{module} is not quantised")
