"""Text on standard output while it is generated, and what it took on standard error."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import click

from mortise.cli.drafting import drafting_text
from mortise.cli.output import messages

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mortise.engine.events import Completion
    from mortise.engine.generation import Generation
    from mortise.engine.llm import LLM
    from mortise.engine.sampling_params import SamplingParams


def show_stream(generation: Generation, *, echo: bool) -> None:
    """Write each prompt with its completion, in the order of the prompts.

    The first unfinished completion is written as its tokens come, the others when it is their turn.
    """
    writer = _Writer(generation, echo)
    writer.open(0)
    for event in generation:
        # Without a tokenizer there is no text to show.
        text = event.text if generation.has_text else f"{event.token_id} "
        writer.take(event.index, text, event.finish is not None)


def show_completions(completions: Sequence[Completion], *, echo: bool) -> None:
    """Write completions that are finished, as :func:`show_stream` writes them while they come."""
    blocks = []
    for completion in completions:
        # Without a tokenizer there is no text to show.
        text = (
            " ".join(map(str, completion.token_ids))
            if completion.text is None
            else (completion.text)
        )
        prompt = click.style(completion.prompt, dim=True) if echo and completion.prompt else ""
        blocks.append(prompt + text + ("" if text.endswith("\n") else "\n"))
    click.echo("\n".join(blocks), nl=False)


class _Writer:
    """Keeps completions apart whose tokens come mixed."""

    def __init__(self, generation: Generation, echo: bool) -> None:
        self._prompts = generation.prompts
        self._echo = echo
        self._current = 0
        self._waiting: dict[int, list[str]] = defaultdict(list)
        self._finished: set[int] = set()
        self._last = ""

    def open(self, index: int) -> None:
        """Begin one completion."""
        if index >= len(self._prompts):
            return
        text = self._prompts[index].text
        if self._echo and text is not None:
            # Dim on a terminal; click drops the style elsewhere.
            self._write(text, click.style(text, dim=True))
        for piece in self._waiting.pop(index, []):
            self._write(piece)

    def take(self, index: int, text: str, is_last: bool) -> None:
        """One piece of one completion."""
        if index != self._current:
            self._waiting[index].append(text)
        else:
            self._write(text)
        if is_last:
            self._finished.add(index)
        while self._current in self._finished:
            self._close()

    def _close(self) -> None:
        if not self._last.endswith("\n"):
            self._write("\n")
        self._current += 1
        if self._current < len(self._prompts):
            self._write("\n")
        self.open(self._current)

    def _write(self, text: str, styled: str | None = None) -> None:
        if text:
            click.echo(styled or text, nl=False)
            self._last = text


def show_timings(llm: LLM, sampling: SamplingParams, completions: list[Completion]) -> None:
    """One line for all completions together."""
    loaded, timings = llm.loaded, [completion.timings for completion in completions]
    generated = sum(one.generated_tokens for one in timings)
    first, total = min(one.first_token for one in timings), max(one.total for one in timings)
    parts = [
        f"load {loaded.seconds:.2f} s",
        f"prompt {sum(one.prompt_tokens for one in timings)} tokens",
        f"first token {first:.2f} s",
        f"generated {generated} tokens",
    ]
    if total > first and generated > len(completions):
        parts.append(f"{(generated - len(completions)) / (total - first):.1f} tokens/s")
    if llm.config.draft.num_tokens:
        parts.append(drafting_text(llm.config.draft.num_tokens, completions))
    dtype = str(loaded.dtype).removeprefix("torch.")
    backend = loaded.bound.ops.backend
    emulated = "emulated " if backend.emulated else ""
    parts.append(f"{emulated}{backend.name} on {loaded.device}, {dtype}")
    if len(completions) == 1:
        (only,) = completions
        parts.append(f"ended by {only.finish_reason}")
        if not sampling.is_greedy:
            parts.append(f"seed {only.seed}")
    messages().print(" | ".join(parts), style="dim", soft_wrap=True)
