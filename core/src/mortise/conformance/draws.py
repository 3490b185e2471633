"""Weights of every form in which a scheme may store them, and rows for them, from a seed."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, assert_never

import torch

from mortise.plugin import ScaleFormat, StoredWeight, WeightScheme

if TYPE_CHECKING:
    from collections.abc import Mapping

GROUP_SIZE: Final = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """One way to store a weight.

    Args:
        scheme: its scheme.
        is_grouped: 32 columns share a scale (int4).
        static_input: the input has a stored scale, which differs between parts.
        asymmetric: and an offset (W8A8).
        scale_format: of FP8_BLOCK.
    """

    scheme: WeightScheme
    is_grouped: bool = False
    static_input: bool = False
    asymmetric: bool = False
    scale_format: ScaleFormat = ScaleFormat.FLOAT32

    def __str__(self) -> str:
        said = {
            "grouped": self.is_grouped,
            "static": self.static_input,
            "offset": self.asymmetric,
            "powers": self.scale_format is ScaleFormat.UE8M0,
        }
        return "_".join([self.scheme.value, *(name for name, is_so in said.items() if is_so)])

    def num_groups(self, columns: int) -> int:
        """G."""
        return columns // GROUP_SIZE if self.is_grouped else 1


_STATIC: Final = (WeightScheme.W8A8, WeightScheme.NVFP4)
_INT4: Final = (WeightScheme.W4A8, WeightScheme.W4A4, WeightScheme.W4A16)


def _forms(scheme: WeightScheme) -> tuple[Form, ...]:
    forms = [Form(scheme=scheme)]
    if scheme in _INT4:
        forms.append(Form(scheme=scheme, is_grouped=True))
    if scheme is WeightScheme.FP8_BLOCK:
        forms.append(Form(scheme=scheme, scale_format=ScaleFormat.UE8M0))
    if scheme in _STATIC:
        forms.append(Form(scheme=scheme, static_input=True))
    if scheme is WeightScheme.W8A8:
        forms.append(Form(scheme=scheme, static_input=True, asymmetric=True))
    return tuple(forms)


FORMS: Final[Mapping[WeightScheme, tuple[Form, ...]]] = MappingProxyType(
    {scheme: _forms(scheme) for scheme in WeightScheme}
)
"""Every form of each scheme, the plainest first."""


def draw_weight(
    form: Form,
    rows: int,
    columns: int,
    *,
    part_sizes: tuple[float, ...] = (1.0,),
    leading: tuple[int, ...] = (),
    seed: int = 0,
    float_dtype: torch.dtype = torch.float32,
) -> StoredWeight:
    """``[*leading, rows, columns]``, any value a byte can hold.

    Its numbers are about one over the root of the columns, so that results are about as large as
    rows are, times the size of their part.
    """
    num_parts = len(part_sizes)
    draw = _Draw(seed, leading)
    size = columns**-0.5
    parts = torch.tensor(part_sizes)
    of_rows = parts.repeat_interleave(rows // num_parts).unsqueeze(1)
    scale: torch.Tensor | None = None
    global_scale: torch.Tensor | None = None
    match form.scheme:
        case WeightScheme.FLOAT:
            weight = (draw.normal(rows, columns) * size * of_rows).to(float_dtype)
        case WeightScheme.FP8_BLOCK:
            weight = (draw.normal(rows, columns) * 100).to(torch.float8_e4m3fn)
            blocks = -(-rows // num_parts // 128)
            scale = draw.positive(num_parts * blocks, -(-columns // 128), size=size / 100)
            scale = scale * parts.repeat_interleave(blocks).unsqueeze(1)
            if form.scale_format is ScaleFormat.UE8M0:
                scale = torch.exp2(scale.log2().round())
        case WeightScheme.W8A8:
            weight = draw.integers(-128, 128, rows, columns).to(torch.int8)
            scale = draw.positive(rows, 1, size=size / 64) * of_rows
        case WeightScheme.W4A8 | WeightScheme.W4A4 | WeightScheme.W4A16:
            weight = draw.integers(-(2**31), 2**31, rows, columns // 8).to(torch.int32)
            scale = draw.positive(rows, form.num_groups(columns), size=size / 4) * of_rows
        case WeightScheme.NVFP4:
            weight = draw.integers(0, 256, rows, columns // 2).to(torch.uint8)
            scale = draw.positive(rows, columns // 16, size=10.0).to(torch.float8_e4m3fn)
            global_scale = draw.positive(num_parts, size=size / 20) * parts
        case _:
            assert_never(form.scheme)
    return StoredWeight(
        scheme=form.scheme,
        weight=weight,
        scale=scale,
        global_scale=global_scale,
        input_scale=draw.positive(num_parts, size=_input_size(form)) if form.static_input else None,
        input_offset=draw.integers(-20, 20, num_parts).float() if form.asymmetric else None,
        num_parts=num_parts,
        scale_format=form.scale_format,
    )


def _input_size(form: Form) -> float:
    """A scale that makes normal rows fill the range."""
    return 4 / 2688 if form.scheme is WeightScheme.NVFP4 else 3 / 127


def draw_rows(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Normal numbers ``[rows, columns]``."""
    return _Draw(seed, ()).normal(rows, columns).to(dtype)


class _Draw:
    def __init__(self, seed: int, leading: tuple[int, ...]) -> None:
        self.generator, self.leading = torch.Generator().manual_seed(seed), leading

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*self.leading, *shape, generator=self.generator)

    def integers(self, low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, (*self.leading, *shape), generator=self.generator)

    def positive(self, *shape: int, size: float) -> torch.Tensor:
        """Between half of ``size`` and one and a half."""
        return size * (0.5 + torch.rand(*self.leading, *shape, generator=self.generator))
