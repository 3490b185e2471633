"""A model directory in the Hugging Face layout: its files and its configuration."""

from __future__ import annotations

import importlib.resources
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mortise.checkpoint.json_file import DOWNLOAD_AGAIN, read_json_object
from mortise.errors import ModelConfigError, ModelNotFoundError, WeightsError

if TYPE_CHECKING:
    from collections.abc import Mapping

BUILTIN = "builtin"
CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# ModelSlim calls its files so, and adds the scheme in old versions.
MODELSLIM_FILES = "quant_model_weight*.safetensors"
MODELSLIM_INDEX_FILES = f"{MODELSLIM_FILES}.index.json"
# One of several files, which an index names.
SHARD = re.compile(r"-\d+-of-\d+\.safetensors$")
LAYOUT = "a directory with config.json, *.safetensors and, for text, tokenizer.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFiles:
    """The safetensors files of a model.

    Args:
        paths: every file once, in order of name.
        weight_map: tensor name to file name as the index has it; None for a single file.
    """

    paths: tuple[Path, ...]
    weight_map: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDirectory:
    """An opened model directory; ``config`` is what ``config.json`` holds, unchanged.

    Args:
        path: absolute path of the directory.
        config: the object in ``config.json``.
        generation_config: the object in ``generation_config.json``; empty if there is no such file.
    """

    path: Path
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any]

    @classmethod
    def open(cls, model: str | Path) -> ModelDirectory:
        """Open a directory by path, or the model that comes with Mortise by the name ``builtin``.

        Raises:
            ModelNotFoundError: no such directory, a file instead, or no ``config.json`` in it.
            ModelConfigError: a JSON file in it cannot be read.
        """
        path = builtin_model_path() if model == BUILTIN else existing_directory(Path(model))
        if not (path / CONFIG_FILE).is_file():
            raise ModelNotFoundError(
                f"model directory {str(model)!r} holds no {CONFIG_FILE}",
                details=[f"looked for: {path / CONFIG_FILE}"],
                expected=LAYOUT,
                remedy="give the directory that was downloaded, not one above or below it",
            )
        generation_config = path / GENERATION_CONFIG_FILE
        return cls(
            path=path,
            config=read_json_object(path / CONFIG_FILE),
            generation_config=(
                read_json_object(generation_config) if generation_config.is_file() else {}
            ),
        )

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end a text: of the generation configuration, else of the configuration.

        Raises:
            ModelConfigError: ``eos_token_id`` is neither an integer nor a list of integers.
        """
        for file, values in (
            (GENERATION_CONFIG_FILE, self.generation_config),
            (CONFIG_FILE, self.config),
        ):
            value = values.get("eos_token_id")
            if value is not None:
                return token_ids(value, file)
        return ()

    def weight_files(self) -> WeightFiles:
        """The safetensors files: ``model.safetensors``, or else those that the index names.

        ModelSlim calls the same files ``quant_model_weights``.

        Raises:
            ModelConfigError: the index cannot be read.
            WeightsError: there are none, the index names a file that is not there, or there are
                weights under both names.
        """
        modelslim = modelslim_file(self.path)
        for file in (self.path / SINGLE_FILE, self.path / INDEX_FILE):
            if file.is_file():
                if modelslim is not None:
                    raise two_models(file, modelslim)
                return files_of(file)
        if modelslim is not None:
            return files_of(modelslim)
        raise no_weights(self.path)


def builtin_model_path() -> Path:
    """The directory of the small model inside the installed distribution.

    Raises:
        ModelNotFoundError: the installation lacks it.
    """
    path = Path(str(importlib.resources.files("mortise") / "assets" / "stdlib-10m"))
    if not path.is_dir():
        raise ModelNotFoundError(
            "the built-in model is not part of this installation",
            details=[f"looked for: {path}"],
            expected="the files of the model inside the mortise package",
            remedy="install mortise-core again, or give the path of a model directory",
        )
    return path


def existing_directory(path: Path) -> Path:
    """The absolute path of a directory that is there.

    Raises:
        ModelNotFoundError: it is not there, or is a file.
    """
    if path.is_dir():
        return path.absolute()
    if path.exists():
        raise ModelNotFoundError(
            f"model {str(path)!r} is a file",
            details=[f"file: {path.absolute()}"],
            expected=LAYOUT,
            remedy=f"give the directory that holds the file: {path.absolute().parent}",
        )
    raise ModelNotFoundError(
        f"model directory {str(path)!r} does not exist",
        details=[f"looked for: {path.absolute()}"],
        expected=LAYOUT,
        remedy=f"correct the path, or use {BUILTIN!r} for the model that comes with Mortise;"
        " Mortise downloads nothing itself: hf download OWNER/NAME --local-dir DIRECTORY",
    )


def modelslim_file(directory: Path) -> Path | None:
    """The index of ModelSlim's files, or its only file.

    Raises:
        WeightsError: there are several of them.
    """
    for pattern in (MODELSLIM_INDEX_FILES, MODELSLIM_FILES):
        found = sorted(file for file in directory.glob(pattern) if not SHARD.search(file.name))
        if len(found) > 1:
            raise two_models(*found[:2])
        if found:
            return found[0]
    return None


def two_models(one: Path, other: Path) -> WeightsError:
    """The error for files that cannot all belong to one model."""
    return WeightsError(
        f"the model directory holds weights twice: {one.name} and {other.name}",
        details=[f"directory: {one.parent}"],
        expected="the files of one model, and their index if there are several",
        remedy="remove those that do not belong to config.json, or finish the download",
    )


def files_of(file: Path) -> WeightFiles:
    """The file itself, or those that it names if it is an index.

    Raises:
        ModelConfigError: the index cannot be read.
        WeightsError: a file that it names is missing.
    """
    return indexed_files(file) if file.suffix == ".json" else WeightFiles(paths=(file,))


def indexed_files(index: Path) -> WeightFiles:
    """The files that an index names, checked to be there.

    Raises:
        ModelConfigError: the index is not a map of tensor names to names of files beside it.
        WeightsError: a file is missing.
    """
    directory = index.parent
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(map(is_file_name, weight_map.values())):
        raise ModelConfigError(
            f"{index.name} holds no usable weight_map",
            details=[f"file: {index}"],
            expected='{"weight_map": {"tensor name": "name of a file in the same directory"}}',
            remedy=DOWNLOAD_AGAIN,
        )
    paths = tuple(directory / name for name in sorted(set(weight_map.values())))
    if missing := [path.name for path in paths if not path.is_file()]:
        raise WeightsError(
            f"{len(missing)} of the {len(paths)} files that {index.name} names"
            f" {'is' if len(missing) == 1 else 'are'} missing",
            details=[f"directory: {directory}", f"missing: {shortened(missing)}"],
            expected=f"all {len(paths)} files beside the index",
            remedy="finish the download",
        )
    return WeightFiles(paths=paths, weight_map=weight_map)


def no_weights(directory: Path) -> WeightsError:
    """The error for a directory without safetensors files."""
    expected = f"{SINGLE_FILE}, or {INDEX_FILE} and the files it names"
    other = sorted(
        path.name for kind in ("*.bin", "*.pt", "*.pth") for path in directory.glob(kind)
    )
    if other:
        return WeightsError(
            "the model's weights are pickled torch files, which can run code when they are read",
            details=[f"directory: {directory}", f"found: {shortened(other)}"],
            expected=expected,
            remedy="convert them: load the model with transformers and call"
            " save_pretrained(DIRECTORY), which writes safetensors",
        )
    loose = sorted(path.name for path in directory.glob("*.safetensors"))
    return WeightsError(
        "the model directory holds no weights",
        details=[f"directory: {directory}", *([f"found: {shortened(loose)}"] if loose else [])],
        expected=expected,
        remedy="finish the download" + (f"; {index_of(loose[0])} is missing" if loose else ""),
    )


def index_of(file: str) -> str:
    """The index that would name a file: ``model.safetensors.index.json`` for most."""
    stem = SHARD.sub("", file)
    return f"{stem}.safetensors.index.json" if stem != file else INDEX_FILE


def is_file_name(value: object) -> bool:
    """Whether a value names a file without leaving the directory."""
    return isinstance(value, str) and value not in {"", ".."} and Path(value).name == value


def token_ids(value: object, file: str) -> tuple[int, ...]:
    """One id or a list of ids as a tuple.

    Raises:
        ModelConfigError: the value is something else.
    """
    ids = value if isinstance(value, list) else [value]
    if all(type(token_id) is int for token_id in ids):
        return tuple(ids)
    raise ModelConfigError(
        f"eos_token_id in {file} is {value!r}",
        expected="an integer or a list of integers",
        remedy=f"correct {file}",
    )


def shortened(names: list[str], limit: int = 5) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
