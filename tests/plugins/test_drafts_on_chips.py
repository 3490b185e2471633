"""On emulated chips too a draft of any number format changes no token, or is refused clearly."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from tests.cli.command_line import mortise
from tests.fixtures.drafted_models import RIGHT, drafting, held_out_prompts, tokens_of
from tests.fixtures.quantised_drafts import OTHER, PAIRS, Pair, draft_scheme, save_pairs

from mortise import SamplingParams
from mortise.errors import BackendUnusableError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mortise import LLM

GREEDY = SamplingParams(max_tokens=6, ignore_eos=True)
ASCEND: dict[str, Any] = {"backend": "npu_ascend"}
CHIPS: dict[str, dict[str, Any]] = {
    "Hopper": {"backend": "cuda_hopper"},
    "Blackwell": {"backend": "cuda_blackwell"},
    "A3": ASCEND | {"backend_options": {"npu_ascend": {"generation": "A3"}}},
    "A5": ASCEND | {"backend_options": {"npu_ascend": {"generation": "A5"}}},
}
SERVED = {
    "Hopper": {"bf16", "fp8-block"},
    "Blackwell": {"bf16", "fp8-block", "nvfp4"},
    "A3": {"bf16", "w8a8", "w4a4"},
    "A5": {"bf16", "w8a8"},
}
"""Of the number formats that are paired here."""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Mapping[tuple[str, str], Pair]:
    folder = tmp_path_factory.mktemp("pairs")
    return save_pairs(folder, model_type="glm_moe_dsa", chance=RIGHT)


def load(pair: Pair, chip: str, num_tokens: int = 0, seqs: int = 8) -> LLM:
    return drafting(
        pair.model,
        num_tokens,
        seqs=seqs,
        dtype="bfloat16",
        device="emulated",
        draft={"model": pair.draft},
        **CHIPS[chip],
    )


def is_served(chip: str, main: str, draft: str) -> bool:
    return {main, draft_scheme(main, draft)} <= SERVED[chip]


EVERY = [(chip, *pair) for chip in CHIPS for pair in PAIRS]


@pytest.mark.parametrize(("chip", "main", "draft"), [one for one in EVERY if is_served(*one)])
def test_drafting_changes_no_token(
    pairs: Mapping[tuple[str, str], Pair], chip: str, main: str, draft: str
) -> None:
    pair = pairs[main, draft]
    plain = load(pair, chip)
    prompts = held_out_prompts(plain.tokenizer, 14)
    expected = tokens_of(plain.generate(prompts, GREEDY))
    for num_tokens, seqs in ((1, 1), (3, 8)):
        llm = load(pair, chip, num_tokens, seqs)
        found = llm.generate(prompts, GREEDY)
        assert tokens_of(found) == expected
        places = [one.drafting.accepted_by_place for one in found if one.drafting is not None]
        assert all(sum(counts) for counts in zip(*places, strict=True))
        backends = {
            one.value
            for one in llm.decisions
            if one.subject == "backend" and "emulated" in one.value
        }
        assert len(backends) == 1, "both roles run on the chip"


@pytest.mark.parametrize(("chip", "main", "draft"), [one for one in EVERY if not is_served(*one)])
def test_what_a_chip_cannot_serve_is_refused_by_name(
    pairs: Mapping[tuple[str, str], Pair], chip: str, main: str, draft: str
) -> None:
    """The draft alone, where the main model could be served."""
    with pytest.raises(BackendUnusableError) as caught:
        load(pairs[main, draft], chip, 1)
    blamed = draft_scheme(main, draft) if main in SERVED[chip] else main
    assert blamed.replace("-", "_") in str(caught.value)
    if main in SERVED[chip]:
        assert "model.layers.3." in str(caught.value)


@pytest.mark.parametrize(
    ("chip", "main", "code"),
    [("Hopper", "fp8-block", 2), ("A3", "w4a4", 0), ("Blackwell", "nvfp4", 0)],
)
def test_the_command_line(
    pairs: Mapping[tuple[str, str], Pair], chip: str, main: str, code: int
) -> None:
    options: list[str] = ["--backend", CHIPS[chip]["backend"], "--device", "emulated"]
    for backend, table in CHIPS[chip].get("backend_options", {}).items():
        options += ["--set", f"backend_options.{backend}.generation={table['generation']}"]
    pair = pairs[main, OTHER]
    arguments = (
        "generate",
        "def f(",
        "--temperature",
        "0",
        "--max-tokens",
        "6",
        "--json",
        *options,
    )
    drafted = mortise(*arguments, *pair.options, "--draft", "2")
    assert drafted.code == code, drafted.stderr
    if code:
        assert drafted.stdout == ""
        assert "nvfp4" in drafted.stderr
        return
    plain = mortise(*arguments, "--model", pair.model)
    (one,), (other,) = plain.document["completions"], drafted.document["completions"]
    assert one["token_ids"] == other["token_ids"]
    assert drafted.document["draft"]["emulated"]
