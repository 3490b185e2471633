"""What a new plugin is called, checked before anything is written."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from packaging.utils import canonicalize_name

from mortise.backends.discover import discover_backends
from mortise.backends.validate import CORE_DISTRIBUTION, RESERVED_NAMES
from mortise.errors import NewPluginError

if TYPE_CHECKING:
    from collections.abc import Iterator

# Narrower than the name of a backend may be: the distribution's name, in which underscores are
# hyphens, must lead back to it.
NAME: Final = re.compile(r"[a-z][a-z0-9]*(?:_[a-z0-9]+)*")
MAX_NAME: Final = 40
MAX_VENDOR: Final = 80


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginPlan:
    """A new plugin's names.

    Args:
        name: of the backend, as configurations write it: ``my_chip``.
        vendor: whose chip it is, or empty.
    """

    name: str
    vendor: str = ""

    @property
    def distribution(self) -> str:
        """What an installer calls it: ``mortise-my-chip``."""
        return f"mortise-{self.name.replace('_', '-')}"

    @property
    def package(self) -> str:
        """What Python imports: ``mortise_my_chip``."""
        return f"mortise_{self.name}"

    @property
    def class_name(self) -> str:
        """The backend's class: ``MyChipBackend``."""
        return "".join(part.capitalize() for part in self.name.split("_")) + "Backend"

    @property
    def summary(self) -> str:
        """One line for tables."""
        owner = f"{self.vendor} {self.name}" if self.vendor else self.name
        return f"The {owner} backend of Mortise"


def plan_plugin(name: str, *, vendor: str = "", allow_installed: bool = False) -> PluginPlan:
    """Check what somebody wants to call a backend, and by whom it is.

    Args:
        name: of the backend.
        vendor: whose chip it is; shown in its manifest and its README.
        allow_installed: take a name that something installed here has already.

    Raises:
        NewPluginError: the name is not one, is kept by the core, or is taken; or the vendor is not
            one line of text.
    """
    _check_name(name)
    plan = PluginPlan(name=name, vendor=_checked_vendor(vendor))
    if not allow_installed and (claims := list(_claims(plan))):
        raise NewPluginError(
            f"the name {name!r} is taken",
            details=claims,
            expected="a name that nothing installed here has",
            remedy="choose another name, or give --allow-installed to begin it anew",
        )
    return plan


def _check_name(name: str) -> None:
    if not NAME.fullmatch(name) or len(name) > MAX_NAME:
        suggestion = _suggestion(name)
        raise NewPluginError(
            f"{name!r} cannot be the name of a backend",
            expected="lower-case letters, digits and single underscores between them, a letter"
            f" first, {MAX_NAME} characters at most",
            remedy=f"call it {suggestion!r}" if suggestion else "choose such a name",
        )
    if name in RESERVED_NAMES or PluginPlan(name=name).distribution == CORE_DISTRIBUTION:
        raise NewPluginError(
            f"the core keeps the name {name!r} for itself",
            expected=f"any name but {', '.join(sorted({*RESERVED_NAMES, 'core'}))}",
            remedy="choose another name",
        )


def _suggestion(name: str) -> str:
    """The nearest name that may be one, or nothing."""
    words = re.findall(r"[a-z0-9]+", name.lower())
    found = "_".join(words)[:MAX_NAME].strip("_").lstrip("0123456789_")
    return found if NAME.fullmatch(found) and found not in {*RESERVED_NAMES, "core"} else ""


def _checked_vendor(vendor: str) -> str:
    text = vendor.strip()
    # Not printable: line breaks, control characters, halves of characters.
    if text.isprintable() and len(text) <= MAX_VENDOR:
        return text
    raise NewPluginError(
        f"the vendor is {vendor!r}",
        expected=f"one line of at most {MAX_VENDOR} printable characters",
        remedy="correct --vendor",
    )


def _claims(plan: PluginPlan) -> Iterator[str]:
    """What is installed here under one of the plan's names; nothing of it is imported."""
    rows = discover_backends()
    yield from (f"backend {row.name}: {row.provenance}" for row in rows if row.name == plan.name)
    for found in importlib.metadata.distributions():
        if canonicalize_name(found.name or "") == plan.distribution:
            yield f"distribution {plan.distribution} {found.version} ({found.locate_file('')})"
    if importlib.util.find_spec(plan.package) is not None:
        yield f"package {plan.package}"
