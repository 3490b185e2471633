"""Every launch of the programs waits for nothing, and is one that was compiled ahead of time."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import pytest
import torch

from mortise.plugin import ScaleFormat
from mortise_cuda_common.groups import Groups
from mortise_cuda_common.kernels import (
    fp8_grouped,
    fp8_rows,
    int4_grouped,
    permutation,
    plain_grouped,
    swiglu,
)
from mortise_cuda_common.programs.base import Programs
from mortise_cuda_common.rows import Kind, Rows

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

MODULES = (fp8_grouped, fp8_rows, int4_grouped, permutation, plain_grouped, swiglu)
CASES = [case for module in MODULES for case in module.CASES]
BF16 = torch.bfloat16
E4M3 = torch.float8_e4m3fn
TRITON = {
    BF16: "*bf16",
    E4M3: "*fp8e4nv",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


class Recorded(Programs):
    """Runs nothing, and remembers what it was asked to."""

    __slots__ = ("launches",)

    def __init__(self) -> None:
        self.launches: list[tuple[Callable[..., None], list[str], set[str]]] = []

    def launch(
        self,
        source: Callable[..., None],
        grid: int,
        arguments: Sequence[Any],
        constants: Mapping[str, int | float | bool],
        *,
        num_warps: int = 4,
        num_stages: int = 3,
    ) -> None:
        kinds = [TRITON[one.dtype] if torch.is_tensor(one) else "i32" for one in arguments]
        self.launches.append((source, kinds, set(constants)))
        assert grid > 0

    def warm(self, *_: Any, **__: Any) -> None:
        raise AssertionError("nothing is warmed")


def nowhere(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    """A tensor without numbers: whoever asks for one fails, as whoever waits for a device would."""
    return torch.empty(shape, dtype=dtype, device="meta")


GROUPS = Groups(
    first_rows=nowhere(4, dtype=torch.int32), counts=nowhere(4, dtype=torch.int32), num_rows=96
)
ROWS = Rows(
    values=nowhere(96, 256, dtype=E4M3),
    kind=Kind.FP8,
    scales=nowhere(2, 96, dtype=torch.float32).T,
)
FP8_WEIGHT = (nowhere(4, 512, 256, dtype=E4M3), nowhere(4, 4, 2, dtype=torch.float32))
INT4_WEIGHT = (nowhere(4, 512, 32, dtype=torch.int32), nowhere(4, 512, 2, dtype=torch.float32))
IDS = nowhere(12, 8, dtype=torch.int64)
ROW_OF = nowhere(12, 8, dtype=torch.int32)

CALLS: dict[str, Callable[[Programs], object]] = {
    "fp8_product": lambda run: fp8_grouped.fp8_product(run, ROWS, *FP8_WEIGHT, GROUPS, BF16),
    **{
        f"fp8_gate_up {then}": lambda run, then=then: fp8_grouped.fp8_gate_up(
            run, ROWS, *FP8_WEIGHT, GROUPS, then
        )
        for then in (None, ScaleFormat.FLOAT32, ScaleFormat.UE8M0)
    },
    "plain_product": lambda run: plain_grouped.plain_product(
        run, nowhere(96, 256), nowhere(4, 512, 256), GROUPS, BF16
    ),
    "plain_gate_up": lambda run: plain_grouped.plain_gate_up(
        run, nowhere(96, 256), nowhere(4, 512, 256), GROUPS, BF16
    ),
    "int4_product": lambda run: int4_grouped.int4_product(
        run, nowhere(96, 256), *INT4_WEIGHT, GROUPS, BF16
    ),
    "int4_gate_up": lambda run: int4_grouped.int4_gate_up(
        run, nowhere(96, 256), *INT4_WEIGHT, GROUPS, BF16
    ),
    "quantise_rows": lambda run: fp8_rows.quantise_rows(
        run, nowhere(96, 256), GROUPS, ScaleFormat.FLOAT32
    ),
    "swiglu": lambda run: swiglu.swiglu(run, nowhere(96, 512), GROUPS),
    "swiglu_quantise": lambda run: swiglu.swiglu_quantise(
        run, nowhere(96, 512), GROUPS, ScaleFormat.UE8M0
    ),
    **{
        f"permute {scale_format}": lambda run, scale_format=scale_format: permutation.permute(
            run, nowhere(12, 256), IDS, 4, 128, scale_format
        )
        for scale_format in (None, ScaleFormat.FLOAT32)
    },
    "unpermute": lambda run: permutation.unpermute(
        run, nowhere(96, 256), ROW_OF, nowhere(12, 8, dtype=torch.float32)
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_launch_is_one_that_was_compiled(name: str) -> None:
    programs = Recorded()
    CALLS[name](programs)
    assert programs.launches
    for source, kinds, constants in programs.launches:
        parameters = list(inspect.signature(source).parameters)
        assert set(parameters[len(kinds) :]) == constants
        compiled = [
            [case.signature[parameter] for parameter in parameters[: len(kinds)]]
            for case in CASES
            if case.source is source and set(case.constants) == constants
        ]
        assert kinds in compiled


def test_every_program_is_launched_by_one_of_them() -> None:
    programs = Recorded()
    for call in CALLS.values():
        call(programs)
    assert {source for source, _, _ in programs.launches} == {case.source for case in CASES}
