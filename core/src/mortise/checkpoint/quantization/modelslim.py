"""Checkpoints of ModelSlim, whose description gives every tensor a type."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from mortise.checkpoint.placement import Skip
from mortise.checkpoint.quantization.configuration import (
    OTHER_VERSION,
    contradiction,
    unknown_value,
)
from mortise.checkpoint.quantization.dialect import Statement
from mortise.checkpoint.quantization.entries import Entry
from mortise.checkpoint.quantization.modelslim_tensors import (
    VALUES_PER_WORD,
    dynamic_placements,
    static_placements,
)
from mortise.checkpoint.quantization.module_scheme import ModuleScheme
from mortise.checkpoint.quantization.stored_modules import FLOATS, dtype_name
from mortise.errors import QuantizationConfigError
from mortise.spec.weights import StoredWeight, WeightScheme

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from mortise.checkpoint.placement import Placement
    from mortise.checkpoint.quantization.stored_modules import StoredModules
    from mortise.checkpoint.tensors import StoredTensor

DIALECT: Final = "modelslim"
FLOAT: Final = "FLOAT"
STATIC: Final = "W8A8"
STATIC_TENSORS: Final = ("deq_scale", "input_scale", "input_offset", "quant_bias")

TYPES: Final[Mapping[str, WeightScheme]] = MappingProxyType(
    {
        FLOAT: WeightScheme.FLOAT,
        STATIC: WeightScheme.W8A8,
        "W8A8_DYNAMIC": WeightScheme.W8A8,
        "W4A8_DYNAMIC": WeightScheme.W4A8,
        "W4A4_DYNAMIC": WeightScheme.W4A4,
    }
)
"""Types of weights, and the schemes that they are read as."""

NOT_A_TENSOR: Final = "quant_type"
"""Last part of entries about attention, which name a module and no tensor."""

SKIPS: Final = (
    Skip(r".+\.kv_cache_(?:scale|offset)", "keys and values are cached unquantised"),
    Skip(r".+\.fa_[qkv]\.(?:scale|offset)", "attention is computed unquantised"),
)


@dataclass(frozen=True)
class ModelSlim:
    """Every module has the type of its weight.

    Args:
        description: what the file holds: types by the names of tensors, and facts about the whole
            model under names without a dot.
        file: its name.
        modules: the checkpoint.
    """

    description: Mapping[str, Any]
    file: str
    modules: StoredModules

    def scheme(self, module: str) -> ModuleScheme:
        """See :class:`~mortise.checkpoint.quantization.dialect.Dialect`."""
        leaves = self.modules.leaves(module)
        weight = leaves.get("weight")
        if weight is None:
            return ModuleScheme(reason="the checkpoint holds no weight of it")
        kind = self.description.get(weight.name, FLOAT)
        if kind not in TYPES:
            raise unknown_value(self.file, f"the type of {weight.name}", kind, TYPES)
        said = self.statement(module).said
        if (weight.dtype in FLOATS) != (kind == FLOAT):
            raise contradiction(weight.name, dtype_name(weight), said)
        if kind == FLOAT:
            return ModuleScheme(reason=said)
        return ModuleScheme(
            scheme=TYPES[kind],
            group_size=None if kind == STATIC else group_size(leaves, weight, TYPES[kind]),
            static_input=kind == STATIC,
            asymmetric_input=kind == STATIC,
            dialect=DIALECT,
            reason=said,
        )

    def statement(self, module: str) -> Statement:
        """See :class:`~mortise.checkpoint.quantization.dialect.Dialect`."""
        kind = self.description.get(f"{module}.weight")
        if kind is None:
            return Statement(f"{self.file} does not name it", is_quantised=False)
        return Statement(f"{self.file} gives it the type {kind}", is_quantised=kind != FLOAT)

    def needed(self, module: str, scheme: ModuleScheme) -> tuple[str, ...]:  # noqa: ARG002
        """See :class:`~mortise.checkpoint.quantization.dialect.Dialect`."""
        return STATIC_TENSORS if scheme.static_input else ("weight_scale",)

    def placements(
        self, module: str, target: StoredWeight, scheme: ModuleScheme
    ) -> Iterator[Placement]:
        """See :class:`~mortise.checkpoint.quantization.dialect.Dialect`."""
        leaves = self.modules.leaves(module)
        if scheme.static_input:
            return static_placements(module, target, leaves)
        return dynamic_placements(module, target, leaves)

    def skips(self) -> tuple[Skip, ...]:
        """See :class:`~mortise.checkpoint.quantization.dialect.Dialect`."""
        return SKIPS

    def entries(self) -> Iterator[Entry]:
        """See :class:`~mortise.checkpoint.quantization.dialect.Dialect`."""
        tensors = self.modules.tensors
        for name in self.description:
            module, _, leaf = name.rpartition(".")
            if module and leaf != NOT_A_TENSOR:
                known = name in tensors
                yield Entry(
                    text=name,
                    where=self.file,
                    matches=lambda _, known=known: known,  # type: ignore[misc]
                    what="tensor",
                )


def group_size(
    leaves: Mapping[str, StoredTensor], weight: StoredTensor, scheme: WeightScheme
) -> int | None:
    """Columns that share a scale; None is per channel.

    Raises:
        QuantizationConfigError: naming the weight whose rows, columns and scales do not go
            together, or that has groups where the scheme has none.
    """
    scale = leaves.get("weight_scale_second") or leaves.get("weight_scale")
    if scale is None or len(weight.shape) != 2:
        return None
    rows, columns = weight.shape
    groups = scale.shape[1] if len(scale.shape) == 2 else 1
    fault = None
    if scheme is WeightScheme.W8A8 and groups != 1:
        fault = f"has scales for {groups} groups of columns"
    elif columns % groups or (scheme is not WeightScheme.W8A8 and columns % VALUES_PER_WORD):
        fault = f"has {columns} columns and {groups} scales to a row"
    elif scheme is WeightScheme.W4A8 and scale.shape[0] not in {rows, 2 * rows}:
        fault = f"has {rows} rows and scales for {scale.shape[0]}"
    if fault is not None:
        raise QuantizationConfigError(
            f"tensor {weight.name} {fault}",
            expected="int8 per channel; int4 per channel or per group that divides the columns,"
            f" these a multiple of {VALUES_PER_WORD}, one row or two to a byte",
            remedy=OTHER_VERSION,
        )
    return None if groups == 1 else columns // groups
