from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from mortise.backends import Stage, discover_backends, load_backend
from mortise.errors import BackendUnusableError
from mortise.spec.hooks import HOOKS
from mortise.spec.reasons import ReasonCode
from mortise.spec.roles import ModelRole
from mortise.testing.distributions import QKV_SPLIT, backend_code

if TYPE_CHECKING:
    from mortise.testing.distributions import FakeDistribution


def test_the_reference_answers_every_hook() -> None:
    bound = load_backend("reference", role=ModelRole.MAIN, source="engine.toml")
    chosen, *providers = bound.decisions
    assert chosen.subject == "backend"
    assert chosen.source == "engine.toml"
    assert [decision.subject for decision in providers] == list(HOOKS)
    assert bound.fallbacks == ()
    assert bound.row.stage is Stage.BOUND
    assert bound.row in bound.candidates


def test_hooks_that_a_backend_lacks_are_the_references_and_said_so(
    installed: FakeDistribution,
) -> None:
    installed.add_backend("toy", version="3.2")
    bound = load_backend("toy", role=ModelRole.DRAFT)
    rules = {decision.subject: decision.rule for decision in bound.decisions}
    assert rules.pop("backend") == "named"
    assert rules.pop("qkv_split") == "implemented"
    assert set(rules.values()) == {"fallback"}
    assert {decision.subject for decision in bound.fallbacks} == HOOKS.keys() - {"qkv_split"}
    for decision in bound.fallbacks:
        assert decision.role is ModelRole.DRAFT
        assert decision.value.startswith("reference (mortise-core ")
        assert decision.reason.startswith("toy does not implement it")
        assert "mortise-toy 3.2" in decision.source
    assert bound.ops.backend.name == "toy"


def test_strict_denies_the_reference_as_a_substitute(installed: FakeDistribution) -> None:
    installed.add_backend("toy")
    with pytest.raises(BackendUnusableError) as caught:
        load_backend("toy", role=ModelRole.MAIN, strict=True)
    assert caught.value.reason is ReasonCode.DENIED_BY_CONFIG
    assert "does not implement resolve_dispatch_dtype" in caught.value.what
    assert load_backend("reference", role=ModelRole.MAIN, strict=True).fallbacks == ()


def test_a_table_read_once_serves_both_roles(installed: FakeDistribution) -> None:
    installed.add_backend("toy")
    rows = discover_backends()
    main = load_backend("toy", role=ModelRole.MAIN, candidates=rows)
    draft = load_backend("toy", role=ModelRole.DRAFT, candidates=rows)
    assert main.candidates == draft.candidates
    assert rows == discover_backends(), "the rows that were handed in stay as they were"


@pytest.mark.parametrize("name", ["reference", "mortise-core:reference", "auto"])
def test_the_chosen_backend_gets_its_own_table(name: str) -> None:
    rows = [row for row in discover_backends() if row.name == "reference"]
    tables = {"reference": {"num_workers": 7}, "other": {"speed": 3}}
    bound = load_backend(name, role=ModelRole.MAIN, options_by_name=tables, candidates=rows)
    assert bound.ops.capabilities.num_workers == 7
    bound = load_backend(
        name, role=ModelRole.MAIN, options={}, options_by_name=tables, candidates=rows
    )
    assert bound.ops.capabilities.num_workers == 4


CHOOSING = """
def choices(self):
    from mortise.plugin import BackendChoice
    return [BackendChoice(subject="a library", value="not used", reason="it is not installed")]
"""


def test_what_a_backend_chose_by_itself_is_a_decision(installed: FakeDistribution) -> None:
    installed.add_backend("toy", code=backend_code(QKV_SPLIT + CHOOSING))
    (found,) = [
        one for one in load_backend("toy", role=ModelRole.DRAFT).decisions if one.rule == "backend"
    ]
    assert (found.subject, found.value, found.role) == ("a library", "not used", ModelRole.DRAFT)
    assert found.reason == "it is not installed"
    assert "mortise-toy 1.0" in found.source
