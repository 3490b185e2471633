"""The built-in model from prompt to tokens, on the GPU beside the processor."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from benchmarks.cuda.rows import Row
from mortise import LLM, EngineConfig, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Iterator

NAME = "built-in model"
PROMPT = "def fibonacci(n):"
BATCHES = (1, 8, 64)


def measure(
    backend: str, device: str | None, batches: tuple[int, ...] = BATCHES, new_tokens: int = 64
) -> Iterator[Row]:
    """Each batch on both; greedy, and how many of the tokens agree.

    Args:
        backend: what is measured.
        device: as of the engine.
        batches: prompts at a time.
        new_tokens: tokens of each.
    """
    llms = {
        backend: LLM(EngineConfig(backend=backend, device=device, dtype="bfloat16")),
        "reference on the processor": LLM(EngineConfig(backend="reference", dtype="bfloat16")),
    }
    sampling = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
    for batch in batches:
        times, tokens = {}, {}
        for name, llm in llms.items():
            llm.generate([PROMPT] * batch, SamplingParams(max_tokens=2, ignore_eos=True))
            started = time.perf_counter()
            completions = llm.generate([PROMPT] * batch, sampling)
            times[name] = (time.perf_counter() - started) * 1e6
            tokens[name] = [one for completion in completions for one in completion.token_ids]
        ours, theirs = tokens.values()
        agreeing = sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(ours)
        yield Row(
            benchmark=NAME,
            case=f"{batch} prompts, {new_tokens} new tokens",
            microseconds=times,
            figures={
                name: {"tokens/s": batch * new_tokens / taken * 1e6, "same tokens": agreeing}
                for name, taken in times.items()
            },
        )
