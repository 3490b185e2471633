"""Models are compared window by window on the same tokens."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch

from mortise.evaluation.comparison import compare_documents
from mortise.evaluation.likelihood import score_documents
from mortise.evaluation.texts import Document
from mortise.evaluation.windows import windows

if TYPE_CHECKING:
    from collections.abc import Sequence

VOCABULARY = 23
DOCUMENTS = [Document("a", "a" * 40), Document("b", "b" * 9)]
TOKEN_IDS = [[(7 * place) % VOCABULARY for place in range(31)], [4, 9, 4, 4, 1]]


class TableModel:
    """Predicts from the token before alone, by a random table; remembers what it was asked."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.randn(VOCABULARY, VOCABULARY, generator=generator)
        self.read: list[list[int]] = []

    def __call__(self, token_ids: Sequence[int]) -> torch.Tensor:
        self.read.append(list(token_ids))
        return self.table[list(token_ids)]


def compared(reference: TableModel, **others: TableModel):
    return compare_documents(reference, others, DOCUMENTS, TOKEN_IDS, length=8, stride=5)


def test_scores_are_those_of_each_model_alone() -> None:
    reference, other = TableModel(0), TableModel(1)
    (found,) = compared(reference, other=other).values()
    for model, score in ((reference, found.reference_score), (other, found.score)):
        alone = score_documents(model, DOCUMENTS, TOKEN_IDS, length=8, stride=5)
        assert score.nats == pytest.approx(alone.nats, rel=1e-6)
        assert score.predicted_tokens == alone.predicted_tokens == 34
        assert score.text_bytes == alone.text_bytes == 49
    excess = found.score.nats_per_token - found.reference_score.nats_per_token
    assert found.excess_nats.mean == pytest.approx(excess, rel=1e-9)


def test_divergence_and_agreement_are_means_over_every_predicted_token() -> None:
    reference, other = TableModel(0), TableModel(1)
    (found,) = compared(reference, other=other).values()
    rows = [token for ids in TOKEN_IDS for token in ids[:-1]]
    expected, wanted = (model.table[rows].double().log_softmax(-1) for model in (reference, other))
    kl = torch.nn.functional.kl_div(wanted, expected, reduction="batchmean", log_target=True)
    same = (expected.argmax(-1) == wanted.argmax(-1)).double().mean()
    assert found.divergence_nats.mean == pytest.approx(float(kl), rel=1e-9)
    assert found.agreement.mean == pytest.approx(float(same))
    num_windows = sum(len(list(windows(len(ids), 8, 5))) for ids in TOKEN_IDS)
    assert len(found.windows) == num_windows
    assert found.divergence_nats.standard_error


def test_the_same_model_is_the_same_exactly() -> None:
    (found,) = compared(TableModel(0), same=TableModel(0)).values()
    assert (found.divergence_nats.mean, found.divergence_nats.standard_error) == (0.0, 0.0)
    assert (found.agreement.mean, found.excess_nats.mean) == (1.0, 0.0)
    assert found.score == found.reference_score


def test_what_else_is_compared_changes_nothing() -> None:
    alone = compared(TableModel(0), one=TableModel(1))["one"]
    assert compared(TableModel(0), two=TableModel(2), one=TableModel(1))["one"] == alone


def test_every_model_reads_a_window_before_anyone_reads_the_next() -> None:
    order: list[tuple[str, int]] = []

    def model(name: str):
        def logits(token_ids: Sequence[int]) -> torch.Tensor:
            order.append((name, len(token_ids)))
            return torch.zeros(len(token_ids), VOCABULARY)

        return logits

    told: list[tuple[int, int]] = []
    compare_documents(
        model("reference"),
        {"one": model("one"), "two": model("two")},
        DOCUMENTS,
        TOKEN_IDS,
        length=16,
        stride=16,
        progress=lambda done, total: told.append((done, total)),
    )
    assert [name for name, _ in order] == ["reference", "one", "two"] * 3
    assert told[-1] == (34 * 3, 34 * 3)
    assert told == sorted(told)


def test_perplexity_of_a_table_of_equals_is_its_size() -> None:
    def uniform(token_ids: Sequence[int]) -> torch.Tensor:
        return torch.zeros(len(token_ids), VOCABULARY)

    found = compare_documents(
        TableModel(0), {"uniform": uniform}, DOCUMENTS, TOKEN_IDS, length=8, stride=8
    )["uniform"]
    assert found.score.perplexity == pytest.approx(VOCABULARY)
    assert found.score.bits_per_byte == pytest.approx(34 * math.log2(VOCABULARY) / 49)
