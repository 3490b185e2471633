"""Each mistake that an author might make is found, named, and found in nothing that is right."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from mortise.conformance import CHECKS, Level
from mortise.conformance.checks import items
from mortise.conformance.records import FaultError, NotAskedError
from mortise.conformance.subject import Subject
from mortise.testing.distributions import FakeDistribution
from tests.conformance.broken_backends import CODE, MANIFEST, MISTAKES, Mistake

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NAMED_IN_THE_ISSUE = {
    "swapped scales",
    "off-by-one page",
    "dropped last token",
    "wrong nibble order",
    "late None",
    "process-wide state in use",
    "wrong dtype",
    "silent copy",
    "stale schedule",
    "read past the last group",
    "unsorted group list",
    "aliasing",
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def faults(subject: Subject, name: str) -> list[str]:
    """What one check says, over all its cases."""
    (check,) = (check for check in CHECKS if check.name == name)
    found = []
    for item in items(subject, check.level):
        if item.check is not check:
            continue
        try:
            item.run(subject)
        except FaultError as fault:
            found.append(str(fault))
        except NotAskedError:
            continue
    return found


def test_the_classic_mistakes_are_among_them() -> None:
    assert {mistake.name for mistake in MISTAKES} >= NAMED_IN_THE_ISSUE


@pytest.mark.parametrize("mistake", MISTAKES, ids=str)
def test_the_mistake_is_found_and_named(mistake: Mistake, tmp_path: Path) -> None:
    manifest = {**MANIFEST}
    if "nvfp4" in " ".join(mistake.words):
        stated = MANIFEST["capabilities"]
        manifest["capabilities"] = {**stated, "schemes": [*stated["schemes"], "nvfp4"]}
    distributions = FakeDistribution(tmp_path)
    distributions.add_backend("broken", manifest=manifest, code=mistake.code)
    with distributions.installed():
        found = faults(Subject("broken"), mistake.check)
    assert found, f"{mistake.check} finds nothing"
    named = [text for text in found if all(word in text for word in mistake.words)]
    assert named, "\n---\n".join(found)


def test_the_right_backend_passes_everything(tmp_path: Path) -> None:
    distributions = FakeDistribution(tmp_path)
    distributions.add_backend("right", manifest=MANIFEST, code=CODE)
    asked, found = set(), []
    with distributions.installed():
        subject = Subject("right")
        for level in Level:
            for item in items(subject, level):
                try:
                    item.run(subject)
                except FaultError as fault:
                    found.append(f"{item}: {fault}")
                except NotAskedError:
                    continue
                asked.add(item.check.name)
    assert not found, "\n".join(found)
    # Whatever finds a mistake was asked of the backend without one.
    assert asked >= {mistake.check for mistake in MISTAKES}


def test_a_claimed_capture_is_skipped_aloud_off_the_device(tmp_path: Path) -> None:
    claimed = CODE.replace("schemes=SCHEMES,", "schemes=SCHEMES,\n            graph_capture=True,")
    distributions = FakeDistribution(tmp_path)
    distributions.add_backend("claiming", manifest=MANIFEST, code=claimed)
    with distributions.installed():
        subject = Subject("claiming")
        captured = [
            item
            for item in items(subject, Level.DEVICE)
            if item.check.name == "captured-experts-are-replayed"
        ]
        assert captured
        for item in captured:
            with pytest.raises(NotAskedError, match="NOT CAPTURED: a graph needs a device"):
                item.run(subject)


def test_a_hook_that_the_reference_answers_is_not_asked(tmp_path: Path) -> None:
    distributions = FakeDistribution(tmp_path)
    distributions.add_backend("small")
    with distributions.installed():
        subject = Subject("small")
        asked = {item.check.hook for item in items(subject, Level.DEVICE) if item.case is not None}
        (experts,) = (
            item
            for item in items(subject, Level.DEVICE)
            if item.check.name == "experts-match-the-reference"
        )
        with pytest.raises(NotAskedError, match="the reference answers quantized_moe_apply"):
            experts.run(subject)
    assert asked == {"qkv_split"}
