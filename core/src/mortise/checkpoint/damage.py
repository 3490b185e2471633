"""Finding out what is wrong with a safetensors file that its library refuses."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from mortise.errors import CorruptFileError

if TYPE_CHECKING:
    from pathlib import Path

LENGTH_BYTES = 8
# The library's own limit; a longer header is not a header but other bytes read as a length.
MAX_HEADER_BYTES = 100_000_000
LFS_POINTER = b"version https://git-lfs"


def corrupt_file(path: Path, cause: str) -> CorruptFileError:
    """The error for a file that is truncated or not a safetensors file.

    Args:
        path: the file.
        cause: what the safetensors library said.
    """
    found = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(len(LFS_POINTER))
    if start == LFS_POINTER:
        return CorruptFileError(
            f"{path.name} is a Git LFS pointer, not the file it stands for",
            details=[f"file: {path}", f"size found: {found} bytes"],
            expected="a safetensors file",
            remedy="fetch the file itself: git lfs pull",
        )
    needed = needed_size(path)
    problem = "is not a safetensors file"
    if needed is not None and found < needed:
        problem = "is truncated"
    elif needed is not None:
        problem = "does not agree with its own header"
    size_needed = "unknown, its header cannot be read" if needed is None else f"{needed} bytes"
    return CorruptFileError(
        f"{path.name} {problem}",
        details=[
            f"file: {path}",
            f"size found: {found} bytes",
            f"size needed: {size_needed}",
            f"safetensors says: {cause}",
        ],
        expected="a complete safetensors file",
        remedy="download the file again and compare its size and checksum with the publisher's",
    )


def needed_size(path: Path) -> int | None:
    """The size in bytes that the header asks for, at least; None if there is no header."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        if not 0 < length <= MAX_HEADER_BYTES:
            return None
        header = file.read(length)
    if len(header) < length:
        # A header begins with a brace; without one the length was nothing but other bytes.
        return LENGTH_BYTES + length if header.startswith(b"{") else None
    try:
        entries = json.loads(header)
        ends = [entry["data_offsets"][1] for key, entry in entries.items() if key != "__metadata__"]
        return LENGTH_BYTES + length + max(ends, default=0)
    except (ValueError, LookupError, TypeError, AttributeError):
        return None
