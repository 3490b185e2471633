"""The emulated fork has the fork's names, parameters, order and defaults."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import pytest
from plugins.cuda_common.tests.oracle.vendor import Signature, surface

from mortise_cuda_common.emulator.deep_gemm.fork import ForkDeepGEMM
from mortise_cuda_common.emulator.deep_gemm.upstream import UpstreamDeepGEMM

if TYPE_CHECKING:
    from pathlib import Path

EMULATED = sorted(name for name in dir(ForkDeepGEMM) if not name.startswith("_"))


def signature_of(name: str) -> Signature:
    _, *parameters = inspect.signature(getattr(ForkDeepGEMM, name)).parameters.values()
    return tuple(
        (one.name, "" if one.default is inspect.Parameter.empty else repr(one.default))
        for one in parameters
    )


@pytest.fixture(scope="module")
def theirs(vendor: Path) -> dict[str, Signature | None]:
    return surface(vendor)


@pytest.mark.parametrize("name", EMULATED)
def test_a_function_has_the_vendors_parameters(
    theirs: dict[str, Signature | None], name: str
) -> None:
    assert name in theirs
    if theirs[name] is not None:
        assert signature_of(name) == theirs[name]


def test_the_comparison_sees_parameters(theirs: dict[str, Signature | None]) -> None:
    compared = [name for name in EMULATED if theirs[name] is not None]
    assert len(compared) > 15
    assert theirs["fp8_paged_mqa_logits"] != theirs["fp8_mqa_logits"]


def test_the_fork_lacks_what_the_library_has(theirs: dict[str, Signature | None]) -> None:
    only_upstream = set(dir(UpstreamDeepGEMM)) - set(dir(ForkDeepGEMM))
    assert only_upstream == {"m_grouped_fp8_gemm_nt_masked"}
    assert not only_upstream & set(theirs)


def test_the_version_is_the_wheels(vendor: Path) -> None:
    assert ForkDeepGEMM.__version__ == (vendor / "VERSION").read_text(encoding="utf-8").strip()
