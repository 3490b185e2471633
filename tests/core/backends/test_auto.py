from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from mortise.backends import Stage, discover_backends, load_backend, probe_backends
from mortise.backends.auto import select_auto
from mortise.backends.probe import ProbeOutcome, probe_in_child
from mortise.backends.select import SelectionRule
from mortise.backends.validate import validate
from mortise.errors import BackendConflictError, BackendNotFoundError, BackendUnusableError
from mortise.spec.reasons import ReasonCode
from mortise.spec.roles import ModelRole
from mortise.testing.distributions import backend_code

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from mortise.backends import Candidate
    from mortise.testing.distributions import FakeDistribution

OWN = {"reference", "auto_a", "auto_b", "auto_c"}


def rows() -> tuple[Candidate, ...]:
    """The backends of this file and the reference, whatever else is installed."""
    return tuple(row for row in discover_backends() if row.name in OWN)


def answering(**outcomes: ProbeOutcome) -> Callable[[str], ProbeOutcome]:
    return lambda object_path: outcomes[object_path.split(".")[0].removeprefix("fake_")]


def found(arch: str = "") -> ProbeOutcome:
    return ProbeOutcome(None, "seen", arch)


ABSENT = ProbeOutcome(ReasonCode.DEVICE_ABSENT, "no such device")
CRASHED = ProbeOutcome(ReasonCode.PROBE_CRASHED, "its probe crashed (signal SIGSEGV)")


def test_the_one_backend_whose_device_is_here(installed: FakeDistribution) -> None:
    installed.add_backend("auto_a")
    installed.add_backend("auto_b")
    selection = select_auto(rows(), answering(auto_a=ABSENT, auto_b=found()))
    assert selection.row.name == "auto_b"
    assert selection.rule is SelectionRule.AUTO
    reasons = {row.name: row.reason for row in selection.candidates}
    assert reasons["auto_a"] is ReasonCode.DEVICE_ABSENT
    assert reasons["reference"] is ReasonCode.NOT_SELECTED


def test_the_most_exact_architecture_goes_first(installed: FakeDistribution) -> None:
    installed.add_backend("auto_a", manifest={"arch": ["gen*"]})
    installed.add_backend("auto_b", manifest={"arch": ["gen1", "gen2"]})
    installed.add_backend("auto_c")
    probe = answering(auto_a=found("gen2"), auto_b=found("gen2"), auto_c=found("gen2"))
    assert select_auto(rows(), probe).row.name == "auto_b"


def test_another_architecture_is_a_mismatch(installed: FakeDistribution) -> None:
    installed.add_backend("auto_a", manifest={"arch": ["gen1"]})
    selection = select_auto(rows(), answering(auto_a=found("gen3")))
    assert selection.row.name == "reference"
    (row,) = [row for row in selection.candidates if row.name == "auto_a"]
    assert row.reason is ReasonCode.ARCH_MISMATCH
    assert row.explanation == "made for gen1, found gen3"


def test_a_tie_is_an_error(installed: FakeDistribution) -> None:
    installed.add_backend("auto_a")
    installed.add_backend("auto_b")
    with pytest.raises(BackendConflictError) as caught:
        select_auto(rows(), answering(auto_a=found(), auto_b=found()))
    assert caught.value.reason is ReasonCode.AMBIGUOUS
    assert str(caught.value).endswith("configure one of them by name: auto_a, auto_b")


def test_namesakes_tie_and_are_told_apart(
    installed: FakeDistribution, elsewhere: FakeDistribution
) -> None:
    installed.add_backend("auto_a", distribution="first", package="fake_first")
    elsewhere.add_backend("auto_a", distribution="second", package="fake_second")
    with pytest.raises(BackendConflictError, match="first:auto_a, second:auto_a"):
        select_auto(rows(), answering(first=found(), second=found()))


def test_the_reference_is_last_and_says_why(installed: FakeDistribution) -> None:
    installed.add_backend("auto_a")
    installed.add_backend("auto_b", manifest={"engine": ">=99"})
    selection = select_auto(rows(), answering(auto_a=ABSENT))
    assert selection.row.name == "reference"
    assert selection.rule is SelectionRule.REFERENCE_LAST
    assert "auto_a: no such device" in selection.reason
    assert "auto_b: it needs mortise-core >=99" in selection.reason


def test_a_broken_backend_is_never_replaced_by_the_reference(installed: FakeDistribution) -> None:
    installed.add_backend("auto_a")
    with pytest.raises(BackendUnusableError, match="SIGSEGV") as caught:
        select_auto(rows(), answering(auto_a=CRASHED))
    assert caught.value.reason is ReasonCode.PROBE_CRASHED


