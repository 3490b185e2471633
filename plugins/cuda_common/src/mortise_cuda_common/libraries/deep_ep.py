"""DeepEP's V1 buffers: whether the library is there and is the one that is called here."""

# The only module that imports ``deep_ep``. Importing it, and making a buffer, writes variables of
# this process (``NVSHMEM_*``; the library's own ``persistent_envs``): so neither is done before
# several ranks exchange rows through it.

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import torch

from mortise.plugin import BackendUnusableError, ReasonCode

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch.distributed as dist

    from mortise_cuda_common.chip import Chip

LIBRARY: Final = "deep_ep"
SOURCE: Final = "github.com/deepseek-ai/DeepEP"
DISTRIBUTIONS: Final = ("deep-ep", "sgl-deep-ep")
PLACEHOLDER: Final = "1.0.0"
"""The version of ``deep-ep`` in the package index, which holds no library."""

_INSTALL: Final = f"build DeepEP of {SOURCE} for this torch and CUDA, v1.2.1 or later"
_OTHERWISE: Final = 'or set option exchange of the backend to "portable"'

CALLED: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "__init__": (
            "group",
            "num_nvl_bytes",
            "num_rdma_bytes",
            "low_latency_mode",
            "num_qps_per_rank",
        ),
        "get_dispatch_config": ("num_ranks",),
        "get_combine_config": ("num_ranks",),
        "get_low_latency_rdma_size_hint": (
            "num_max_dispatch_tokens_per_rank",
            "hidden",
            "num_ranks",
            "num_experts",
        ),
        "get_dispatch_layout": ("topk_idx", "num_experts"),
        "dispatch": (
            "x",
            "num_tokens_per_rank",
            "num_tokens_per_rdma_rank",
            "is_token_in_rank",
            "num_tokens_per_expert",
            "topk_idx",
            "topk_weights",
            "expert_alignment",
        ),
        "combine": ("x", "handle"),
        "clean_low_latency_buffer": (
            "num_max_dispatch_tokens_per_rank",
            "hidden",
            "num_experts",
        ),
        "low_latency_dispatch": (
            "x",
            "topk_idx",
            "num_max_dispatch_tokens_per_rank",
            "num_experts",
            "use_fp8",
            "round_scale",
            "use_ue8m0",
            "async_finish",
            "return_recv_hook",
        ),
        "low_latency_combine": (
            "x",
            "topk_idx",
            "topk_weights",
            "handle",
            "async_finish",
            "return_recv_hook",
        ),
    }
)
"""Methods of ``Buffer`` that are called here, and the arguments that they are given by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BufferSize:
    """Memory of one buffer.

    Args:
        nvlink_bytes: of normal exchanges within a machine.
        rdma_bytes: of low-latency exchanges, and of normal ones between machines.
        low_latency: whether low-latency exchanges go through it.
        num_queue_pairs: of each rank.
    """

    nvlink_bytes: int = 0
    rdma_bytes: int = 0
    low_latency: bool = False
    num_queue_pairs: int = 24


@dataclass(frozen=True, slots=True)
class DeepEP:
    """The library, checked.

    Args:
        module: ``deep_ep``, or what stands in for it.
        version: of it.
    """

    module: Any
    version: str

    @classmethod
    def load(cls) -> DeepEP:
        """Import the library.

        Raises:
            BackendUnusableError: it is missing, cannot be imported, or is another than is called
                here.
        """
        version = require_installed()
        try:
            module = importlib.import_module(LIBRARY)
        except Exception as error:
            raise BackendUnusableError(
                f"{LIBRARY} {version} cannot be imported: {type(error).__name__}:"
                f" {' '.join(str(error).split())}",
                reason=ReasonCode.IMPORT_FAILED,
                remedy=f"{_INSTALL}, uninstall it, {_OTHERWISE}",
            ) from error
        return cls.of(module, str(getattr(module, "__version__", version)))

    @classmethod
    def of(cls, module: Any, version: str) -> DeepEP:
        """Check what was imported.

        Raises:
            BackendUnusableError: it has not the buffers that are called here.
        """
        problem = _problem(module)
        if problem is not None:
            raise BackendUnusableError(
                f"{LIBRARY} {version} {problem}",
                reason=ReasonCode.IMPORT_FAILED,
                expected="the class Buffer of v1.2.1",
                remedy=f"{_INSTALL}, {_OTHERWISE}",
            )
        return cls(module, version)

    @classmethod
    def emulated(cls, chip: Chip, queue_depth: int) -> DeepEP:
        """The stand-in of one chip; it passes the check as the library does."""
        from mortise_cuda_common.emulator.deep_ep import EmulatedDeepEP

        return cls.of(EmulatedDeepEP(chip, queue_depth=queue_depth), EmulatedDeepEP.__version__)

    @property
    def id_dtype(self) -> torch.dtype:
        """The dtype of experts' numbers; a build may have them in 32 bits."""
        dtype: torch.dtype = getattr(self.module, "topk_idx_t", torch.int64)
        return dtype

    def normal_size(self, hidden_size: int, world_size: int) -> BufferSize:
        """Memory for normal exchanges of bfloat16 rows; no format that is carried is wider.

        Raises:
            BackendUnusableError: the library has no tables for so many ranks.
        """
        buffer = self.module.Buffer
        try:
            configs = buffer.get_dispatch_config(world_size), buffer.get_combine_config(world_size)
        except AssertionError as error:
            raise BackendUnusableError(
                f"{LIBRARY} {self.version}: {error}",
                reason=ReasonCode.REQUEST_UNSUPPORTED,
                remedy="start another number of processes, or install a later DeepEP",
            ) from error
        row_bytes = hidden_size * torch.bfloat16.itemsize
        return BufferSize(
            nvlink_bytes=max(
                one.get_nvl_buffer_size_hint(row_bytes, world_size) for one in configs
            ),
            rdma_bytes=max(one.get_rdma_buffer_size_hint(row_bytes, world_size) for one in configs),
            num_queue_pairs=buffer.num_sms,
        )

    def low_latency_size(
        self, max_tokens: int, hidden_size: int, world_size: int, num_experts: int
    ) -> BufferSize:
        """Memory for low-latency exchanges, and a queue pair for each expert of a rank."""
        hint = self.module.Buffer.get_low_latency_rdma_size_hint(
            max_tokens, hidden_size, world_size, num_experts
        )
        return BufferSize(
            rdma_bytes=hint, low_latency=True, num_queue_pairs=num_experts // world_size
        )

    def open(self, group: dist.ProcessGroup, size: BufferSize) -> Any:
        """Make a buffer; every rank of the group calls this.

        Raises:
            BackendUnusableError: the library cannot.
        """
        try:
            return self.module.Buffer(
                group,
                num_nvl_bytes=size.nvlink_bytes,
                num_rdma_bytes=size.rdma_bytes,
                low_latency_mode=size.low_latency,
                num_qps_per_rank=size.num_queue_pairs,
            )
        except Exception as error:
            raise BackendUnusableError(
                f"{LIBRARY} {self.version} cannot open a buffer: {type(error).__name__}:"
                f" {' '.join(str(error).split())}",
                reason=ReasonCode.CREATE_FAILED,
                details=[
                    f"asked for: {size.nvlink_bytes} bytes over NVLink, {size.rdma_bytes} over RDMA"
                ],
                remedy="see that NVLink connects the GPUs of a machine (nvidia-smi topo -m) and"
                f" that their memory has room, {_OTHERWISE}",
            ) from error


