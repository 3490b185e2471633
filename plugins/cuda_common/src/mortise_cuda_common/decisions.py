"""What was decided when a role was loaded: which libraries serve, and why others do not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mortise.plugin import BackendChoice

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mortise_cuda_common.runtime import Runtime

UNUSED = "-"
"""What the adapter calls a function that this version does not have."""


def decisions(runtime: Runtime) -> Iterator[BackendChoice]:
    """DeepGEMM: its version with the names of what is called, or why it is left out.

    Args:
        runtime: of the role.
    """
    deep_gemm = runtime.deep_gemm
    if deep_gemm is None:
        yield BackendChoice(subject="DeepGEMM", value="not used", reason=runtime.no_deep_gemm)
        return
    called = ", ".join(name for _, name in deep_gemm.describe() if name != UNUSED)
    asked = "its emulation" if runtime.emulated else "compared with torch at loading"
    yield BackendChoice(
        subject="DeepGEMM", value=deep_gemm.version, reason=f"{asked}; called are {called}"
    )
