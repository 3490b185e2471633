"""Fetches the wheel of DeepGEMM's fork, to read and to compile and never to install."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pathlib import Path

REQUIREMENT: Final = "sgl-deep-gemm==0.1.5.post1"
SECONDS: Final = 60


class WheelMissingError(Exception):
    """The wheel could not be had; the message says what pip said."""


def fetch(folder: Path) -> Path:
    """Download the wheel into a folder, without anything that it requires.

    Raises:
        WheelMissingError: no network, no wheel for this platform, or not in time.
    """
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
    command += ["--no-deps", "--only-binary", ":all:", "--no-input", "--progress-bar", "off"]
    command += ["--retries", "1", "--timeout", "10", "--dest", str(folder), REQUIREMENT]
    try:
        outcome = subprocess.run(
            command, capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise WheelMissingError(f"pip took more than {SECONDS} s for {REQUIREMENT}") from None
    found = sorted(folder.glob("sgl_deep_gemm-*.whl"))
    if outcome.returncode != 0 or not found:
        said = outcome.stderr.strip().splitlines()
        errors = [line for line in said if line.startswith("ERROR")] or said[-3:]
        raise WheelMissingError(f"pip could not download {REQUIREMENT}: {' '.join(errors)}")
    return found[0]


def unpack(wheel: Path, folder: Path) -> Path:
    """Unpack the sources, and give the folder of the package; its compiled object stays behind."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith(".so")]
        own = [name for name in names if "/include/cut" not in name]
        archive.extractall(folder, own)
    return folder / "deep_gemm"
