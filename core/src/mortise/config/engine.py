"""The fields of the engine configuration."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
)

from mortise.config.problems import config_error, problems_in
from mortise.config.table import FrozenTable, thaw
from mortise.config.toml_file import read_toml


def path_text(value: object) -> object:
    """``pathlib`` paths as text; anything else is left for the validation to judge."""
    return os.fspath(value) if isinstance(value, os.PathLike) else value


PathText = Annotated[str, Field(min_length=1), BeforeValidator(path_text)]
PositiveInt = Annotated[int, Field(ge=1)]
BackendOptions = Annotated[
    Mapping[str, Mapping[str, Any]],
    BeforeValidator(thaw),
    AfterValidator(FrozenTable),
    PlainSerializer(thaw, return_type=dict[str, dict[str, Any]]),
]
DispatchChoice = Literal["auto", "bf16", "fp8", "int8", "nvfp4"]

MAX_DRAFT_TOKENS: Final = 16
"""Each further token is drafted from guesses alone, and is accepted ever more rarely."""


class Section(BaseModel):
    """A table of the configuration: frozen, keyword-only, no conversion of types, no extra keys.

    Raises:
        ConfigError: unknown keys, wrong types and bad values, all of them in one message.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            kind = type(self)
            found = problems_in(error, kind, f"given to {kind.__name__}")
            raise config_error(found, kind) from None

    # pydantic's own marker: it may build a nested section without calling this constructor, so
    # that the problems of every section arrive together and with their full key.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]


