"""The backend's own table of the engine configuration, checked."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mortise.plugin import ConfigError
from mortise_npu_ascend.dispatch import Generation

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic_core import ErrorDetails


class Options(BaseModel):
    """``[backend_options.npu_ascend]``; a key that is not given is None or its default.

    Args:
        generation: emulated: which chip, A2 unless given. On a device it must be the device's.
        strict: emulated: also do what the device does to its users' harm, such as overwriting an
            input.
        weight_format: ``nz`` stores weights in the tiles that the matrix units read, where the
            shapes allow it; ``nd`` leaves them row by row.
        num_workers: workers that the indexer's schedule is split among; None is the number of the
            device's matrix units. The result does not depend on it.
        exchange: between processes. ``auto`` is DeepEP where it is installed and carries a layer's
            rows, else the core's over HCCL; ``deep_ep`` makes it an error where it does not;
            ``portable`` is the core's.
        triton: whether fused projections are split by a Triton program, where there is Triton.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    generation: Literal["A2", "A3", "A5"] | None = None
    strict: bool | None = None
    weight_format: Literal["nz", "nd"] = "nz"
    num_workers: int | None = Field(default=None, ge=1)
    exchange: Literal["auto", "deep_ep", "portable"] = "auto"
    triton: bool = True

    @property
    def chip(self) -> Generation | None:
        """The generation asked for."""
        return None if self.generation is None else Generation(self.generation)


def read_options(table: Mapping[str, object]) -> Options:
    """Check the table.

    Raises:
        ConfigError: an unknown key or a wrong value; every one of them is told.
    """
    try:
        return Options.model_validate(dict(table))
    except ValidationError as error:
        complaints = [_complaint(wrong) for wrong in error.errors()]
        raise ConfigError(
            f"backend_options.npu_ascend is wrong: {'; '.join(complaints)}",
            expected=f"keys {', '.join(Options.model_fields)}",
            remedy="correct or remove what is wrong; docs/how-to/run-on-ascend.md describes them",
        ) from error


def _complaint(wrong: ErrorDetails) -> str:
    key = str(wrong["loc"][0])
    if wrong["type"] == "extra_forbidden":
        close = difflib.get_close_matches(key, Options.model_fields, n=1)
        return f"unknown key {key!r}" + (f", did you mean {close[0]!r}?" if close else "")
    message = wrong["msg"]
    return f"{key} is {wrong['input']!r}: {message[:1].lower()}{message[1:]}"
