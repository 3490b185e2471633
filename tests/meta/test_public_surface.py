"""The public surface changes on purpose or not at all."""

from __future__ import annotations

import difflib

from tests.meta.public_surface import surface
from tests.meta.tree import REPOSITORY

FROZEN = REPOSITORY / "tests" / "meta" / "public_api.txt"
REGENERATE = "python -m tests.meta.public_surface > tests/meta/public_api.txt"


def test_the_surface_is_the_frozen_one() -> None:
    frozen = FROZEN.read_text(encoding="utf-8")
    difference = difflib.unified_diff(
        frozen.splitlines(), surface().splitlines(), "frozen", "found", lineterm="", n=0
    )
    changed = "\n".join(difference)
    assert not changed, (
        f"the public surface changed; if that is meant, run:\n{REGENERATE}\n{changed}"
    )