class CacheConfig(Section):
    """The paged key-value cache."""

    page_size: Literal[64] = Field(default=64, description="Tokens in one page of the cache.")
    num_pages: PositiveInt | None = Field(
        default=None,
        description="Pages of the cache; unset means as many as `cache.max_num_tokens` needs.",
    )
    max_num_tokens: PositiveInt = Field(
        default=8192,
        description="Tokens the cache holds over all requests, rounded up to whole pages; not used"
        " when `cache.num_pages` is set.",
    )

    @property
    def capacity_pages(self) -> int:
        """Pages to allocate: ``num_pages``, or enough for ``max_num_tokens``."""
        return self.num_pages or -(-self.max_num_tokens // self.page_size)


class SchedulerConfig(Section):
    """What runs together in one step."""

    max_num_seqs: PositiveInt = Field(default=16, description="Requests that run at the same time.")
    max_num_batched_tokens: PositiveInt = Field(
        default=512,
        description="Prompt tokens processed in one step; a longer prompt is processed in chunks"
        " of this many.",
    )


class DispatchConfig(Section):
    """Overrides of the format in which tokens travel to the experts.

    The strongest place that says anything about a model is heard; in it, the key of a mode goes
    before the general one.
    """

    dtype: DispatchChoice = Field(
        default="auto",
        description="Dispatch format of the main model; `auto` leaves the choice to the layers and"
        " the backend, and is not the same as `bf16`. The draft model has keys of its own.",
    )
    normal_dtype: DispatchChoice = Field(
        default="auto",
        description="The same for the normal exchange alone. It goes before `dispatch.dtype` of the"
        " same place; a stronger place goes before both, and takes them back with `auto`.",
    )
    low_latency_dtype: DispatchChoice = Field(
        default="auto", description="Likewise for the low-latency exchange alone."
    )
    mode: Literal["auto", "normal", "low_latency"] = Field(
        default="auto",
        description="Exchange by which several processes send tokens to their experts; `auto` is"
        " `low_latency` for a step in which no process reads a prompt and none has more tokens"
        " than `dispatch.max_tokens_per_rank`, else `normal`; for one process it is `normal`.",
    )
    max_tokens_per_rank: PositiveInt = Field(
        default=128,
        description="Tokens that one process may send in a `low_latency` exchange; memory for"
        " this many from every process is set aside.",
    )


class DraftConfig(Section):
    """Drafting by multi-token prediction, and what the draft model has of its own.

    What is not set here is as for the main model, copied when the configuration is resolved;
    nothing that is set here changes anything for the main model.
    """

    num_tokens: Annotated[int, Field(ge=0, le=MAX_DRAFT_TOKENS)] = Field(
        default=0,
        description="Tokens that the multi-token prediction layer drafts for each request and step,"
        " and the main model then verifies; 0 drafts none.",
    )
    model: PathText | None = Field(
        default=None,
        description="Path of the model directory whose multi-token prediction layer drafts; unset"
        " is the main model's own. Embedding and head are always the main model's.",
    )
    quantization: Literal["auto", "none"] = Field(
        default="auto",
        description="`auto` takes every module of the draft as its checkpoint stores it; `none`"
        " says that none is quantised, whatever the checkpoint's configuration says, and is an"
        " error where one is.",
    )
    dispatch_dtype: DispatchChoice = Field(
        default="auto",
        description="Dispatch format of the draft model, decided apart from the main one.",
    )
    normal_dispatch_dtype: DispatchChoice = Field(
        default="auto", description="Likewise for the draft model's normal exchange alone."
    )
    low_latency_dispatch_dtype: DispatchChoice = Field(
        default="auto",
        description="Likewise for the draft model's low-latency exchange alone.",
    )
    backend_options: BackendOptions = Field(
        default_factory=FrozenTable,
        description="As `backend_options`, for the draft model: a key given here goes before the"
        " same key there.",
    )


class ParallelConfig(Section):
    """Several processes that share a model's experts, started by torchrun."""

    timeout_seconds: PositiveInt = Field(
        default=60,
        description="How long one process waits for another before it gives up with an error.",
    )


class EngineConfig(Section):
    """Everything an engine is built from.

    Raises:
        ConfigError: unknown keys, wrong types and bad values, all of them in one message.
    """

    model: PathText = Field(
        default="builtin",
        description="Path of a model directory in the Hugging Face layout, relative to the working"
        " directory, or `builtin` for the small model that comes with Mortise.",
    )
    backend: str = Field(
        default="reference",
        min_length=1,
        description="Name of an installed backend; `mortise backends` lists them.",
    )
    device: str | None = Field(
        default=None,
        min_length=1,
        description="Device the backend runs on, in the backend's own words; unset means its"
        " default, `emulated` means the chip's numerics on the processor.",
    )
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        default="auto", description="Type of the hidden state; `auto` is what the checkpoint says."
    )
    index_key_dtype: Literal["auto", "compute", "fp8"] = Field(
        default="auto",
        description="How the cache holds the keys of the sparse-attention indexer: `compute` is the"
        " type of the hidden state; `fp8` is float8 e4m3 with a scale a key, half of that memory;"
        " `auto` is `compute` for float32 models, else what the backend prefers.",
    )
    strict: bool = Field(
        default=False,
        description="Make it an error when a backend hands a hook over to the reference"
        " implementation, which otherwise is reported once.",
    )
    threads: PositiveInt | None = Field(
        default=None,
        description="Threads of one operation on the processor; unset is one for a small model,"
        " else torch's choice.",
    )
    warmup_threads: PositiveInt | None = Field(
        default=None,
        description="How much is compiled at a time before the engine is ready, where the backend"
        " compiles; unset is one job for each processor.",
    )
    backend_options: BackendOptions = Field(
        default_factory=FrozenTable,
        description="A table for each backend, by name; its keys are the backend's own and the"
        " backend checks them.",
    )
    cache: CacheConfig = CacheConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    dispatch: DispatchConfig = DispatchConfig()
    draft: DraftConfig = DraftConfig()
    parallel: ParallelConfig = ParallelConfig()

    @classmethod
    def from_toml(cls, path: str | Path) -> Self:
        """Read a TOML file; what it does not mention keeps its default.

        Raises:
            ConfigError: the file is missing or not TOML, or its keys or values are wrong.
        """
        source, values = f"file {path}", read_toml(Path(path))
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise config_error(problems_in(error, cls, f"from {source}"), cls) from None
