"""A recording as it is read: checked as a whole before anything of it is believed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from mortise.errors import RecordingError
from mortise.recording.codec import decode
from mortise.recording.documents import CALLS_FILE, FORMAT, HEADER_FILE, SCHEMA, Call, Header
from mortise.recording.writer import facts_of

if TYPE_CHECKING:
    from pathlib import Path

    import torch


class Recording:
    """Calls in their order, and their tensors, which are read when they are asked for.

    Args:
        path: the directory.
        header: what it says of itself.
        calls: the calls that were kept.
    """

    def __init__(self, path: Path, header: Header, calls: tuple[Call, ...]) -> None:
        self.path = path
        self.header = header
        self.calls = calls
        self._numbers = {call.number: call for call in calls}
        self._shards = {
            name: safe_open(path / name, framework="pt")
            for name in header.files
            if name != CALLS_FILE
        }
        self._places = {key: shard for shard in self._shards.values() for key in _names(shard)}

    @classmethod
    def open(cls, path: Path) -> Recording:
        """Check every file against its checksum, and read the index.

        Raises:
            RecordingError: it is no recording, of another version, or not whole.
        """
        header = _header(path)
        for name, facts in header.files.items():
            _require_whole(path, name, facts.bytes, facts.sha256)
        try:
            with (path / CALLS_FILE).open(encoding="utf-8") as lines:
                calls = tuple(Call.model_validate_json(line) for line in lines)
            return cls(path, header, calls)
        except (OSError, ValidationError, SafetensorError) as error:
            raise _damaged(path, str(error)) from None

    def call(self, number: int) -> Call:
        """The call of a number.

        Raises:
            RecordingError: there is none, or it was not kept.
        """
        if number not in self._numbers:
            made = self.header.num_calls
            raise RecordingError(
                f"call {number} is not in the recording",
                details=[f"{len(self.calls)} of the {made} calls of the run were kept"],
                expected=f"one of the kept calls, the first is {self.calls[0].number}"
                if self.calls
                else "a recording that holds calls",
                remedy="see `mortise replay` without --call for numbers that were compared",
            )
        return self._numbers[number]

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, in memory of its own."""
        if name not in self._places:
            raise _damaged(self.path, f"tensor {name!r} is in none of its files")
        found: torch.Tensor = self._places[name].get_tensor(name)  # type: ignore[no-untyped-call]
        # A view of the file begins wherever it lies there, and kernels want aligned memory.
        return found.clone()

    def value(self, encoded: Any) -> Any:
        """An argument or answer with its tensors."""
        return decode(encoded, self.tensor)

    def arguments(self, call: Call) -> dict[str, Any]:
        """All arguments of a call with their tensors."""
        return {name: self.value(one) for name, one in call.arguments.items()}


def _names(shard: Any) -> list[str]:
    return list(shard.keys())


def _header(path: Path) -> Header:
    file = path / HEADER_FILE
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise RecordingError(
            f"{str(path)!r} is no recording: {HEADER_FILE} is not there or cannot be read",
            expected="a directory that `mortise record` wrote",
            remedy="correct the path",
        ) from None
    try:
        header = Header.model_validate_json(text)
    except ValidationError as error:
        if f'"{FORMAT}"' in text and (version := _other_version(text)) is not None:
            raise _of_other_version(path, version) from None
        raise RecordingError(
            f"{str(file)!r} is not what `mortise record` writes",
            details=[f"{one['loc']}: {one['msg']}" for one in error.errors()[:3]],
            expected="a directory that `mortise record` wrote",
            remedy="correct the path, or record again",
        ) from None
    if header.format != FORMAT:
        raise RecordingError(
            f"{str(file)!r} has the format {header.format!r}",
            expected=FORMAT,
            remedy="correct the path",
        )
    if header.schema_version != SCHEMA:
        raise _of_other_version(path, header.schema_version)
    return header


def _other_version(text: str) -> int | None:
    import json

    try:
        found = json.loads(text).get("schema")
    except (ValueError, AttributeError):
        return None
    return found if isinstance(found, int) and found != SCHEMA else None


def _of_other_version(path: Path, version: int) -> RecordingError:
    return RecordingError(
        f"the recording {str(path)!r} has version {version} of the format",
        expected=f"version {SCHEMA}",
        remedy="replay it with the version of Mortise that wrote it, or record again",
    )


def _require_whole(path: Path, name: str, num_bytes: int, sha256: str) -> None:
    file = path / name
    if "/" in name or not file.is_file():
        raise _damaged(path, f"{name} is missing")
    found = file.stat().st_size
    if found != num_bytes:
        raise _damaged(path, f"{name} has {found} bytes, and had {num_bytes}")
    if facts_of(file).sha256 != sha256:
        raise _damaged(path, f"{name} was changed: its checksum is another")


def _damaged(path: Path, what: str) -> RecordingError:
    return RecordingError(
        f"the recording {str(path)!r} is damaged",
        details=[what],
        expected="the files as `mortise record` wrote them",
        remedy="copy it again, or record again",
    )
