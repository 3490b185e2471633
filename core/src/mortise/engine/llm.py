"""A language model in a few lines of Python: text in, text out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from mortise.checkpoint import Tokenizer
from mortise.config import EngineConfig, ResolvedConfig
from mortise.engine.engine import Engine
from mortise.engine.generation import Delivery, Generation
from mortise.engine.loading import load_model
from mortise.engine.prompts import Prompt, prompts_of, sampling_of, token_ids_of
from mortise.engine.shared_generation import generate_shared
from mortise.engine.warmup import run_jobs, warmup_decision, warmup_jobs
from mortise.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType

    import torch

    from mortise.backends import Decision
    from mortise.engine.binding import WrapOps
    from mortise.engine.events import Completion
    from mortise.engine.loading import LoadedModel, LoadProgress
    from mortise.engine.sampling_params import SamplingParams
    from mortise.engine.warmup import WarmupProgress, WarmupReport
    from mortise.env import Launch
    from mortise.parallel.group import ExpertParallelGroup

    Prompts = str | Prompt | Sequence[int] | Sequence[str | Prompt | Sequence[int]]
    """A text, the tokens of one, or a list of either."""
    Sampling = SamplingParams | Sequence[SamplingParams] | None
    """For every prompt, or one for each."""

TOKENIZER_FILE = "tokenizer.json"


class LLM:
    """A model, its cache and its backend; for one thread.

    ::

        from mortise import LLM, SamplingParams

        llm = LLM(model="models/my-model", backend="reference")
        for completion in llm.generate(["def add(", "import "], SamplingParams(max_tokens=16)):
            print(completion.text)

    Args:
        config: a whole configuration, made by :class:`EngineConfig` or resolved from files.
        progress: told the bytes loaded so far and the bytes of all weights.
        launch: this process's place among several that share the model's experts
            (``mortise.env.read_launch``); each makes its own ``LLM``, and all make the same calls.
            None is this process alone.
        warm_up: compile now what the backend compiles for this model; False leaves it to
            :meth:`warm_up`, or to the first tokens, which then wait for it.
        wrap_ops: given the hooks of each role, gives those that its model is to call; how a run
            is recorded.
        fields: fields of :class:`EngineConfig`, instead of ``config``.

    Raises:
        MortiseError: the configuration, the backend, the model directory or its weights are wrong.
        WarmupError: something could not be compiled.
        ParallelError: the processes do not fit together, or one of them died.
    """

    def __init__(
        self,
        config: EngineConfig | ResolvedConfig | None = None,
        *,
        progress: LoadProgress | None = None,
        launch: Launch | None = None,
        warm_up: bool = True,
        wrap_ops: WrapOps | None = None,
        **fields: Any,
    ) -> None:
        if config is not None and fields:
            raise ConfigError(
                f"a configuration is given and beside it {', '.join(fields)}",
                expected="either a configuration or its fields",
                remedy="put the fields into the configuration",
            )
        if not isinstance(config, ResolvedConfig):
            config = ResolvedConfig.of(config or EngineConfig(**fields))
        self.resolved = config
        self._loaded = load_model(config, progress, launch, wrap_ops)
        directory = self._loaded.directory.path
        self._tokenizer = (
            Tokenizer.load(directory) if (directory / TOKENIZER_FILE).is_file() else None
        )
        self._engine = Engine(self._loaded, self._tokenizer, config.config)
        self._delivery = Delivery(self._engine)
        self._warmed: WarmupReport | None = None
        try:
            self._jobs = warmup_jobs(self._loaded, config.config)
            if warm_up:
                self.warm_up()
        except BaseException as error:
            # The others would wait for a process that is not coming.
            self.close(error)
            raise

    def warm_up(
        self, progress: WarmupProgress | None = None, *, ahead: bool = False
    ) -> WarmupReport:
        """Compile what the backend compiles for this model; nothing, where it compiles nothing.

        Args:
            progress: told the jobs that are done and all there are.
            ahead: ahead of a start: everything that the backend can keep for later ones.

        Raises:
            WarmupError: something could not be compiled; the message names it.
            ParallelError: another process failed at it, or died.
        """
        self._warmed = run_jobs(
            warmup_jobs(self._loaded, self.config, ahead=True) if ahead else self._jobs,
            backend=str(self._loaded.bound.ops.backend),
            threads=self.config.warmup_threads,
            group=self.group,
            progress=progress,
        )
        return self._warmed

    def close(self, error: BaseException | None = None) -> None:
        """Leave the other processes, if there are any; nothing can be generated afterwards.

        Args:
            error: why, if the others may still count on this one: they are told.
        """
        self.group.close(error)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close(error)

    @property
    def config(self) -> EngineConfig:
        """What it was made from."""
        return self.resolved.config

    @property
    def loaded(self) -> LoadedModel:
        """The model with its facts: architecture, dtype, device, backend, seconds of loading."""
        return self._loaded

    @property
    def group(self) -> ExpertParallelGroup:
        """The processes that share the model's experts."""
        return self._loaded.group

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """Every decision with its rule and reason, in the order in which they were taken."""
        warmed = self._jobs if self._warmed is None else self._warmed.jobs
        draft = self._loaded.draft
        decisions = (*self._loaded.decisions, *(() if draft is None else draft.decisions))
        if not warmed:
            return decisions
        return (*decisions, warmup_decision(self._loaded.bound.ops, len(warmed), self._warmed))

    @property
    def warmup_seconds(self) -> float:
        """Wall time of the last warm-up; 0 if there was none."""
        return 0.0 if self._warmed is None else self._warmed.seconds

    @property
    def default_sampling(self) -> SamplingParams:
        """What the model's ``generation_config.json`` recommends; greedy where it does not say."""
        return self._loaded.default_sampling

    @property
    def tokenizer(self) -> Tokenizer:
        """Text to tokens and back.

        Raises:
            ModelConfigError: the model directory has none.
        """
        return self._tokenizer or Tokenizer.load(self._loaded.directory.path)

    def generate(self, prompts: Prompts, sampling: Sampling = None) -> list[Completion]:
        """Continue each prompt.

        Args:
            prompts: a text, the tokens of one, or a list of texts or of lists of tokens.
            sampling: for all of them, or one for each; None is :attr:`default_sampling`.

        Returns:
            One completion a prompt, in the order of the prompts.

        Raises:
            RequestError: before anything runs, if any of them cannot be served as asked.
            CapacityError: likewise, if one alone exceeds the cache.
        """
        if self.group.world_size == 1:
            return self.stream(prompts, sampling).completions()
        found = prompts_of(prompts, self._tokenizer)
        wanted = sampling_of(sampling or self.default_sampling, len(found))
        return generate_shared(self.group, self._delivery, found, wanted)

    def stream(self, prompts: Prompts, sampling: Sampling = None) -> Generation:
        """As :meth:`generate`, one token at a time, the prompts mixed as their tokens come.

        Leaving the loop early and dropping the generation gives up what is not finished. Several
        processes cannot leave a loop together, so they have no stream.
        """
        assert self.group.world_size == 1, "several processes generate, they do not stream"
        found = prompts_of(prompts, self._tokenizer)
        return Generation(
            self._delivery, found, sampling_of(sampling or self.default_sampling, len(found))
        )

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]]) -> Prompt:
        """A conversation as the model was trained on it, ready for :meth:`generate`.

        Args:
            messages: turns such as ``{"role": "user", "content": "Hello"}``, the oldest first.

        Raises:
            ModelConfigError: the model has no tokenizer or no chat template.
            RequestError: the template refuses the messages.
        """
        text = self.tokenizer.apply_chat_template(messages)
        return Prompt(tuple(self.tokenizer.encode(text, add_special_tokens=False)), text)

    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """What the model expects after each token of one sequence, through the paged cache.

        Args:
            token_ids: T tokens, taken as they are.

        Returns:
            float32 ``[T, vocab]`` on the backend's device.

        Raises:
            RequestError: the sequence is empty, holds what is no token, or exceeds the context.
            CapacityError: the cache has no room for it.
        """
        return self._engine.logits(token_ids_of(token_ids))
