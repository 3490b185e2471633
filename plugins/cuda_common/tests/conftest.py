"""What runs the programs of a test: the emulated chip, and the real one where there is one."""

from __future__ import annotations

import pytest
import torch
from plugins.cuda_common.tests.kernel_cases import HALF, Machine

from mortise_cuda_common.programs.compiled import CompiledPrograms
from mortise_cuda_common.programs.emulated import EmulatedPrograms

CAPABILITIES = {9, 10}
"""Major numbers of Hopper's and Blackwell's chips."""

GROUP_ADDITIONS = 128


@pytest.fixture(
    scope="session", params=["emulated", pytest.param("cuda", marks=pytest.mark.device)]
)
def machine(request: pytest.FixtureRequest) -> Machine:
    """Both run the same sources."""
    single = HALF[torch.float32]
    if request.param == "emulated":
        # Exact products, added up in float32 in any order.
        return Machine(
            programs=EmulatedPrograms(),
            device=torch.device("cpu"),
            fp8_sums=GROUP_ADDITIONS * single,
            bf16_sums=2 * single,
            other=4 * single,
        )
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU: the compiled programs are not run")
    major, minor = torch.cuda.get_device_capability()
    if major not in CAPABILITIES:
        pytest.skip(f"the GPU is of sm_{major}{minor}, not sm_90, sm_100 or sm_103")
    # Hopper adds 32 products of e4m3 at a time to what it has, keeping 13 bits behind the point of
    # the largest (DeepSeek-V3, arXiv 2412.19437, section 3.5.2): of each it cuts off the rest.
    return Machine(
        programs=CompiledPrograms(),
        device=torch.device("cuda"),
        fp8_sums=4 * 33 * 2.0**-13,
        bf16_sums=4 * single,
        other=8 * single,
    )
