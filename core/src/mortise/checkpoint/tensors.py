"""The tensors of a checkpoint: every header at once, the data one tensor at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

import torch
from safetensors import SafetensorError, safe_open

from mortise.checkpoint.damage import corrupt_file
from mortise.checkpoint.fused_experts import experts_apart
from mortise.errors import MissingTensorError, WeightsError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from mortise.checkpoint.directory import WeightFiles
    from mortise.checkpoint.fused_experts import ExpertPart

# Names of the safetensors format.
DTYPES = MappingProxyType(
    {
        "BOOL": torch.bool,
        "U8": torch.uint8,
        "I8": torch.int8,
        "U16": torch.uint16,
        "I16": torch.int16,
        "U32": torch.uint32,
        "I32": torch.int32,
        "U64": torch.uint64,
        "I64": torch.int64,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "F8_E8M0": torch.float8_e8m0fnu,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F32": torch.float32,
        "F64": torch.float64,
    }
)

# A mapping keeps every page that was read resident. It is made anew after this many bytes, so that
# a checkpoint in one large file does not end up in memory twice: as parameters and as a mapping.
MAPPED_BYTES_LIMIT = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """Where a tensor is stored and what the file's header says of it.

    ``within`` is where it is in a tensor of all experts; None is a tensor of its own.
    """

    name: str
    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    within: ExpertPart | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the stored data."""
        return math.prod(self.shape) * self.dtype.itemsize


class CheckpointTensors:
    """Read access to the tensors of one or several safetensors files.

    Opening reads the headers of all files and no data. At most one file is mapped at any time.
    Experts that are stored as one tensor a layer are named and read one by one.

    Args:
        files: the files, and the index if there is one.

    Raises:
        CorruptFileError: a file is truncated or not a safetensors file.
        MissingTensorError: the index promises a tensor that its file does not hold.
        WeightsError: two files hold the same tensor, or a dtype is unknown.
    """

    def __init__(self, files: WeightFiles) -> None:
        stored = tensors_of(files.paths)
        if files.weight_map is not None:
            check_index(files.weight_map, stored)
        self._tensors = experts_apart(stored)
        self._mapped_path: Path | None = None
        self._mapped: Any = None
        self._mapped_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Unmap the file that was read last; reading again maps it anew."""
        self._mapped_path, self._mapped, self._mapped_bytes = None, None, 0

    def names(self) -> Iterator[str]:
        """Every tensor once, file by file, in the order of the data in each file."""
        return iter(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __len__(self) -> int:
        return len(self._tensors)

    def stored(self, name: str) -> StoredTensor:
        """What the headers say of a tensor; ``name`` must be one of ``names()``."""
        return self._tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; ``name`` must be one of ``names()``."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of a tensor; ``name`` must be one of ``names()``."""
        return self._tensors[name].dtype

    def read(self, name: str) -> torch.Tensor:
        """Map one tensor, on the processor and in its stored dtype.

        The result is backed by the file: let go of it before the next one is read, and the memory
        of the mapping is given back.

        Args:
            name: one of ``names()``.

        Raises:
            CorruptFileError: the file was damaged after it had been opened.
        """
        stored = self._tensors[name]
        if stored.path != self._mapped_path or self._mapped_bytes >= MAPPED_BYTES_LIMIT:
            self.close()
            self._mapped, self._mapped_path = opened(stored.path), stored.path
        self._mapped_bytes += stored.nbytes
        if stored.within is not None:
            return stored.within.of(self._mapped.get_tensor(stored.within.name))
        tensor: torch.Tensor = self._mapped.get_tensor(name)
        return tensor


def opened(path: Path) -> Any:
    """Map a safetensors file.

    Raises:
        CorruptFileError: it is truncated or not a safetensors file.
        WeightsError: it cannot be read.
    """
    try:
        return safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        raise corrupt_file(path, str(error)) from None
    except OSError as error:
        raise WeightsError(
            f"{path.name} cannot be read: {error}",
            details=[f"file: {path}"],
            expected="a readable safetensors file",
            remedy="correct the file's permissions, or finish the download",
        ) from None


def tensors_of(paths: Sequence[Path]) -> dict[str, StoredTensor]:
    """The tensors of all files, from their headers.

    Raises:
        CorruptFileError: a file is truncated or not a safetensors file.
        WeightsError: two files hold the same tensor, or a dtype is unknown.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in paths:
        file = opened(path)
        for name in file.offset_keys():
            if name in tensors:
                raise WeightsError(
                    f"tensor {name!r} is stored twice",
                    details=[f"first: {tensors[name].path}", f"second: {path}"],
                    expected="every tensor in one file",
                    remedy="remove the file that does not belong to this model, or download the"
                    " model into an empty directory",
                )
            header = file.get_slice(name)
            tensors[name] = StoredTensor(
                name=name,
                path=path,
                shape=tuple(header.get_shape()),
                dtype=known_dtype(header.get_dtype(), name, path),
            )
    return tensors


def known_dtype(stored: str, name: str, path: Path) -> torch.dtype:
    """The torch dtype for a dtype of the safetensors format.

    Raises:
        WeightsError: this version of Mortise does not know it.
    """
    if stored in DTYPES:
        return DTYPES[stored]
    raise WeightsError(
        f"tensor {name!r} is stored as {stored}",
        details=[f"file: {path}"],
        expected=f"one of {', '.join(DTYPES)}",
        remedy="use a version of the model in one of these formats",
    )


def check_index(weight_map: Mapping[str, str], tensors: Mapping[str, StoredTensor]) -> None:
    """Compare the index with the headers; a tensor that the index leaves out is no error here.

    Raises:
        MissingTensorError: the index promises a tensor that its file does not hold.
    """
    broken = [
        f"{name}: not in {file}"
        for name, file in weight_map.items()
        if name not in tensors or tensors[name].path.name != file
    ]
    if broken:
        raise MissingTensorError(
            f"the index names {len(broken)} tensors that its files do not hold"
            if len(broken) > 1
            else "the index names a tensor that its file does not hold",
            details=[*broken[:10], *([f"and {len(broken) - 10} more"] if broken[10:] else [])],
            expected="model.safetensors.index.json and the safetensors files of one and the same"
            " model",
            remedy="download the model again into an empty directory",
        )
