"""Models to be compared with one: quantised copies of it, made for the occasion, or others."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from mortise.cli.eval_configuration import with_fields, with_own_dispatch
from mortise.cli.session import load_llm
from mortise.cli.speaker import own_launch
from mortise.errors import (
    BackendError,
    ConfigError,
    MortiseError,
    QuantizationConfigError,
    RequestError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mortise.checkpoint import ModelDirectory
    from mortise.config import ResolvedConfig
    from mortise.engine.llm import LLM
    from mortise.evaluation.texts import Document

BUILTIN: Final = "builtin"
BF16: Final = "bf16"
SCHEMES: Final = (BF16, "fp8-block", "w8a8", "w4a8", "w4a16", "w4a4", "nvfp4")
ALL: Final = "all"


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What the user wants compared with a model.

    Args:
        schemes: copies of it.
        is_all: whether nobody named them: one that cannot be had is left out and told.
        directories: of other models.
    """

    schemes: tuple[str, ...]
    is_all: bool
    directories: tuple[str, ...]

    @classmethod
    def of(cls, schemes: str | None, directories: Sequence[str]) -> Self:
        """Take ``--schemes`` and ``--against`` apart.

        Raises:
            RequestError: a scheme is not known.
        """
        names = tuple(dict.fromkeys(name.strip() for name in (schemes or "").split(",") if name))
        if schemes is not None and names != (ALL,):
            _require_known(names)
        is_all = names == (ALL,)
        return cls(
            schemes=SCHEMES if is_all else names,
            is_all=is_all,
            directories=tuple(dict.fromkeys(map(_full_path, directories))),
        )


def _full_path(directory: str) -> str:
    return directory if directory == BUILTIN else str(Path(directory).absolute())


