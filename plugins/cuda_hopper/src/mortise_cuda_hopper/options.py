"""The backend's own table of the engine configuration."""

from __future__ import annotations

from mortise_cuda_common.options import CommonOptions


class Options(CommonOptions):
    """``[backend_options.cuda_hopper]``: what all backends for NVIDIA GPUs have, and no more."""
