"""The engine drafts what Hugging Face transformers drafts: the same tokens in as many passes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from mortise import SamplingParams
from tests.fixtures.drafted_models import RIGHT, drafting, held_out_prompts, save_drafted

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

MODELS = {"deepseek_v3": "DeepseekV3ForCausalLM", "glm4_moe": "Glm4MoeForCausalLM"}
"""Those of which transformers can run the multi-token prediction layer."""
SOMETIMES = 0.2
"""A share of chance with which drafts hang on the hidden state, and are right and wrong in turn."""
NEW_TOKENS = 24


def load(path: Path, model_type: str, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """transformers' own model, told where this small model has the layer."""
    import transformers

    model_class = getattr(transformers, MODELS[model_type])
    # It knows the numbers that the layer has in published models, and no other.
    monkeypatch.setattr(
        model_class, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.3\..*"]
    )
    return model_class.from_pretrained(path).eval()


def generated(model: nn.Module, prompt: list[int]) -> tuple[list[int], list[int]]:
    """New tokens of greedy generation with drafting, and how many tokens each pass read."""
    rows: list[int] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        rows.append(ids.shape[1])

    watched = model.model.register_forward_pre_hook(note, with_kwargs=True)
    with torch.inference_mode():
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            use_mtp=True,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
    watched.remove()
    return out[0, len(prompt) :].tolist(), rows


@pytest.mark.parametrize("chance", [RIGHT, SOMETIMES])
@pytest.mark.parametrize("model_type", MODELS)
def test_the_same_tokens_in_as_many_passes(
    model_type: str, chance: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_drafted(tmp_path / "model", model_type=model_type, chance=chance)
    model, llm = load(path, model_type, monkeypatch), drafting(path, 1)
    steps = accepted = 0
    for prompt in held_out_prompts(llm.tokenizer, 14)[2:]:
        expected, rows = generated(model, prompt)
        (ours,) = llm.generate([prompt], SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True))
        assert list(ours.token_ids) == expected
        assert ours.drafting is not None
        # The last token of all may be verified by transformers beside no draft.
        assert rows[0] == len(prompt)
        assert set(rows[1:-1]) == {2}
        assert ours.drafting.steps == len(rows) - 1
        steps, accepted = steps + ours.drafting.steps, accepted + ours.drafting.accepted
    assert 0.1 * steps < accepted < 0.9 * steps
