"""Saying what did not fit when memory runs out."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from mortise.errors import CapacityError

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def memory_for(what: str, num_bytes: int, device: torch.device, remedy: str) -> Iterator[None]:
    """Turn torch's failure to allocate into an error that a user can act on.

    Raises:
        CapacityError: names what was to be allocated, its size and the device.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # On the processor torch raises a bare RuntimeError that says so in words.
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and (
            "allocate memory" not in str(error)
        ):
            raise
        raise CapacityError(
            f"{what} needs {size_text(num_bytes)}, which {device} cannot give",
            details=[str(error).splitlines()[0]],
            expected="enough free memory",
            remedy=remedy,
        ) from error


def size_text(num_bytes: int) -> str:
    """Bytes in the unit that leaves one to three digits before the point: ``19.2 MiB``."""
    size, unit = float(num_bytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