def _require_known(names: Sequence[str]) -> None:
    unknown = [name for name in names if name not in SCHEMES]
    if unknown or not names:
        raise RequestError(
            f"--schemes names {', '.join(map(repr, unknown)) or 'none'}",
            expected=f"{ALL}, or some of {', '.join(SCHEMES)} with commas between them",
            remedy="correct --schemes",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredModel:
    """A model that is ready to be compared.

    Args:
        name: as it is shown.
        llm: the model.
        weight_bytes: of all tensors of its checkpoint.
    """

    name: str
    llm: LLM
    weight_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """A scheme of ``all`` that this model or this backend does not have."""

    name: str
    reason: str


def require_one_process() -> None:
    """Require that the models have this process for themselves.

    Raises:
        RequestError: torchrun started several.
    """
    launch = own_launch()
    if launch is not None and launch.world_size > 1:
        raise RequestError(
            f"--schemes and --against are given to {launch.world_size} processes",
            expected="one process, which holds all models",
            remedy="start it without torchrun",
        )


def load_schemes(
    resolved: ResolvedConfig, asked: Asked, told: set[str]
) -> tuple[list[MeasuredModel], list[LeftOut]]:
    """Make and load the model of each scheme.

    Args:
        resolved: configuration of the unquantised model.
        asked: which.
        told: warnings that were shown already.

    Raises:
        MortiseError: the model is quantised already, a named scheme cannot be had, or none can.
    """
    if asked.schemes:
        _require_unquantised(resolved)
    found: list[MeasuredModel] = []
    errors: dict[str, MortiseError] = {}
    for scheme in asked.schemes:
        try:
            found.append(_load_scheme(resolved, scheme, told))
        except (QuantizationConfigError, BackendError, ConfigError) as error:
            if not asked.is_all:
                raise
            errors[scheme] = error
    if errors and not found:
        raise next(iter(errors.values()))
    return found, [LeftOut(name=name, reason=error.what) for name, error in errors.items()]


def _require_unquantised(resolved: ResolvedConfig) -> None:
    from mortise.checkpoint import CheckpointTensors, ModelDirectory
    from mortise.checkpoint.quantization.write.quantise import require_unquantised

    directory = ModelDirectory.open(resolved.config.model)
    with CheckpointTensors(directory.weight_files()) as tensors:
        require_unquantised(directory, tensors)


def _load_scheme(resolved: ResolvedConfig, scheme: str, told: set[str]) -> MeasuredModel:
    from mortise.checkpoint.quantization.write.recipe import Recipe
    from mortise.cli.quantised_copy import write_copy

    if scheme == BF16:
        return _load_bf16(resolved, told)
    # The weights are copied into memory while they are loaded, and the files can go.
    with tempfile.TemporaryDirectory(prefix="mortise-eval-") as place:
        directory = Path(place) / scheme
        write_copy(resolved.config.model, directory, Recipe.of(scheme))
        return _load(with_fields(resolved, "--schemes", model=str(directory)), scheme, told)


def _load_bf16(resolved: ResolvedConfig, told: set[str]) -> MeasuredModel:
    """The unquantised weights, computed in bfloat16: the rounding that every scheme has at least.

    The same model again if it is computed so anyway.
    """
    own = with_own_dispatch(with_fields(resolved, "--schemes", dtype="bfloat16"))
    measured = _load(own, BF16, told)
    num_weights = weights_of(measured.llm.loaded.directory).num_weights
    assert num_weights is not None
    return replace(measured, weight_bytes=2 * num_weights)


def load_others(resolved: ResolvedConfig, asked: Asked, told: set[str]) -> list[MeasuredModel]:
    """Load the models of ``--against``, called by their directories.

    Raises:
        MortiseError: one of them cannot be loaded.
    """
    last_parts = [Path(directory).name for directory in asked.directories]
    taken = [*last_parts, *asked.schemes]
    return [
        _load(
            with_fields(resolved, "--against", model=directory),
            last if taken.count(last) == 1 else directory,
            told,
        )
        for directory, last in zip(asked.directories, last_parts, strict=True)
    ]


def _load(resolved: ResolvedConfig, name: str, told: set[str]) -> MeasuredModel:
    llm = load_llm(resolved, told)
    num_bytes = weights_of(llm.loaded.directory).num_bytes
    return MeasuredModel(name=name, llm=llm, weight_bytes=num_bytes)


def require_comparable(
    reference: LLM, other: MeasuredModel, documents: Sequence[Document], length: int
) -> None:
    """Require that a model reads and predicts the same tokens as the unquantised one.

    Raises:
        RequestError: it does not, or its context is shorter than the windows.
    """
    problem = next(_differences(reference, other.llm, documents, length), None)
    if problem is not None:
        raise RequestError(
            f"{other.name} cannot be compared with {reference.loaded.directory.path.name}:"
            f" {problem}",
            expected="a model of the same tokens, such as a quantised copy",
            remedy="correct --against or --model",
        )


def _differences(
    reference: LLM, other: LLM, documents: Sequence[Document], length: int
) -> Iterator[str]:
    from mortise.engine.llm import TOKENIZER_FILE

    sizes = [llm.loaded.facts.vocab_size for llm in (other, reference)]
    if sizes[0] != sizes[1]:
        yield f"its vocabulary has {sizes[0]} tokens, the other {sizes[1]}"
    context = other.loaded.facts.max_position_embeddings
    if context < length:
        yield f"its context of {context} tokens is shorter than the windows of {length}"
    # A directory without a tokenizer is taken at its word.
    if (other.loaded.directory.path / TOKENIZER_FILE).is_file():
        for one in documents:
            if one.token_ids(other.tokenizer) != one.token_ids(reference.tokenizer):
                yield f"it cuts {one.name} into other tokens"


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """How large a checkpoint is.

    Args:
        num_bytes: of all its tensors, scales included.
        num_weights: numbers in it; None where several are packed into an element.
    """

    num_bytes: int
    num_weights: int | None

    def bits_each(self, num_bytes: int) -> float | None:
        """Bits that each of these numbers takes in a copy of so many bytes."""
        return None if self.num_weights is None else 8 * num_bytes / self.num_weights


def weights_of(directory: ModelDirectory) -> Weights:
    """Count what is in a checkpoint, from the headers of its files."""
    from mortise.checkpoint import CheckpointTensors
    from mortise.checkpoint.quantization.write.quantise import require_unquantised

    with CheckpointTensors(directory.weight_files()) as tensors:
        stored = [tensors.stored(name) for name in tensors.names()]
        try:
            require_unquantised(directory, tensors)
        except QuantizationConfigError:
            num_weights = None
        else:
            num_weights = sum(math.prod(tensor.shape) for tensor in stored)
    return Weights(num_bytes=sum(tensor.nbytes for tensor in stored), num_weights=num_weights)
