"""Checkpoints of modelopt with float4 weights (NVFP4)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Final, Literal

import torch
from pydantic import field_validator

from mortise.checkpoint.quantization.configuration import CONFIG, Section, contradiction
from mortise.checkpoint.quantization.conversions import scale_of
from mortise.checkpoint.quantization.dialect import CACHE_SCALES, Statement
from mortise.checkpoint.quantization.entries import Entry, glob_pattern, glob_prefix
from mortise.checkpoint.quantization.module_scheme import ModuleScheme
from mortise.checkpoint.quantization.nvfp4 import (
    Nvfp4Names,
    nvfp4_placements,
    require_whole_blocks,
)
from mortise.checkpoint.quantization.stored_modules import FLOATS, dtype_name
from mortise.spec.weights import StoredWeight, WeightScheme

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mortise.checkpoint.placement import Placement, Skip
    from mortise.checkpoint.quantization.stored_modules import StoredModules

DIALECT: Final = "modelopt"
WILDCARDS: Final = re.compile(r"[*?\[]")

NVFP4_NAMES: Final = Nvfp4Names(
    weight="weight",
    global_scale="weight_scale_2",
    input_scale="input_scale",
    scalar=scale_of,
)


class ModeloptConfig(Section):
    """``quantization`` of ``hf_quant_config.json``, or ``quantization_config`` of modelopt.

    The exceptions are ``exclude_modules`` in the one and ``ignore`` in the other.
    """

    quant_algo: Literal["NVFP4"]
    group_size: Literal[16] | None = None
    exclude_modules: tuple[str, ...] | None = None
    ignore: tuple[str, ...] | None = None

    @field_validator("quant_algo", mode="before")
    @classmethod
    def _in_capitals(cls, value: object) -> object:
        return value.upper() if isinstance(value, str) else value

    @property
    def excluded(self) -> tuple[str, ...]:
        """Modules that are not quantised, each once."""
        return tuple(dict.fromkeys((*(self.exclude_modules or ()), *(self.ignore or ()))))


@dataclass(frozen=True)
class Modelopt:
    """Every projection is quantised but for those that the configuration excludes.

    Args:
        config: what the file says.
        modules: the checkpoint.
        where: the list of exceptions, for messages.
    """

    config: ModeloptConfig
    modules: StoredModules
    where: str = CONFIG

    @cached_property
    def _excluded(self) -> re.Pattern[str]:
        return re.compile("|".join(map(excluding, self.config.excluded)) or r"(?!)")

    def scheme(self, module: str) -> ModuleScheme:
        """See :class:`~mortise.checkpoint.quantization.dialect.Dialect`."""
        leaves = self.modules.leaves(module)
        weight = leaves.get("weight")
        if weight is None:
            return ModuleScheme(reason="the checkpoint holds no weight of it")
        statement = self.statement(module)
        said = statement.said
        if not statement.is_quantised:
            if weight.dtype not in FLOATS:
                raise contradiction(weight.name, dtype_name(weight), said)
            return ModuleScheme(reason=said)
        if weight.dtype != torch.uint8:
            raise contradiction(weight.name, dtype_name(weight), said)
        require_whole_blocks(leaves, weight)
        return ModuleScheme(
            scheme=WeightScheme.NVFP4,
            static_input="input_scale" in leaves,
            dialect=DIALECT,
            reason=said,
        )

    def statement(self, module: str) -> Statement:
        """See :class:`~mortise.checkpoint.quantization.dialect.Dialect`."""
        if self._excluded.match(module):
            return Statement(f"{self.where} excludes it", is_quantised=False)
        return Statement(f"{self.where} says NVFP4 and does not exclude it", is_quantised=True)

    def needed(self, module: str, scheme: ModuleScheme) -> tuple[str, ...]:  # noqa: ARG002
        """See :class:`~mortise.checkpoint.quantization.dialect.Dialect`."""
        return ("weight_scale", NVFP4_NAMES.global_scale)

    def placements(
        self,
        module: str,
        target: StoredWeight,
        scheme: ModuleScheme,  # noqa: ARG002
    ) -> Iterator[Placement]:
        """See :class:`~mortise.checkpoint.quantization.dialect.Dialect`."""
        return nvfp4_placements(module, NVFP4_NAMES, target)

    def skips(self) -> tuple[Skip, ...]:
        """See :class:`~mortise.checkpoint.quantization.dialect.Dialect`."""
        return (CACHE_SCALES,)

    def entries(self) -> Iterator[Entry]:
        """See :class:`~mortise.checkpoint.quantization.dialect.Dialect`."""
        for text in self.config.excluded:
            pattern = re.compile(excluding(text))
            yield Entry(
                text=text,
                where=f"the list of exceptions in {self.where}",
                matches=lambda name, pattern=pattern: bool(pattern.match(name)),  # type: ignore[misc]
                prefix=glob_prefix(text),
            )


def excluding(text: str) -> str:
    """The pattern of an exception.

    Modelopt writes names, and globs such as ``model.layers.0.self_attn*``. A name without
    wildcards stands for everything in it, and old versions write only the last parts of names.
    """
    if WILDCARDS.search(text):
        return glob_pattern(text).pattern
    return rf"(?:.*\.)?{re.escape(text)}(?:\..*)?\Z"
