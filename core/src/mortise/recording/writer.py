"""A recording as it is written: tensors to shards as they come, the index at the end."""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from typing import TYPE_CHECKING, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from mortise.errors import RecordingError
from mortise.recording.documents import CALLS_FILE, HEADER_FILE, Call, FileFacts, Header

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

SHARD_BYTES: Final = 256 << 20
"""A shard is closed when it holds so much; no tensor is cut."""


class RecordingWriter:
    """A directory beside its destination, which it becomes when it is finished.

    Args:
        output: the destination, which must not be there yet.
        max_bytes: bytes of tensors that may be kept in all.

    Raises:
        RecordingError: the destination is taken, or nothing can be written there.
    """

    def __init__(self, output: Path, max_bytes: int, shard_bytes: int = SHARD_BYTES) -> None:
        require_free(output)
        self.output = output
        self.max_bytes = max_bytes
        self.tensor_bytes = 0
        self._shard_bytes = shard_bytes
        self._names: dict[bytes, str] = {}
        self._shard: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._calls: list[Call] = []
        self._files: dict[str, FileFacts] = {}
        self._unfinished = output.with_name(f".{output.name}.{secrets.token_hex(4)}.unfinished")
        try:
            self._unfinished.mkdir(parents=True)
        except OSError as error:
            raise _unwritable(output, error) from None

    def room_for(self, tensors: Iterable[torch.Tensor]) -> bool:
        """Whether all of them may still be kept, counted as if none were kept already."""
        return self.tensor_bytes + sum(tensor.nbytes for tensor in tensors) <= self.max_bytes

    def keep(self, tensor: torch.Tensor) -> str:
        """Copy a tensor and name it; equal bytes of equal shape have one name."""
        kept = tensor.detach().to("cpu", copy=True).contiguous()
        data = kept.reshape(-1).view(torch.uint8).numpy().tobytes() if kept.numel() else b""
        facts = f"{kept.dtype} {tuple(kept.shape)}".encode()
        key = hashlib.sha256(facts + hashlib.sha256(data).digest()).digest()
        if key in self._names:
            return self._names[key]
        self._names[key] = name = f"t{len(self._names) + 1}"
        self._shard[name] = kept
        self.tensor_bytes += kept.nbytes
        self._pending_bytes += kept.nbytes
        if self._pending_bytes >= self._shard_bytes:
            self._close_shard()
        return name

    def add(self, call: Call) -> None:
        """Put a call into the index."""
        self._calls.append(call)

    def finish(self, header: Header) -> None:
        """Write what is pending and the index, and let the directory take its place.

        Args:
            header: complete but for ``files`` and ``tensor_bytes``.

        Raises:
            RecordingError: it cannot be written; nothing is left then.
        """
        try:
            self._close_shard()
            lines = (call.model_dump_json(by_alias=True, exclude_none=True) for call in self._calls)
            path = self._unfinished / CALLS_FILE
            path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            self._files[CALLS_FILE] = facts_of(path)
            whole = header.model_copy(
                update={"files": self._files, "tensor_bytes": self.tensor_bytes}
            )
            text = json.dumps(whole.model_dump(by_alias=True), indent=2, ensure_ascii=False)
            (self._unfinished / HEADER_FILE).write_text(f"{text}\n", encoding="utf-8")
            require_free(self.output)
            self._unfinished.rename(self.output)
        except (OSError, SafetensorError) as error:
            raise _unwritable(self.output, error) from None
        finally:
            self.discard()

    def discard(self) -> None:
        """Remove what is not finished."""
        shutil.rmtree(self._unfinished, ignore_errors=True)

    def _close_shard(self) -> None:
        if not self._shard:
            return
        path = self._unfinished / f"tensors-{len(self._files) + 1:05}.safetensors"
        try:
            save_file(self._shard, path)
            self._files[path.name] = facts_of(path)
        except (OSError, SafetensorError) as error:
            raise _unwritable(self.output, error) from None
        self._shard, self._pending_bytes = {}, 0


def facts_of(path: Path) -> FileFacts:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileFacts(bytes=path.stat().st_size, sha256=digest)


def require_free(output: Path) -> None:
    """Require that nothing is there yet.

    Raises:
        RecordingError: something is.
    """
    if output.exists() or output.is_symlink():
        raise RecordingError(
            f"{str(output)!r} is there already",
            expected="the name of a directory that is not there yet",
            remedy="give another name, or remove it first",
        )


def _unwritable(output: Path, error: Exception) -> RecordingError:
    return RecordingError(
        f"{str(output)!r} cannot be written: {error}",
        expected="a place where a directory can be made, with room for the recording",
        remedy="correct the path or its permissions, or make room; nothing half-done is left",
    )
