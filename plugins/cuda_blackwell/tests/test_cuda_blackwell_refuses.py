from __future__ import annotations

import json
import subprocess
import sys

import pytest

from mortise.backends import Stage, discover_backends, load_backend
from mortise.errors import BackendUnusableError
from mortise.plugin import BindContext, ModelRole, ReasonCode
from mortise_cuda_blackwell.backend import BlackwellBackend

NAME, DISTRIBUTION = "cuda_blackwell", "mortise-cuda-blackwell"

IMPORTING = """
import json, sys
import mortise.plugin
before = set(sys.modules)
import mortise_cuda_blackwell.backend, mortise_cuda_blackwell.dispatch
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def test_it_is_listed_with_its_reason() -> None:
    (row,) = [row for row in discover_backends() if row.name == NAME]
    assert row.distribution == DISTRIBUTION
    assert row.stage is Stage.COMPATIBLE, "nothing else speaks against it"
    assert row.reason is ReasonCode.CANNOT_SERVE_YET
    assert row.explanation


def test_asking_for_it_is_an_error_with_cause_first_and_remedy_last() -> None:
    with pytest.raises(BackendUnusableError) as caught:
        load_backend(NAME, role=ModelRole.MAIN)
    assert caught.value.reason is ReasonCode.CANNOT_SERVE_YET
    first, *_, last = str(caught.value).splitlines()
    assert first.startswith(f"backend {NAME!r} cannot serve: ")
    assert last.startswith("  remedy: ")
    assert DISTRIBUTION in last


def test_the_class_refuses_in_the_words_of_the_manifest() -> None:
    (row,) = [row for row in discover_backends() if row.name == NAME]
    context = BindContext(role=ModelRole.MAIN, device=None, engine_version="0.1.0")
    with pytest.raises(BackendUnusableError) as caught:
        BlackwellBackend.create(context)
    assert caught.value.what.endswith(row.explanation)


def test_importing_it_needs_nothing_but_the_core() -> None:
    child = subprocess.run(
        [sys.executable, "-c", IMPORTING], capture_output=True, text=True, check=True
    )
    imported = json.loads(child.stdout)
    assert imported == [
        "mortise_cuda_blackwell",
        "mortise_cuda_blackwell.backend",
        "mortise_cuda_blackwell.dispatch",
    ]
