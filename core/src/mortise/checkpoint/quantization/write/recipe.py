"""What a model is to be quantised to: schemes, the dialect that stores them, and exceptions."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from mortise.checkpoint.quantization.module_scheme import ModuleScheme
from mortise.errors import QuantizationConfigError
from mortise.formats.integer import VALUES_PER_WORD
from mortise.formats.nvfp4 import BLOCK
from mortise.spec.weights import ScaleFormat, WeightScheme

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

FLOAT: Final = "float"
NONE: Final = "none"

SCHEMES: Final[Mapping[str, ModuleScheme]] = MappingProxyType(
    {
        "fp8-block": ModuleScheme(scheme=WeightScheme.FP8_BLOCK),
        "w8a8": ModuleScheme(scheme=WeightScheme.W8A8),
        "w8a8-static": ModuleScheme(
            scheme=WeightScheme.W8A8, static_input=True, asymmetric_input=True
        ),
        "w4a8": ModuleScheme(scheme=WeightScheme.W4A8),
        "w4a16": ModuleScheme(scheme=WeightScheme.W4A16),
        "w4a4": ModuleScheme(scheme=WeightScheme.W4A4),
        "nvfp4": ModuleScheme(scheme=WeightScheme.NVFP4, static_input=True),
        FLOAT: ModuleScheme(),
    }
)
"""The names by which schemes are asked for."""

DIALECTS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "fp8": ("fp8-block",),
        "compressed-tensors": ("w8a8", "w4a8", "w4a16", "nvfp4"),
        "modelopt": ("nvfp4",),
        "modelslim": ("w8a8", "w8a8-static", "w4a8", "w4a4"),
    }
)
"""Which schemes each dialect can store; the first that stores a scheme is its default."""

DEFAULT_GROUPS: Final[Mapping[tuple[str, str], int | None]] = MappingProxyType(
    {
        ("compressed-tensors", "w4a8"): 128,
        ("compressed-tensors", "w4a16"): 128,
        ("modelslim", "w4a4"): None,
    }
)
"""Where columns may share scales in groups, and how many unless it is said; None is all."""


@dataclass(frozen=True, slots=True)
class Rule:
    """Another scheme for the modules whose dotted name a glob matches."""

    pattern: str
    scheme: str

    @property
    def option(self) -> str:
        """As it was asked for."""
        return f"--scheme-for {self.pattern}={self.scheme}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Checked when made; make one with :meth:`of`.

    Args:
        scheme: name of the scheme for every projection that nothing else is said of.
        draft_scheme: the same for those of multi-token prediction layers; ``none`` leaves these
            layers as they are, whatever else is asked for.
        dialect: who defined the layout that is written.
        group_size: columns that share a scale where a scheme has groups; None is the default of
            the dialect.
        ignore: globs of modules that stay unquantised; they go before every rule.
        rules: exceptions; the first that matches counts.
        scale_format: what the scales of float8 blocks are.
    """

    scheme: str
    dialect: str
    draft_scheme: str = NONE
    group_size: int | None = None
    ignore: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()
    scale_format: ScaleFormat = ScaleFormat.FLOAT32

    @classmethod
    def of(
        cls,
        scheme: str,
        dialect: str | None = None,
        *,
        draft_scheme: str = NONE,
        group_size: int | None = None,
        ignore: Sequence[str] = (),
        rules: Sequence[Rule] = (),
        powers_of_two: bool = False,
    ) -> Recipe:
        """Check what is asked for.

        Args:
            scheme: as in the class, like all but the following two.
            dialect: None is the default of the scheme.
            draft_scheme: see the class.
            group_size: see the class.
            ignore: see the class.
            rules: see the class.
            powers_of_two: round the scales of float8 blocks up to powers of two.

        Raises:
            QuantizationConfigError: a name is unknown, the dialect cannot store one of the schemes,
                or an option means nothing for them.
        """
        known("scheme", scheme, [name for name in SCHEMES if name != FLOAT])
        known("--draft-scheme", draft_scheme, [NONE, *(name for name in SCHEMES if name != FLOAT)])
        for rule in rules:
            known(rule.option, rule.scheme, SCHEMES)
        found = dialect or next(name for name, stored in DIALECTS.items() if scheme in stored)
        known("dialect", found, DIALECTS)
        recipe = cls(
            scheme=scheme,
            dialect=found,
            draft_scheme=draft_scheme,
            group_size=group_size,
            ignore=tuple(ignore),
            rules=tuple(rules),
            scale_format=ScaleFormat.UE8M0 if powers_of_two else ScaleFormat.FLOAT32,
        )
        recipe._check_pairs()
        recipe._check_groups()
        recipe._check_scale_format()
        return recipe

    @property
    def needs_input_ranges(self) -> bool:
        """Whether the range of some inputs has to be known."""
        return any(SCHEMES[name].static_input for name in (*self._schemes(), *self._of_drafts()))

    @property
    def needs_draft_input_ranges(self) -> bool:
        """Whether those of multi-token prediction layers may be among them."""
        asked = (*self._of_drafts(), *(rule.scheme for rule in self.rules))
        return self.quantises_drafts and any(SCHEMES[name].static_input for name in asked)

    @property
    def quantises_drafts(self) -> bool:
        """Whether multi-token prediction layers are quantised too."""
        return self.draft_scheme != NONE

    def module_scheme(
        self, module: str, out_features: int, in_features: int, *, of_draft: bool = False
    ) -> ModuleScheme:
        """How to store a projection ``[N, K]``; ``reason`` says which option wants it so."""
        for pattern in self.ignore:
            if fnmatch.fnmatchcase(module, pattern):
                return ModuleScheme(reason=f"--ignore {pattern}")
        rule = next((one for one in self.rules if fnmatch.fnmatchcase(module, one.pattern)), None)
        option, default = ("--scheme", self.scheme)
        if of_draft:
            option, default = ("--draft-scheme", self.draft_scheme)
        name = default if rule is None else rule.scheme
        reason = f"{option} {name}" if rule is None else rule.option
        if name == FLOAT:
            return ModuleScheme(reason=reason)
        misfit = self._misfit(name, out_features, in_features)
        if misfit:
            return ModuleScheme(reason=misfit)
        group_size = self._group_size(name)
        if group_size is not None and in_features % group_size:
            group_size, reason = None, f"{reason}; {in_features} columns are no whole groups"
        scheme = SCHEMES[name]
        return replace(
            scheme,
            group_size=group_size,
            scale_format=(
                self.scale_format
                if scheme.scheme is WeightScheme.FP8_BLOCK
                else scheme.scale_format
            ),
            dialect=self.dialect,
            reason=reason,
        )

    def _misfit(self, name: str, out_features: int, in_features: int) -> str:
        """Why a projection of this size cannot be stored so; empty if it can."""
        columns = {WeightScheme.NVFP4: BLOCK} | dict.fromkeys(
            (WeightScheme.W4A8, WeightScheme.W4A16, WeightScheme.W4A4), VALUES_PER_WORD
        )
        multiple = columns.get(SCHEMES[name].scheme, 1)
        if in_features % multiple:
            return f"{name} needs columns in multiples of {multiple}, and it has {in_features}"
        if (self.dialect, name) == ("modelslim", "w4a8") and out_features % 2:
            return f"modelslim stores w4a8 in pairs of rows, and it has {out_features}"
        return ""

    def _group_size(self, name: str) -> int | None:
        if (self.dialect, name) not in DEFAULT_GROUPS:
            return None
        return self.group_size or DEFAULT_GROUPS[self.dialect, name]

    def _schemes(self) -> Iterator[str]:
        yield self.scheme
        yield from (rule.scheme for rule in self.rules)

    def _of_drafts(self) -> tuple[str, ...]:
        return (self.draft_scheme,) if self.quantises_drafts else ()

    def _check_pairs(self) -> None:
        stored = DIALECTS[self.dialect]
        for name in (*self._schemes(), *self._of_drafts()):
            if name not in stored and name != FLOAT:
                elsewhere = [dialect for dialect, names in DIALECTS.items() if name in names]
                raise QuantizationConfigError(
                    f"dialect {self.dialect} cannot store scheme {name}",
                    details=[f"{name} can be stored by {', '.join(elsewhere)}"],
                    expected=f"one of {', '.join(stored)} for {self.dialect}",
                    remedy="choose another dialect or another scheme",
                )

    def _check_groups(self) -> None:
        if self.group_size is None:
            return
        if self.group_size < 1 or self.group_size % VALUES_PER_WORD:
            raise QuantizationConfigError(
                f"--group-size is {self.group_size}",
                expected=f"a multiple of {VALUES_PER_WORD} columns",
                remedy="correct --group-size",
            )
        asked = (*self._schemes(), *self._of_drafts())
        if not any((self.dialect, name) in DEFAULT_GROUPS for name in asked):
            grouped = [f"{name} of {dialect}" for dialect, name in DEFAULT_GROUPS]
            raise QuantizationConfigError(
                f"--group-size is {self.group_size}, and {self.scheme} of {self.dialect} has no"
                " groups of columns",
                expected=f"--group-size only beside {', '.join(grouped)}",
                remedy="leave --group-size out",
            )

    def _check_scale_format(self) -> None:
        if self.scale_format is ScaleFormat.UE8M0 and self.dialect != "fp8":
            raise QuantizationConfigError(
                f"--ue8m0 is given beside dialect {self.dialect}",
                expected="--ue8m0 only beside fp8-block of dialect fp8",
                remedy="leave --ue8m0 out",
            )


def scheme_name(scheme: ModuleScheme) -> str:
    """The name by which a scheme is asked for."""
    return next(
        name
        for name, asked in SCHEMES.items()
        if (asked.scheme, asked.static_input) == (scheme.scheme, scheme.static_input)
    )


def known(what: str, name: str, names: Sequence[str] | Mapping[str, object]) -> None:
    """Require that a name is one of several.

    Raises:
        QuantizationConfigError: it is not.
    """
    if name not in names:
        raise QuantizationConfigError(
            f"{what}: {name!r} is not known",
            expected=f"one of {', '.join(names)}",
            remedy="correct the name",
        )
