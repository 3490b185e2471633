"""The programs of NVFP4, judged by NVIDIA's headers, float64 and the core's formats."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from plugins.cuda_blackwell.tests.nvfp4_cases import (
    BF16,
    Machine,
    dequantised,
    groups_of,
    normal,
    places,
    poisoned,
    stored_weight,
)
from tests.fixtures.vendor_conversions import UnavailableError, VendorConversions
from torch.testing import assert_close

from mortise.formats.nvfp4 import dequantise_nvfp4, quantise_nvfp4
from mortise_cuda_blackwell.kernels.nvfp4_grouped import (
    BLOCK_ROWS,
    block_rows_of,
    nvfp4_gate_up,
    nvfp4_product,
    weight_only_product,
)
from mortise_cuda_blackwell.kernels.nvfp4_rows import quantise_rows, swiglu_quantise
from mortise_cuda_blackwell.layout import Nvfp4Weight
from mortise_cuda_common.programs.compiled import CompiledPrograms
from mortise_cuda_common.programs.emulated import EmulatedPrograms

if TYPE_CHECKING:
    from mortise_cuda_common.groups import Groups
    from mortise_cuda_common.rows import Rows

SCALES = torch.tensor([1e-3, 3e-2, 1.0])
LAYOUTS = {
    "one after the other": groups_of([3, 0, 130]),
    "aligned": groups_of([3, 0, 20], alignment=128),
    "masked": groups_of([3, 0, 20], capacity=32),
    "many": groups_of([200, 0, 190]),
    "none": groups_of([0, 0, 0]),
}


@pytest.fixture(scope="module", params=["emulated", pytest.param("cuda", marks=pytest.mark.device)])
def machine(request: pytest.FixtureRequest) -> Machine:
    """Rows, and weights alone, need no fp4 units: any GPU with e4m3 runs those programs."""
    if request.param == "emulated":
        return Machine(EmulatedPrograms(), torch.device("cpu"), has_fp4=True, sums=2.0**-24)
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU: the compiled programs are not run")
    major, minor = torch.cuda.get_device_capability()
    if major not in {9, 10}:
        pytest.skip(f"the GPU is of sm_{major}{minor}, not sm_90, sm_100 or sm_103")
    # How many bits tensor cores keep between two additions is not published.
    return Machine(CompiledPrograms(), torch.device("cuda"), has_fp4=major == 10, sums=2.0**-20)


@pytest.fixture
def fp4_machine(machine: Machine) -> Machine:
    if not machine.has_fp4:
        pytest.skip("the GPU has no fp4 units")
    return machine


@pytest.fixture(scope="module")
def vendor(tmp_path_factory: pytest.TempPathFactory) -> VendorConversions:
    try:
        return VendorConversions(tmp_path_factory.mktemp("vendor"))
    except UnavailableError as error:
        pytest.skip(f"the vendor's headers cannot be compiled: {error}")


def test_the_layouts_are_multiplied_in_tiles_of_every_height() -> None:
    assert {block_rows_of(groups) for groups in LAYOUTS.values()} == set(BLOCK_ROWS)


def same_rows(found: Rows, packed: torch.Tensor, scales: torch.Tensor, groups: Groups) -> None:
    assert found.scales is not None
    for place in places(groups):
        assert torch.equal(found.values[place], packed[place])
        assert torch.equal(found.scales[place].view(torch.uint8), scales[place].view(torch.uint8))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("columns", [16, 272])
def test_rows_are_those_of_the_format(
    machine: Machine, layout: str, dtype: torch.dtype, columns: int
) -> None:
    groups = LAYOUTS[layout]
    plain = normal(1, groups.num_rows, columns, dtype=dtype) * 4
    found = machine.run(quantise_rows, poisoned(plain, groups), SCALES, groups)
    for scale, place in zip(SCALES, places(groups), strict=True):
        packed, scales = quantise_nvfp4(plain[place], scale)
        assert found.scales is not None
        assert torch.equal(found.values[place], packed)
        assert torch.equal(found.scales[place].float(), scales.float())


@given(
    values=st.lists(st.floats(width=32), min_size=16, max_size=16),
    divisor_exponent=st.integers(-100, 100),
)
@settings(max_examples=80, deadline=None)
def test_any_block_is_that_of_the_format(
    machine: Machine, values: list[float], divisor_exponent: int
) -> None:
    plain, scale = torch.tensor([values]), torch.tensor([2.0**divisor_exponent])
    groups = groups_of([1])
    rows = torch.cat([plain, plain.new_full((3, 16), torch.nan)])
    same_rows(
        machine.run(quantise_rows, rows, scale, groups),
        *quantise_nvfp4(plain, scale),
        groups=groups,
    )


def test_rows_are_those_of_nvidias_headers(machine: Machine, vendor: VendorConversions) -> None:
    groups = groups_of([40])
    plain = normal(5, groups.num_rows, 256, dtype=BF16).float() * 30
    scale = torch.tensor([0.03])
    divisor = scale.reciprocal().expand(groups.num_rows, 16)
    packed, scales = vendor.quantise_nvfp4(plain, divisor)
    same_rows(machine.run(quantise_rows, plain, scale, groups), packed, scales, groups)


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_swiglu_rounds_as_tensors_do(machine: Machine, dtype: torch.dtype) -> None:
    groups = groups_of([5, 17, 2], alignment=8)
    gate_up = normal(2, groups.num_rows, 2 * 272, dtype=dtype) * 3
    gate, up = gate_up.chunk(2, dim=1)
    found = machine.run(swiglu_quantise, poisoned(gate_up, groups), SCALES, groups)
    wanted = machine.run(quantise_rows, F.silu(gate) * up, SCALES, groups)
    assert wanted.scales is not None
    # silu itself may be one bit off, which moves a value to the next code now and then.
    different = same = 0
    for place in places(groups):
        unequal = found.values[place] != wanted.values[place]
        different, same = different + int(unequal.sum()), same + unequal.numel()
    assert different <= 0.01 * same


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("rows", "parts", "columns"), [(224, 2, 144), (300, 1, 528)])
@pytest.mark.parametrize("out_dtype", [BF16, torch.float32])
def test_product_is_that_of_the_dequantised_operands(
    fp4_machine: Machine, layout: str, rows: int, parts: int, columns: int, out_dtype: torch.dtype
) -> None:
    groups = LAYOUTS[layout]
    stored = stored_weight(3, 3, rows, columns, num_parts=parts)
    weight = Nvfp4Weight.of(stored)
    plain = normal(4, groups.num_rows, columns, dtype=BF16)
    quantised = fp4_machine.run(quantise_rows, poisoned(plain, groups), SCALES, groups)
    alphas = SCALES.unsqueeze(1) * weight.global_scale
    found = fp4_machine.run(nvfp4_product, quantised, weight, alphas, groups, out_dtype)
    assert (found.shape, found.dtype) == ((groups.num_rows, rows), out_dtype)
    error = 2.0**-8 if out_dtype is BF16 else columns * fp4_machine.sums
    assert quantised.scales is not None
    for expert, place in enumerate(places(groups)):
        rows_RK = dequantise_nvfp4(quantised.values[place], quantised.scales[place], 1.0).double()
        rows_RK *= float(SCALES[expert])
        wanted = rows_RK @ dequantised(stored, expert).T
        bound = error * (rows_RK.abs() @ dequantised(stored, expert).abs().T)
        assert bool(((found[place].double() - wanted).abs() <= bound + 1e-30).all())


def test_a_stated_global_scale_multiplies_every_sum(fp4_machine: Machine) -> None:
    groups = groups_of([4, 2])
    stored = stored_weight(8, 2, 128, 64)
    weight = Nvfp4Weight.of(stored)
    rows = fp4_machine.run(quantise_rows, normal(9, groups.num_rows, 64), torch.ones(2), groups)
    plain = fp4_machine.run(nvfp4_product, rows, weight, weight.global_scale, groups, torch.float32)
    stated = replace(rows, global_scale=0.25)
    scaled = fp4_machine.run(
        nvfp4_product, stated, weight, weight.global_scale, groups, torch.float32
    )
    for place in places(groups):
        assert torch.equal(scaled[place], plain[place] * 0.25)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("intermediate", "columns"), [(112, 144), (272, 272)])
def test_gate_and_up_in_one_program_are_the_three_in_turn(
    fp4_machine: Machine, layout: str, intermediate: int, columns: int
) -> None:
    groups = LAYOUTS[layout]
    weight = Nvfp4Weight.of(stored_weight(6, 3, 2 * intermediate, columns, num_parts=2))
    plain = normal(7, groups.num_rows, columns, dtype=BF16)
    rows = fp4_machine.run(quantise_rows, plain, SCALES, groups)
    alphas = weight.global_scale * 0.01
    found = fp4_machine.run(nvfp4_gate_up, rows, weight, alphas, SCALES, groups)
    gate_up = fp4_machine.run(nvfp4_product, rows, weight, alphas, groups, BF16)
    wanted = fp4_machine.run(swiglu_quantise, gate_up, SCALES, groups)
    assert wanted.scales is not None
    same_rows(found, wanted.values, wanted.scales, groups)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("rows", "parts", "columns"), [(224, 2, 144), (300, 1, 528)])
def test_weights_alone_lose_nothing(
    machine: Machine, layout: str, rows: int, parts: int, columns: int
) -> None:
    groups = LAYOUTS[layout]
    stored = stored_weight(3, 3, rows, columns, num_parts=parts, static_input=False)
    plain = normal(4, groups.num_rows, columns, dtype=BF16)
    found = machine.run(
        weight_only_product, poisoned(plain, groups), Nvfp4Weight.of(stored), groups, torch.float32
    )
    for expert, place in enumerate(places(groups)):
        exact = plain[place].double()
        wanted = exact @ dequantised(stored, expert).T
        bound = columns * machine.sums * (exact.abs() @ dequantised(stored, expert).abs().T)
        assert_close(
            torch.maximum((found[place].double() - wanted).abs() - bound, torch.zeros(())),
            torch.zeros_like(wanted),
            rtol=0,
            atol=1e-30,
        )


def test_strides_of_rows_and_scales_are_free(fp4_machine: Machine) -> None:
    """Rows that were moved apart have their scales column by column."""
    groups = groups_of([9, 4])
    weight = Nvfp4Weight.of(stored_weight(10, 2, 256, 144, num_parts=2))
    rows = fp4_machine.run(
        quantise_rows, normal(11, groups.num_rows, 144, dtype=BF16), SCALES[:2], groups
    )
    assert rows.scales is not None
    apart = torch.empty(groups.num_rows, 80, dtype=torch.uint8)
    apart[:, 5:77] = rows.values
    turned = rows.scales.view(torch.uint8).T.contiguous().T.view(torch.float8_e4m3fn)
    strided = replace(rows, values=apart[:, 5:77], scales=turned)
    assert (strided.values.stride(0), turned.stride(0)) == (80, 1)
    alphas = weight.global_scale * 0.01
    for out_dtype in (BF16, torch.float32):
        found, wanted = (
            fp4_machine.run(nvfp4_product, one, weight, alphas, groups, out_dtype)
            for one in (strided, rows)
        )
        assert all(torch.equal(found[place], wanted[place]) for place in places(groups))
    gated, wanted_rows = (
        fp4_machine.run(nvfp4_gate_up, one, weight, alphas, SCALES[:2], groups)
        for one in (strided, rows)
    )
    assert wanted_rows.scales is not None
    same_rows(gated, wanted_rows.values, wanted_rows.scales, groups)
