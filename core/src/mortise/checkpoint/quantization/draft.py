"""The draft of a checkpoint, decided from its tensors before anything that is said of them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Final

from mortise.checkpoint.quantization.module_scheme import ModuleScheme
from mortise.checkpoint.quantization.stored_modules import FLOATS, dtype_name
from mortise.errors import QuantizationConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mortise.checkpoint.placement import Placement, Skip
    from mortise.checkpoint.quantization.dialect import Dialect, Statement
    from mortise.checkpoint.quantization.entries import Entry
    from mortise.checkpoint.quantization.stored_modules import StoredModules
    from mortise.checkpoint.tensors import StoredTensor
    from mortise.spec.weights import StoredWeight

PACKED: Final = "weight_packed"
QUANTISED_LEAVES: Final = frozenset(
    {
        PACKED,
        "weight_scale",
        "weight_scale_inv",
        "weight_scale_2",
        "weight_scale_second",
        "weight_global_scale",
        "weight_offset",
        "weight_offset_second",
        "weight_zero_point",
        "weight_g_idx",
        "input_scale",
        "input_global_scale",
        "input_offset",
        "input_zero_point",
        "deq_scale",
        "quant_bias",
        "scale_bias",
    }
)
"""Tensors that no unquantised module has, in whatever dialect."""

NAMESPACE: Final = re.compile(r"mtp\.|(?:.+\.)?layers\.\d+\.")
"""What the names of a draft's modules begin with."""

LISTED_MODULES: Final = 3
NONE_REASON: Final = "draft.quantization is none"
ANOTHER_DRAFT: Final = "name a model whose draft is whole by draft.model"


@dataclass(frozen=True)
class TensorsOfModules:
    """How the modules of a checkpoint look, whatever is said of them.

    Args:
        modules: the checkpoint.
        skips: tensors that say nothing of the module that they are stored with.
    """

    modules: StoredModules
    skips: tuple[Skip, ...] = ()

    @cached_property
    def _skipped(self) -> tuple[re.Pattern[str], ...]:
        return tuple(re.compile(skip.pattern) for skip in self.skips)

    def weight(self, module: str) -> StoredTensor | None:
        """The values of a module, if it has any."""
        leaves = self.modules.leaves(module)
        return leaves.get(PACKED) or leaves.get("weight")

    def signs(self, module: str) -> list[StoredTensor]:
        """The tensors of a module that only a quantised one has, its weight aside."""
        return [
            stored
            for leaf, stored in self.modules.leaves(module).items()
            if leaf in QUANTISED_LEAVES - {PACKED}
            and not any(pattern.fullmatch(stored.name) for pattern in self._skipped)
        ]

    def is_quantised(self, module: str) -> bool:
        """Whether the values of a module, or anything beside them, are those of a quantised one."""
        weight = self.weight(module)
        return bool(self.signs(module)) or (weight is not None and weight.dtype not in FLOATS)

    def described(self, module: str) -> str:
        """``m.weight is int8, beside m.weight_scale``."""
        weight, signs = self.weight(module), self.signs(module)
        found = "no weight" if weight is None else f"{weight.name} is {dtype_name(weight)}"
        return found + (f", beside {', '.join(sign.name for sign in signs)}" if signs else "")


@dataclass(frozen=True)
class DraftAsStored:
    """``draft.quantization`` ``auto``: floats without scales are floats, whatever is said of them.

    Quantised modules are read in the dialect that the checkpoint is written in, and have to be
    whole. What lists of modules name need not exist: they are those of the model that the draft
    was made for, and change nothing here.

    Args:
        modules: the checkpoint.
        dialect: of the program that wrote it; None where nothing says that anything is quantised.
    """

    modules: StoredModules
    dialect: Dialect | None

    @cached_property
    def _tensors(self) -> TensorsOfModules:
        return TensorsOfModules(self.modules, self.skips())

    def scheme(self, module: str) -> ModuleScheme:
        """See :class:`~mortise.checkpoint.quantization.dialect.Dialect`.

        Raises:
            QuantizationConfigError: a quantised module lacks some of its tensors, an unquantised
                one has tensors of a quantised one, or a list says that it is not quantised.
        """
        weight, signs = self._tensors.weight(module), self._tensors.signs(module)
        if weight is None and not signs:
            return ModuleScheme(reason="the checkpoint holds no weight of it")
        if weight is None:
            raise incomplete(signs[0], [f"{module}.weight"], "a scale without its weight")
        if weight.dtype not in FLOATS:
            return self._quantised(module, weight)
        if signs:
            raise scales_of_floats(weight, signs)
        if self.dialect is None:
            return ModuleScheme()
        return floats(weight, self.dialect.statement(module))

    def _quantised(self, module: str, weight: StoredTensor) -> ModuleScheme:
        if self.dialect is None:
            raise undescribed(self._tensors.described(module))
        scheme = self.dialect.scheme(module)
        leaves = self.modules.leaves(module)
        missing = [leaf for leaf in self.dialect.needed(module, scheme) if leaf not in leaves]
        if missing:
            raise incomplete(weight, [f"{module}.{leaf}" for leaf in missing], scheme.reason)
        return scheme

    def statement(self, module: str) -> Statement:
        """See :class:`~mortise.checkpoint.quantization.dialect.Dialect`."""
        assert self.dialect is not None, f"nothing is said of {module}"
        return self.dialect.statement(module)

    def needed(self, module: str, scheme: ModuleScheme) -> tuple[str, ...]:
        """See :class:`~mortise.checkpoint.quantization.dialect.Dialect`."""
        assert self.dialect is not None, f"{module} is not quantised"
        return self.dialect.needed(module, scheme)

    def placements(
        self, module: str, target: StoredWeight, scheme: ModuleScheme
    ) -> Iterator[Placement]:
        """See :class:`~mortise.checkpoint.quantization.dialect.Dialect`."""
        assert self.dialect is not None, f"{module} is not quantised"
        return self.dialect.placements(module, target, scheme)

    def skips(self) -> tuple[Skip, ...]:
        """See :class:`~mortise.checkpoint.quantization.dialect.Dialect`."""
        return () if self.dialect is None else self.dialect.skips()

    def entries(self) -> Iterator[Entry]:
        """None: an entry that names nothing changes nothing, since the tensors decide."""
        return iter(())


