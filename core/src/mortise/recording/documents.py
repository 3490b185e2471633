"""What the index of a recording holds: one document about all of it, and one a call."""

from __future__ import annotations

from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field

SCHEMA: Final = 1
"""Version of the format; a reader refuses every other."""

HEADER_FILE: Final = "recording.json"
CALLS_FILE: Final = "calls.jsonl"
FORMAT: Final = "mortise-recording"


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class FileFacts(_Document):
    """Size and checksum of one file."""

    bytes: int
    sha256: str


class WhoAnswered(_Document):
    """The backend that a run was recorded with."""

    name: str
    distribution: str
    version: str
    emulated: bool
    device: str


class LeftOut(_Document):
    """Calls that were made and not kept."""

    hook: str
    layer: str
    role: str
    reason: str
    calls: int


class Header(_Document):
    """``recording.json``: where a recording comes from, and what of the run it lacks.

    Args:
        format, schema_version: what this is.
        mortise: version of the core that wrote it.
        model: directory of the model.
        dtype: of the hidden state.
        threads: of one operation on the processor, which decide the order of its sums.
        backends: who answered, by role.
        sample: what was to be kept, in the words of the command line.
        max_bytes: bytes of tensors that could be kept.
        tensor_bytes: bytes of tensors that were.
        num_calls: calls of the whole run, kept or not.
        left_out: those that were not.
        files: the other files.
    """

    format: str
    schema_version: int = Field(alias="schema")
    mortise: str
    model: str
    dtype: str
    threads: int
    backends: dict[str, WhoAnswered]
    sample: str
    max_bytes: int
    tensor_bytes: int
    num_calls: int
    left_out: list[LeftOut]
    files: dict[str, FileFacts]


class Call(_Document):
    """One line of ``calls.jsonl``.

    Args:
        number: its place among all calls of the run, kept or not; the first is 1.
        hook: its name; ``supports`` and ``supports_linear`` are the questions that come before.
        role: main or draft.
        layer: dotted name of the module that called, empty where none did.
        forward_pass: number of the forward pass of all models, 0 while the model is loaded.
        mode: the kind of pass, where it is known.
        arguments: by the names of the hook's parameters, as ``codec`` writes them.
        answer: likewise.
        uses: number of the earlier call that this one builds on: that prepared its weights, made
            its schedule or its dispatcher, or sent the rows that are brought back. 0 is none.
    """

    number: int
    hook: str
    role: str
    layer: str
    forward_pass: int = Field(alias="pass")
    mode: str | None = None
    arguments: dict[str, Any]
    answer: Any = None
    uses: int = 0
