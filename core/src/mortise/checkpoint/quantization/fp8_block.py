"""Checkpoints with float8 weights in blocks of 128 x 128, as DeepSeek publishes them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Final, Literal

import torch
from pydantic import Field, field_validator

from mortise.checkpoint.placement import Placement, Skip, StoredForm
from mortise.checkpoint.quantization.configuration import CONFIG, Section, contradiction
from mortise.checkpoint.quantization.conversions import power_of_two_of, scale_of, values_of
from mortise.checkpoint.quantization.entries import Entry
from mortise.checkpoint.quantization.module_scheme import ModuleScheme
from mortise.checkpoint.quantization.stored_modules import FLOATS, dtype_name
from mortise.spec.weights import ScaleFormat, StoredWeight, WeightScheme

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mortise.checkpoint.quantization.stored_modules import StoredModules

BLOCK: Final = 128
WEIGHT_DTYPE: Final = torch.float8_e4m3fn
SCALE_DTYPES: Final = (*FLOATS, torch.float8_e8m0fnu)
DIALECT: Final = "fp8"


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

    The list need not be whole: transformers leaves out weights that blocks do not divide, and
    DeepSeek lists nothing.
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
        if weight.dtype != WEIGHT_DTYPE:
            if scale is not None or weight.dtype not in FLOATS:
                raise contradiction(weight.name, dtype, f"{CONFIG} says fp8: float8_e4m3fn")
            return ModuleScheme(reason=f"{weight.name} is {dtype} and has no weight_scale_inv")
        if self._excluded.match(module):
            raise contradiction(weight.name, dtype, f"{CONFIG} lists it as not converted")
        powers = self.config.scale_fmt == "ue8m0" or (
            scale is not None and scale.dtype == torch.float8_e8m0fnu
        )
        return ModuleScheme(
            scheme=WeightScheme.FP8_BLOCK,
            scale_format=ScaleFormat.UE8M0 if powers else ScaleFormat.FLOAT32,
            dialect=DIALECT,
            reason=f"{CONFIG} says fp8 in blocks of {BLOCK} x {BLOCK}",
        )

    def placements(
        self, module: str, target: StoredWeight, scheme: ModuleScheme
    ) -> Iterator[Placement]:
        """See :class:`~mortise.checkpoint.quantization.dialect.Dialect`."""
        return block_placements(module, "weight_scale_inv", target, scheme)

    def skips(self) -> tuple[Skip, ...]:
        """See :class:`~mortise.checkpoint.quantization.dialect.Dialect`."""
        return ()

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
    yield Placement(weight, target.weight)
    make = power_of_two_of if scheme.scale_format is ScaleFormat.UE8M0 else scale_of
    yield Placement(
        scale,
        target.scale,
        stored=StoredForm(shapes=(tuple(target.scale.shape),), dtypes=SCALE_DTYPES),
        convert=make(scale, target.scale.shape, values=values_of(weight)),
    )
