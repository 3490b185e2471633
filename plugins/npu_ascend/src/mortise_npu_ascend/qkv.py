"""The split of gated delta net projections: a Triton program where there is one to run."""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any, Final, Protocol

import torch

from mortise.plugin import QKVLayout, QKVParts
from mortise.reference import qkv as reference
from mortise_npu_ascend.emulator import triton_launch
from mortise_npu_ascend.qkv_plan import fits, split_plan

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mortise.plugin import QKVShape
    from mortise_npu_ascend.vendor import Vendor

TRITON: Final = "triton-ascend"
DTYPES: Final = frozenset({torch.bfloat16, torch.float16, torch.float32})
EMULATED_CORES: Final = 48
"""Stands for the vector units of an emulated chip; chips of one generation differ in theirs."""


class Launcher(Protocol):
    """Runs the one program of this module on a grid of one axis."""

    def __call__(
        self, programs: int, arguments: Sequence[Any], constants: Mapping[str, int]
    ) -> None:
        """Start so many programs with these arguments."""
        ...


class QKVSplitter:
    """``qkv_split`` of one backend.

    Args:
        launcher: runs the program; None splits by torch's operators.
        num_cores: cores that run such programs.
    """

    def __init__(self, launcher: Launcher | None, num_cores: int) -> None:
        self._launcher = launcher
        self._num_cores = num_cores

    @classmethod
    def of(cls, vendor: Vendor, *, use_triton: bool = True) -> QKVSplitter:
        """For one device: by the program on an emulated one, and where triton-ascend is installed.

        Args:
            vendor: the operators and their device.
            use_triton: False always splits by torch's operators.
        """
        if not use_triton:
            return cls(None, 1)
        if vendor.emulated:
            return cls(_launch_emulated, EMULATED_CORES)
        if not _is_installed():
            return cls(None, 1)
        limits = vendor.torch_npu.npu.get_device_limit(vendor.device.index)
        return cls(_compiled(), int(limits["vector_core_num"]))

    def split(
        self, projected_qkvz: torch.Tensor, projected_ba: torch.Tensor, shape: QKVShape
    ) -> QKVParts:
        """Cut the projections along their layout.

        What the program does not take, the exact reference does by torch's operators, which start
        as many programs as they like: other dtypes, and heads wider than a block.
        """
        if self._launcher is None or not fits(shape) or projected_qkvz.dtype not in DTYPES:
            return reference.qkv_split(projected_qkvz, projected_ba, shape)
        return _split(projected_qkvz, projected_ba, shape, self._launcher, self._num_cores)


def _split(
    qkvz: torch.Tensor, ba: torch.Tensor, shape: QKVShape, launcher: Launcher, num_cores: int
) -> QKVParts:
    qkvz, ba = _with_dense_rows(qkvz), _with_dense_rows(ba)
    num_tokens, ratio = qkvz.shape[0], shape.num_value_heads // shape.num_key_heads
    values = shape.num_value_heads * shape.value_head_dim
    parts = QKVParts(
        mixed_qkv=qkvz.new_empty(num_tokens, qkvz.shape[1] - values),
        z=qkvz.new_empty(num_tokens, shape.num_value_heads, shape.value_head_dim),
        b=ba.new_empty(num_tokens, shape.num_value_heads),
        a=ba.new_empty(num_tokens, shape.num_value_heads),
    )
    # One row may have any stride.
    strides = [max(one.stride(0), one.shape[1]) for one in (qkvz, ba)]
    plan = split_plan(num_tokens, shape, max(strides), num_cores)
    constants = {
        "QKVZ_STRIDE": strides[0],
        "BA_STRIDE": strides[1],
        "KEY_HEADS": shape.num_key_heads,
        "RATIO": ratio,
        "KEY_DIM": shape.key_head_dim,
        "VALUES": ratio * shape.value_head_dim,
        "INTERLEAVED": int(shape.layout is QKVLayout.INTERLEAVED),
        "BLOCK_TOKENS": plan.block_tokens,
        "KEY_BLOCK": plan.key_block,
        "VALUE_BLOCK": plan.value_block,
        "HEAD_BLOCK": plan.head_block,
    }
    tensors = (qkvz, ba, parts.mixed_qkv, parts.z, parts.b, parts.a)
    for launch in plan.launches:
        tokens = slice(launch.first_token, launch.first_token + launch.num_tokens)
        arguments = [*(one[tokens] for one in tensors), launch.num_tokens]
        launcher(launch.programs, arguments, constants)
    return parts


def _with_dense_rows(projected: torch.Tensor) -> torch.Tensor:
    """Rows may be apart, and none before another; columns may not be apart."""
    is_dense = projected.stride(1) == 1 and projected.stride(0) >= projected.shape[1]
    return projected if is_dense else projected.contiguous()


def _launch_emulated(programs: int, arguments: Sequence[Any], constants: Mapping[str, int]) -> None:
    from mortise_npu_ascend.qkv_kernel import split_kernel

    triton_launch.launch(split_kernel, (programs,), arguments, constants)


def _compiled() -> Launcher:
    """The program, compiled by Triton when it is first run."""
    from mortise_npu_ascend.qkv_kernel import split_kernel

    program = importlib.import_module("triton").jit(split_kernel)

    def launch(programs: int, arguments: Sequence[Any], constants: Mapping[str, int]) -> None:
        program[(programs,)](*arguments, **constants)

    return launch


def _is_installed() -> bool:
    try:
        importlib.metadata.version(TRITON)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
