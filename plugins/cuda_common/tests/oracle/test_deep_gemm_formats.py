"""Our float8 and the emulated layouts, beside the vendor's helpers of pure torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from plugins.cuda_common.tests.oracle.vendor import helper, helpers

from mortise.formats import fp8
from mortise.plugin import ScaleFormat
from mortise_cuda_common.chip import EMULATED, Architecture
from mortise_cuda_common.emulator.deep_gemm.upstream import UpstreamDeepGEMM
from mortise_cuda_common.libraries.deep_gemm_scales import pack_row_scales
from mortise_cuda_common.libraries.deep_gemm_smoke import difference_of

if TYPE_CHECKING:
    from pathlib import Path

SHAPES = [(1, 128), (13, 256), (64, 512), (130, 640), (7, 1664)]


@pytest.fixture(scope="module")
def maths(vendor: Path) -> dict[str, Any]:
    return helpers(vendor / "utils" / "math.py")


@pytest.fixture(scope="module")
def numeric(vendor: Path) -> dict[str, Any]:
    return helpers(vendor / "testing" / "numeric.py")


@pytest.fixture
def plain() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(130, 640, generator=generator)
    return (rows * torch.logspace(-3, 3, 130).unsqueeze(1)).bfloat16()


@pytest.mark.parametrize("scale_format", [ScaleFormat.FLOAT32, ScaleFormat.UE8M0])
@pytest.mark.parametrize("of", ["rows", "blocks"])
def test_float8_is_the_vendors(
    maths: dict[str, Any], plain: torch.Tensor, of: str, scale_format: ScaleFormat
) -> None:
    name = {"rows": "per_token_cast_to_fp8", "blocks": "per_block_cast_to_fp8"}[of]
    ours = {"rows": fp8.quantise_fp8_rows, "blocks": fp8.quantise_fp8_block}[of]
    theirs_values, theirs_scale = maths[name](plain, scale_format is ScaleFormat.UE8M0)
    values, scale = ours(plain, scale_format)
    assert torch.equal(scale, theirs_scale)
    assert torch.equal(values.view(torch.uint8), theirs_values.view(torch.uint8))


def test_scales_are_rounded_up_as_the_vendor_does(maths: dict[str, Any]) -> None:
    scale = torch.rand(10000, generator=torch.Generator().manual_seed(1)).exp2() * 1e-3
    next_to_powers = torch.tensor([1.0, 1.0000001, 0.9999999, 2.0**-126, 2.0**100, 3e38])
    for one in (scale, next_to_powers):
        assert torch.equal(fp8.ceil_to_ue8m0(one), maths["ceil_to_ue8m0"](one))


@pytest.mark.parametrize("shape", SHAPES)
def test_packed_scales_are_the_vendors(
    maths: dict[str, Any], vendor: Path, shape: tuple[int, int]
) -> None:
    rows, columns = shape[0], -(-shape[1] // 128)
    exponents = torch.randint(-20, 20, (rows, columns), generator=torch.Generator().manual_seed(5))
    scales = exponents.float().exp2()
    library = UpstreamDeepGEMM(EMULATED[Architecture.SM100])
    pack = helper(
        vendor / "utils" / "layout.py",
        "_pack_fp32_into_ue8m0_fallback",
        torch=torch,
        align=maths["align"],
        get_tma_aligned_size=library.get_tma_aligned_size,
    )
    theirs = pack(scales)
    for found in (
        library.get_mn_major_tma_aligned_packed_ue8m0_tensor(scales),
        pack_row_scales(scales),
    ):
        assert torch.equal(found, theirs)
        assert found.stride() == theirs.stride()
        assert found.shape == theirs.shape
    if columns % 4 == 0:
        assert torch.equal(found, maths["pack_ue8m0_to_int"](scales))


def test_differences_are_the_vendors(numeric: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(50, 60, generator=generator), torch.randn(50, 60, generator=generator)
    for other in (x, y, x + 1e-3 * y):
        assert difference_of(x, other) == pytest.approx(float(numeric["calc_diff"](x, other)))
