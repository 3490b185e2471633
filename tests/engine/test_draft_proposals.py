"""What is drafted is what the layer says of the whole text, whatever was accepted before."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from mortise import LLM, SamplingParams
from mortise.kv.pages import pages_for
from mortise.layers.paged_attention import BatchLayout
from mortise.spec.roles import ForwardMode
from tests.fixtures.drafted_models import FAMILIES, drafting, held_out_prompts, save_drafted

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from mortise.engine.request import Request
    from mortise.engine.speculative.acceptance import Proposal
    from mortise.models.family import CausalLM, DraftModel
    from mortise.spec.dispatch import DispatchMode

NUM_DRAFTS = 3
SOMETIMES = 0.2
"""A share of chance with which drafts hang on the hidden state, and are right and wrong in turn."""
GREEDY = SamplingParams(max_tokens=16, ignore_eos=True)


def fresh_pass(model: CausalLM | DraftModel, length: int) -> object:
    """One sequence from its beginning, over an empty cache."""
    pages = pages_for(length)
    pool = model.new_pool(pages, torch.float32, torch.device("cpu"), 1)
    layout = BatchLayout(
        mode=ForwardMode.PREFILL,
        query_lens=(length,),
        context_lens=(length,),
        page_table=torch.arange(pages, dtype=torch.int32).unsqueeze(0),
        prompt_lens=(length,),
        state_slots=(0,),
    )
    return model.new_pass(pool, layout)


@torch.inference_mode()
def drafted_anew(llm: LLM, token_ids: Sequence[int]) -> tuple[int, ...]:
    """The drafts after some tokens, nothing being kept from one to the next."""
    assert llm.loaded.draft is not None
    main, draft = llm.loaded.model, llm.loaded.draft.model
    read = torch.tensor(token_ids[:-1])
    hidden_TH = main.run(read, fresh_pass(main, len(read)))
    following = list(token_ids[1:])
    for _ in range(NUM_DRAFTS):
        embeddings_TH = main.embed(torch.tensor(following))
        output_TH = draft.run(embeddings_TH, hidden_TH, fresh_pass(draft, len(following)))
        following.append(int(main.logits(output_TH[-1:]).argmax()))
        hidden_TH = torch.cat([hidden_TH, output_TH[-1:]])
    return tuple(following[-NUM_DRAFTS:])


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_draft_is_that_of_the_whole_text(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts in chunks, requests side by side; some are preempted and read again."""
    path = save_drafted(tmp_path / "model", model_type=model_type, chance=SOMETIMES)
    llm = drafting(path, NUM_DRAFTS, seqs=4, chunk=31, pages=3)
    drafter = llm._engine._stepper._drafter
    assert drafter is not None
    propose = drafter.propose
    seen: dict[tuple[int, ...], tuple[int, ...]] = {}

    def noting(requests: Sequence[Request], mode: DispatchMode) -> list[Proposal]:
        proposals = propose(requests, mode)
        for request, proposal in zip(requests, proposals, strict=True):
            seen[tuple(request.token_ids)] = proposal.token_ids
        return proposals

    monkeypatch.setattr(drafter, "propose", noting)
    # A page each, and all want a second one.
    prompts = [prompt[:60] for prompt in held_out_prompts(llm.tokenizer, 14)[7:]]
    generation = llm.stream(prompts, [GREEDY] * len(prompts))
    found = generation.completions()
    assert sum(request.num_preemptions for request in generation._requests)
    accepted = [one.drafting.accepted_by_place for one in found if one.drafting is not None]
    assert all(sum(places) for places in zip(*accepted, strict=True)), "no place was ever right"
    assert len(seen) > 40
    for token_ids, drafts in seen.items():
        assert drafts == drafted_anew(llm, token_ids)
