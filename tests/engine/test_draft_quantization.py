"""A draft runs as its tensors are stored, and says where something else is said of them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from mortise import SamplingParams
from mortise.checkpoint.quantization.write.recipe import Recipe
from mortise.errors import QuantizationConfigError
from tests.fixtures.drafted_models import drafting, save_drafted
from tests.fixtures.quantised_models import write

if TYPE_CHECKING:
    from pathlib import Path

    from mortise import LLM

LAYER = "model.layers.3"
PROMPTS = [[257, 1, 2, 3], [256, *range(40, 60)]]
GREEDY = SamplingParams(max_tokens=16, temperature=0.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_drafted(tmp_path_factory.mktemp("models") / "model")


def change(path: Path, **fields: Any) -> None:
    """Let quantization_config of a directory say something else."""
    file = path / "config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["quantization_config"] |= fields
    file.write_text(json.dumps(content), encoding="utf-8")


def projections(llm: LLM, role: str) -> dict[str, str]:
    """Decisions about projections, and why."""
    return {
        one.value: one.reason
        for one in llm.decisions
        if one.role.value == role and "projections" in one.value
    }


def assert_drafts_change_nothing(path: Path, **draft: Any) -> LLM:
    llm = drafting(path, 2, draft=draft)
    drafted = llm.generate(PROMPTS, GREEDY)
    plain = drafting(path).generate(PROMPTS, GREEDY)
    assert [one.token_ids for one in drafted] == [one.token_ids for one in plain]
    assert all(one.drafting is not None and one.drafting.drafted for one in drafted)
    return llm


@pytest.mark.parametrize(
    ("recipe", "lists", "says"),
    [
        (
            Recipe.of("nvfp4", "modelopt"),
            {"ignore": ["lm_head", "model.layers.[0-2].mlp.gate", "*.layers.[0-2].*.weights_proj"]},
            "says NVFP4 and does not exclude it",
        ),
        (
            Recipe.of("fp8-block"),
            {"modules_to_not_convert": []},
            "says fp8 and does not list it",
        ),
        (
            Recipe.of("w4a16"),
            {"ignore": ["lm_head", r"re:.*\.layers\.[0-2]\.mlp\.gate$", "re:.*weights_proj$"]},
            "says w4a16, written as pack-quantized",
        ),
    ],
)
def test_an_unquantised_draft_in_a_checkpoint_that_says_it_is_quantised(
    model: Path, tmp_path: Path, recipe: Recipe, lists: dict[str, Any], says: str
) -> None:
    path = tmp_path / "q"
    write(model, path, recipe)
    change(path, **lists)
    llm = assert_drafts_change_nothing(path)
    decided = projections(llm, "draft")
    reasons = set(decided.values())
    assert any(
        one.startswith("its weight is float32 without scales, though ") and one.endswith(says)
        for one in reasons
    )
    assert all(value.endswith(" projections float") for value in decided)


@pytest.mark.parametrize("draft", ["w8a8", "w4a16", "nvfp4"])
def test_a_draft_in_another_scheme(model: Path, tmp_path: Path, draft: str) -> None:
    write(model, tmp_path / "q", Recipe.of("w4a16", draft_scheme=draft))
    llm = assert_drafts_change_nothing(tmp_path / "q")
    assert {value.split()[2] for value in projections(llm, "draft")} == {draft}
    assert {value.split()[2] for value in projections(llm, "main")} == {"w4a16"}


def test_experts_alone_are_quantised(model: Path, tmp_path: Path) -> None:
    ignored = [f"{LAYER}.self_attn.*", f"{LAYER}.mlp.shared_experts.*"]
    write(model, tmp_path / "q", Recipe.of("w8a8", draft_scheme="w8a8", ignore=ignored))
    llm = assert_drafts_change_nothing(tmp_path / "q")
    # Both products of the experts, each of all of them.
    assert list(projections(llm, "draft")) == ["2 projections w8a8"]


def test_the_users_word(model: Path, tmp_path: Path) -> None:
    write(model, tmp_path / "whole", Recipe.of("w8a8"))
    llm = assert_drafts_change_nothing(tmp_path / "whole", quantization="none")
    assert set(projections(llm, "draft").values()) == {"draft.quantization is none"}
    write(model, tmp_path / "both", Recipe.of("w8a8", draft_scheme="w8a8"))
    with pytest.raises(QuantizationConfigError) as caught:
        drafting(tmp_path / "both", 2, draft={"quantization": "none"})
    assert f"modules of {LAYER} are stored quantised" in caught.value.what
    # The unquantised draft of another directory, whose own words nobody has to know.
    change(tmp_path / "whole", quant_method="a method of tomorrow")
    assert_drafts_change_nothing(
        tmp_path / "both", quantization="none", model=str(tmp_path / "whole")
    )
    with pytest.raises(QuantizationConfigError) as caught:
        drafting(tmp_path / "both", 2, draft={"model": str(tmp_path / "whole")})
    assert "draft.quantization none" in str(caught.value.remedy)
