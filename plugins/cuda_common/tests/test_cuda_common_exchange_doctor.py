"""The doctor says which exchanges of a run DeepEP carries, and how much memory they take."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mortise.plugin import DispatchMode, DoctorRequest, Verdict
from mortise_cuda_common import doctor
from mortise_cuda_common.chip import Architecture
from mortise_cuda_common.environment import VendorEnvironment
from mortise_cuda_common.exchange_doctor import findings
from mortise_cuda_common.options import CommonOptions

UNSET = VendorEnvironment()
DEEPSEEK = DoctorRequest(
    device=None,
    world_size=8,
    modes=tuple(DispatchMode),
    max_tokens=4096,
    max_tokens_per_rank=128,
    hidden_size=7168,
    num_experts=256,
    num_experts_per_tok=8,
)


def test_a_large_model_is_carried_in_both_modes() -> None:
    found = list(findings(DEEPSEEK, 132, UNSET, demanded=False))
    assert [one.name for one in found] == ["DeepEP, normal", "DeepEP, low_latency"]
    assert {one.verdict for one in found} == {Verdict.OK}
    # 10 channels of 8 ranks' 256 tokens: a row, its source, 128 numbers and weights of experts and
    # 128 scales, and the queue's five numbers.
    normal = 10 * 8 * (5 * 4 + 256 * (7168 * 2 + 8 + 128 * (8 + 4) + 128 * 4))
    # Both buffers hold 256 experts' 128 rows twice, with two numbers for each 128 columns.
    fast = 2 * (2 * 256 * 128 * (7168 * 2 + 7168 // 128 * 4) + 256 * 4)
    for one, needed in zip(found, (normal, fast), strict=True):
        assert f"buffer of {-(-needed // 2**20)} MB on each GPU" in one.found


def test_of_several_machines_only_the_low_latency_buffer_is_known() -> None:
    normal, fast = findings(replace(DEEPSEEK, world_size=16), 132, UNSET, demanded=False)
    assert normal.found == "carries the model's rows"
    assert "buffer of" in fast.found


@pytest.mark.parametrize("demanded", [False, True])
def test_what_is_not_carried_is_told_with_the_remedy(demanded: bool) -> None:
    request = replace(DEEPSEEK, max_tokens_per_rank=1024)
    normal, fast = findings(request, 132, UNSET, demanded=demanded)
    assert normal.verdict is Verdict.OK
    assert fast.verdict is (Verdict.FAIL if demanded else Verdict.NOTE)
    assert "needs queues of 2050" in fast.found
    assert ("the core's exchange over NCCL does" in fast.found) is not demanded
    assert "at most 511" in fast.remedy


@pytest.mark.parametrize("changes", [{"num_experts": 0}, {"hidden_size": 0}, {"modes": ()}])
def test_nothing_is_said_of_a_model_that_cannot_be_read(changes: dict[str, Any]) -> None:
    assert list(findings(replace(DEEPSEEK, **changes), 132, UNSET, demanded=True)) == []


def test_one_process_and_another_exchange_hear_nothing_of_deep_ep() -> None:
    def names(request: DoctorRequest, **options: Any) -> list[str]:
        found = doctor.findings(request, CommonOptions(**options), Architecture.SM90)
        return [one.name for one in found if "DeepEP" in one.name]

    assert names(DEEPSEEK) == ["DeepEP", "DeepEP, normal", "DeepEP, low_latency"]
    assert names(DEEPSEEK, exchange="portable") == []
    assert names(replace(DEEPSEEK, world_size=1)) == []
