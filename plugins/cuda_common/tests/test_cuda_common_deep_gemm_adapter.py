"""The adapter of DeepGEMM calls every version alike, and trusts none before it has multiplied."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
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

from mortise.plugin import BackendUnusableError, ContractError, ReasonCode
from mortise_cuda_common.emulator.deep_gemm.fork import ForkDeepGEMM
from mortise_cuda_common.emulator.deep_gemm.upstream import UpstreamDeepGEMM
from mortise_cuda_common.libraries.deep_gemm import DeepGEMM
from mortise_cuda_common.libraries.deep_gemm_names import resolve
from mortise_cuda_common.libraries.deep_gemm_smoke import difference_of
from mortise_cuda_common.rows import Kind, Rows

if TYPE_CHECKING:
    from collections.abc import Iterator

    from plugins.cuda_common.tests.deep_gemm_cases import Quantised

    from mortise_cuda_common.chip import Chip

CPU = torch.device("cpu")


@pytest.fixture(params=CHIPS, ids=lambda chip: chip.name)
def chip(request: pytest.FixtureRequest) -> Chip:
    found: Chip = request.param
    return found


@pytest.fixture
def library(chip: Chip) -> DeepGEMM:
    return DeepGEMM.emulated(chip)


def as_rows(operand: Quantised) -> Rows:
    return Rows(values=operand.values, scales=operand.scale, kind=Kind.FP8_UE8M0)


def emulated(chip: Chip, **others: object) -> Any:
    """The functions of the emulated library as a module has them, with some changed or gone."""
    made = UpstreamDeepGEMM(chip)
    names = {name: getattr(made, name) for name in dir(made) if name[0] != "_" or "version" in name}
    merged = {**names, **others}
    return SimpleNamespace(**{name: one for name, one in merged.items() if one is not None})


@pytest.mark.parametrize("kind", LIBRARIES)
def test_both_libraries_pass_the_first_products(chip: Chip, kind: type) -> None:
    found = DeepGEMM.of(kind(chip), chip, CPU)
    assert not found.is_emulated
    names = dict(found.describe())
    assert (
        names["fp8_masked"]
        == {
            ForkDeepGEMM: "m_grouped_fp8_fp4_gemm_nt_masked",
            UpstreamDeepGEMM: "m_grouped_fp8_gemm_nt_masked",
        }[kind]
    )
    assert "-" not in names.values()


def test_one_thread_at_a_time_is_in_the_library(chip: Chip) -> None:
    """It keeps compiled kernels in a map without a lock, and a warm-up has many threads."""
    inside, most = [0], [0]

    def slow(*_: object) -> int:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.01)
        inside[0] -= 1
        return 128

    names = ("get_num_sms", "get_mk_alignment_for_contiguous_layout")
    found = DeepGEMM.of(emulated(chip, **dict.fromkeys(names, slow)), chip, CPU)
    with ThreadPoolExecutor(6) as pool:
        calls = [pool.submit(one) for one in (found.num_sms, found.alignment) * 3]
        assert [call.result() for call in calls] == [128] * 6
    assert most == [1]


def test_it_launches_on_its_own_gpu(chip: Chip, monkeypatch: pytest.MonkeyPatch) -> None:
    """It launches on the thread's current one, which is the first in every new thread."""
    entered: list[torch.device] = []

    @contextmanager
    def entering(device: torch.device) -> Iterator[None]:
        entered.append(device)
        yield

    monkeypatch.setattr("torch.cuda.device", entering)
    second = torch.device("cuda", 1)
    made = emulated(chip)
    assert (
        resolve(made, "2.6.1", second).functions.alignment() == DeepGEMM.emulated(chip).alignment()
    )
    assert entered == [second]
    assert resolve(made, "2.6.1", CPU).functions.num_sms() == chip.num_sms
    assert entered == [second]


def test_one_product(library: DeepGEMM) -> None:
    emulator = ForkDeepGEMM(library.chip)
    a, b = rows(emulator, 40, 256), weight(emulator, 136, 256)
    scale = library.prepare_weight_scale(b.scale, 136, 256)
    out = library.fp8_linear(as_rows(a), b.values, scale)
    assert difference_of(out, a.exact @ b.exact.T) < MOST_DIFFERENCE
    none = Rows(values=a.values[:0], scales=a.scale[:0], kind=Kind.FP8_UE8M0)
    assert library.fp8_linear(none, b.values, scale).shape == (0, 136)


