"""What ``mortise doctor`` says of a run on Ascend, before anything of it is started."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from mortise.errors import ConfigError
from mortise.plugin import DispatchMode, DoctorRequest, Finding, Verdict
from mortise.testing.distributions import FakeDistribution
from mortise_npu_ascend.backend import AscendBackend
from mortise_npu_ascend.doctor import findings
from mortise_npu_ascend.environment import INT8_DISPATCH, VendorEnvironment

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DEEPSEEK = DoctorRequest(
    device=None,
    options={"generation": "A3"},
    world_size=16,
    modes=tuple(DispatchMode),
    max_tokens=4096,
    max_tokens_per_rank=128,
    hidden_size=7168,
    num_experts=256,
    num_experts_per_tok=8,
)
UNSET = VendorEnvironment()


@pytest.fixture
def installed(tmp_path: Path) -> Iterator[FakeDistribution]:
    """torch_npu for this torch, triton-ascend and deep_ep, as far as an installer leaves traces."""
    distributions = FakeDistribution(tmp_path)
    version = ".".join(torch.__version__.split(".")[:2]) + ".0"
    distributions.add_metadata("torch-npu", version)
    distributions.add_metadata("triton-ascend", "3.2.0")
    for package in ("torch_npu", "deep_ep"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise RuntimeError('imported')")
        distributions.packages.append(package)
    with distributions.installed():
        yield distributions
    assert "torch_npu" not in sys.modules


def looked(request: DoctorRequest, environment: VendorEnvironment = UNSET) -> dict[str, Finding]:
    found = {finding.name: finding for finding in findings(request, environment)}
    assert all(finding.remedy for finding in found.values() if finding.verdict is Verdict.FAIL)
    return found


@pytest.mark.usefixtures("installed")
def test_the_buffer_is_computed_from_the_model_and_the_processes() -> None:
    small = looked(DEEPSEEK)["HCCL_BUFFSIZE"]
    assert small.verdict is Verdict.FAIL
    # test_npu_ascend_exchange_choice works both numbers out.
    assert "gives DeepEP 200 MB; 16 processes need, in MB:" in small.found
    assert "normal on A3 2036; low_latency on A3 960" in small.found
    assert small.remedy == "set HCCL_BUFFSIZE to 2036 on every rank, before they start"
    assert looked(DEEPSEEK, VendorEnvironment(buffer="2036"))["HCCL_BUFFSIZE"].verdict is Verdict.OK
    own = looked(DEEPSEEK, VendorEnvironment(buffer="9000", own_buffer="1000"))
    assert own["DEEPEP_HCCL_BUFFSIZE"].verdict is Verdict.WARN, "enough for one exchange"
    assert "HCCL_BUFFSIZE" not in own


@pytest.mark.usefixtures("installed")
def test_every_generation_is_told_where_the_chip_is_not_said() -> None:
    found = looked(replace(DEEPSEEK, options={}, world_size=8))["HCCL_BUFFSIZE"]
    for generation in ("A2", "A3", "A5"):
        assert f"normal on {generation} " in found.found
    one = looked(replace(DEEPSEEK, options={}, world_size=1))["HCCL_BUFFSIZE"]
    assert one.verdict is Verdict.NOTE
    assert one.found.startswith("8 processes would need, in MB: normal on A2 ")


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 256},
        {"num_experts": 0},
        {"options": {"exchange": "portable"}},
        {"device": "emulated"},
        {"num_experts": 250},
    ],
)
def test_no_buffer_is_asked_for_where_deep_ep_sends_nothing(changes: dict) -> None:
    assert "HCCL_BUFFSIZE" not in looked(replace(DEEPSEEK, **changes))


@pytest.mark.usefixtures("installed")
def test_a_buffer_that_is_no_number() -> None:
    found = looked(DEEPSEEK, VendorEnvironment(buffer="lots"))["HCCL_BUFFSIZE"]
    assert (found.verdict, found.found) == (
        Verdict.FAIL,
        "environment variable HCCL_BUFFSIZE is 'lots'",
    )


@pytest.mark.usefixtures("installed")
def test_steps_that_are_too_long_for_deep_ep() -> None:
    found = looked(replace(DEEPSEEK, max_tokens=9000))["tokens of a step"]
    assert found.verdict is Verdict.FAIL
    assert found.remedy == "set scheduler.max_num_batched_tokens to at most 8192"
    assert "tokens of a step" not in looked(replace(DEEPSEEK, max_tokens=9000, world_size=1))


@pytest.mark.usefixtures("installed")
def test_libraries_that_are_installed_are_not_imported() -> None:
    found = looked(DEEPSEEK)
    assert found["torch_npu"].verdict is found["triton-ascend"].verdict is Verdict.OK
    assert "exchange" not in found


def test_libraries_that_are_missing() -> None:
    found = looked(DEEPSEEK)
    assert found["torch_npu"].verdict is Verdict.FAIL
    assert found["torch_npu"].remedy.startswith('pip install "torch-npu==')
    assert found["triton-ascend"].verdict is Verdict.NOTE
    assert found["exchange"].verdict is Verdict.NOTE
    assert "rows travel by the core's exchange over HCCL" in found["exchange"].found
    demanded = looked(replace(DEEPSEEK, options={"exchange": "deep_ep"}))
    assert demanded["exchange"].verdict is Verdict.FAIL
    assert "exchange" not in looked(replace(DEEPSEEK, world_size=1))


def test_another_torch_npu_than_this_torchs(tmp_path: Path) -> None:
    distributions = FakeDistribution(tmp_path)
    distributions.add_metadata("torch-npu", "1.11.0")
    (tmp_path / "torch_npu.py").write_text("")
    with distributions.installed():
        found = looked(DEEPSEEK)["torch_npu"]
    assert found.verdict is Verdict.FAIL
    assert found.found.startswith("torch_npu 1.11.0 is installed beside torch ")


def test_variables_that_decide_for_a_whole_process() -> None:
    found = looked(
        replace(DEEPSEEK, device="emulated"),
        VendorEnvironment(int8_dispatch="1", expert_counts="2"),
    )
    assert found[INT8_DISPATCH].verdict is Verdict.WARN
    assert "is not heard" in found[INT8_DISPATCH].found
    assert found["MOE_EXPERT_TOKEN_NUMS_TYPE"].verdict is Verdict.FAIL


def test_an_emulated_chip_needs_nothing() -> None:
    found = looked(replace(DEEPSEEK, device="emulated"))
    assert list(found) == ["device"]
    assert found["device"].found == "an emulated Ascend A3, which needs no library"


def test_the_backend_class_is_the_one_that_is_asked() -> None:
    (first, *_) = AscendBackend.doctor(replace(DEEPSEEK, device="emulated"))
    assert first.name == "device"
    with pytest.raises(ConfigError, match="unknown key 'exchnage', did you mean 'exchange'"):
        AscendBackend.doctor(replace(DEEPSEEK, options={"exchnage": "auto"}))
