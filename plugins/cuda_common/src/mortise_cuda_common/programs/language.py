"""The part of ``triton.language`` that Mortise's programs are written in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from mortise_cuda_common.programs import blocks, dtypes, products
from mortise_cuda_common.programs.integers import Integers
from mortise_cuda_common.programs.memory import Memory
from mortise_cuda_common.programs.scalars import Int32

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mortise_cuda_common.programs.together import Writes


class Language:
    """What a program finds under the name ``tl``.

    Everything is computed by torch as a chip computes it, rounded in the same places, but for the
    order of sums within one operation and for chips' approximations (exp2, division, sigmoid).

    Args:
        places: of programs that run at once on the one axis of their grid.
        grid: programs on that axis.
        writes: keeps what several programs write; None for one.
    """

    __slots__ = ("_grid", "_place", "atomic_add", "load", "store")

    def __init__(self, places: Sequence[int], grid: int, writes: Writes | None) -> None:
        self._place = (
            Int32(places[0])
            if len(places) == 1
            else Integers(torch.tensor(places, dtype=torch.int64), dtypes.int32)
        )
        self._grid = Int32(grid)
        memory = Memory(writes)
        self.load = memory.load
        self.store = memory.store
        self.atomic_add = memory.atomic_add

    def program_id(self, axis: int) -> Int32 | Integers:
        """Place of this program in the grid."""
        return self._place if axis == 0 else Int32(0)

    def num_programs(self, axis: int) -> Int32:
        """Programs along one axis of the grid."""
        return self._grid if axis == 0 else Int32(1)

    int1 = dtypes.int1
    int8 = dtypes.int8
    int16 = dtypes.int16
    int32 = dtypes.int32
    int64 = dtypes.int64
    uint8 = dtypes.uint8
    uint16 = dtypes.uint16
    uint32 = dtypes.uint32
    float8e4nv = dtypes.float8e4nv
    float8e5 = dtypes.float8e5
    float16 = dtypes.float16
    bfloat16 = dtypes.bfloat16
    float32 = dtypes.float32
    float64 = dtypes.float64

    dot = staticmethod(products.dot)
    dot_scaled = staticmethod(products.dot_scaled)

    arange = staticmethod(blocks.arange)
    full = staticmethod(blocks.full)
    zeros = staticmethod(blocks.zeros)
    cast = staticmethod(blocks.cast)
    where = staticmethod(blocks.where)
    maximum = staticmethod(blocks.maximum)
    minimum = staticmethod(blocks.minimum)
    clamp = staticmethod(blocks.clamp)
    trans = staticmethod(blocks.trans)
    permute = staticmethod(blocks.permute)
    reshape = staticmethod(blocks.reshape)
    expand_dims = staticmethod(blocks.expand_dims)
    broadcast_to = staticmethod(blocks.broadcast_to)
    join = staticmethod(blocks.join)
    split = staticmethod(blocks.split)
    interleave = staticmethod(blocks.interleave)
    sum = staticmethod(blocks.block_sum)
    cumsum = staticmethod(blocks.cumsum)
    max = staticmethod(blocks.block_max)
    min = staticmethod(blocks.block_min)
    argmax = staticmethod(blocks.argmax)
    abs = staticmethod(blocks.size_of)
    exp = staticmethod(blocks.exp)
    exp2 = staticmethod(blocks.exp2)
    log = staticmethod(blocks.log)
    log2 = staticmethod(blocks.log2)
    sqrt = staticmethod(blocks.sqrt)
    rsqrt = staticmethod(blocks.rsqrt)
    floor = staticmethod(blocks.floor)
    ceil = staticmethod(blocks.ceil)
    sigmoid = staticmethod(blocks.sigmoid)
    div_rn = staticmethod(blocks.div_rn)
    cdiv = staticmethod(blocks.cdiv)

    static_range = staticmethod(range)
    range = staticmethod(blocks.loop)

    @staticmethod
    def constexpr(value: Any) -> Any:
        """A constant of compilation, which is the value itself."""
        return value

    @staticmethod
    def multiple_of(value: Any, values: Any) -> Any:  # noqa: ARG004 - Triton's name
        """A hint for the compiler: the value itself."""
        return value

    max_contiguous = multiple_of

    @staticmethod
    def assume(condition: Any) -> None:
        """A hint for the compiler, which must be true.

        Raises:
            AssertionError: it is not.
        """
        assert condition, "a Triton program assumes what does not hold"

    @staticmethod
    def static_assert(condition: Any, message: str = "") -> None:
        """What must hold when a program is compiled."""
        assert condition, message

    @staticmethod
    def debug_barrier() -> None:
        """Threads of one program wait for each other: there is one here."""