@pytest.mark.parametrize("counts", [(5, 0, 130), (40,), (1,)])
def test_contiguous_groups(library: DeepGEMM, counts: tuple[int, ...]) -> None:
    emulator = ForkDeepGEMM(library.chip)
    groups = row_groups(counts, library.alignment())
    a, b = rows(emulator, len(groups), 256), weight(emulator, len(counts), 136, 256)
    a.scale[groups < 0] = float("nan")  # of rows that nobody defined
    scale = library.prepare_weight_scale(b.scale, 136, 256)
    out = empty(len(groups), 136)
    library.fp8_contiguous(as_rows(a), b.values, scale, groups, out)
    mine = groups >= 0
    wanted = by_own_group(a.exact, b.exact, groups)[mine]
    assert difference_of(out[mine], wanted) < MOST_DIFFERENCE
    plain_a, plain_b = plain(len(groups), 256).bfloat16(), plain(len(counts), 8, 256).bfloat16()
    out = empty(len(groups), 8)
    library.bf16_contiguous(plain_a, plain_b, groups, out)
    wanted = by_own_group(plain_a.double(), plain_b.double(), groups)[mine]
    assert difference_of(out[mine], wanted) < MOST_DIFFERENCE


@pytest.mark.parametrize("counts", [(5, 0, 128), (40,)])
def test_masked_groups(library: DeepGEMM, counts: tuple[int, ...]) -> None:
    emulator, size = ForkDeepGEMM(library.chip), library.slot_multiple()
    held = torch.tensor(counts, dtype=torch.int32)
    mine = torch.arange(size) < held.unsqueeze(1)
    a, b = rows(emulator, len(counts), size, 256), weight(emulator, len(counts), 136, 256)
    a.scale[~mine] = float("nan")
    scale = library.prepare_weight_scale(b.scale, 136, 256)
    out = empty(len(counts), size, 136)
    library.fp8_masked(a.values, a.scale, b.values, scale, held, 0, out)
    assert difference_of(out[mine], (a.exact @ b.exact.mT)[mine]) < MOST_DIFFERENCE
    plain_a, plain_b = plain(len(counts), size, 256).bfloat16(), plain(len(counts), 8, 256)
    out = empty(len(counts), size, 8)
    library.bf16_masked(plain_a, plain_b.bfloat16(), held, 3, out)
    wanted = plain_a.double() @ plain_b.bfloat16().double().mT
    assert difference_of(out[mine], wanted[mine]) < MOST_DIFFERENCE


def test_scales_that_lie_right_are_not_copied(library: DeepGEMM) -> None:
    scales = torch.ones(13, 6)
    prepared = library.prepare_row_scales(scales)
    assert prepared.stride(0) == 1
    assert library.prepare_row_scales(prepared) is prepared
    assert prepared.dtype == (torch.int32 if library.packs_scales else torch.float32)
    again = scales.T.contiguous().T  # rows side by side, not 16 bytes apart
    assert torch.equal(library.prepare_row_scales(again), prepared)


def test_a_weight_of_one_expert_has_strides_that_are_compared(library: DeepGEMM) -> None:
    """Torch gives a dimension of 1 any stride and calls it contiguous; the library does not."""
    emulator = ForkDeepGEMM(library.chip)
    a, b = rows(emulator, 128, 128), weight(emulator, 8, 128)
    odd = b.values.as_strided((1, 8, 128), (77, 128, 1))
    assert odd.is_contiguous()
    scale = b.scale.as_strided((1, 1, 1), (77, 5, 3))
    prepared = library.prepare_weight_scale(scale, 8, 128)
    out, groups = empty(128, 8), torch.zeros(128, dtype=torch.int32)
    library.fp8_contiguous(as_rows(a), odd, prepared, groups, out)
    assert difference_of(out, a.exact @ b.exact.T) < MOST_DIFFERENCE
    with pytest.raises(RuntimeError, match=r"t\.stride"):
        emulator.m_grouped_fp8_gemm_nt_contiguous(a.pair, (odd, prepared), out, groups)


def test_what_each_chip_takes() -> None:
    hopper, blackwell = DeepGEMM.emulated(HOPPER), DeepGEMM.emulated(BLACKWELL)
    assert (hopper.most_native_next_n, hopper.head_counts) == (2, (32, 64))
    assert (hopper.block_sizes, hopper.num_sms(), hopper.slot_multiple()) == ((64,), 132, 128)
    assert blackwell.most_native_next_n > 10**6
    assert (blackwell.head_counts, blackwell.block_sizes) == ((8, 16, 32, 64), (32, 64))
    assert not hopper.no_paged_mqa


def test_the_alignment_is_asked_for_every_time() -> None:
    module = UpstreamDeepGEMM(BLACKWELL)
    found = DeepGEMM.of(module, BLACKWELL, CPU)
    assert (found.alignment(), found.slot_multiple()) == (128, 128)
    module.set_mk_alignment_for_contiguous_layout(224)
    assert (found.alignment(), found.slot_multiple()) == (224, 224)
    assert DeepGEMM.of(module, BLACKWELL, CPU).alignment() == 224


