"""Pictures are described in words, stand alone, and name hooks and codes that exist."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from typing import TYPE_CHECKING

import pytest

from mortise.spec.hooks import HOOKS
from mortise.spec.reasons import ReasonCode
from tests.docs.pages import DOCS, pages

if TYPE_CHECKING:
    from pathlib import Path

SVG = "{http://www.w3.org/2000/svg}"
PICTURES = tuple(sorted(DOCS.rglob("*.svg")))
# Plots of measurements are in the reference.
DRAWN_BY_HAND = tuple(sorted((DOCS / "explanation").glob("*.svg")))


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.stem)
def test_a_picture_is_described_and_stands_alone(path: Path) -> None:
    root = ET.parse(path).getroot()
    assert root.get("role") == "img"
    assert {child.tag for child in root} >= {f"{SVG}title", f"{SVG}desc"}
    assert not [element for element in root.iter() if element.tag == f"{SVG}image"]
    assert "prefers-color-scheme: dark" in (root.findtext(f"{SVG}style") or "")


@pytest.mark.parametrize("path", DRAWN_BY_HAND, ids=lambda path: path.stem)
def test_a_picture_names_hooks_and_reason_codes_that_exist(path: Path) -> None:
    named = names_in(path)
    assert named
    assert named <= {*HOOKS, *ReasonCode}


def test_the_life_of_a_backend_can_fail_as_every_code() -> None:
    well = {ReasonCode.SELECTED, ReasonCode.NOT_SELECTED}
    assert names_in(DOCS / "explanation/life-of-a-backend.svg") == set(ReasonCode) - well


def names_in(path: Path) -> set[str]:
    """Texts of a picture that are one word with underscores, and the reason code that has none."""
    texts = {text.text or "" for text in ET.parse(path).getroot().iter(f"{SVG}text")}
    return {text for text in texts if ("_" in text and " " not in text) or text in set(ReasonCode)}


def test_every_picture_is_shown() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages())
    assert PICTURES
    assert [path.name for path in PICTURES if f"]({path.name})" not in text] == []