@dataclass(frozen=True)
class UnquantisedDraft(DraftAsStored):
    """``draft.quantization`` ``none``: every module is floats because the user says so."""

    def scheme(self, module: str) -> ModuleScheme:
        """See :class:`~mortise.checkpoint.quantization.dialect.Dialect`.

        Raises:
            QuantizationConfigError: the module is quantised; further ones of the draft are named.
        """
        if self._tensors.is_quantised(module):
            raise self._contradiction(module)
        return ModuleScheme(reason=NONE_REASON, notable=True)

    def _contradiction(self, module: str) -> QuantizationConfigError:
        namespace = NAMESPACE.match(module)
        prefix = module if namespace is None else namespace[0]
        every = [name for name in self.modules.names() if name.startswith(prefix)]
        further = [name for name in every if name != module and self._tensors.is_quantised(name)]
        listed = [module, *further[: LISTED_MODULES - 1]]
        return QuantizationConfigError(
            f"{NONE_REASON}, and {counted(1 + len(further), prefix.removesuffix('.'))} stored"
            " quantised",
            details=[*map(self._tensors.described, listed), *rest(1 + len(further))],
            expected="a draft in bfloat16, float16 or float32, without scales",
            remedy="leave draft.quantization at auto, which takes every module as it is stored, or"
            " name a model with an unquantised draft by draft.model",
        )


def floats(weight: StoredTensor, statement: Statement) -> ModuleScheme:
    """The scheme of a weight of floats, and whether the checkpoint says so too."""
    if not statement.is_quantised:
        return ModuleScheme(reason=statement.said)
    dtype = dtype_name(weight)
    return ModuleScheme(
        reason=f"its weight is {dtype} without scales, though {statement.said}", notable=True
    )


def incomplete(found: StoredTensor, missing: Sequence[str], said: str) -> QuantizationConfigError:
    """The error for a quantised module that is not whole."""
    return QuantizationConfigError(
        f"tensor {found.name} is {dtype_name(found)}, and the checkpoint lacks"
        f" {' and '.join(missing)}",
        details=[f"stored as it is because {said}"],
        expected="every quantised weight of the draft with all of its scales",
        remedy=f"download the checkpoint again; if it is whole, {ANOTHER_DRAFT}",
    )


def scales_of_floats(
    weight: StoredTensor, signs: Sequence[StoredTensor]
) -> QuantizationConfigError:
    """The error for a weight of floats beside the scales of a quantised one."""
    names = ", ".join(sign.name for sign in signs)
    return QuantizationConfigError(
        f"tensor {weight.name} is {dtype_name(weight)}, and the checkpoint holds {names} beside it",
        expected="a weight of floats without scales, or a quantised weight with them",
        remedy="download the checkpoint again; if it is whole, its weight and its scales are not of"
        f" one version of the model: {ANOTHER_DRAFT}",
    )


def undescribed(found: str) -> QuantizationConfigError:
    """The error for a quantised module in a checkpoint that says nothing of quantisation."""
    return QuantizationConfigError(
        f"tensor {found}, and nothing says how the draft is quantised",
        expected="quantization_config in config.json, hf_quant_config.json or"
        " quant_model_description.json beside the weights",
        remedy="download these files too, or name a model with an unquantised draft by draft.model",
    )


def unreadable(error: QuantizationConfigError) -> QuantizationConfigError:
    """The error for a checkpoint whose quantisation is not known, with what else can be done."""
    return QuantizationConfigError(
        error.what,
        details=error.details,
        expected=error.expected,
        remedy=f"{error.remedy}; if its draft is unquantised, say so: draft.quantization none",
    )


def counted(number: int, where: str) -> str:
    """``2 modules of mtp are``."""
    return f"1 module of {where} is" if number == 1 else f"{number} modules of {where} are"


def rest(number: int) -> list[str]:
    """How many modules are not listed."""
    return [f"and {number - LISTED_MODULES} more"] if number > LISTED_MODULES else []
