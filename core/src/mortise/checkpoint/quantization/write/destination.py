"""A directory that appears whole or not at all."""

from __future__ import annotations

import secrets
import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from safetensors import SafetensorError

from mortise.errors import WeightsError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from pathlib import Path

WEIGHTS: Final = frozenset(
    [".bin", ".gguf", ".h5", ".index.json", ".msgpack", ".onnx", ".pt", ".pth", ".safetensors"]
)
"""Endings of files that hold weights or say where they are."""


def require_free(output: Path) -> None:
    """Require that a directory is not there yet, or is empty.

    Raises:
        WeightsError: it is neither.
    """
    if not output.exists() and not output.is_symlink():
        return
    if not output.is_dir():
        raise WeightsError(
            f"{str(output)!r} is a file",
            expected="the name of a directory that is not there yet",
            remedy="give another name",
        )
    if found := sorted(path.name for path in output.iterdir()):
        holds = "holds weights" if any(map(is_weights, found)) else "is not empty"
        raise WeightsError(
            f"directory {str(output)!r} {holds}",
            details=[f"found: {', '.join(found[:5])}"],
            expected="a directory that is empty or not there yet",
            remedy="give another directory, or remove this one first",
        )


@contextmanager
def new_directory(output: Path) -> Iterator[Path]:
    """A directory beside ``output`` that takes its place at the end, or goes away on an error.

    Raises:
        WeightsError: ``output`` is taken, or it cannot be written there.
    """
    require_free(output)
    unfinished = output.with_name(f".{output.name}.{secrets.token_hex(4)}.unfinished")
    try:
        unfinished.mkdir(parents=True)
        try:
            yield unfinished
            unfinished.rename(output)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise WeightsError(
            f"{str(output)!r} cannot be written: {error}",
            expected="a place where a directory can be made, with room for the model",
            remedy="correct the path or its permissions, or make room; nothing half-done is left",
        ) from None


def copy_other_files(source: Path, destination: Path, written: Collection[str]) -> list[str]:
    """Copy what a model directory holds beside its weights; what is in folders stays behind.

    Args:
        source: the model directory.
        destination: where to.
        written: names of files that are there already.

    Returns:
        Names of the files that were copied.
    """
    files = [
        path
        for path in sorted(source.iterdir())
        if path.is_file() and path.name not in written and not is_weights(path.name)
    ]
    for path in files:
        shutil.copyfile(path, destination / path.name)
    return [path.name for path in files]


def is_weights(name: str) -> bool:
    """Whether a file of this name holds weights, or is the index of such files."""
    return any(map(name.endswith, WEIGHTS))