def test_a_broken_backend_does_not_stop_one_that_serves(installed: FakeDistribution) -> None:
    installed.add_backend("auto_a")
    installed.add_backend("auto_b")
    selection = select_auto(rows(), answering(auto_a=CRASHED, auto_b=found()))
    assert selection.row.name == "auto_b"
    (row,) = [row for row in selection.candidates if row.name == "auto_a"]
    assert row.reason is ReasonCode.PROBE_CRASHED


def test_a_machine_without_the_device_node_is_not_probed(
    installed: FakeDistribution, tmp_path: Path
) -> None:
    pattern = str(tmp_path / "node*")
    installed.add_backend("auto_a", manifest={"devices": [pattern]})
    selection = select_auto(rows(), answering())
    assert selection.row.name == "reference"
    assert f"no device node like {pattern}" in selection.reason
    (tmp_path / "node0").touch()
    assert select_auto(rows(), answering(auto_a=found())).row.name == "auto_a"


def test_nothing_at_all_is_an_error() -> None:
    with pytest.raises(BackendNotFoundError):
        select_auto(())
    assert validate((), "1") == ()


PROBING = """
from mortise.plugin import Backend, DeviceProbe

class FakeBackend(Backend):
    @classmethod
    def probe(cls):
        {body}
"""


def probing(body: str) -> str:
    """A class that is asked and never created; without torch the child starts at once."""
    return PROBING.format(body=body)


@pytest.mark.parametrize(
    ("code", "reason", "said"),
    [
        (probing("return DeviceProbe(found=True, arch='gen1')"), None, ""),
        (
            probing("return DeviceProbe(found=False, reason='driver is off')"),
            ReasonCode.DEVICE_ABSENT,
            "driver is off",
        ),
        (
            probing("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"),
            ReasonCode.PROBE_CRASHED,
            "signal SIGSEGV",
        ),
        (
            probing("import os, sys; print('driver panic', file=sys.stderr); os._exit(7)"),
            ReasonCode.PROBE_CRASHED,
            "exit code 7): driver panic",
        ),
        (probing("raise RuntimeError('no driver')"), ReasonCode.IMPORT_FAILED, "no driver"),
        ("import not_a_vendor_library", ReasonCode.IMPORT_FAILED, "not_a_vendor_library"),
        (probing("print('noise'); return DeviceProbe(found=True)"), None, ""),
    ],
)
def test_a_probe_runs_in_a_child(
    installed: FakeDistribution, code: str, reason: ReasonCode | None, said: str
) -> None:
    installed.add_backend("auto_a", code=code)
    outcome = probe_in_child("fake_auto_a.backend:FakeBackend")
    assert outcome.reason is reason
    assert said in outcome.explanation


def test_a_probe_has_a_time_limit(installed: FakeDistribution) -> None:
    installed.add_backend("auto_a", code="import time; time.sleep(60)")
    outcome = probe_in_child("fake_auto_a.backend:FakeBackend", time_limit_s=0.5)
    assert outcome.reason is ReasonCode.PROBE_TIMEOUT
    assert "0.5 s" in outcome.explanation


def test_auto_loads_what_its_probe_chose(installed: FakeDistribution) -> None:
    installed.add_backend("auto_a")
    bound = load_backend("auto", role=ModelRole.MAIN, candidates=rows())
    assert bound.ops.backend.name == "auto_a"
    assert bound.row.stage is Stage.BOUND
    assert bound.decisions[0].rule == SelectionRule.AUTO
    assert bound.decisions[0].reason == "needs no device"


REFUSING = """
@classmethod
def probe(cls):
    from mortise.plugin import BackendUnusableError, ReasonCode
    raise BackendUnusableError(
        "it is another", reason=ReasonCode.ARCH_MISMATCH, details=["seen twice"], remedy="buy one"
    )
"""


def test_a_probe_that_says_what_is_wrong_is_told_with_its_code_and_remedy(
    installed: FakeDistribution,
) -> None:
    installed.add_backend(
        "auto_a", code=backend_code(REFUSING), manifest={"devices": ["/dev/null"]}
    )
    (row,) = [one for one in probe_backends(rows()) if one.name == "auto_a"]
    assert not row.usable
    assert (row.reason, row.explanation) == (ReasonCode.ARCH_MISMATCH, "it is another; seen twice")
    assert row.remedy == "buy one"


def test_all_are_probed_but_the_reference(installed: FakeDistribution) -> None:
    installed.add_backend("auto_a", manifest={"devices": ["/dev/no-such-node*"]})
    installed.add_backend("auto_b")
    probed = {row.name: row for row in probe_backends(rows(), answering(auto_b=found()))}
    assert probed["auto_a"].reason is ReasonCode.DEVICE_ABSENT
    assert "/dev/no-such-node*" in probed["auto_a"].explanation
    assert "driver" in probed["auto_a"].remedy
    assert (probed["auto_b"].usable, probed["auto_b"].explanation) == (True, "seen")
    assert probed["reference"].usable