def test_what_would_be_wrong_without_an_error_is_refused(library: DeepGEMM) -> None:
    emulator = ForkDeepGEMM(library.chip)
    a, b = rows(emulator, 2, 64, 128), weight(emulator, 2, 8, 128)
    scale = library.prepare_weight_scale(b.scale, 8, 128)
    held = torch.ones(2, dtype=torch.int32)
    with pytest.raises(ContractError, match="slots of 64 rows") as caught:
        library.fp8_masked(a.values, a.scale, b.values, scale, held, 1, empty(2, 64, 8))
    assert caught.value.reason is ReasonCode.CONTRACT_BROKEN
    with pytest.raises(ContractError, match=r"results of torch\.float32"):
        library.fp8_linear(as_rows(a), b.values[0], scale[0], torch.float32)
    with pytest.raises(ContractError, match="rows of kind plain"):
        library.fp8_linear(Rows(values=a.values[0], kind=Kind.PLAIN), b.values[0], scale[0])
    any_scale = Rows(values=a.values[0], scales=a.scale[0], kind=Kind.FP8)
    if library.packs_scales:
        with pytest.raises(ContractError, match="rows of kind fp8 reached"):
            library.fp8_linear(any_scale, b.values[0], scale[0])
    else:
        assert library.fp8_linear(any_scale, b.values[0], scale[0]).shape == (64, 8)
    with pytest.raises(ContractError, match="are 2 x 1"):
        library.prepare_weight_scale(torch.ones(3, 2, 1), 100, 128)


@pytest.mark.parametrize("wrong", [0.3, 0.0, -2.0, float("nan")])
def test_blackwell_is_given_powers_of_two_alone(wrong: float) -> None:
    scale = torch.ones(2, 1, 1)
    scale[1] = wrong
    with pytest.raises(ContractError, match="1 of 2 are no powers of two"):
        DeepGEMM.emulated(BLACKWELL).prepare_weight_scale(scale, 8, 128)
    assert DeepGEMM.emulated(HOPPER).prepare_weight_scale(scale, 8, 128) is not None


# ---- other versions


def refusal(version: object, **others: object) -> str:
    module = emulated(HOPPER, __version__=version, **others)
    return DeepGEMM.of(module, HOPPER, CPU).no_paged_mqa


@pytest.mark.parametrize(
    "version", ["2.4.2", "2.5.0.post20260424", "2.6.1", "0.1.0", "0.1.5.post1"]
)
def test_versions_whose_scores_are_used(version: str) -> None:
    assert not refusal(version)


@pytest.mark.parametrize(
    ("version", "why"),
    [
        ("2.3.0", "is older than 2.4.2"),
        ("2.8.0", "compressed logits"),
        ("0.2.3.post2", "compressed logits"),
        ("local", "does not tell"),
    ],
)
def test_versions_whose_scores_are_not_used(version: str, why: str) -> None:
    assert why in refusal(version)


def test_a_library_without_scores_multiplies_all_the_same() -> None:
    module = emulated(HOPPER, fp8_paged_mqa_logits=None)
    found = DeepGEMM.of(module, HOPPER, CPU)
    assert found.no_paged_mqa == "deep_gemm 2.6.1 has no fp8_paged_mqa_logits"
    assert ("paged_logits", "-") in found.describe()
    with pytest.raises(BackendUnusableError, match="cannot score pages"):
        found.paged_mqa_metadata(torch.ones(1, 1, dtype=torch.int32), 64, 132)
    with pytest.raises(BackendUnusableError, match="cannot score pages"):
        found.paged_mqa_logits(*[torch.ones(1)] * 6, 1)


@pytest.mark.parametrize(("version", "most"), [("2.4.2", 2), ("2.5.0", 10**6), ("0.1.4", 2)])
def test_older_versions_take_two_queries_on_blackwell(version: str, most: int) -> None:
    found = DeepGEMM.of(emulated(BLACKWELL, __version__=version), BLACKWELL, CPU)
    assert (found.most_native_next_n >= 10**6) == (most >= 10**6)


def test_a_library_without_a_product_is_unusable() -> None:
    missing = dict.fromkeys(
        (
            "m_grouped_fp8_gemm_nt_masked",
            "m_grouped_fp8_fp4_gemm_nt_masked",
            "fp8_m_grouped_gemm_nt_masked",
        )
    )
    with pytest.raises(BackendUnusableError, match="has no function for fp8_masked") as caught:
        DeepGEMM.of(emulated(HOPPER, **missing), HOPPER, CPU)
    assert "m_grouped_fp8_gemm_nt_masked or m_grouped" in str(caught.value)
    assert str(caught.value).splitlines()[-1].startswith("  remedy: pip install")


