"""What compressed-tensors writes into ``quantization_config``, and the scheme each group means."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Literal

from pydantic import Field, field_validator

from mortise.checkpoint.quantization.configuration import (
    CONFIG,
    OTHER_VERSION,
    Section,
    unknown_value,
)
from mortise.errors import QuantizationConfigError
from mortise.spec.weights import WeightScheme

if TYPE_CHECKING:
    from collections.abc import Mapping

MIXED: Final = "mixed-precision"
"""Stands for the formats that the groups name themselves."""

SCHEMES: Final[Mapping[tuple[str, str], WeightScheme]] = MappingProxyType(
    {
        ("int8 channel", "int8 token dynamic"): WeightScheme.W8A8,
        ("int4 channel", "int8 token dynamic"): WeightScheme.W4A8,
        ("int4 group", "int8 token dynamic"): WeightScheme.W4A8,
        ("int4 channel", "int4 token dynamic"): WeightScheme.W4A4,
        ("int4 group", "int4 token dynamic"): WeightScheme.W4A4,
        ("int4 channel", "unquantised"): WeightScheme.W4A16,
        ("int4 group", "unquantised"): WeightScheme.W4A16,
        ("float4 tensor_group of 16", "float4 tensor_group of 16 local"): WeightScheme.NVFP4,
        ("float4 tensor_group of 16", "unquantised"): WeightScheme.NVFP4,
        ("float8 block of 128x128", "float8 group of 128 dynamic"): WeightScheme.FP8_BLOCK,
    }
)
"""Weights and input as :meth:`Arguments.described` says them, and the scheme that they make."""

INT4: Final = frozenset({WeightScheme.W4A16, WeightScheme.W4A8, WeightScheme.W4A4})


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """How values are written: the tensor that holds them, and the schemes written so."""

    leaf: str
    schemes: frozenset[WeightScheme]


FORMATS: Final[Mapping[str, Format]] = MappingProxyType(
    {
        "int-quantized": Format(leaf="weight", schemes=INT4 | {WeightScheme.W8A8}),
        "pack-quantized": Format(leaf="weight_packed", schemes=INT4),
        "nvfp4-pack-quantized": Format(
            leaf="weight_packed", schemes=frozenset({WeightScheme.NVFP4})
        ),
        "float-quantized": Format(leaf="weight", schemes=frozenset({WeightScheme.FP8_BLOCK})),
    }
)


class Arguments(Section):
    """How weights or inputs are quantised (``compressed_tensors/quantization/quant_args.py``)."""

    num_bits: int = 8
    type: str = "int"
    symmetric: bool = True
    group_size: int | None = None
    strategy: str | None = None
    block_structure: tuple[int, ...] | None = None
    dynamic: bool | str = False
    actorder: bool | str | None = None

    @field_validator("block_structure", mode="before")
    @classmethod
    def _as_old_versions_write_it(cls, value: object) -> object:
        return value.split("x") if isinstance(value, str) else value

    @property
    def scope(self) -> str:
        """Who shares a scale; without ``strategy`` the size of groups says it."""
        if self.strategy is not None:
            return self.strategy
        if self.group_size is None:
            return "tensor"
        return "channel" if self.group_size == -1 else "group"

    def described(self) -> str:
        """Number format, who shares a scale, and when it is found: a key of :data:`SCHEMES`."""
        words = [f"{self.type}{self.num_bits}", self.scope]
        # Any size of groups of int4 weights will do; other sizes are part of the format.
        if self.scope in {"group", "tensor_group"} and self.type != "int":
            words.append(f"of {self.group_size}")
        if self.block_structure:
            words.append(f"of {'x'.join(map(str, self.block_structure))}")
        if self.dynamic:
            words.append("dynamic" if self.dynamic is True else self.dynamic)
        return " ".join(words)


class Group(Section):
    """Modules that are quantised alike."""

    targets: tuple[str, ...]
    weights: Arguments | None = None
    input_activations: Arguments | None = None
    output_activations: Arguments | None = None
    format: str | None = None


class CompressedTensorsConfig(Section):
    """``quantization_config`` with ``quant_method`` compressed-tensors."""

    quant_method: Literal["compressed-tensors"]
    config_groups: dict[str, Group]
    ignore: tuple[str, ...] | None = None
    format: str = "dense"
    transform_config: dict[str, Any] | None = Field(default=None)
    sparsity_config: dict[str, Any] | None = Field(default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupScheme:
    """What a group means.

    Args:
        name: of the group.
        scheme: of its modules.
        group_size: columns that share a scale; None is per channel.
        static_input: a global scale of the input is stored.
        format: how values are written.
    """

    name: str
    scheme: WeightScheme
    group_size: int | None
    static_input: bool
    format: str

    @property
    def leaf(self) -> str:
        """The tensor that holds the values."""
        return FORMATS[self.format].leaf


def group_schemes(config: CompressedTensorsConfig) -> dict[str, GroupScheme]:
    """The scheme of every group, by its name.

    Raises:
        QuantizationConfigError: a group asks for something that cannot be read.
    """
    require_nothing_else(config)
    return {name: group_scheme(name, group, config) for name, group in config.config_groups.items()}


def require_nothing_else(config: CompressedTensorsConfig) -> None:
    """Refuse what would change the numbers beside the groups: transforms and sparsity.

    Raises:
        QuantizationConfigError: there is such a thing.
    """
    sparsity = config.sparsity_config or {}
    for key, asked in (
        ("transform_config", bool((config.transform_config or {}).get("config_groups"))),
        ("sparsity_config", sparsity.get("format", "dense") != "dense"),
    ):
        if asked:
            raise QuantizationConfigError(
                f"{CONFIG} holds a {key}, which is not known here",
                expected="quantised weights without transforms and sparsity",
                remedy=OTHER_VERSION,
            )


def group_scheme(name: str, group: Group, config: CompressedTensorsConfig) -> GroupScheme:
    """The scheme of one group.

    Raises:
        QuantizationConfigError: it asks for something that cannot be read.
    """
    where = f"config_groups.{name} in {CONFIG}"
    weights, inputs = group.weights, group.input_activations
    require_symmetric(where, group)
    asked = (
        "unquantised" if weights is None else weights.described(),
        "unquantised" if inputs is None else inputs.described(),
    )
    if asked not in SCHEMES:
        raise QuantizationConfigError(
            f"{where} asks for weights {asked[0]} with input {asked[1]}",
            expected="one of: "
            + "; ".join(f"weights {pair[0]} with input {pair[1]}" for pair in SCHEMES),
            remedy=OTHER_VERSION,
        )
    assert weights is not None
    scheme = SCHEMES[asked]
    return GroupScheme(
        name=name,
        scheme=scheme,
        group_size=weights.group_size if weights.scope == "group" else None,
        static_input=scheme is WeightScheme.NVFP4 and inputs is not None,
        format=known_format(where, group.format or config.format, scheme),
    )


def require_symmetric(where: str, group: Group) -> None:
    """Refuse zero points, reordered columns and quantised outputs.

    Raises:
        QuantizationConfigError: the group asks for one of them.
    """
    asked: dict[str, object] = {}
    for part in ("weights", "input_activations"):
        arguments: Arguments | None = getattr(group, part)
        if arguments is not None and not arguments.symmetric:
            asked[f"{part}.symmetric"] = False
    # Other orders only steered the calibration: the columns are where they were.
    if group.weights is not None and group.weights.actorder in {"group", "dynamic", True}:
        asked["weights.actorder"] = group.weights.actorder
    if group.weights is not None and group.weights.dynamic is not False:
        asked["weights.dynamic"] = group.weights.dynamic
    if group.output_activations is not None:
        asked["output_activations"] = group.output_activations.described()
    if asked:
        raise QuantizationConfigError(
            f"{where}: " + ", ".join(f"{key} is {value!r}" for key, value in asked.items()),
            expected="symmetric weights and inputs, weights quantised beforehand, columns in order,"
            " outputs unquantised",
            remedy=OTHER_VERSION,
        )


def known_format(where: str, name: str, scheme: WeightScheme) -> str:
    """The name of a format that can hold a scheme.

    Raises:
        QuantizationConfigError: it is not known, or does not go with the scheme.
    """
    fitting = {known for known, described in FORMATS.items() if scheme in described.schemes}
    if name not in fitting:
        raise unknown_value(where, f"format for {scheme.value}", name, fitting)
    return name
