"""The core asks, plugins answer: no vendor or device word stands anywhere in the core."""

from __future__ import annotations

import re

import pytest

from tests.meta.tree import CORE_SOURCES, shown

WORDS = (
    "amd ascend blackwell cann cublas cuda cudnn cutlass deep_ep deep_gemm flashinfer gaudi hccl "
    "hip hopper huawei mps musa nccl npu nvidia rccl rocm torch_npu tpu xpu "
    r"sm_?\d+\w? [abgh]+[12]00 910\w?"
)
# An underscore separates words here (is_npu), a letter does not (input).
DEVICE_WORD = re.compile(
    rf"(?<![a-z0-9])(?:{'|'.join(WORDS.split())})(?![a-z0-9])", flags=re.IGNORECASE
)
# A vocabulary is learnt from text, not written: a piece of "input" is no statement about a chip.
LEARNT = {"tokenizer.json", "vocab.json", "merges.txt"}
TEXT = {".py", ".toml", ".md", ".json", ".jinja", ".template", ".txt", ".typed"}


@pytest.mark.parametrize(
    "text",
    ["torch.cuda", "is_npu()", "Hopper", "import torch_npu", "sm_90a", "SM100", "H100", "NCCL"],
)
def test_the_pattern_finds_device_words(text: str) -> None:
    assert DEVICE_WORD.search(text)


@pytest.mark.parametrize(
    "text", ["input", "barracuda", "output_npuzzle", "chip", "ship", "200", "small"]
)
def test_the_pattern_leaves_other_words_alone(text: str) -> None:
    assert not DEVICE_WORD.search(text)


def test_no_device_word_in_the_core() -> None:
    found = []
    for path in sorted(CORE_SOURCES.rglob("*")):
        if match := DEVICE_WORD.search(path.name):
            found.append(f"{shown(path)}: file name holds {match.group()!r}")
        if path.suffix not in TEXT or path.name in LEARNT or not path.is_file():
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if match := DEVICE_WORD.search(line):
                found.append(f"{shown(path)}:{number}: {match.group()!r}")
    assert not found, "a difference between chips belongs into a plugin:\n" + "\n".join(found)
