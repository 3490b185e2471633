"""The repository says nothing about the machines it was written on."""

from __future__ import annotations

import re

import pytest

from tests.meta.tree import shown, tracked_files

# Character classes keep this file from finding itself.
LEAK = re.compile(
    r"(?<![\w.])/(?:[h]ome|[r]oot|[U]sers|[w]ork|[t]mp/\w)[/\w]"  # somebody's directories
    r"|[p]ypi\.org|[p]ythonhosted\.org|[r]egistry\.npmjs\.org|[d]eb\.debian\.org"  # package hosts
    r"|[e]xtra-index-url"
)


@pytest.mark.parametrize(
    "text", ["see /ro" + "ot/venv", "https://py" + "pi.org/simple", "in /tm" + "p/build"]
)
def test_the_pattern_finds_leaks(text: str) -> None:
    assert LEAK.search(text)


def test_the_pattern_leaves_addresses_alone() -> None:
    assert not LEAK.search("https://example.com/home/index.html and ./work/tree")


def test_no_tracked_file_leaks() -> None:
    found = []
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), start=1):
            if match := LEAK.search(line):
                found.append(f"{shown(path)}:{number}: {match.group()!r}")
    assert not found, "\n".join(found)
