"""What every module of the core holds, so that a change by somebody else shows."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

import mortise

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

SKIPPED = ("__main__", "conformance")
PLAIN = (bool, bytes, float, int, str, type(None))


def import_core() -> None:
    """Import every module of the core, so that none appears later."""
    for found in pkgutil.walk_packages(mortise.__path__, "mortise."):
        if not any(part in SKIPPED for part in found.name.split(".")):
            importlib.import_module(found.name)


def snapshot() -> dict[str, int]:
    """The identity of every attribute of every module of the core and of its classes.

    What the kit itself does, and what a module refers to without owning it, is left out.
    """
    return dict(_attributes())


def _attributes() -> Iterator[tuple[str, int]]:
    for name, module in sorted(sys.modules.items()):
        is_core = name == "mortise" or name.startswith("mortise.")
        if not is_core or any(part in SKIPPED for part in name.split(".")):
            continue
        for attribute, value in vars(module).items():
            # Importing a module binds it in its package; __builtins__ and the like are Python's.
            if isinstance(value, ModuleType) or attribute.startswith("__"):
                continue
            yield f"{name}.{attribute}", id(value)
            if isinstance(value, type) and value.__module__ == name:
                yield from _of_class(f"{name}.{attribute}", value)


def _of_class(place: str, owner: type) -> Iterator[tuple[str, int]]:
    for attribute, value in vars(owner).items():
        # Python and abc keep caches of their own in classes.
        if not attribute.startswith(("__", "_abc_")):
            yield f"{place}.{attribute}", id(value)


def changes(before: Mapping[str, int], after: Mapping[str, int]) -> list[str]:
    """What was replaced, added or removed, in words."""
    found = [f"{name} was removed" for name in before.keys() - after.keys()]
    found += [f"{name} was added" for name in after.keys() - before.keys()]
    found += [
        f"{name} was replaced"
        for name in before.keys() & after.keys()
        if before[name] != after[name]
    ]
    return sorted(found)


def state_of_package(package: str) -> dict[str, str]:
    """What the modules of a plugin hold at module level and in their classes, as text.

    Modules, functions and classes are named, not looked into; containers by what is in them.
    """
    found: dict[str, str] = {}
    for name, module in sorted(sys.modules.items()):
        if name.split(".")[0] != package or module is None:
            continue
        for attribute, value in vars(module).items():
            if not attribute.startswith("__") and not isinstance(value, ModuleType):
                found[f"{name}.{attribute}"] = _shown(value)
                if isinstance(value, type) and value.__module__ == name:
                    found |= {
                        f"{name}.{attribute}.{inner}": _shown(one)
                        for inner, one in vars(value).items()
                        if not inner.startswith(("__", "_abc_"))
                    }
    return found


def _shown(value: Any) -> str:
    if isinstance(value, PLAIN):
        return repr(value)
    if isinstance(value, list | tuple | set | frozenset):
        return f"{type(value).__name__} of {[_shown(one) for one in value]}"
    if isinstance(value, dict):
        return f"dict of { {repr(key): _shown(one) for key, one in value.items()} }"
    return f"{type(value).__name__} at {id(value)}"


def differences(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """Attributes of modules that were there before and hold something else now."""
    return sorted(name for name in before.keys() & after.keys() if before[name] != after[name])
