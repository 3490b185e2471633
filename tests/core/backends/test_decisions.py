from __future__ import annotations

import dataclasses

import pytest

from mortise.backends import Decision, DecisionLog
from mortise.spec.roles import ModelRole


def decision(subject: str) -> Decision:
    return Decision(
        role=ModelRole.MAIN, subject=subject, value="bf16", rule="override", reason="asked for"
    )


def test_a_log_keeps_the_order() -> None:
    log = DecisionLog([decision("first")])
    log.add(decision("second"))
    log.extend([decision("third"), decision("first")])
    assert [found.subject for found in log] == ["first", "second", "third", "first"]
    assert log.about("first") == (decision("first"), decision("first"))
    assert len(log) == 4


def test_two_logs_share_nothing() -> None:
    one, two = DecisionLog(), DecisionLog()
    one.add(decision("first"))
    assert len(two) == 0


def test_a_decision_does_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        decision("first").value = "int8"  # type: ignore[misc]
