"""The emulated DeepGEMM multiplies as the vendor says, and by nobody's rows but their own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plugins.cuda_common.tests.deep_gemm_cases import (
    BLACKWELL,
    CHIPS,
    HOPPER,
    LIBRARIES,
    MOST_DIFFERENCE,
    by_own_group,
    empty,
    plain,
    row_groups,
    rows,
    weight,
)

from mortise_cuda_common.emulator.deep_gemm.fork import ForkDeepGEMM
from mortise_cuda_common.emulator.deep_gemm.upstream import UpstreamDeepGEMM
from mortise_cuda_common.libraries.deep_gemm_smoke import difference_of

if TYPE_CHECKING:
    from mortise_cuda_common.chip import Chip
    from mortise_cuda_common.emulator.deep_gemm.library import EmulatedDeepGEMM

COUNTS = (5, 0, 128, 200)


@pytest.fixture(params=[(kind, chip) for kind in LIBRARIES for chip in CHIPS], ids=str)
def library(request: pytest.FixtureRequest) -> EmulatedDeepGEMM:
    kind, chip = request.param
    made: EmulatedDeepGEMM = kind(chip)
    return made


@pytest.fixture(params=CHIPS, ids=lambda chip: chip.name)
def fork(request: pytest.FixtureRequest) -> ForkDeepGEMM:
    return ForkDeepGEMM(request.param)


@pytest.mark.parametrize("shape", [(1, 8, 128), (33, 136, 256), (130, 128, 272)])
def test_one_product(library: Any, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    a, b, out = rows(library, m, k), weight(library, n, k), empty(m, n)
    library.fp8_gemm_nt(a.pair, b.pair, out)
    assert difference_of(out, a.exact @ b.exact.T) < MOST_DIFFERENCE


def test_hopper_adds_to_float32_with_scales_of_rows_on_both_sides() -> None:
    library = ForkDeepGEMM(HOPPER)
    a, b = rows(library, 40, 256), rows(library, 24, 256, seed=9)
    out = plain(40, 24, seed=3)
    wanted = out.double() + a.exact @ b.exact.T
    library.fp8_gemm_nt(a.pair, b.pair, out, out, (1, 1, 128))
    assert torch.allclose(out.double(), wanted, atol=1e-4)


def test_blackwell_writes_float32() -> None:
    library = ForkDeepGEMM(BLACKWELL)
    a, b, out = rows(library, 40, 256), weight(library, 24, 256), empty(40, 24, dtype=torch.float)
    library.fp8_gemm_nt(a.pair, b.pair, out)
    assert torch.allclose(out.double(), a.exact @ b.exact.T, atol=1e-4)


def test_products_of_nothing() -> None:
    library = ForkDeepGEMM(HOPPER)
    out = plain(3, 8)
    b = weight(library, 8, 128)
    library.fp8_gemm_nt(rows(library, 0, 128).pair, b.pair, empty(0, 8))
    assert torch.equal(out, plain(3, 8))
    values = torch.empty(3, 0, dtype=torch.float8_e4m3fn)
    library.fp8_gemm_nt((values, torch.empty(3, 0)), (values[:0].new_empty(8, 0), empty(1, 0)), out)
    assert not out.any()


@pytest.mark.parametrize("quantised", [True, False], ids=["e4m3", "bfloat16"])
def test_contiguous_groups(library: Any, quantised: bool) -> None:
    groups = row_groups(COUNTS, library.get_mk_alignment_for_contiguous_layout())
    a, b = rows(library, len(groups), 256), weight(library, 4, 136, 256)
    out = empty(len(groups), 136)
    if quantised:
        library.m_grouped_fp8_gemm_nt_contiguous(a.pair, b.pair, out, groups)
        exact_a, exact_b = a.exact, b.exact
    else:
        plain_a, plain_b = plain(len(groups), 256).bfloat16(), plain(4, 136, 256).bfloat16()
        library.m_grouped_bf16_gemm_nt_contiguous(plain_a, plain_b, out, groups)
        exact_a, exact_b = plain_a.double(), plain_b.double()
    mine = groups >= 0
    wanted = by_own_group(exact_a, exact_b, groups)
    assert difference_of(out[mine], wanted[mine]) < MOST_DIFFERENCE
    assert out[~mine].isnan().all()


@pytest.mark.parametrize("quantised", [True, False], ids=["e4m3", "bfloat16"])
def test_masked_groups(fork: ForkDeepGEMM, quantised: bool) -> None:
    counts = torch.tensor([0, 3, 128], dtype=torch.int32)
    b, out = weight(fork, 3, 136, 256), empty(3, 128, 136)
    if quantised:
        a = rows(fork, 3, 128, 256)
        fork.m_grouped_fp8_fp4_gemm_nt_masked(a.pair, b.pair, out, counts, 7)
        wanted = a.exact @ b.exact.mT
    else:
        plain_a, plain_b = plain(3, 128, 256).bfloat16(), plain(3, 136, 256).bfloat16()
        fork.m_grouped_bf16_gemm_nt_masked(plain_a, plain_b, out, counts, 7)
        wanted = plain_a.double() @ plain_b.double().mT
    mine = torch.arange(128) < counts.unsqueeze(1)
    assert difference_of(out[mine], wanted[mine]) < MOST_DIFFERENCE
    assert out[~mine].isnan().all()


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
def test_a_tile_is_multiplied_by_the_group_of_its_first_row(chip: Chip) -> None:
    library = ForkDeepGEMM(chip)
    groups = row_groups((70, 60), 1)  # the second group begins within the first one's tile
    padded = torch.cat([groups, groups.new_full((126,), -1)])
    a, b, out = rows(library, 256, 128), weight(library, 2, 8, 128), empty(256, 8)
    library.m_grouped_fp8_gemm_nt_contiguous(a.pair, b.pair, out, padded)
    by_first = a.exact @ b.exact[0].T
    assert difference_of(out[:128], by_first[:128]) < MOST_DIFFERENCE
    assert difference_of(out[70:128], (a.exact @ b.exact[1].T)[70:128]) > 0.1
    # The last two rows of the second group begin a tile of their own.
    assert difference_of(out[128:130], (a.exact @ b.exact[1].T)[128:130]) < MOST_DIFFERENCE


def test_hopper_looks_at_the_first_row_of_each_warpgroup_once_more() -> None:
    groups = torch.tensor([0] * 64 + [-1] + [0] * 63, dtype=torch.int32)
    for chip, is_skipped in ((HOPPER, True), (BLACKWELL, False)):
        library = ForkDeepGEMM(chip)
        a, b, out = rows(library, 128, 128), weight(library, 1, 8, 128), empty(128, 8)
        library.m_grouped_fp8_gemm_nt_contiguous(a.pair, b.pair, out, groups)
        assert not out[:64].isnan().any()
        assert bool(out[65:].isnan().all()) is is_skipped


@settings(max_examples=20, deadline=None)
@given(
    counts=st.lists(st.integers(0, 70), min_size=1, max_size=4),
    alignment=st.sampled_from([32, 64]),
    on_blackwell=st.booleans(),
)
def test_ends_of_groups_say_what_numbers_of_rows_say(
    counts: list[int], alignment: int, on_blackwell: bool
) -> None:
    library = UpstreamDeepGEMM(BLACKWELL if on_blackwell else HOPPER)
    library.set_mk_alignment_for_contiguous_layout(alignment)
    groups = row_groups(counts, alignment)
    ends, start = [], 0
    for count in counts:
        ends.append(start + count)
        start = -(-ends[-1] // alignment) * alignment
    a, b = rows(library, len(groups), 128), weight(library, len(counts), 8, 128)
    by_numbers, by_ends = empty(len(groups), 8), empty(len(groups), 8)
    library.m_grouped_fp8_gemm_nt_contiguous(a.pair, b.pair, by_numbers, groups)
    library.m_grouped_fp8_gemm_nt_contiguous(
        a.pair, b.pair, by_ends, torch.tensor(ends, dtype=torch.int32), use_psum_layout=True
    )
    mine = groups >= 0
    assert torch.equal(by_numbers[mine], by_ends[mine])
    gaps = by_ends[~mine]
    # Hopper's kernels are never told to write zeros between groups.
    assert not gaps.any() if on_blackwell else gaps.isnan().all()


def refuses(text: str) -> Any:
    return pytest.raises(RuntimeError, match=text)


def test_the_vendors_assertions(fork: ForkDeepGEMM) -> None:
    a, b, out = rows(fork, 128, 128), weight(fork, 2, 8, 128), empty(128, 8)
    groups = row_groups((128,), 128)
    multiply = fork.m_grouped_fp8_gemm_nt_contiguous
    with refuses("scalar_type.. == torch.bfloat16, not torch.float32"):
        multiply(a.pair, b.pair, out.float(), groups)
    with refuses("scalar_type.. == torch.int32"):
        multiply(a.pair, b.pair, out, groups.long())
    with refuses("m == m__ or num_groups"):
        multiply(a.pair, b.pair, out, groups[:100])
    with refuses("m == m_ and n == n_ and k == k_"):
        multiply(a.pair, b.pair, out[:, :4], groups)
    with refuses("torch.float8_e4m3fn, not torch.bfloat16"):
        multiply((a.values.bfloat16(), a.scale), b.pair, out, groups)
    with refuses(r"sf.size\(-1\) == ceil_div"):
        multiply((a.values, torch.ones(128, 2)), b.pair, out, groups)
    with refuses(r"sf.size\(-2\) == ceil_div"):
        multiply(a.pair, (b.values, torch.ones(2, 2, 1)), out, groups)
    with refuses("not expected_m_for_psum_layout"):
        multiply(a.pair, b.pair, out, groups, expected_m_for_psum_layout=3)
    with refuses(r"t.stride\(-2\) == 1 or t.stride\(-1\) == 1"):
        multiply((a.values.repeat(1, 2)[:, ::2], a.scale), b.pair, out, groups)


def test_rows_that_no_tensor_map_can_describe(fork: ForkDeepGEMM) -> None:
    a, b = rows(fork, 16, 200), weight(fork, 8, 200)
    with refuses("CUDA_ERROR_INVALID_VALUE.*rows of 200 bytes"):
        fork.fp8_gemm_nt(a.pair, b.pair, empty(16, 8))
    a, b = rows(fork, 16, 128), weight(fork, 12, 128)
    with refuses("rows of 24 bytes"):
        fork.fp8_gemm_nt(a.pair, b.pair, empty(16, 12))


def test_hopper_takes_both_operands_by_rows_only() -> None:
    library = ForkDeepGEMM(HOPPER)
    a, b = rows(library, 16, 128), weight(library, 128, 128)
    with refuses("major_b == cute::UMMA::Major::K"):
        library.fp8_gemm_nt(a.pair, (b.values.T, b.scale), empty(16, 128))


def test_float32_of_hopper_needs_scales_of_rows() -> None:
    library = ForkDeepGEMM(HOPPER)
    a, b = rows(library, 16, 128), weight(library, 8, 128)
    with refuses("not c.has_value.. and d.scalar_type"):
        library.fp8_gemm_nt(a.pair, b.pair, empty(16, 8, dtype=torch.float))


def test_blackwell_traps_on_scales_of_any_value() -> None:
    library = ForkDeepGEMM(BLACKWELL)
    hopper = ForkDeepGEMM(HOPPER)
    a, b = rows(hopper, 16, 128), weight(hopper, 8, 128)
    with refuses("is no power of two"):
        library.fp8_gemm_nt(a.pair, b.pair, empty(16, 8))


def test_slots_whose_tiles_reach_into_the_next_are_refused(fork: ForkDeepGEMM) -> None:
    for capacity in (8, 32, 64, 192):
        a, b = rows(fork, 2, capacity, 128), weight(fork, 2, 8, 128)
        counts = torch.tensor([1, 1], dtype=torch.int32)
        with refuses("DeepGEMM#268"):
            fork.m_grouped_fp8_fp4_gemm_nt_masked(a.pair, b.pair, empty(2, capacity, 8), counts, 1)


def test_one_slot_may_be_of_any_size(fork: ForkDeepGEMM) -> None:
    a, b, out = rows(fork, 1, 8, 128), weight(fork, 1, 8, 128), empty(1, 8, 8)
    fork.m_grouped_fp8_fp4_gemm_nt_masked(
        a.pair, b.pair, out, torch.tensor([8], dtype=torch.int32), 8
    )
    assert difference_of(out, a.exact @ b.exact.mT) < MOST_DIFFERENCE


def test_state_belongs_to_one_object() -> None:
    first, second = ForkDeepGEMM(HOPPER), ForkDeepGEMM(HOPPER)
    first.set_num_sms(100)
    first.set_mk_alignment_for_contiguous_layout(64)
    assert (second.get_num_sms(), second.get_mk_alignment_for_contiguous_layout()) == (132, 128)
    assert (first.get_num_sms(), first.get_m_alignment_for_contiguous_layout()) == (100, 64)


def test_the_theoretical_alignment() -> None:
    of = ForkDeepGEMM(BLACKWELL).get_theoretical_mk_alignment_for_contiguous_layout
    assert [of(rows) for rows in (1, 32, 33, 200, 224, 1000)] == [32, 32, 64, 224, 224, 224]
    assert of() == 224
    assert ForkDeepGEMM(HOPPER).get_theoretical_mk_alignment_for_contiguous_layout(1) == 128
