"""What experts of each scheme ordinarily take and ask for, against a table."""

from __future__ import annotations

import re
from itertools import product

import pytest
import torch
from tests.docs.pages import DOCS

from mortise.spec.consumer import CONSUMED, PLAIN
from mortise.spec.dispatch import DispatchDtype
from mortise.spec.methods import ordinary_method, unquantised
from mortise.spec.weights import WeightScheme

# Schemes by whether the checkpoint holds a scale for the input; "plain" is the compute dtype. The
# experts take the formats in this order of preference; the marked one they ask for.
METHODS = {
    # scheme       without a scale   with one
    "float": ("*plain", "*plain"),
    "fp8_block": ("*fp8 plain", "*fp8 plain"),
    "w8a8": ("*int8 plain", "*plain"),
    "w4a8": ("*int8 plain", "*int8 plain"),
    "w4a4": ("*plain", "*plain"),
    "w4a16": ("*plain", "*plain"),
    # Asked for by the scale itself, so the method need not.
    "nvfp4": ("*plain", "nvfp4 plain"),
}
COMPUTE_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
CASES = tuple(product(WeightScheme, (False, True), COMPUTE_DTYPES))


@pytest.mark.parametrize(("scheme", "static_input", "compute_dtype"), CASES)
def test_every_scheme_takes_and_asks_for_what_the_table_says(
    scheme: WeightScheme, static_input: bool, compute_dtype: torch.dtype
) -> None:
    words = METHODS[scheme.value][static_input].replace("plain", COMPUTE_DTYPES[compute_dtype])
    method = ordinary_method(scheme, compute_dtype, static_input=static_input)
    assert [dtype.value for dtype in method.accepted] == words.replace("*", "").split()
    asked = [word.removeprefix("*") for word in words.split() if word.startswith("*")]
    assert asked == ([] if method.requested is None else [method.requested.value])
    assert method.requested_in_mode == {}
    assert not method.runner_quantises


def test_the_table_knows_every_scheme() -> None:
    assert list(METHODS) == [scheme.value for scheme in WeightScheme]


@pytest.mark.parametrize(("scheme", "static_input", "compute_dtype"), CASES)
def test_what_is_taken_passes_the_check_at_run_time(
    scheme: WeightScheme, static_input: bool, compute_dtype: torch.dtype
) -> None:
    accepted = set(ordinary_method(scheme, compute_dtype, static_input=static_input).accepted)
    assert accepted <= PLAIN | CONSUMED[scheme]
    # Unquantised rows are always taken: then the method quantises by itself.
    assert accepted & PLAIN == {unquantised(compute_dtype)}


def test_the_page_says_the_same() -> None:
    page = (DOCS / "how-to/choose-a-dispatch-format.md").read_text(encoding="utf-8")
    row = r"^\| ((?:(?:, )?`\w+`)+)([\w ]*) \| ([\w, ]*compute dtype) \|$"
    conditions = {
        "": (False, True),
        " with stored scales for the input": (True,),
        " without": (False,),
    }
    shown: dict[str, list[str]] = {scheme: ["", ""] for scheme in METHODS}
    # A later row, with a condition, is the exception from an earlier one.
    for names, condition, accepted in re.findall(row, page, flags=re.MULTILINE):
        for name in re.findall(r"`(\w+)`", names):
            for static_input in conditions[condition]:
                shown[name][static_input] = accepted.replace("the compute dtype", "plain")
    assert shown == {
        scheme: [", ".join(words.replace("*", "").split()) for words in both]
        for scheme, both in METHODS.items()
    }


def test_every_quantised_format_is_consumed_by_some_scheme() -> None:
    consumed = frozenset().union(*CONSUMED.values())
    assert consumed == set(DispatchDtype) - PLAIN
