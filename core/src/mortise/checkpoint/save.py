"""Writing a model directory in the Hugging Face layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file

from mortise.checkpoint.directory import CONFIG_FILE, INDEX_FILE
from mortise.errors import WeightsError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch

DEFAULT_SHARD_BYTES = 5_000_000_000
STEM = "model"


def save_checkpoint(
    directory: str | Path,
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Write tensors and configuration as transformers and huggingface_hub lay them out.

    Args:
        directory: created if it is not there; other files in it are left alone.
        tensors: by name, at least one; none may share memory with another.
        config: the object for ``config.json``.
        max_shard_bytes: a file holds no more than this, unless one tensor alone does.

    Raises:
        WeightsError: the directory already holds weights, which would be mixed with these.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    refuse_existing_weights(directory)
    shards = list(shards_of(tensors, max_shard_bytes))
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = shard_name(number, len(shards))
        write_shard({name: tensors[name] for name in names}, directory / file)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total_size = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        write_json(directory / INDEX_FILE, index)
    write_json(directory / CONFIG_FILE, config)


def write_shard(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write one safetensors file, readable by whom the user's files are readable by.

    safetensors itself makes files for their owner alone.
    """
    path.touch()
    mode = path.stat().st_mode
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, path, metadata={"format": "pt"})
    path.chmod(mode)


def refuse_existing_weights(directory: Path) -> None:
    """Keep files of two checkpoints out of one directory.

    Raises:
        WeightsError: there are safetensors files.
    """
    if found := sorted(path.name for path in directory.glob("*.safetensors*")):
        raise WeightsError(
            f"directory {str(directory)!r} already holds weights",
            details=[f"found: {', '.join(found[:5])}"],
            expected="a directory without safetensors files",
            remedy="give another directory, or remove these files first",
        )


def shards_of(tensors: Mapping[str, torch.Tensor], max_shard_bytes: int) -> Iterator[list[str]]:
    """Names of the tensors of each file, as many as fit; one that is too large stands alone."""
    names: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if tensor.nbytes > max_shard_bytes:
            yield [name]
            continue
        if size + tensor.nbytes > max_shard_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += tensor.nbytes
    if names:
        yield names


def shard_name(number: int, count: int, stem: str = STEM) -> str:
    """``model.safetensors``, or ``model-00001-of-00003.safetensors`` where there are several."""
    several = f"-{number:05d}-of-{count:05d}" if count > 1 else ""
    return f"{stem}{several}.safetensors"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write an object as people read it, the keys in their order."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
