"""What the trained model is worth on held-out text, beside the baselines.

Every document is `bos text eos`, cut into windows of at most a given length without overlap; each
token but bos is predicted once, from the tokens before it in its window. The baselines predict the
same tokens. Shape suffixes: T tokens of a window, V vocabulary.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from mortise.evaluation.ngrams import Ngrams
from mortise.evaluation.score import Score
from training.attention import DenseAttention, IndexedAttention, RecentAttention
from training.baselines import documents, scores
from training.data import TokenIds, load_tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from torch import Tensor

    from training.attention import TrainingAttention
    from training.language_model import LanguageModel


@dataclass(frozen=True, slots=True)
class MTPScore:
    """How well the MTP layer guesses the token after the next one.

    `agreement` is the share of its first choices that the main model makes too once it has read
    the true next token: what greedy drafting would accept after the held-out text, while it is
    more after what the model writes itself (`training.drafting`).
    """

    predicted_tokens: int
    nats_per_token: float
    accuracy: float
    agreement: float


def measures(score: Score) -> dict[str, float]:
    """Return what the model card tells of a score."""
    return {
        "predicted_tokens": score.predicted_tokens,
        "nats_per_token": score.nats_per_token,
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte,
    }


def windows(tokens_N: TokenIds, length: int) -> Iterator[Tensor]:
    """Yield int64 windows of at most `length` inputs and their last target."""
    for document in documents(tokens_N):
        for start in range(0, len(document) - 1, length):
            window = document[start : start + length + 1]
            yield torch.from_numpy(window.astype(np.int64))


@torch.no_grad()
def model_score(
    model: LanguageModel,
    tokens_N: TokenIds,
    text_bytes: int,
    length: int,
    attend: Callable[[], TrainingAttention],
) -> Score:
    """Return the score of the main model on a stream, with one kind of attention."""
    nats, predicted = 0.0, 0
    for window_T in windows(tokens_N, length):
        logs_TV = model.main.logits(hidden_states(model, window_T, attend())).log_softmax(dim=-1)
        nats -= float(logs_TV.gather(1, window_T[1:, None]).double().sum())
        predicted += len(window_T) - 1
    return Score(nats, predicted, text_bytes)


def hidden_states(model: LanguageModel, window_T: Tensor, attend: TrainingAttention) -> Tensor:
    """Return the main model's hidden states of all tokens of a window but the last."""
    states: Tensor = model.main(window_T[:-1], torch.arange(len(window_T) - 1), attend)
    return states


@torch.no_grad()
def mtp_score(model: LanguageModel, tokens_N: TokenIds, length: int, topk: int) -> MTPScore:
    """Return how well the MTP layer predicts, on windows of a stream."""
    counts: Counter[str] = Counter()
    nats = 0.0
    for window_T in windows(tokens_N, length):
        if len(window_T) < 3:
            continue
        hidden_TH = hidden_states(model, window_T, IndexedAttention(1, topk))
        main_T = model.main.logits(hidden_TH).argmax(dim=-1)
        next_T = window_T[1:-1]
        rotation = model.main.rotary(torch.arange(len(next_T)))
        further_TH = model.mtp(
            model.main.model.embed_tokens(next_T),
            hidden_TH[:-1],
            rotation,
            IndexedAttention(1, topk),
        )
        logs_TV = model.main.logits(further_TH).log_softmax(dim=-1)
        guess_T = logs_TV.argmax(dim=-1)
        nats -= float(logs_TV.gather(1, window_T[2:, None]).sum())
        counts["tokens"] += len(guess_T)
        counts["right"] += int((guess_T == window_T[2:]).sum())
        counts["agreed"] += int((guess_T == main_T[1:]).sum())
    tokens = counts["tokens"]
    return MTPScore(tokens, nats / tokens, counts["right"] / tokens, counts["agreed"] / tokens)


def evaluate(
    model: LanguageModel, data: Path, ngrams: Path, lengths: tuple[int, ...]
) -> dict[str, object]:
    """Return every number of the model card that is measured on the held-out text.

    Args:
        model: loaded, with its indexers.
        data: directory that `training.data` wrote.
        ngrams: file that `training.baselines` wrote.
        lengths: window lengths to measure at.
    """
    tokens_N = load_tokens(data / "held_out.bin")
    text_bytes = json.loads((data / "data.json").read_text(encoding="utf-8"))["held_out"][
        "text_bytes"
    ]
    topk = model.config.index_topk
    assert topk is not None
    kinds: dict[str, Callable[[], TrainingAttention]] = {
        "selected": lambda: IndexedAttention(1, topk),
        "all": lambda: DenseAttention(1),
        "recent": lambda: RecentAttention(topk),
    }
    baselines = scores(Ngrams.load(ngrams), tokens_N, text_bytes)
    results: dict[str, object] = {name: measures(found) for name, found in baselines.items()}
    results["mtp"] = asdict(mtp_score(model, tokens_N, lengths[0], topk))
    for length in lengths:
        for kind, attend in kinds.items():
            measured = model_score(model, tokens_N, text_bytes, length, attend)
            results[f"{kind} keys, {length} tokens"] = measures(measured)
    return results
