"""Entries of lists of modules, and whether each of them names something that exists."""

from __future__ import annotations

import fnmatch
import re
from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mortise.errors import QuantizationConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

# A model with tied embeddings stores no head, and still every list of exceptions names it.
ALWAYS_KNOWN = ("lm_head",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One entry of a list.

    Args:
        text: as it is written.
        where: the list, for messages.
        matches: whether it means a module of this dotted name.
        prefix: where to look first: names that begin so are likely to match.
        what: what it should name.
    """

    text: str
    where: str
    matches: Callable[[str], bool]
    prefix: str = ""
    what: str = "module"


def require_known(entries: Iterable[Entry], modules: Iterable[str]) -> None:
    """Require that every entry means a module, or a part of the model that holds modules.

    Args:
        entries: of all lists.
        modules: dotted names of every module that exists.

    Raises:
        QuantizationConfigError: naming the entries that mean nothing.
    """
    names = sorted({*ALWAYS_KNOWN, *with_ancestors(modules)})
    unknown = [entry for entry in entries if not means_something(entry, names)]
    if unknown:
        first, *others = unknown
        raise QuantizationConfigError(
            f"{first.where} names {first.text!r}, and the model has no such {first.what}",
            details=[f"also: {other.text!r} in {other.where}" for other in others[:10]]
            + ([f"and {len(others) - 10} more"] if others[10:] else []),
            expected=f"entries that name a {first.what} of this model",
            remedy="correct or remove the entry: what it was meant for is not treated as it says",
        )


def means_something(entry: Entry, names: Sequence[str]) -> bool:
    """Whether an entry means any of the sorted names."""
    return any(map(entry.matches, starting_with(entry.prefix, names))) or any(
        map(entry.matches, names)
    )


def starting_with(prefix: str, names: Sequence[str]) -> Iterator[str]:
    """The sorted names that begin with a prefix."""
    for index in range(bisect_left(names, prefix), len(names)):
        if not names[index].startswith(prefix):
            return
        yield names[index]


def with_ancestors(modules: Iterable[str]) -> set[str]:
    """Dotted names with everything that they are part of: ``a.b.c``, ``a.b``, ``a``."""
    found: set[str] = set()
    for module in modules:
        while module and module not in found:
            found.add(module)
            module = module.rpartition(".")[0]
    return found


def compiled(pattern: str, where: str) -> re.Pattern[str]:
    """Compile a regular expression that a file holds.

    Raises:
        QuantizationConfigError: it is none.
    """
    try:
        return re.compile(pattern)
    except re.error as error:
        raise QuantizationConfigError(
            f"{where} holds {pattern!r}, which is no regular expression: {error}",
            expected="a regular expression as Python reads it",
            remedy="correct the entry",
        ) from None


def glob_pattern(text: str) -> re.Pattern[str]:
    """A name with ``*``, ``?`` and ``[...]`` as shells read them, which dots do not stop."""
    return re.compile(fnmatch.translate(text))


def glob_prefix(text: str) -> str:
    """The part of a glob before its first wildcard."""
    return re.split(r"[*?\[]", text, maxsplit=1)[0]
