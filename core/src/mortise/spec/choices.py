"""What a backend decided by itself when it was created, for people to read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendChoice:
    """One decision of a backend: which library or way it uses, and why not another.

    Args:
        subject: what was decided, in a word or two: the name of a library.
        value: what it is: a version, ``not used``.
        reason: why, in words.
    """

    subject: str
    value: str
    reason: str
