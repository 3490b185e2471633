"""The backends' own tables of the engine configuration, checked."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mortise.plugin import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic_core import ErrorDetails

PAGE = "docs/how-to/run-on-cuda.md"

Table = TypeVar("Table", bound="CommonOptions")


class CommonOptions(BaseModel):
    """Keys that all backends for NVIDIA GPUs have; one that is not given has its default.

    Args:
        runner: what multiplies. ``auto`` is DeepGEMM where it is usable and fast for the shape,
            else the backend's own Triton programs; ``deep_gemm`` makes it an error where DeepGEMM
            cannot; ``triton`` does not load it.
        runner_figures: TOML file of figures by which ``auto`` chooses, relative to the working
            directory; None is what others published.
        indexer: what scores the indexer's keys, likewise.
        exchange: between processes. ``auto`` is DeepEP where it is installed and carries a layer's
            rows, else the core's over NCCL; ``deep_ep`` makes it an error where it does not;
            ``portable`` is the core's.
        num_workers: workers that the indexer's schedule is split among; None is the number of the
            chip's multiprocessors. The result does not depend on it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    runner: Literal["auto", "deep_gemm", "triton"] = "auto"
    runner_figures: str | None = None
    indexer: Literal["auto", "deep_gemm", "triton"] = "auto"
    exchange: Literal["auto", "deep_ep", "portable"] = "auto"
    num_workers: int | None = Field(default=None, ge=1)

    @property
    def wants_deep_gemm(self) -> bool:
        """Whether anything may be computed by DeepGEMM."""
        return not self.runner == self.indexer == "triton"

    @property
    def demands_deep_gemm(self) -> bool:
        """Whether its absence is an error."""
        return "deep_gemm" in (self.runner, self.indexer)


def read_options(kind: type[Table], backend: str, table: Mapping[str, object]) -> Table:
    """Check the table of one backend.

    Args:
        kind: what its table is.
        backend: its name.
        table: as configured.

    Raises:
        ConfigError: an unknown key or a wrong value; every one of them is told.
    """
    try:
        return kind.model_validate(dict(table))
    except ValidationError as error:
        complaints = [_complaint(wrong, kind) for wrong in error.errors()]
        raise ConfigError(
            f"backend_options.{backend} is wrong: {'; '.join(complaints)}",
            expected=f"keys {', '.join(kind.model_fields)}",
            remedy=f"correct or remove what is wrong; {PAGE} describes them",
        ) from error


def _complaint(wrong: ErrorDetails, kind: type[CommonOptions]) -> str:
    key = str(wrong["loc"][0])
    if wrong["type"] == "extra_forbidden":
        close = difflib.get_close_matches(key, kind.model_fields, n=1)
        return f"unknown key {key!r}" + (f", did you mean {close[0]!r}?" if close else "")
    message = wrong["msg"]
    return f"{key} is {wrong['input']!r}: {message[:1].lower()}{message[1:]}"
