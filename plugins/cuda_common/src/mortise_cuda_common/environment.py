"""What the vendor's libraries read in the environment, read in this one place."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

CUDA_HOME: Final = "CUDA_HOME"
CUDA_PATH: Final = "CUDA_PATH"
SEARCH_PATH: Final = "PATH"
USE_NVRTC: Final = "DG_JIT_USE_NVRTC"
CACHE_FOLDER: Final = "DG_JIT_CACHE_DIR"
QUEUE_DEPTH: Final = "NVSHMEM_QP_DEPTH"
VARIABLES: Final = (CUDA_HOME, CUDA_PATH, SEARCH_PATH, USE_NVRTC, CACHE_FOLDER, QUEUE_DEPTH)
"""All that are read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VendorEnvironment:
    """Variables as the vendor's libraries find them; none is ever written, None is not set.

    Args:
        cuda_home: folder of the CUDA toolkit.
        cuda_path: the same, looked at after ``cuda_home``.
        search_path: folders of programs, in which ``nvcc`` may be.
        use_nvrtc: makes DeepGEMM compile without ``nvcc`` where it is ``1``.
        cache_folder: where DeepGEMM keeps what it compiled.
        queue_depth: work requests that a queue pair of NVSHMEM holds; DeepEP's low-latency
            exchange wants two for each token of a rank, and two more.
    """

    cuda_home: str | None = None
    cuda_path: str | None = None
    search_path: str | None = None
    use_nvrtc: str | None = None
    cache_folder: str | None = None
    queue_depth: str | None = None

    @property
    def compiles_without_nvcc(self) -> bool:
        """Whether DeepGEMM compiles by NVRTC."""
        return self.use_nvrtc not in (None, "0")


def read_environment(environ: Mapping[str, str] = os.environ) -> VendorEnvironment:
    """Read every variable once; one that is set to nothing counts as not set."""

    def text(name: str) -> str | None:
        return environ.get(name, "").strip() or None

    return VendorEnvironment(
        cuda_home=text(CUDA_HOME),
        cuda_path=text(CUDA_PATH),
        search_path=text(SEARCH_PATH),
        use_nvrtc=text(USE_NVRTC),
        cache_folder=text(CACHE_FOLDER),
        queue_depth=text(QUEUE_DEPTH),
    )
