"""Checkpoints of the compressed-tensors library: int8, int4, float4 and float8 in groups."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Final

import torch

from mortise.checkpoint.placement import Placement, Skip, StoredForm
from mortise.checkpoint.quantization.compressed_tensors_config import (
    INT4,
    CompressedTensorsConfig,
    GroupScheme,
    group_schemes,
)
from mortise.checkpoint.quantization.configuration import (
    CONFIG,
    OTHER_VERSION,
    contradiction,
)
from mortise.checkpoint.quantization.conversions import (
    multiplier_of,
    scale_of,
    unpack_words,
    values_of,
    words_from_bytes,
    words_from_offset_binary,
)
from mortise.checkpoint.quantization.dialect import CACHE_SCALES, Statement
from mortise.checkpoint.quantization.entries import Entry, compiled
from mortise.checkpoint.quantization.fp8_block import block_placements
from mortise.checkpoint.quantization.module_scheme import ModuleScheme
from mortise.checkpoint.quantization.nvfp4 import (
    Nvfp4Names,
    nvfp4_placements,
    require_whole_blocks,
)
from mortise.checkpoint.quantization.stored_modules import FLOATS, dtype_name
from mortise.errors import QuantizationConfigError
from mortise.spec.weights import StoredWeight, WeightScheme

if TYPE_CHECKING:
    import re
    from collections.abc import Iterable, Iterator, Mapping

    from mortise.checkpoint.quantization.stored_modules import StoredModules
    from mortise.checkpoint.tensors import StoredTensor

DIALECT: Final = "compressed-tensors"
REGEX: Final = "re:"
EVERY_MODULE: Final = "Linear"
"""The class of all modules that this lookup is asked about."""

VALUES_PER_WORD: Final = 8

NVFP4_NAMES: Final = Nvfp4Names(
    weight="weight_packed",
    global_scale="weight_global_scale",
    input_scale="input_global_scale",
    scalar=multiplier_of,
)

REFUSED: Final = ("weight_zero_point", "weight_g_idx", "input_scale", "input_zero_point")
"""Tensors of schemes that the groups never mean."""


@dataclass(frozen=True)
class CompressedTensors:
    """Modules belong to the group whose target names them, unless they are ignored.

    A target is a name, a regular expression behind ``re:``, or the class ``Linear``; the more
    specific comes first. (``compressed_tensors/utils/match.py``.)
    """

    config: CompressedTensorsConfig
    modules: StoredModules

    @cached_property
    def _targets(self) -> Mapping[str, GroupScheme]:
        schemes = group_schemes(self.config)
        return {
            target: schemes[name]
            for name, group in self.config.config_groups.items()
            for target in group.targets
        }

    @cached_property
    def _patterns(self) -> tuple[tuple[re.Pattern[str], GroupScheme], ...]:
        return tuple(
            (pattern, self._targets[target])
            for target, pattern in patterns_in(sorted(self._targets), "a target")
        )

    @cached_property
    def _ignored(self) -> frozenset[str]:
        return frozenset(self.config.ignore or ())

    @cached_property
    def _ignored_patterns(self) -> tuple[re.Pattern[str], ...]:
        return tuple(pattern for _, pattern in patterns_in(sorted(self._ignored), "ignore"))

    def require_known(self) -> None:
        """Read everything that the configuration holds.

        Raises:
            QuantizationConfigError: a group cannot be read, or a pattern is none.
        """
        _ = self._patterns, self._ignored_patterns

    def scheme(self, module: str) -> ModuleScheme:
        """See :class:`~mortise.checkpoint.quantization.dialect.Dialect`."""
        leaves = self.modules.leaves(module)
        values = leaves.get("weight_packed") or leaves.get("weight")
        group, said = self._group(module)
        if values is None:
            return ModuleScheme(reason="the checkpoint holds no weight of it")
        if group is None:
            if values.dtype not in FLOATS:
                raise contradiction(values.name, dtype_name(values), said)
            return ModuleScheme(reason=said)
        if group.leaf not in leaves or values.dtype in FLOATS:
            raise contradiction(values.name, dtype_name(values), said)
        require_fit(leaves, leaves[group.leaf], group)
        return ModuleScheme(
            scheme=group.scheme,
            group_size=group.group_size,
            static_input=group.static_input,
            dialect=DIALECT,
            reason=said,
        )

    def statement(self, module: str) -> Statement:
        """See :class:`~mortise.checkpoint.quantization.dialect.Dialect`."""
        group, said = self._group(module)
        return Statement(said, is_quantised=group is not None)

    def needed(self, module: str, scheme: ModuleScheme) -> tuple[str, ...]:  # noqa: ARG002
        """See :class:`~mortise.checkpoint.quantization.dialect.Dialect`."""
        if scheme.scheme is not WeightScheme.NVFP4:
            return ("weight_scale",)
        of_input = (NVFP4_NAMES.input_scale,) if scheme.static_input else ()
        return ("weight_scale", NVFP4_NAMES.global_scale, *of_input)

    def placements(
        self, module: str, target: StoredWeight, scheme: ModuleScheme
    ) -> Iterator[Placement]:
        """See :class:`~mortise.checkpoint.quantization.dialect.Dialect`."""
        if scheme.scheme is WeightScheme.NVFP4:
            return nvfp4_placements(module, NVFP4_NAMES, target)
        if scheme.scheme is WeightScheme.FP8_BLOCK:
            return block_placements(module, "weight_scale", target, scheme)
        group, _ = self._group(module)
        return int_placements(module, "weight" if group is None else group.leaf, target)

    def skips(self) -> tuple[Skip, ...]:
        """See :class:`~mortise.checkpoint.quantization.dialect.Dialect`."""
        return (
            Skip(r".+\.weight_shape", "follows from the packed weight and config.json"),
            CACHE_SCALES,
        )

    def entries(self) -> Iterator[Entry]:
        """See :class:`~mortise.checkpoint.quantization.dialect.Dialect`."""
        for text in self._ignored:
            yield entry(text, f"ignore in {CONFIG}")
        for text, group in self._targets.items():
            if text != EVERY_MODULE:
                yield entry(text, f"config_groups.{group.name}.targets in {CONFIG}")

    def _group(self, module: str) -> tuple[GroupScheme | None, str]:
        """The group of a module, if it has one, and what says so."""
        ignored = any(pattern.match(module) for pattern in self._ignored_patterns)
        if ignored or module in self._ignored:
            return None, f"ignore in {CONFIG} lists it"
        found = self._targets.get(module) or next(
            (group for pattern, group in self._patterns if pattern.match(module)),
            self._targets.get(EVERY_MODULE),
        )
        if found is None:
            return None, f"no target in {CONFIG} names it"
        return found, (
            f"config_groups.{found.name} in {CONFIG} says {found.scheme.value},"
            f" written as {found.format}"
        )


def patterns_in(texts: Iterable[str], where: str) -> Iterator[tuple[str, re.Pattern[str]]]:
    """The entries that are regular expressions, compiled."""
    for text in texts:
        if text.startswith(REGEX):
            yield text, compiled(text.removeprefix(REGEX), f"{where} in {CONFIG}")


def entry(text: str, where: str) -> Entry:
    """A name or a regular expression, which need not reach the end of a name."""
    if text.startswith(REGEX):
        pattern = compiled(text.removeprefix(REGEX), where)
        return Entry(text=text, where=where, matches=lambda name: bool(pattern.match(name)))
    return Entry(text=text, where=where, matches=text.__eq__, prefix=text)


def require_fit(
    leaves: Mapping[str, StoredTensor], values: StoredTensor, group: GroupScheme
) -> None:
    """Refuse tensors that the group's scheme does not have, and columns that groups do not divide.

    Raises:
        QuantizationConfigError: naming the tensor.
    """
    for leaf in REFUSED:
        if leaf in leaves:
            raise QuantizationConfigError(
                f"tensor {leaves[leaf].name} belongs to a scheme that is not known here",
                details=[f"config_groups.{group.name} in {CONFIG} says {group.scheme.value}"],
                expected="symmetric weights with their columns in order, inputs without a zero",
                remedy=OTHER_VERSION,
            )
    if group.scheme is WeightScheme.NVFP4:
        require_whole_blocks(leaves, values)
    scale = leaves.get("weight_scale")
    if group.scheme in INT4 and scale is not None and len(values.shape) == len(scale.shape) == 2:
        columns = values.shape[1] * (VALUES_PER_WORD if group.leaf == "weight_packed" else 1)
        covered = scale.shape[1] * (group.group_size or columns)
        if columns % VALUES_PER_WORD or columns != covered:
            raise QuantizationConfigError(
                f"tensor {values.name} holds {columns} columns, its weight_scale {covered}",
                details=[f"config_groups.{group.name} in {CONFIG}: groups of {group.group_size}"],
                expected=f"columns in whole groups, and a multiple of {VALUES_PER_WORD}",
                remedy="leave the module unquantised, or use other groups",
            )


def int_placements(module: str, leaf: str, target: StoredWeight) -> Iterator[Placement]:
    """Integer values, packed or one to a byte, and their scales.

    Args:
        module: its name.
        leaf: the tensor that holds the values.
        target: views to fill.
    """
    weight, scale = f"{module}.{leaf}", f"{module}.weight_scale"
    assert target.scale is not None
    values = values_of(weight)
    if target.scheme is WeightScheme.W8A8:
        yield Placement(weight, target.weight)
    elif leaf == "weight_packed":
        values = values_of(weight, unpack_words)
        yield Placement(weight, target.weight, convert=words_from_offset_binary)
    else:
        rows, words = target.weight.shape
        form = StoredForm(shapes=((rows, VALUES_PER_WORD * words),), dtypes=(torch.int8,))
        yield Placement(weight, target.weight, stored=form, convert=words_from_bytes(weight))
    yield Placement(scale, target.scale, convert=scale_of(scale, target.scale.shape, values=values))