# ---- the first products


def test_arguments_of_layout_are_passed_by_position() -> None:
    """Their names have changed: m_indices, then grouped_layout."""
    made = UpstreamDeepGEMM(HOPPER)

    def contiguous(a: Any, b: Any, d: Any, m_indices: Any) -> None:
        made.m_grouped_fp8_gemm_nt_contiguous(a, b, d, m_indices)

    def masked(lhs: Any, rhs: Any, out: Any, counts: Any, hint: int) -> None:
        made.m_grouped_fp8_gemm_nt_masked(lhs, rhs, out, counts, hint)

    DeepGEMM.of(
        emulated(
            HOPPER,
            m_grouped_fp8_gemm_nt_contiguous=contiguous,
            m_grouped_fp8_gemm_nt_masked=masked,
        ),
        HOPPER,
        CPU,
    )


def zeros(a: Any, b: Any, d: torch.Tensor, *layout: Any) -> None:
    d.zero_()


def nothing(a: Any, b: Any, d: torch.Tensor, *layout: Any) -> None:
    d.fill_(float("nan"))


@pytest.mark.parametrize("kernel", [zeros, nothing], ids=["zeros", "NaN"])
@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("fp8_gemm_nt", "128 x 128 x 256"),
        ("m_grouped_fp8_gemm_nt_contiguous", "4 contiguous groups"),
        ("m_grouped_fp8_gemm_nt_masked", "4 masked groups"),
    ],
)
def test_a_library_that_multiplies_wrongly_is_unusable(name: str, what: str, kernel: Any) -> None:
    with pytest.raises(BackendUnusableError) as caught:
        DeepGEMM.of(emulated(HOPPER, **{name: kernel}), HOPPER, CPU)
    assert f"deep_gemm 2.6.1 multiplies {what} wrongly here" in caught.value.what
    assert caught.value.reason is ReasonCode.CREATE_FAILED


def test_the_group_of_a_row_is_tried() -> None:
    """A library that takes all rows for the first group's passes no product of groups."""
    made = UpstreamDeepGEMM(HOPPER)

    def first_group(a: Any, b: Any, d: Any, layout: torch.Tensor) -> None:
        made.m_grouped_fp8_gemm_nt_contiguous(a, b, d, layout.clamp(max=0))

    module = emulated(HOPPER, m_grouped_fp8_gemm_nt_contiguous=first_group)
    with pytest.raises(BackendUnusableError, match="4 contiguous groups wrongly"):
        DeepGEMM.of(module, HOPPER, CPU)


def test_what_a_first_product_dies_of_is_told_from_its_root() -> None:
    def dies(*_: Any) -> None:
        try:
            raise OSError("nvcc fatal : Unsupported gpu architecture 'compute_90a'")
        except OSError as error:
            raise RuntimeError("compilation failed") from error

    with pytest.raises(BackendUnusableError) as caught:
        DeepGEMM.of(emulated(HOPPER, fp8_gemm_nt=dies), HOPPER, CPU)
    first, *_, last = str(caught.value).splitlines()
    assert first == "OSError: nvcc fatal : Unsupported gpu architecture 'compute_90a'"
    assert last.startswith("  remedy: check that the CUDA toolkit at CUDA_HOME")


class Foreign:
    """A tensor of another library, which gives it away by its memory."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def __dlpack__(self, **_: Any) -> Any:
        return self._tensor.__dlpack__()

    def __dlpack_device__(self) -> Any:
        return self._tensor.__dlpack_device__()


def test_tensors_of_another_library_become_torchs() -> None:
    made = UpstreamDeepGEMM(HOPPER)

    def foreign(name: str) -> Any:
        return lambda *given: Foreign(getattr(made, name)(*given))

    names = ("get_paged_mqa_logits_metadata", "get_mn_major_tma_aligned_tensor")
    found = DeepGEMM.of(emulated(HOPPER, **{name: foreign(name) for name in names}), HOPPER, CPU)
    plan = found.paged_mqa_metadata(torch.full((3, 1), 700, dtype=torch.int32), 64, 132)
    assert isinstance(plan, torch.Tensor)
    assert plan.shape == (133, 2)
    assert found.prepare_row_scales(torch.ones(13, 2)).stride() == (1, 16)


def test_nothing_that_the_library_keeps_for_the_process_is_changed() -> None:
    module = emulated(HOPPER)
    for name in vars(module):
        if name.startswith("set_"):
            setattr(module, name, None)
    DeepGEMM.of(module, HOPPER, CPU)
