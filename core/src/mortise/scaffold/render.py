"""The files of a new plugin, made of templates that lie beside this module."""

from __future__ import annotations

import importlib.metadata
import json
import string
from importlib.resources import files
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from packaging.version import Version

from mortise.backends.discover import engine_version
from mortise.backends.validate import CORE_DISTRIBUTION
from mortise.spec.hooks import HOOKS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mortise.scaffold.plan import PluginPlan

ENDING: Final = ".template"
FILES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "README.md": "README.md",
        "LICENSE": "LICENSE",
        "pyproject.toml": "pyproject.toml",
        "tox.ini": "tox.ini",
        ".gitignore": "gitignore",
        ".github/workflows/test.yml": "test.yml",
        "src/%{package}/__init__.py": "init.py",
        "src/%{package}/py.typed": "py.typed",
        "src/%{package}/backend.toml": "backend.toml",
        "src/%{package}/backend.py": "backend.py",
        "src/%{package}/split.py": "split.py",
        "tests/test_conformance.py": "test_conformance.py",
        "tests/test_split.py": "test_split.py",
    }
)
"""Template of each file, in the order in which a reader meets them."""


class _Template(string.Template):
    """Text with ``%{word}`` in it: everything else, dollars and percent signs too, is itself."""

    delimiter = "%"
    pattern = r"""
    %\{(?P<braced>[a-z_]+)\}  # the one form there is
    | (?P<escaped>(?!)) | (?P<named>(?!)) | (?P<invalid>(?!))
    """  # type: ignore[assignment]  # compiled by the class that it is handed to


def render_plugin(plan: PluginPlan) -> dict[PurePosixPath, str]:
    """The text of every file of a new plugin, by its path below the plugin's directory."""
    words = _words(plan)
    return {
        PurePosixPath(_Template(path).substitute(words)): _Template(_text(name)).substitute(words)
        for path, name in FILES.items()
    }


def _text(name: str) -> str:
    return (files("mortise.scaffold") / "templates" / f"{name}{ENDING}").read_text(encoding="utf-8")


def _words(plan: PluginPlan) -> dict[str, str]:
    """What stands for each word; names were checked, and free text is quoted where it is TOML."""
    core = Version(engine_version())
    return {
        "name": plan.name,
        "distribution": plan.distribution,
        "package": plan.package,
        "class_name": plan.class_name,
        "summary": plan.summary,
        # A basic string of TOML is written as one of JSON.
        "summary_toml": json.dumps(plan.summary, ensure_ascii=False),
        # Before its release, a version is less than the release.
        "core_version": core.public if core.is_prerelease else f"{core.major}.{core.minor}",
        "next_core": f"{core.major + 1}",
        "torch": _required("torch"),
        "qkv_split_version": str(HOOKS["qkv_split"].version),
    }


def _required(library: str) -> str:
    """What the core requires of a library."""
    requirements = importlib.metadata.requires(CORE_DISTRIBUTION) or []
    (found,) = (text for text in requirements if text.split(">")[0].strip() == library)
    return found
