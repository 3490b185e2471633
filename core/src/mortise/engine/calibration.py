"""Which values the inputs of a model's projections take on a text of its kind."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Final

import torch

from mortise.engine.input_ranges import observed_inputs
from mortise.engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from mortise.checkpoint.quantization.write.input_range import InputRange
    from mortise.engine.llm import LLM

    Progress = Callable[[int, int], None]
    """Told how many sequences are done, and how many there are."""

NUM_SEQUENCES: Final = 16
SEQUENCE_LENGTH: Final = 128
SEED: Final = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What was run, and what was seen.

    Args:
        sequences: how many.
        tokens: in all of them.
        input_ranges: by dotted module name.
    """

    sequences: int
    tokens: int
    input_ranges: Mapping[str, InputRange]


def calibrate(
    llm: LLM, sequences: Sequence[Sequence[int]], progress: Progress = lambda _done, _all: None
) -> Calibration:
    """Run sequences through a model and note the range of every projection's input.

    A draft reads each sequence beside the hidden states of the main model, as it reads prompts.

    Args:
        llm: unquantised, computed by the reference in one process; with its draft, if the ranges of
            that are wanted too.
        sequences: token ids, each sequence at most as long as the model's context.
        progress: told after each of them.
    """
    with observed_inputs(llm.loaded) as seen:
        for done, token_ids in enumerate(sequences, start=1):
            if llm.loaded.draft is None:
                llm.logits(token_ids)
            else:
                read_as_prompt(llm, token_ids)
            progress(done, len(sequences))
    return Calibration(
        sequences=len(sequences),
        tokens=sum(map(len, sequences)),
        input_ranges=seen.ranges,
    )


def read_as_prompt(llm: LLM, token_ids: Sequence[int]) -> None:
    """Let a model read a prompt, and its draft too, for the sake of what they compute.

    Args:
        llm: with a draft.
        token_ids: the prompt; one that fills the whole context is read without its last token.
    """
    longest = llm.loaded.facts.max_position_embeddings - 1
    one_token = SamplingParams(max_tokens=1, temperature=0.0)
    for _ in llm.stream([list(token_ids[:longest])], [one_token]):
        pass


def own_sequences(llm: LLM, progress: Progress = lambda _done, _all: None) -> list[list[int]]:
    """Text that the model writes by itself, each begun by one token drawn at random.

    Sampled at temperature 1 from fixed seeds, so that the same model writes the same. After
    LLM-QAT (arXiv 2305.17888), which calibrates without data in this way.

    Args:
        llm: writes it.
        progress: told how many tokens are written.
    """
    length = min(SEQUENCE_LENGTH, llm.loaded.facts.max_position_embeddings)
    generator = torch.Generator().manual_seed(SEED)
    first = torch.randint(llm.loaded.facts.vocab_size, (NUM_SEQUENCES, 1), generator=generator)
    sampling = [
        SamplingParams(max_tokens=length - 1, temperature=1.0, seed=seed, ignore_eos=True)
        for seed in range(SEED, SEED + NUM_SEQUENCES)
    ]
    prompts: list[list[int]] = first.tolist()
    generation = llm.stream(prompts, sampling)
    for done, _ in enumerate(generation, start=1):
        progress(done, NUM_SEQUENCES * (length - 1))
    return [
        [*prompt, *completion.token_ids]
        for prompt, completion in zip(prompts, generation.completions(), strict=True)
    ]


def first_sequences(texts: Iterable[Sequence[int]], context: int) -> list[list[int]]:
    """The beginning of some texts, cut into sequences of at most 128 tokens.

    Args:
        texts: the tokens of each.
        context: tokens that the model can hold.

    Returns:
        At most 16 sequences, none empty.
    """
    return [list(one) for one in islice(_cut(texts, min(SEQUENCE_LENGTH, context)), NUM_SEQUENCES)]


def _cut(texts: Iterable[Sequence[int]], length: int) -> Iterator[Sequence[int]]:
    for text in texts:
        for start in range(0, len(text), length):
            yield text[start : start + length]
