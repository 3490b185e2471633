"""The measurements of ``eval``: a model alone beside baselines, or others beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mortise.cli.eval_rows import Row
from mortise.cli.eval_schemes import BUILTIN, weights_of
from mortise.cli.session import progress_bar

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mortise.cli.eval_schemes import MeasuredModel
    from mortise.engine.llm import LLM
    from mortise.evaluation.texts import Document


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """Texts, and how they are read.

    Args:
        documents: the texts.
        token_ids: of each.
        length: tokens of a window.
        stride: tokens from one window to the next.
    """

    documents: Sequence[Document]
    token_ids: Sequence[list[int]]
    length: int
    stride: int


def score_alone(llm: LLM, reading: Reading) -> list[Row]:
    """The model, and beside the built-in one what counting its training text achieves."""
    from mortise.evaluation.likelihood import score_documents

    with progress_bar("predicting") as advance:
        score = score_documents(
            llm.logits,
            reading.documents,
            reading.token_ids,
            length=reading.length,
            stride=reading.stride,
            progress=advance,
        )
    weights = weights_of(llm.loaded.directory)
    own = Row(
        name=llm.loaded.directory.path.name,
        score=score,
        weight_bytes=weights.num_bytes,
        bits_per_weight=weights.bits_each(weights.num_bytes),
    )
    return [own, *_baselines(llm, reading)]


def _baselines(llm: LLM, reading: Reading) -> list[Row]:
    """Only beside the model whose tokens were counted."""
    from mortise.evaluation.ngrams import Ngrams, ngram_scores
    from mortise.evaluation.texts import NGRAMS_FILE, held_out_directory, total_bytes

    if llm.config.model != BUILTIN:
        return []
    bos_token_id = llm.tokenizer.bos_token_id
    assert bos_token_id is not None
    ngrams = Ngrams.load(held_out_directory() / NGRAMS_FILE)
    text_bytes = total_bytes(reading.documents)
    scores = ngram_scores(ngrams, bos_token_id, reading.token_ids, text_bytes)
    return [Row(name=name, score=score) for name, score in scores.items()]


def compare(llm: LLM, models: Sequence[MeasuredModel], reading: Reading) -> list[Row]:
    """The model, and then each of the others beside it, on the same windows."""
    from mortise.evaluation.comparison import compare_documents

    with progress_bar("predicting") as advance:
        found = compare_documents(
            llm.logits,
            {model.name: model.llm.logits for model in models},
            reading.documents,
            reading.token_ids,
            length=reading.length,
            stride=reading.stride,
            progress=advance,
        )
    weights = weights_of(llm.loaded.directory)
    reference = Row(
        name=llm.loaded.directory.path.name,
        score=next(iter(found.values())).reference_score,
        weight_bytes=weights.num_bytes,
        bits_per_weight=weights.bits_each(weights.num_bytes),
    )
    others = [
        Row(
            name=model.name,
            score=found[model.name].score,
            weight_bytes=model.weight_bytes,
            bits_per_weight=weights.bits_each(model.weight_bytes),
            comparison=found[model.name],
        )
        for model in models
    ]
    return [reference, *others]
