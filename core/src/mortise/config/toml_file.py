"""Reading a TOML file, with errors that say where in it."""

from __future__ import annotations

import tomllib
from typing import TYPE_CHECKING, Any

from mortise.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path


def read_toml(path: Path) -> dict[str, Any]:
    """Read the tables of a TOML file.

    Raises:
        ConfigError: no such file, not readable, not UTF-8, or not TOML (with line and column).
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"configuration file {path} does not exist",
            details=[f"looked for: {path.absolute()}"],
            expected="a TOML file",
            remedy="correct the path, or leave it out to use the defaults",
        ) from None
    except OSError as error:
        raise ConfigError(
            f"configuration file {path} cannot be read: {error.strerror}",
            expected="a readable TOML file",
            remedy="correct the path or the file's permissions",
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"configuration file {path} is not UTF-8 text: byte {error.start} is not valid",
            expected="a TOML file, which is always UTF-8",
            remedy="save the file as UTF-8",
        ) from None
    except tomllib.TOMLDecodeError as error:
        # Its message ends with the place: "... (at line 3, column 7)".
        raise ConfigError(
            f"configuration file {path} is not valid TOML: {error}",
            expected='TOML such as: backend = "reference"',
            remedy="correct the file at that place",
        ) from None
