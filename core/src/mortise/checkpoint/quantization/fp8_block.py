"""Checkpoints with float8 weights in blocks of 128 x 128, as DeepSeek publishes them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Literal

import torch
from pydantic import Field, field_validator

from mortise.checkpoint.placement import Placement, Skip, StoredForm
from mortise.checkpoint.quantization.configuration import CONFIG, Section, contradiction
from mortise.checkpoint.quantization.conversions import power_of_two_of, scale_of, values_of
from mortise.checkpoint.quantization.dialect import Statement
from mortise.checkpoint.quantization.entries import Entry
from mortise.checkpoint.quantization.module_scheme import ModuleScheme
from mortise.checkpoint.quantization.stored_modules import FLOATS, dtype_name
from mortise.spec.weights import ScaleFormat, StoredWeight, WeightScheme

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from mortise.checkpoint.placement import Conversion, Read
    from mortise.checkpoint.quantization.stored_modules import StoredModules
    from mortise.checkpoint.tensors import StoredTensor

BLOCK: Final = 128
WEIGHT_DTYPE: Final = torch.float8_e4m3fn
POWER_OF_TWO_DTYPE: Final = torch.float8_e8m0fnu
SCALE_DTYPES: Final = (*FLOATS, POWER_OF_TWO_DTYPE)
DIALECT: Final = "fp8"

EXPERT: Final = re.compile(r"(?P<experts>.+\.experts)\.(?P<number>\d+)\.(?P<projection>\w+)")
FUSED: Final[Mapping[str, tuple[str, int, int]]] = MappingProxyType(
    {
        "gate_proj": ("gate_up_proj_scale_inv", 0, 2),
        "up_proj": ("gate_up_proj_scale_inv", 1, 2),
        "down_proj": ("down_proj_scale_inv", 0, 1),
    }
)
"""Tensor of scales of all experts, and which of how many parts of its rows a projection has."""


class Fp8Config(Section):
    """``quantization_config`` with ``quant_method`` fp8."""

    quant_method: Literal["fp8"]
    fmt: Literal["e4m3"] = "e4m3"
    activation_scheme: Literal["dynamic"] = "dynamic"
    weight_block_size: tuple[int, int]
    scale_fmt: Literal["float", "ue8m0"] | None = None
    expert_dtype: Literal["fp8"] = "fp8"
    modules_to_not_convert: tuple[str, ...] | None = Field(default=None)
    ignored_layers: tuple[str, ...] | None = Field(default=None)

    @field_validator("weight_block_size", mode="before")
    @classmethod
    def _only_blocks_that_are_known(cls, value: object) -> object:
        if value not in ([BLOCK, BLOCK], (BLOCK, BLOCK)):
            raise ValueError(f"[{BLOCK}, {BLOCK}]")
        return value

    @property
    def excluded(self) -> tuple[str, ...]:
        """Modules that are not quantised, under either of the names of the list."""
        return self.modules_to_not_convert or self.ignored_layers or ()


@dataclass(frozen=True)
class Fp8Block:
    """Every module whose weight is float8 is quantised; the configuration lists exceptions.

    The list need not be whole: DeepSeek lists nothing. transformers leaves weights that blocks do
    not divide as they are, with scales beside them that it made and never filled; and where it has
    quantised a model itself, it writes the scales of all experts of a layer as one tensor.
    """

    config: Fp8Config
    modules: StoredModules

    @cached_property
    def _excluded(self) -> re.Pattern[str]:
        return re.compile("|".join(map(excluding, self.config.excluded)) or r"(?!)")

    def scheme(self, module: str) -> ModuleScheme:
        """See :class:`~mortise.checkpoint.quantization.dialect.Dialect`."""
        leaves = self.modules.leaves(module)
        weight, scale = leaves.get("weight"), leaves.get("weight_scale_inv")
        if weight is None:
            return ModuleScheme(reason="the checkpoint holds no weight of it")
        dtype = dtype_name(weight)
        if weight.dtype in FLOATS and scale is not None and is_divided(weight):
            raise contradiction(weight.name, dtype, f"{scale.name} beside it says float8_e4m3fn")
        if weight.dtype in FLOATS:
            return ModuleScheme(reason=f"its weight is {dtype}")
        if weight.dtype != WEIGHT_DTYPE:
            raise contradiction(weight.name, dtype, f"{CONFIG} says fp8: float8_e4m3fn")
        if not (statement := self.statement(module)).is_quantised:
            raise contradiction(weight.name, dtype, statement.said)
        if scale is None and (fused := self._fused_scales(module)) is not None:
            scale = fused.stored
        powers = self.config.scale_fmt == "ue8m0" or (
            scale is not None and scale.dtype == POWER_OF_TWO_DTYPE
        )
        return ModuleScheme(
            scheme=WeightScheme.FP8_BLOCK,
            scale_format=ScaleFormat.UE8M0 if powers else ScaleFormat.FLOAT32,
            dialect=DIALECT,
            reason=f"{CONFIG} says fp8 in blocks of {BLOCK} x {BLOCK}",
        )

    def statement(self, module: str) -> Statement:
        """See :class:`~mortise.checkpoint.quantization.dialect.Dialect`."""
        if self._excluded.match(module):
            return Statement(f"{CONFIG} lists it as not converted", is_quantised=False)
        return Statement(f"{CONFIG} says fp8 and does not list it", is_quantised=True)

    def needed(self, module: str, scheme: ModuleScheme) -> tuple[str, ...]:  # noqa: ARG002
        """See :class:`~mortise.checkpoint.quantization.dialect.Dialect`."""
        return () if self._fused_scales(module) is not None else ("weight_scale_inv",)

    def placements(
        self, module: str, target: StoredWeight, scheme: ModuleScheme
    ) -> Iterator[Placement]:
        """See :class:`~mortise.checkpoint.quantization.dialect.Dialect`."""
        fused = None
        if "weight_scale_inv" not in self.modules.leaves(module):
            fused = self._fused_scales(module)
        if fused is None:
            yield from block_placements(module, "weight_scale_inv", target, scheme)
        else:
            yield from fused_placements(module, fused, target, scheme)

    def skips(self) -> tuple[Skip, ...]:
        """See :class:`~mortise.checkpoint.quantization.dialect.Dialect`."""
        unused = [
            re.escape(leaves["weight_scale_inv"].name)
            for leaves in map(self.modules.leaves, self.modules.names())
            if leaves.keys() >= {"weight", "weight_scale_inv"}
            and leaves["weight"].dtype in FLOATS
            and not is_divided(leaves["weight"])
        ]
        return (Skip("|".join(unused), "beside a weight that is not quantised"),) if unused else ()

    def _fused_scales(self, module: str) -> FusedScales | None:
        match = EXPERT.fullmatch(module)
        if match is None or match["projection"] not in FUSED:
            return None
        leaf, part, num_parts = FUSED[match["projection"]]
        stored = self.modules.leaves(match["experts"]).get(leaf)
        if stored is None:
            return None
        return FusedScales(
            stored=stored, expert=int(match["number"]), part=part, num_parts=num_parts
        )

    def entries(self) -> Iterator[Entry]:
        """See :class:`~mortise.checkpoint.quantization.dialect.Dialect`."""
        for text in self.config.excluded:
            pattern = re.compile(excluding(text))
            yield Entry(
                text=text,
                where=f"modules_to_not_convert in {CONFIG}",
                matches=lambda name, pattern=pattern: bool(pattern.match(name)),  # type: ignore[misc]
                prefix=text,
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedScales:
    """Where the scales of one expert's projection are in a tensor of all experts.

    Args:
        stored: scales ``[E, B, K/128]``.
        expert: which expert.
        part: which of ``num_parts`` equal parts of the B blocks of rows.
    """

    stored: StoredTensor
    expert: int
    part: int
    num_parts: int


def is_divided(weight: StoredTensor) -> bool:
    """Whether whole blocks cover a weight."""
    return not any(size % BLOCK for size in weight.shape[-2:])


def excluding(text: str) -> str:
    """The pattern of an entry, as transformers reads it.

    The beginning of the name up to a dot, as a regular expression, or its end.
    (``transformers/quantizers/quantizers_utils.py``, ``should_convert_module``.)
    """
    try:
        re.compile(text)
    except re.error:
        begins = re.escape(text)
    else:
        begins = text
    return rf"(?:(?:{begins})(?:(?<=\.)|(?=\.|$))|.*{re.escape(text)}$)"


def block_placements(
    module: str, scale_leaf: str, target: StoredWeight, scheme: ModuleScheme
) -> Iterator[Placement]:
    """A float8 weight and its scales of blocks.

    Args:
        module: its name.
        scale_leaf: what the tensor of scales is called.
        target: views to fill.
        scheme: of the module.
    """
    weight, scale = f"{module}.weight", f"{module}.{scale_leaf}"
    assert target.scale is not None
    shape = tuple(target.scale.shape)
    yield Placement(weight, target.weight)
    yield Placement(
        scale,
        target.scale,
        stored=StoredForm(shapes=(shape,), dtypes=SCALE_DTYPES),
        convert=conversion(scale, shape, weight, scheme),
    )


def fused_placements(
    module: str, fused: FusedScales, target: StoredWeight, scheme: ModuleScheme
) -> Iterator[Placement]:
    """A float8 weight of one expert, whose scales are part of a tensor of all experts."""
    assert target.scale is not None
    shape = tuple(target.scale.shape)
    yield Placement(f"{module}.weight", target.weight)
    num_experts = max(fused.stored.shape[0], fused.expert + 1)
    name = f"{fused.stored.name}[{fused.expert}]"
    own = conversion(name, shape, f"{module}.weight", scheme)

    def convert(stored: torch.Tensor, read: Read) -> torch.Tensor:
        return own(stored[fused.expert].chunk(fused.num_parts)[fused.part], read)

    yield Placement(
        fused.stored.name,
        target.scale,
        stored=StoredForm(
            shapes=((num_experts, fused.num_parts * shape[0], shape[1]),), dtypes=SCALE_DTYPES
        ),
        convert=convert,
    )


def conversion(scale: str, shape: tuple[int, ...], weight: str, scheme: ModuleScheme) -> Conversion:
    """Scales as they are, once they have been found to be what the scheme says."""
    make = power_of_two_of if scheme.scale_format is ScaleFormat.UE8M0 else scale_of
    return make(scale, shape, values=values_of(weight))
