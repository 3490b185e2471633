"""Two ranks of an emulated chip: what the main model sends is quantised, the draft's is not."""

from __future__ import annotations

import json
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from tests.cli.command_line import mortise
from tests.fixtures.drafted_models import save_drafted
from tests.fixtures.launched import launch

if TYPE_CHECKING:
    from pathlib import Path

CHIPS: dict[str, dict[str, Any]] = {
    "w8a8": {
        "backend": "npu_ascend",
        "backend_options": {"npu_ascend": {"generation": "A3"}},
    },
    "fp8-block": {"backend": "cuda_hopper"},
}
"""By the number format that each serves."""


def cases_of(folder: Path) -> list[dict[str, Any]]:
    """Both chips, quantised main model or quantised draft, without and with drafting."""
    plain = save_drafted(
        folder / "plain", model_type="glm4_moe", dtype=torch.bfloat16, moe_intermediate_size=64
    )
    cases = []
    for scheme, chip in CHIPS.items():
        for name, draft in (("main", "none"), ("both", scheme)):
            schemes = ("--scheme", scheme, "--draft-scheme", draft)
            outcome = mortise("quantize", folder / scheme / name, "--model", plain, *schemes)
            assert outcome.code == 0, outcome.stderr
        ways = (
            (folder / scheme / "main", folder / scheme / "main"),
            (plain, folder / scheme / "both"),
        )
        for (main, draft), num_tokens in product(ways, (0, 3)):
            config = {"model": str(main), "draft": {"num_tokens": num_tokens, "model": str(draft)}}
            config |= {"device": "emulated", "dtype": "bfloat16"} | chip
            cases += [{"config": config, "num_prompts": number} for number in (1, 3)]
    return cases


def test_drafting_changes_no_token(tmp_path: Path) -> None:
    """With one prompt the other rank is idle, with three it has one of them."""
    cases = cases_of(tmp_path)
    file = tmp_path / "cases.json"
    file.write_text(json.dumps(cases), encoding="utf-8")
    ended = launch([["-m", "tests.engine.rank_program", "cases", str(file)]] * 2)
    assert [one.code for one in ended] == [0, 0], ended[0].stderr
    *found, _ = json.loads(ended[0].stdout)
    for first in range(0, len(cases), 4):
        without, drafting = found[first : first + 2], found[first + 2 : first + 4]
        for case, one, other in zip(cases[first:], without, drafting, strict=False):
            number = case["num_prompts"]
            assert one["tokens"][:number] == other["tokens"][:number], case
            formats = {text.split(",")[0] for text in other["formats"]}
            assert len(formats) == 2, "main model and draft travel differently"
            assert len({text.split(",")[0] for text in one["formats"]}) == 1
