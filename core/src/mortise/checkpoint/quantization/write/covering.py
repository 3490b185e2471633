"""Few patterns that name exactly the modules they are meant for."""

from __future__ import annotations

import fnmatch
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator


@dataclass(frozen=True, slots=True)
class Pattern:
    """A dotted name in which None stands for any number.

    Args:
        parts: between the dots.
        whole_subtree: everything below the name, instead of the name itself.
    """

    parts: tuple[str | None, ...]
    whole_subtree: bool = False

    @property
    def is_open(self) -> bool:
        """Whether it may match more than one name."""
        return self.whole_subtree or None in self.parts

    def regular_expression(self) -> str:
        """For :func:`re.match`, as compressed-tensors matches it."""
        name = r"\.".join(r"\d+" if part is None else re.escape(part) for part in self.parts)
        return name + (r"\..*" if self.whole_subtree else "$")

    def glob(self) -> str:
        """For :mod:`fnmatch`, whose ``*`` crosses dots."""
        name = ".".join("*" if part is None else part for part in self.parts)
        return name + (".*" if self.whole_subtree else "")


def by_regular_expression(pattern: Pattern) -> Callable[[str], object]:
    """Whether a name matches the regular expression."""
    return re.compile(pattern.regular_expression()).match


def by_glob(pattern: Pattern) -> Callable[[str], object]:
    """Whether a name matches the glob."""
    return re.compile(fnmatch.translate(pattern.glob())).match


def covering(
    names: Collection[str],
    among: Collection[str],
    matcher: Callable[[Pattern], Callable[[str], object]],
    *,
    subtrees: bool = False,
) -> list[Pattern]:
    """Patterns that match every one of ``names`` and none of the others ``among`` them.

    Numbers are left open where that adds no other name: all of them, or all but the first, which
    is that of the layer.

    Args:
        names: what to match, a part of ``among``.
        among: every name there is.
        matcher: how a pattern will be read.
        subtrees: name a part of the model instead of everything in it.
    """
    wanted = set(names)
    others = [name for name in among if name not in wanted]
    entries = list(dict.fromkeys(complete_subtrees(names, among) if subtrees else exact(names)))
    for keep_first in (False, True):
        entries = [
            pattern
            for general, special in generalised(entries, keep_first=keep_first).items()
            for pattern in (
                [general] if not any(map(matcher(general), others)) else sorted(special, key=order)
            )
        ]
    return entries


def exact(names: Iterable[str]) -> Iterator[Pattern]:
    """The names themselves."""
    return (Pattern(tuple(name.split("."))) for name in names)


def complete_subtrees(names: Collection[str], among: Collection[str]) -> Iterator[Pattern]:
    """For each name the largest part of the model around it of which everything is named."""
    there = Counter(ancestor for name in among for ancestor in ancestors(name))
    named = Counter(ancestor for name in names for ancestor in ancestors(name))
    for name in names:
        whole = next((one for one in ancestors(name) if named[one] == there[one]), name)
        yield Pattern(tuple(whole.split(".")), whole_subtree=whole != name)


def ancestors(name: str) -> Iterator[str]:
    """What a name is part of, the largest first: ``a``, ``a.b`` of ``a.b.c``."""
    parts = name.split(".")
    return (".".join(parts[:length]) for length in range(1, len(parts)))


def generalised(entries: Iterable[Pattern], *, keep_first: bool) -> dict[Pattern, list[Pattern]]:
    """Patterns by what they become when their numbers are left open."""
    found: dict[Pattern, list[Pattern]] = defaultdict(list)
    for entry in entries:
        found[opened(entry, keep_first=keep_first)].append(entry)
    return found


def opened(entry: Pattern, *, keep_first: bool) -> Pattern:
    """Leave the numbers of a pattern open, the first one on demand excepted."""
    numbers = [index for index, part in enumerate(entry.parts) if part is None or part.isdigit()]
    kept = numbers[:1] if keep_first else []
    parts = (
        None if index in numbers and index not in kept else part
        for index, part in enumerate(entry.parts)
    )
    return Pattern(tuple(parts), entry.whole_subtree)


def order(entry: Pattern) -> tuple[tuple[int, str], ...]:
    """Layer 2 before layer 10."""
    return tuple(
        (int(part), "") if part is not None and part.isdigit() else (-1, part or "")
        for part in entry.parts
    )
