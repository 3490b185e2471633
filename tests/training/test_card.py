"""The card that is shipped is the one that the scripts write, with numbers in its places."""

import json
import re

import pytest
from training.card import CARD, draft_rows
from training.drafting import acceptance, prompts, shipped_texts

from mortise.checkpoint import builtin_model_path

SHIPPED = (builtin_model_path() / "README.md").read_text(encoding="utf-8")


def test_the_shipped_card_is_of_this_form() -> None:
    """Word for word: only what is measured stands where the template has a place for it."""
    parts = re.split(r"\{\w+[^}]*\}", CARD)
    form = r"[\s\S]+?".join(re.escape(part) for part in parts)
    assert re.fullmatch(form, SHIPPED)


def test_prompts_come_from_all_documents_and_do_not_overlap() -> None:
    texts = shipped_texts(builtin_model_path())
    found = prompts(texts, 64, 200)
    assert [len(prompt) for prompt in found] == [64] * 200
    assert any(prompt[0] == 0 for prompt in found), "beginnings of documents"
    every = prompts(texts, 64, 10**6)
    assert len({tuple(prompt) for prompt in found}) == 200
    assert sum(map(len, every)) > 0.9 * len(texts)


@pytest.mark.slow
def test_the_drafts_that_the_card_tells_of_are_accepted_again() -> None:
    """Up to what another processor rounds otherwise, and generates otherwise in consequence."""
    model = builtin_model_path()
    context = json.loads((model / "config.json").read_text())["max_position_embeddings"]
    measured = acceptance(model, shipped_texts(model), context, num_drafts=(1, 4))
    for row, found in zip(draft_rows(measured), measured["drafts"], strict=True):
        listed = re.search(rf"^\| {found['num_tokens']} \|(.*)\|$", SHIPPED, re.MULTILINE)
        assert listed, row
        shown = [float(cell.strip(" %")) for cell in listed[1].split("|")]
        for kind, (first, length) in zip(
            ("greedy", "recommended"), (shown[:2], shown[2:]), strict=True
        ):
            assert 100 * found[kind]["accepted_by_place"][0] == pytest.approx(first, abs=2)
            assert found[kind]["acceptance_length"] == pytest.approx(length, abs=0.1)
