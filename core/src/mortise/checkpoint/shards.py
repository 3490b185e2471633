"""Writing safetensors files one tensor at a time, before anybody knows how many there will be."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mortise.checkpoint.save import (
    DEFAULT_SHARD_BYTES,
    STEM,
    shard_name,
    write_json,
    write_shard,
)

if TYPE_CHECKING:
    from pathlib import Path

    import torch


class ShardWriter:
    """Files as :func:`~mortise.checkpoint.save.save_checkpoint` splits them; holds one at a time.

    Args:
        directory: is there, and holds no weights.
        stem: what the names of the files begin with.
        max_shard_bytes: a file holds no more than this, unless one tensor alone does.
    """

    def __init__(
        self, directory: Path, stem: str = STEM, max_shard_bytes: int = DEFAULT_SHARD_BYTES
    ) -> None:
        self._directory = directory
        self._stem = stem
        self._max_shard_bytes = max_shard_bytes
        self._filling: dict[str, torch.Tensor] = {}
        self._filling_bytes = 0
        self._files: list[tuple[Path, list[str]]] = []
        self._total_bytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take a tensor, which must not change or go away before the file is written.

        Args:
            name: not taken before.
            tensor: shares memory with no other.
        """
        self._total_bytes += tensor.nbytes
        if tensor.nbytes > self._max_shard_bytes:
            self._write({name: tensor})
            return
        if self._filling_bytes + tensor.nbytes > self._max_shard_bytes:
            self._write_filling()
        self._filling[name] = tensor
        self._filling_bytes += tensor.nbytes

    def close(self) -> None:
        """Write the last file, give all their names, and write the index if there are several."""
        self._write_filling()
        weight_map: dict[str, str] = {}
        for number, (path, names) in enumerate(self._files, start=1):
            file = shard_name(number, len(self._files), self._stem)
            path.rename(self._directory / file)
            weight_map |= dict.fromkeys(names, file)
        if len(self._files) > 1:
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
            write_json(self._directory / f"{self._stem}.safetensors.index.json", index)

    def _write_filling(self) -> None:
        if self._filling:
            self._write(self._filling)
        self._filling, self._filling_bytes = {}, 0

    def _write(self, tensors: dict[str, torch.Tensor]) -> None:
        path = self._directory / f"{self._stem}-{len(self._files) + 1:05d}.unfinished"
        write_shard(tensors, path)
        self._files.append((path, list(tensors)))
