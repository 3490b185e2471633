"""DeepGEMM's functions under whatever names an installed version gives them."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, fields
from threading import Lock
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import torch
from packaging.version import InvalidVersion, Version

from mortise.plugin import BackendUnusableError, ReasonCode

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

NAMES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "alignment": (
            "get_mk_alignment_for_contiguous_layout",
            "get_m_alignment_for_contiguous_layout",
        ),
        "num_sms": ("get_num_sms",),
        "fp8_linear": ("fp8_gemm_nt", "fp8_fp4_gemm_nt"),
        "fp8_contiguous": (
            "m_grouped_fp8_gemm_nt_contiguous",
            "m_grouped_fp8_fp4_gemm_nt_contiguous",
        ),
        "fp8_masked": (
            "m_grouped_fp8_gemm_nt_masked",
            "m_grouped_fp8_fp4_gemm_nt_masked",
            "fp8_m_grouped_gemm_nt_masked",
        ),
        "bf16_contiguous": ("m_grouped_bf16_gemm_nt_contiguous",),
        "bf16_masked": ("m_grouped_bf16_gemm_nt_masked", "bf16_m_grouped_gemm_nt_masked"),
        "tma_aligned": ("get_mn_major_tma_aligned_tensor",),
        "transform_scales": ("transform_sf_into_required_layout",),
    }
)
"""What is called here, and its names by preference: the fork lacks some that the library has."""

PAGED_NAMES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "paged_metadata": ("get_paged_mqa_logits_metadata",),
        "paged_logits": ("fp8_paged_mqa_logits",),
    }
)
"""What the indexer calls besides; a library without them can multiply all the same."""

TWO_DIMENSIONS: Final = ("2.4.2", "2.8")
"""Versions that take lengths ``[rows, next_n]`` and give a row's logits in its own columns."""

TWO_DIMENSIONS_OF_THE_FORK: Final = ("0.1.0", "0.2.3")
"""The fork counts by itself."""

ANY_NEXT_N: Final = "2.5"
ANY_NEXT_N_OF_THE_FORK: Final = "0.1.5"


@dataclass(frozen=True, slots=True, kw_only=True)
class Functions:
    """The functions that are called, each by position alone: names of parameters have changed.

    One thread at a time is in any of them. The fork is called through apache-tvm-ffi, which lets
    other threads of Python run meanwhile, and neither library guards what it keeps of the kernels
    that it compiled (``csrc/jit/cache.hpp``). They launch on the current stream of the GPU that is
    the thread's current one, wherever the tensors are: here that is the role's.
    """

    alignment: Callable[..., Any]
    num_sms: Callable[..., Any]
    fp8_linear: Callable[..., Any]
    fp8_contiguous: Callable[..., Any]
    fp8_masked: Callable[..., Any]
    bf16_contiguous: Callable[..., Any]
    bf16_masked: Callable[..., Any]
    tma_aligned: Callable[..., Any]
    transform_scales: Callable[..., Any]
    paged_metadata: Callable[..., Any] | None = None
    paged_logits: Callable[..., Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """What one library answers to.

    Args:
        functions: found.
        rows: each purpose with the name that answers to it, ``-`` where none does.
        no_paged_mqa: why its paged scores are not used; empty if they are.
        takes_any_next_n: whether SM100 takes any number of query rows of a request.
    """

    functions: Functions
    rows: tuple[tuple[str, str], ...]
    no_paged_mqa: str
    takes_any_next_n: bool


def resolve(library: Any, version: str, device: torch.device | None = None) -> Resolved:
    """Find every function.

    Args:
        library: the module, or what stands in for it.
        version: of it.
        device: the GPU that it launches on.

    Raises:
        BackendUnusableError: it lacks a product or a layout under all names that are known.
    """
    found = {purpose: _find(library, names) for purpose, names in {**NAMES, **PAGED_NAMES}.items()}
    missing = [purpose for purpose in NAMES if found[purpose] is None]
    if missing:
        wanted = "; ".join(f"{purpose}: {' or '.join(NAMES[purpose])}" for purpose in missing)
        raise BackendUnusableError(
            f"deep_gemm {version} has no function for {', '.join(missing)}",
            reason=ReasonCode.IMPORT_FAILED,
            expected=wanted,
            remedy='pip install "sgl-deep-gemm==0.1.5.post1"',
        )
    refusal, any_next_n = _of_version(version)
    lacking = [names[0] for purpose, names in PAGED_NAMES.items() if found[purpose] is None]
    if lacking:
        refusal = f"deep_gemm {version} has no {' and no '.join(lacking)}"
    chosen = {field.name: found[field.name] for field in fields(Functions)}
    lock = Lock()
    called = {name: pair[1] for name, pair in chosen.items() if pair is not None}
    return Resolved(
        functions=Functions(**{name: _guarded(one, lock, device) for name, one in called.items()}),
        rows=tuple((name, "-" if pair is None else pair[0]) for name, pair in chosen.items()),
        no_paged_mqa=refusal,
        takes_any_next_n=any_next_n,
    )


def _find(library: Any, names: tuple[str, ...]) -> tuple[str, Callable[..., Any]] | None:
    for name in names:
        function = getattr(library, name, None)
        if function is not None:
            return name, function
    return None


def _guarded(
    function: Callable[..., Any], lock: Lock, device: torch.device | None
) -> Callable[..., Any]:
    """The function on its device, which waits for threads that are in one with the same lock."""
    is_gpu = device is not None and device.type == "cuda"

    def call(*arguments: Any) -> Any:
        with lock, torch.cuda.device(device) if is_gpu else nullcontext():
            return function(*arguments)

    return call


def _of_version(version: str) -> tuple[str, bool]:
    """Why paged scores of a version are not used, and whether it takes any ``next_n``.

    Names alone do not tell: the same function took lengths in one dimension, then in either, then
    in two alone.
    """
    try:
        number = Version(version)
    except InvalidVersion:
        return f"the version of deep_gemm, {version!r}, does not tell how it takes lengths", False
    is_fork = number.major == 0
    first, behind = TWO_DIMENSIONS_OF_THE_FORK if is_fork else TWO_DIMENSIONS
    if number < Version(first):
        said = (
            f"deep_gemm {version} is older than {first}, the first with lengths of two dimensions"
        )
        return said, False
    if Version(number.base_version) >= Version(behind):
        return f"deep_gemm {version} gives compressed logits, as all do from {behind} on", False
    return "", number >= Version(ANY_NEXT_N_OF_THE_FORK if is_fork else ANY_NEXT_N)
