"""FRACTAL_NZ is a tag of a storage: views have it, copies do not."""

from __future__ import annotations

import pytest
import torch

from mortise_npu_ascend.emulator import EmulatedNpu, install

ND, FRACTAL_NZ = 2, 29


@pytest.fixture
def npu() -> EmulatedNpu:
    npu = install("A2")
    npu.npu.config.allow_internal_format = True
    return npu


def test_the_numbers_of_the_formats_are_the_vendors(npu: EmulatedNpu) -> None:
    assert (npu.Format.ND, npu.Format.FRACTAL_NZ) == (ND, FRACTAL_NZ)


def test_a_cast_copies_and_tags(npu: EmulatedNpu) -> None:
    weight = torch.arange(32, dtype=torch.int8).view(4, 8)
    tiled = npu.npu_format_cast(weight, FRACTAL_NZ)
    assert torch.equal(tiled, weight)
    assert tiled.data_ptr() != weight.data_ptr()
    assert (npu.get_npu_format(weight), npu.get_npu_format(tiled)) == (ND, FRACTAL_NZ)
    assert npu.get_npu_format(npu.npu_format_cast(tiled, ND)) == ND


def test_views_have_the_format_of_their_storage_and_copies_are_plain(npu: EmulatedNpu) -> None:
    tiled = npu.npu_format_cast(torch.zeros(4, 8, dtype=torch.int8), FRACTAL_NZ)
    for view in (
        tiled.view(torch.int32),
        tiled.t(),
        tiled[1:],
        torch.nn.Parameter(tiled, requires_grad=False),
    ):
        assert npu.get_npu_format(view) == FRACTAL_NZ
    for copy in (tiled.clone(), tiled.t().contiguous(), tiled + 1):
        assert npu.get_npu_format(copy) == ND


def test_a_transposed_weight_stays_transposed(npu: EmulatedNpu) -> None:
    transposed = npu.npu_format_cast(torch.zeros(4, 8).t(), FRACTAL_NZ)
    assert transposed.stride() == (1, 8)


@pytest.mark.parametrize(("generation", "allowed"), [("A2", True), ("A3", False), ("A5", False)])
def test_where_internal_formats_are_off_a_cast_warns_and_stays_plain(
    generation: str, allowed: bool
) -> None:
    npu = install(generation)
    assert npu.config.allow_internal_format is allowed
    npu.config.allow_internal_format = False
    with pytest.warns(UserWarning, match="while allow_internel_format=False"):
        plain = npu.npu_format_cast(torch.zeros(4, 8), FRACTAL_NZ)
    assert npu.get_npu_format(plain) == ND


def test_formats_and_shapes_that_cannot_be(npu: EmulatedNpu) -> None:
    with pytest.raises(RuntimeError, match="format 4 is not emulated"):
        npu.npu_format_cast(torch.zeros(4, 8), 4)
    with pytest.raises(RuntimeError, match="at least two dimensions, got 1"):
        npu.npu_format_cast(torch.zeros(8), FRACTAL_NZ)
