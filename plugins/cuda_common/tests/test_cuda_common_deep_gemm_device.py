"""DeepGEMM itself does what its emulation does, on a GPU; off it the emulated two are compared."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from plugins.cuda_common.tests.deep_gemm_cases import (
    CHIPS,
    plain,
    row_groups,
    rows,
    weight,
)

from mortise.errors import BackendUnusableError
from mortise.formats import fp8
from mortise_cuda_common.chip import Architecture
from mortise_cuda_common.device import chip_of
from mortise_cuda_common.emulator.deep_gemm.fork import ForkDeepGEMM
from mortise_cuda_common.emulator.deep_gemm.upstream import UpstreamDeepGEMM
from mortise_cuda_common.libraries.deep_gemm import DeepGEMM
from mortise_cuda_common.libraries.deep_gemm_smoke import difference_of
from mortise_cuda_common.rows import Kind, Rows

PRODUCT_DIFFERENCE = 1e-3
"""What the library's own tests allow a product of e4m3, whose sums a chip cuts off."""

BF16_DIFFERENCE = 1e-5
SCORE_DIFFERENCE = 5e-6
"""What they allow scores of the same quantised operands."""


@dataclass(frozen=True)
class Both:
    """The library under test, and the emulation of the same chip."""

    library: DeepGEMM
    emulated: DeepGEMM
    device: torch.device

    def there(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device)

    def rows(self, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
        return rows(ForkDeepGEMM(self.library.chip), *shape).pair

    def weight(self, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
        return weight(ForkDeepGEMM(self.library.chip), *shape).pair


@pytest.fixture(
    scope="module",
    params=[*CHIPS, pytest.param(None, marks=pytest.mark.device)],
    ids=lambda chip: "gpu" if chip is None else chip.name,
)
def both(request: pytest.FixtureRequest) -> Both:
    if request.param is not None:
        cpu = torch.device("cpu")
        library = DeepGEMM.of(UpstreamDeepGEMM(request.param), request.param, cpu)
        return Both(library, DeepGEMM.emulated(request.param), cpu)
    try:
        chip = chip_of(0, tuple(Architecture))
        device = torch.device("cuda", 0)
        return Both(DeepGEMM.load(chip, device), DeepGEMM.emulated(chip), device)
    except BackendUnusableError as error:
        pytest.skip(f"DeepGEMM was not compared with its emulation: {error.what}")


def check(found: torch.Tensor, wanted: torch.Tensor, most: float) -> None:
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype
    assert difference_of(found, wanted) < most


def test_both_are_of_one_chip(both: Both) -> None:
    assert both.library.num_sms() == both.emulated.num_sms()
    assert both.library.alignment() == both.emulated.alignment()


@pytest.mark.parametrize("shape", [(1, 64), (13, 256), (128, 640), (2, 128, 256), (3, 13, 12)])
def test_scales_of_rows(both: Both, shape: tuple[int, ...]) -> None:
    scales = fp8.ceil_to_ue8m0(plain(*shape).exp())
    found = both.library.prepare_row_scales(both.there(scales))
    wanted = both.emulated.prepare_row_scales(scales)
    assert torch.equal(found.cpu(), wanted)
    assert found.stride() == wanted.stride()


def test_scales_of_weights(both: Both) -> None:
    for shape in ((200, 640), (3, 200, 640), (1, 8, 128)):
        _, scale = both.weight(*shape)
        found = both.library.prepare_weight_scale(both.there(scale), *shape[-2:])
        wanted = both.emulated.prepare_weight_scale(scale, *shape[-2:])
        assert torch.equal(found.cpu(), wanted)
        assert found.stride() == wanted.stride()


@pytest.mark.parametrize("shape", [(1, 64, 128), (33, 576, 512), (200, 2112, 1536)])
def test_one_product(both: Both, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    (values, scales), (weights, weight_scale) = both.rows(m, k), both.weight(n, k)

    def product(library: DeepGEMM, device: torch.device) -> torch.Tensor:
        own = Rows(values=values.to(device), scales=scales.to(device), kind=Kind.FP8_UE8M0)
        scale = library.prepare_weight_scale(weight_scale.to(device), n, k)
        return library.fp8_linear(own, weights.to(device), scale)

    wanted = product(both.emulated, torch.device("cpu"))
    check(product(both.library, both.device).cpu(), wanted, PRODUCT_DIFFERENCE)


@pytest.mark.parametrize("quantised", [True, False], ids=["e4m3", "bfloat16"])
def test_contiguous_groups(both: Both, quantised: bool) -> None:
    groups = row_groups((3, 0, 128, 200, 1), both.library.alignment())
    (values, scales), (weights, weight_scale) = (
        both.rows(len(groups), 512),
        both.weight(5, 256, 512),
    )

    def product(library: DeepGEMM, device: torch.device) -> torch.Tensor:
        out = torch.empty(len(groups), 256, dtype=torch.bfloat16, device=device)
        if quantised:
            own = Rows(values=values.to(device), scales=scales.to(device), kind=Kind.FP8_UE8M0)
            scale = library.prepare_weight_scale(weight_scale.to(device), 256, 512)
            library.fp8_contiguous(own, weights.to(device), scale, groups.to(device), out)
        else:
            a, b = (plain(*shape).bfloat16() for shape in ((len(groups), 512), (5, 256, 512)))
            library.bf16_contiguous(a.to(device), b.to(device), groups.to(device), out)
        return out.cpu()[groups >= 0]

    wanted = product(both.emulated, torch.device("cpu"))
    most = PRODUCT_DIFFERENCE if quantised else BF16_DIFFERENCE
    check(product(both.library, both.device), wanted, most)


@pytest.mark.parametrize("quantised", [True, False], ids=["e4m3", "bfloat16"])
def test_masked_groups(both: Both, quantised: bool) -> None:
    size = both.library.slot_multiple()
    counts = torch.tensor([0, 3, size, 70], dtype=torch.int32)
    mine = torch.arange(size) < counts.unsqueeze(1)
    (values, scales), (weights, weight_scale) = both.rows(4, size, 512), both.weight(4, 256, 512)

    def product(library: DeepGEMM, device: torch.device) -> torch.Tensor:
        out = torch.empty(4, size, 256, dtype=torch.bfloat16, device=device)
        held = counts.to(device)
        if quantised:
            scale = library.prepare_weight_scale(weight_scale.to(device), 256, 512)
            a = (values.to(device), scales.to(device))
            library.fp8_masked(*a, weights.to(device), scale, held, 50, out)
        else:
            a, b = (plain(*shape).bfloat16() for shape in ((4, size, 512), (4, 256, 512)))
            library.bf16_masked(a.to(device), b.to(device), held, 50, out)
        return out.cpu()[mine]

    wanted = product(both.emulated, torch.device("cpu"))
    most = PRODUCT_DIFFERENCE if quantised else BF16_DIFFERENCE
    check(product(both.library, both.device), wanted, most)


def test_a_weight_of_one_expert(both: Both) -> None:
    """Its first stride is any number to torch, and compared by the library."""
    groups = torch.zeros(both.library.alignment(), dtype=torch.int32)
    (values, scales), (weights, weight_scale) = both.rows(len(groups), 128), both.weight(64, 128)

    def product(library: DeepGEMM, device: torch.device) -> torch.Tensor:
        own = Rows(values=values.to(device), scales=scales.to(device), kind=Kind.FP8_UE8M0)
        scale = weight_scale.to(device).as_strided((1, 1, 1), (7, 5, 3))
        scale = library.prepare_weight_scale(scale, 64, 128)
        one = weights.to(device).as_strided((1, 64, 128), (77, 128, 1))
        out = torch.empty(len(groups), 64, dtype=torch.bfloat16, device=device)
        library.fp8_contiguous(own, one, scale, groups.to(device), out)
        return out.cpu()

    wanted = product(both.emulated, torch.device("cpu"))
    check(product(both.library, both.device), wanted, PRODUCT_DIFFERENCE)


def random_lens(seed: int, rows: int, next_n: int) -> torch.Tensor:
    chance = random.Random(seed)
    last = torch.tensor([chance.randint(next_n, 5000) for _ in range(rows)], dtype=torch.int32)
    return (last.unsqueeze(1) + torch.arange(1 - next_n, 1).int()).contiguous()


@pytest.mark.parametrize("next_n", [1, 2])
@pytest.mark.parametrize("rows", [1, 31, 32, 200])
def test_plans(both: Both, rows: int, next_n: int) -> None:
    for seed in range(3):
        lens = random_lens(seed, rows, next_n)
        sms = both.library.num_sms()
        found = both.library.paged_mqa_metadata(both.there(lens), 64, sms)
        assert torch.equal(found.cpu(), both.emulated.paged_mqa_metadata(lens, 64, sms))


@pytest.mark.parametrize("next_n", [1, 2])
@pytest.mark.parametrize(("heads", "dim"), [(64, 128), (32, 64)])
def test_scores(both: Both, heads: int, dim: int, next_n: int) -> None:
    batch, lens = 5, random_lens(7, 5, next_n)
    longest = int(lens.max())
    pages_of_row = -(-longest // 64)
    pages = batch * pages_of_row
    keys = fp8.to_e4m3(plain(pages, 64 * dim)).view(torch.uint8)
    scale = plain(pages, 64, seed=2).abs().view(torch.uint8)
    kv = torch.cat([keys, scale], 1).reshape(pages, 64, 1, dim + 4)
    q = fp8.to_e4m3(plain(batch, next_n, heads, dim, seed=3))
    weights = plain(batch * next_n, heads, seed=4)
    table = torch.randperm(pages, generator=torch.Generator().manual_seed(5))
    table = table.reshape(batch, pages_of_row).int()

    def scored(library: DeepGEMM, device: torch.device) -> torch.Tensor:
        seen = lens.to(device)
        plan = library.paged_mqa_metadata(seen, 64, library.num_sms())
        logits = library.paged_mqa_logits(
            q.to(device), kv.to(device), weights.to(device), seen, table.to(device), plan, longest
        )
        return logits.cpu()[torch.arange(longest) < lens.reshape(-1, 1)]

    wanted = scored(both.emulated, torch.device("cpu"))
    check(scored(both.library, both.device), wanted, SCORE_DIFFERENCE)
