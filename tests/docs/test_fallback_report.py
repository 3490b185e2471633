"""The page about fallbacks shows rows as ``mortise explain`` has them, and knows every rule."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from mortise.backends import load_backend
from mortise.backends.load import ProviderRule
from mortise.spec.hooks import HOOKS
from mortise.spec.roles import ModelRole
from mortise.testing.distributions import FakeDistribution
from tests.docs.pages import DOCS, blocks_of

if TYPE_CHECKING:
    from pathlib import Path

PAGE = DOCS / "how-to" / "read-a-fallback-report.md"


def test_the_rows_are_those_of_a_backend_with_one_hook(tmp_path: Path) -> None:
    distribution = FakeDistribution(tmp_path)
    distribution.add_backend("tenon")
    with distribution.installed():
        bound = load_backend("tenon", role=ModelRole.MAIN)
    rows = {
        (
            "main",
            one.subject,
            HOOKS[one.subject].phase.value,
            one.value,
            str(one.rule),
            one.reason,
        )
        for one in bound.decisions
        if one.subject in HOOKS
    }
    lines = [
        tuple(re.split(r"  +", line))
        for block in blocks_of(PAGE)
        if block.language == "text"
        for line in block.text.splitlines()
    ]
    assert len(lines) == 4
    assert set(lines[1:]) <= rows


def test_every_rule_is_explained_in_order() -> None:
    text = PAGE.read_text(encoding="utf-8")
    shown = re.findall(r"^\| `(\w+)` \|", text, flags=re.MULTILINE)
    assert shown == [rule.value for rule in ProviderRule]
