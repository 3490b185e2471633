"""How many programs split how many tokens of what shape, in which blocks."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from mortise.plugin import QKVLayout, QKVShape
from mortise_cuda_common.chip import Architecture
from mortise_cuda_common.kernels.qkv_kernel import split_kernel
from mortise_cuda_common.programs.base import CompileCase

if TYPE_CHECKING:
    from collections.abc import Mapping

NUM_WARPS: Final = 4
BLOCK_BYTES: Final = 16 * 1024
"""What one program copies, about: some accesses of 16 bytes for each of its threads at a time."""
MOST_TOKENS: Final = 64
MOST_COLUMNS: Final = 1024
LEAST_COLUMNS: Final = 64
"""Blocks that leave nothing over are no narrower: a warp copies 512 bytes at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitPlan:
    """How tokens of one shape are split; it does not depend on how many there are.

    Args:
        key_heads: programs of each block of tokens.
        constants: the program's.
    """

    key_heads: int
    constants: Mapping[str, int]

    def programs(self, num_tokens: int) -> int:
        """Programs for so many tokens, each with one block of tokens of one key head."""
        return -(-num_tokens // self.constants["BLOCK_TOKENS"]) * self.key_heads


def split_plan(shape: QKVShape, itemsize: int) -> SplitPlan:
    """Plan the split of one shape.

    Args:
        shape: heads and head sizes; any of them.
        itemsize: bytes of one number.
    """
    ratio = shape.num_value_heads // shape.num_key_heads
    values = ratio * shape.value_head_dim
    token_bytes = 2 * (shape.key_head_dim + values) * itemsize
    block_tokens = 1 << (max(1, BLOCK_BYTES // token_bytes).bit_length() - 1)
    constants = {
        "KEY_HEADS": shape.num_key_heads,
        "RATIO": ratio,
        "KEY_DIM": shape.key_head_dim,
        "VALUES": values,
        "INTERLEAVED": int(shape.layout is QKVLayout.INTERLEAVED),
        "BLOCK_TOKENS": min(MOST_TOKENS, block_tokens),
        "KEY_BLOCK": _power_of_two(shape.key_head_dim),
        "VALUE_BLOCK": value_columns(values),
        "HEAD_BLOCK": _power_of_two(shape.num_value_heads),
    }
    return SplitPlan(key_heads=shape.num_key_heads, constants=MappingProxyType(constants))


def value_columns(columns: int) -> int:
    """Values of a block: as many as leave nothing over where there are such, else one for all."""
    whole = columns & -columns
    return min(MOST_COLUMNS, whole if whole >= LEAST_COLUMNS else _power_of_two(columns))


def _power_of_two(number: int) -> int:
    """The smallest power of two that is not less."""
    return 1 << (number - 1).bit_length()


def _case(
    layout: QKVLayout, triton_dtype: str, key_heads: int, ratio: int, value_dim: int = 128
) -> CompileCase:
    shape = QKVShape(
        num_key_heads=key_heads,
        num_value_heads=key_heads * ratio,
        key_head_dim=128,
        value_head_dim=value_dim,
        layout=layout,
    )
    names = ("qkvz", "ba", "mixed", "gates", "betas", "alphas")
    numbers = {"num_tokens": "i32", "qkvz_stride": "i32", "ba_stride": "i32"}
    sixteen_bytes = r"(?s)ld\.global\.v4\.b32.*st\.global\.v4\.b32"
    return CompileCase(
        name=f"split of {layout.value} {triton_dtype} of {key_heads} key heads with {ratio} value"
        f" heads x {value_dim} each",
        source=split_kernel,
        signature={**dict.fromkeys(names, f"*{triton_dtype}"), **numbers},
        constants=split_plan(shape, 4 if triton_dtype == "fp32" else 2).constants,
        architectures=tuple(Architecture),
        num_warps=NUM_WARPS,
        instructions=MappingProxyType(dict.fromkeys(Architecture, sixteen_bytes)),
        divisible_by_16=(*names, "qkvz_stride", "ba_stride"),
    )


CASES: Final = (
    # Qwen3-Next.
    _case(QKVLayout.INTERLEAVED, "bf16", 16, 2),
    _case(QKVLayout.CONTIGUOUS, "bf16", 16, 2),
    _case(QKVLayout.INTERLEAVED, "bf16", 16, 3),
    _case(QKVLayout.INTERLEAVED, "fp16", 1, 16),
    _case(QKVLayout.CONTIGUOUS, "fp32", 4, 8),
)
