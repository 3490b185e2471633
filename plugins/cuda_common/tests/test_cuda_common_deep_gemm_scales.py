"""The emulated DeepGEMM brings scales into the vendor's layouts, and refuses what it refuses."""

from __future__ import annotations

import pytest
import torch
from plugins.cuda_common.tests.deep_gemm_cases import BLACKWELL, HOPPER, plain, weight

from mortise.formats import fp8
from mortise_cuda_common.emulator.deep_gemm.fork import ForkDeepGEMM
from mortise_cuda_common.emulator.deep_gemm.upstream import UpstreamDeepGEMM


def powers(*shape: int) -> torch.Tensor:
    return fp8.ceil_to_ue8m0(plain(*shape).exp())


def test_rows_lie_side_by_side() -> None:
    library = ForkDeepGEMM(HOPPER)
    for shape in ((13, 3), (2, 13, 3)):
        scales = plain(*shape)
        found = library.get_mn_major_tma_aligned_tensor(scales)
        assert torch.equal(found, scales)
        assert found.stride()[-2:] == (1, 16)  # 13 rounded up to 16 bytes
        assert library.get_mn_major_tma_aligned_tensor(found) is found
    assert library.get_tma_aligned_size(13, 4) == 16


def test_words_hold_four_scales_from_the_lowest_byte_on() -> None:
    library = UpstreamDeepGEMM(BLACKWELL)
    scales = powers(5, 6)
    packed = library.get_mn_major_tma_aligned_packed_ue8m0_tensor(scales)
    assert packed.shape == (5, 2)
    assert packed.stride() == (1, 8)
    for row in range(5):
        for column in range(6):
            byte = (int(packed[row, column // 4]) >> (8 * (column % 4))) & 0xFF
            assert 2.0 ** (byte - 127) == scales[row, column]


def test_rows_between_groups_are_not_looked_at() -> None:
    library = UpstreamDeepGEMM(BLACKWELL)
    library.set_mk_alignment_for_contiguous_layout(4)
    scales = powers(8, 4)
    scales[1:4] = float("nan")
    ends = torch.tensor([1, 8], dtype=torch.int32)
    packed = library.get_mn_major_tma_aligned_packed_ue8m0_tensor(scales, ends)
    assert not packed[1:4].any()
    with pytest.raises(RuntimeError, match="no power of two"):
        library.get_mn_major_tma_aligned_packed_ue8m0_tensor(scales)


def test_packed_scales_are_read_by_rows_or_side_by_side() -> None:
    library = UpstreamDeepGEMM(BLACKWELL)
    scales = powers(8, 6)
    wanted = library.get_mn_major_tma_aligned_packed_ue8m0_tensor(scales)
    side_by_side = scales.T.contiguous().T
    assert torch.equal(library.get_mn_major_tma_aligned_packed_ue8m0_tensor(side_by_side), wanted)
    with pytest.raises(RuntimeError, match=r"batched_sf.stride\(2\) == mn"):
        library.get_mn_major_tma_aligned_packed_ue8m0_tensor(powers(8, 12)[:, ::2])


def test_weights_of_hopper_stay_as_they_are() -> None:
    library = ForkDeepGEMM(HOPPER)
    scale = weight(library, 3, 200, 256).scale
    found = library.transform_sf_into_required_layout(scale, 200, 256, (1, 128, 128), 3, False)
    assert found is scale
    two_of_three = scale.repeat(1, 2, 1)[:, ::2]
    with pytest.raises(RuntimeError, match=r"sf.stride\(-3\) == sf.size"):
        library.transform_sf_into_required_layout(two_of_three, 200, 256, (1, 128, 128), 3, False)
    with pytest.raises(RuntimeError, match=r"sf.stride\(-1\) == 1 and"):
        library.transform_sf_into_required_layout(
            two_of_three[0], 200, 256, (1, 128, 128), None, False
        )


def test_weights_of_blackwell_are_packed_for_every_row() -> None:
    library = ForkDeepGEMM(BLACKWELL)
    scale = weight(library, 3, 200, 640).scale
    packed = library.transform_sf_into_required_layout(scale, 200, 640, (1, 128, 128), 3, False)
    assert packed.shape == (3, 200, 2)
    assert packed.stride() == (400, 1, 200)
    wide = fp8.unpack_ue8m0(packed, 5)
    assert torch.equal(wide, scale.repeat_interleave(128, dim=1)[:, :200])
    again = library.transform_sf_into_required_layout(packed, 200, 640, (1, 1, 128), 3, False)
    assert again is packed


def test_recipes_of_two_and_of_three() -> None:
    library = ForkDeepGEMM(HOPPER)
    scales = plain(8, 2)
    for recipe, side in (((1, 128, 128), True), ((1, 128), None)):
        found = library.transform_sf_into_required_layout(scales, 8, 256, recipe, None, side)
        assert torch.equal(found, scales)
    with pytest.raises(RuntimeError, match=r"is_sfa\.has_value"):
        library.transform_sf_into_required_layout(scales, 8, 256, (1, 128, 128))
    with pytest.raises(RuntimeError, match=r"not is_sfa\.has_value"):
        library.transform_sf_into_required_layout(scales, 8, 256, (1, 128), None, True)
    with pytest.raises(RuntimeError, match="Unknown SF transformation"):
        library.transform_sf_into_required_layout(plain(8, 8), 8, 256, (1, 32))
