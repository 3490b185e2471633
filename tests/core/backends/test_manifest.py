from __future__ import annotations

from importlib.resources import files

import pytest
import torch

from mortise.backends.manifest import parse_manifest
from mortise.errors import BackendUnusableError
from mortise.plugin import BindContext, ModelRole
from mortise.reference.backend import ReferenceBackend
from mortise.spec.hooks import HOOKS
from mortise.spec.reasons import ReasonCode

GOOD = """
schema = 1
name = "toy"
summary = "a toy"
object = "toy.backend:Toy"
engine = ">=0.1"
devices = ["/dev/toy*"]
arch = ["t1", "t2*"]

[implements]
qkv_split = 1

[capabilities]
schemes = ["float"]
emulation = true
"""


def complaint(text: str) -> str:
    with pytest.raises(BackendUnusableError) as caught:
        parse_manifest(text)
    assert caught.value.reason is ReasonCode.MANIFEST_INVALID
    return caught.value.what


def test_a_manifest_is_read() -> None:
    manifest = parse_manifest(GOOD)
    assert manifest.schema_version == 1
    assert manifest.implements == {"qkv_split": 1}
    assert manifest.devices == ("/dev/toy*",)
    assert manifest.capabilities.emulation is True
    assert manifest.status == "serves"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("schema = 1", "schema = 2", "schema = 2"),
        ("schema = 1", "", "key 'schema' is missing"),
        ("summary", "sumary", "unknown key 'sumary', did you mean 'summary'?"),
        ("emulation", "emulations", "unknown key 'capabilities.emulations', did you mean"),
        ("qkv_split = 1", 'qkv_split = "1"', "implements.qkv_split = '1'"),
        ("qkv_split = 1", "qkv_split = true", "implements.qkv_split = True"),
        ("qkv_split = 1", "", "at least one hook"),
        ('">=0.1"', '"newest"', "engine = 'newest'"),
        ('["/dev/toy*"]', '["toy"]', "absolute path"),
        ('["float"]', '["flot"]', "capabilities.schemes.0 = 'flot'"),
        ('"toy.backend:Toy"', '"toy.backend"', "object = 'toy.backend'"),
        ('object = "toy.backend:Toy"', "", "needs an object"),
        ("schema = 1", 'schema = 1\nstatus = "planned"', "needs a status_reason"),
        ("schema = 1", "schema = ", "not TOML"),
    ],
)
def test_a_mistake_is_named(old: str, new: str, said: str) -> None:
    assert old in GOOD
    assert said in complaint(GOOD.replace(old, new))


def test_all_mistakes_are_told_at_once() -> None:
    said = complaint(GOOD.replace("summary", "sumary").replace('">=0.1"', '"newest"'))
    assert "sumary" in said
    assert "newest" in said


def test_the_reference_says_the_same_in_its_manifest_and_in_code() -> None:
    manifest = parse_manifest(files("mortise.reference").joinpath("backend.toml").read_text())
    context = BindContext(role=ModelRole.MAIN, device=None, engine_version="0")
    capabilities = ReferenceBackend.create(context).capabilities()
    declared = manifest.capabilities
    assert dict(manifest.implements) == {name: spec.version for name, spec in HOOKS.items()}
    assert set(declared.schemes) == capabilities.schemes
    assert set(declared.dispatch_dtypes) == capabilities.dispatch_dtypes
    assert set(declared.page_sizes) == capabilities.page_sizes
    named = tuple(getattr(torch, name) for name in declared.compute_dtypes)
    assert named == capabilities.compute_dtypes
