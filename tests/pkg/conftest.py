"""The wheels, built once; and one clean environment in which all of them are installed together."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.pkg.installation import PROJECTS, TOY, CleanEnvironment, build_wheels

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheel of each of our distributions, by its normalised name."""
    return build_wheels(PROJECTS, tmp_path_factory.mktemp("wheels"))


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory, wheels: dict[str, Path]) -> CleanEnvironment:
    """Our distributions, installed together."""
    environment = CleanEnvironment(tmp_path_factory.mktemp("environment") / "bare")
    environment.install(wheels.values())
    return environment


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory, bare: CleanEnvironment) -> Path:
    """A plugin that the installed core wrote."""
    directory = tmp_path_factory.mktemp("fresh") / "plugin"
    bare.mortise("new-plugin", "fresh_chip", "--output", directory)
    return directory


@pytest.fixture(scope="session")
def third_party(tmp_path_factory: pytest.TempPathFactory, fresh: Path) -> dict[str, Path]:
    """Wheels that others would make: of the example, and of the new plugin."""
    return build_wheels((TOY, fresh), tmp_path_factory.mktemp("third-party"))


@pytest.fixture(scope="session")
def environment(bare: CleanEnvironment, third_party: dict[str, Path]) -> CleanEnvironment:
    """Our distributions and those of others, installed together."""
    bare.install(third_party.values())
    return bare
