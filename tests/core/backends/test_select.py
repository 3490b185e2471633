from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from mortise.backends import Stage, discover_backends
from mortise.backends.select import SelectionRule, select_by_name
from mortise.errors import BackendConflictError, BackendNotFoundError, BackendUnusableError
from mortise.spec.reasons import ReasonCode

if TYPE_CHECKING:
    from mortise.testing.distributions import FakeDistribution


def test_the_named_row_is_taken_and_the_others_say_so(installed: FakeDistribution) -> None:
    installed.add_backend("toy")
    installed.add_backend("other")
    selection = select_by_name(discover_backends(), "toy")
    assert selection.row.stage is Stage.SELECTED
    assert selection.rule is SelectionRule.NAMED
    reasons = {row.name: row.reason for row in selection.candidates}
    assert reasons["toy"] is ReasonCode.SELECTED
    assert reasons["other"] is reasons["reference"] is ReasonCode.NOT_SELECTED


def test_an_unknown_name_gets_close_matches_and_the_searched_place(
    installed: FakeDistribution,
) -> None:
    installed.add_backend("toy")
    with pytest.raises(BackendNotFoundError) as caught:
        select_by_name(discover_backends(), "refrence")
    message = str(caught.value)
    assert caught.value.reason is ReasonCode.NOT_FOUND
    assert message.startswith("no backend 'refrence' is installed")
    assert f"searched: {sys.prefix}" in message
    assert "toy" in message
    assert "mortise-toy 1.0" in message
    assert message.splitlines()[-1] == "  remedy: did you mean 'reference'?"


def test_a_name_like_nothing_gets_no_suggestion() -> None:
    with pytest.raises(BackendNotFoundError, match="install the distribution"):
        select_by_name(discover_backends(), "zzz")


def test_two_distributions_of_one_name_are_named_with_their_paths(
    installed: FakeDistribution, elsewhere: FakeDistribution
) -> None:
    first = installed.add_backend("toy", distribution="first", package="fake_first")
    second = elsewhere.add_backend("toy", distribution="second", package="fake_second")
    with pytest.raises(BackendConflictError) as caught:
        select_by_name(discover_backends(), "toy")
    message = str(caught.value)
    assert caught.value.reason is ReasonCode.NAME_DUPLICATE
    assert f"first 1.0 ({first / 'backend.toml'})" in message
    assert f"second 1.0 ({second / 'backend.toml'})" in message
    assert "'first:toy' or 'second:toy'" in message


def test_the_distribution_tells_namesakes_apart(
    installed: FakeDistribution, elsewhere: FakeDistribution
) -> None:
    installed.add_backend("toy", distribution="first", package="fake_first")
    elsewhere.add_backend("toy", distribution="Second_Dist", package="fake_second")
    selection = select_by_name(discover_backends(), "second-dist:toy")
    assert selection.row.distribution == "second-dist"
    assert select_by_name(discover_backends(), "Second_Dist:toy").row == selection.row


def test_a_namesake_that_cannot_serve_still_makes_the_name_ambiguous(
    installed: FakeDistribution, elsewhere: FakeDistribution
) -> None:
    installed.add_backend("toy", distribution="first", package="fake_first")
    elsewhere.add_backend(
        "toy", distribution="second", package="fake_second", manifest={"engine": ">=99"}
    )
    with pytest.raises(BackendConflictError):
        select_by_name(discover_backends(), "toy")


def test_nobody_can_take_the_reference_away(installed: FakeDistribution) -> None:
    installed.add_backend("reference", distribution="mortise-squatter")
    assert select_by_name(discover_backends(), "reference").row.distribution == "mortise-core"


def test_a_named_backend_that_cannot_serve_is_an_error_with_the_table(
    installed: FakeDistribution,
) -> None:
    installed.add_backend("toy", manifest={"status": "planned", "status_reason": "no kernels"})
    with pytest.raises(BackendUnusableError) as caught:
        select_by_name(discover_backends(), "toy")
    assert caught.value.reason is ReasonCode.CANNOT_SERVE_YET
    first, *middle, last = str(caught.value).splitlines()
    assert first == "backend 'toy' cannot serve: no kernels"
    assert any("reference" in line and "ok" in line for line in middle)
    assert last == "  remedy: use another backend, or a later mortise-toy"