def require_installed() -> str:
    """Look for the library without importing it.

    Returns:
        Its version, or ``of unknown version``.

    Raises:
        BackendUnusableError: it is not there, or what is there is an empty placeholder.
    """
    version = _installed_version()
    if version == PLACEHOLDER:
        raise BackendUnusableError(
            f"deep-ep {PLACEHOLDER} of the package index is a placeholder without the library",
            reason=ReasonCode.IMPORT_FAILED,
            remedy=f"uninstall it and {_INSTALL}",
        )
    if importlib.util.find_spec(LIBRARY) is not None:
        return version or "of unknown version"
    raise BackendUnusableError(
        f"{LIBRARY} is not installed", reason=ReasonCode.IMPORT_FAILED, remedy=_INSTALL
    )


def _installed_version() -> str | None:
    for name in DISTRIBUTIONS:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _problem(module: Any) -> str | None:
    """What is missing from the module; None where nothing is."""
    buffer = getattr(module, "Buffer", None)
    if buffer is None:
        if hasattr(module, "ElasticBuffer"):
            return "has ElasticBuffer alone: it is built without the class Buffer of V1"
        return "has no class Buffer"
    for method, arguments in CALLED.items():
        function = getattr(buffer, method, None)
        if function is None:
            return f"has no Buffer.{method}"
        found = inspect.signature(function).parameters
        missing = [name for name in arguments if name not in found]
        if missing:
            return f"has a Buffer.{method} without {', '.join(missing)}"
    return None
