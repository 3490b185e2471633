"""Float8 index keys cost the shipped model next to nothing, and pick nearly the same keys."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mortise import LLM
from mortise.evaluation.texts import TEXT_FILE, held_out_directory, read_documents
from mortise.layers import paged_attention

if TYPE_CHECKING:
    import pytest

TOKENS, TOPK = 1000, 256
"""Of held-out text; keys that a token may see."""


def picked_and_loss(
    index_key_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[torch.Tensor], float]:
    """The keys that each layer picked, ``[T, 256]``, and nats per token."""
    picked = []
    select_keys = paged_attention.select_keys

    def recorded(*arguments: object) -> torch.Tensor:
        picked.append(select_keys(*arguments))
        return picked[-1]

    llm = LLM(index_key_dtype=index_key_dtype, scheduler={"max_num_batched_tokens": TOKENS})
    documents = read_documents(held_out_directory() / TEXT_FILE)
    ids = [token for one in documents for token in one.token_ids(llm.tokenizer)][:TOKENS]
    with monkeypatch.context() as patch:
        patch.setattr(paged_attention, "select_keys", recorded)
        logits = llm.logits(ids)
    wanted = torch.tensor(ids[1:]).unsqueeze(1)
    return picked, float(-logits[:-1].log_softmax(-1).gather(1, wanted).mean())


def test_they_pick_nearly_the_same_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, plain_loss = picked_and_loss("compute", monkeypatch)
    rounded, rounded_loss = picked_and_loss("fp8", monkeypatch)
    assert abs(rounded_loss - plain_loss) < 0.01
    assert len(plain) == len(rounded) == 4
    for ours, theirs in zip(plain, rounded, strict=True):
        shared = [
            len(set(one.tolist()) & set(other.tolist())) / TOPK
            for one, other in zip(ours[TOPK::50], theirs[TOPK::50], strict=True)
        ]
        assert min(shared) > 0.9
        assert sum(shared) / len(shared) > 0.96
    assert any(not torch.equal(ours, theirs) for ours, theirs in zip(plain, rounded, strict=True))
