"""DeepEP V1 for CPU tensors: what arrives, in which order, and what is refused."""

from mortise_cuda_common.emulator.deep_ep.library import EmulatedDeepEP

__all__ = ["EmulatedDeepEP"]
