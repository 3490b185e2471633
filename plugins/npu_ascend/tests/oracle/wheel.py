"""Fetches the vendor's wheel for the installed torch, to read and never to install."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Final

import torch
from packaging.version import Version

if TYPE_CHECKING:
    from pathlib import Path

SECONDS: Final = 40


class WheelMissingError(Exception):
    """The wheel could not be had; the message says what pip said."""


def requirement() -> str:
    """The release for the installed torch, the newest repair of it."""
    return f"torch-npu=={Version(torch.__version__).base_version}.*"


def fetch(folder: Path) -> Path:
    """Download the wheel into a folder, without anything that it requires.

    Raises:
        WheelMissingError: no network, no such release, or not in time.
    """
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
    command += ["--no-deps", "--only-binary", ":all:", "--no-input", "--progress-bar", "off"]
    command += ["--retries", "1", "--timeout", "10", "--dest", str(folder), requirement()]
    try:
        outcome = subprocess.run(
            command, capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise WheelMissingError(f"pip took more than {SECONDS} s for {requirement()}") from None
    found = sorted(folder.glob("torch_npu-*.whl"))
    if outcome.returncode != 0 or not found:
        said = outcome.stderr.strip().splitlines()
        errors = [line for line in said if line.startswith("ERROR")] or said[-3:]
        raise WheelMissingError(f"pip could not download {requirement()}: {' '.join(errors)}")
    return found[0]
