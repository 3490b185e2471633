"""The search for what nobody documented finds one of each kind."""

from __future__ import annotations

import inspect
from enum import StrEnum
from typing import TYPE_CHECKING, TypeAlias

import click
import pytest
from pydantic import Field

from mortise import errors, plugin
from mortise.backends import manifest
from mortise.cli import command_tree
from mortise.config import describe
from mortise.config.engine import EngineConfig
from mortise.spec import hooks, reasons
from mortise.spec.roles import Phase
from tests.docs import completeness, hook_pages, records_page
from tests.docs.completeness import undocumented

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from mortise.spec.qkv import QKVParts, QKVShape


Found: TypeAlias = "Callable[[], dict[str, list[str]]]"


@pytest.fixture
def more() -> Found:
    """What became undocumented since the test began, of the kinds where anything did."""
    before = undocumented()

    def found() -> dict[str, list[str]]:
        now = {
            kind: [name for name in names if name not in before[kind]]
            for kind, names in undocumented().items()
        }
        return {kind: names for kind, names in now.items() if names}

    return found


def test_a_hook(monkeypatch: pytest.MonkeyPatch, more: Found) -> None:
    def rms_norm() -> None:
        """Normalise."""

    spec = hooks.HookSpec(name="rms_norm", version=1, phase=Phase.KERNEL)
    monkeypatch.setattr(hooks, "HOOKS", {**hooks.HOOKS, "rms_norm": spec})
    monkeypatch.setattr(hooks, "rms_norm", rms_norm, raising=False)
    (missing,) = more().values()
    assert missing[0] == "rms_norm: no row in reference/hooks.md"
    assert len(missing) == 1 + len(hook_pages.SECTIONS)


def test_a_section_of_a_hooks_contract(monkeypatch: pytest.MonkeyPatch, more: Found) -> None:
    """The page that the generator makes for a new hook does not count until somebody fills it."""
    page = f"{hook_pages.head('qkv_split')}\n\n{hook_pages.blank()}\n"
    text_of = completeness.text_of

    def text(name: str) -> str:
        return page if name == "reference/hooks/qkv_split.md" else text_of(name)

    monkeypatch.setattr(completeness, "text_of", text)
    assert len(more()["hook"]) == len(hook_pages.SECTIONS)


def test_a_parameter_of_a_hook(monkeypatch: pytest.MonkeyPatch, more: Found) -> None:
    def qkv_split(
        projected_qkvz: torch.Tensor, projected_ba: torch.Tensor, shape: QKVShape, scale: float
    ) -> QKVParts:
        raise AssertionError

    monkeypatch.setattr(hooks, "qkv_split", qkv_split)
    assert more() == {"parameter": ["qkv_split(scale)"]}


def test_a_parameter_without_a_meaning(monkeypatch: pytest.MonkeyPatch, more: Found) -> None:
    """A row is made of what the specification says; where that says nothing, it is empty."""
    doc = inspect.cleandoc(hooks.qkv_split.__doc__ or "")
    silent = doc.replace("    projected_ba: ``[T, 2*nv]``.\n", "")
    assert silent != doc
    monkeypatch.setattr(hooks.qkv_split, "__doc__", silent)
    page = f"{hook_pages.head('qkv_split')}\n"
    text_of = completeness.text_of
    monkeypatch.setattr(
        completeness,
        "text_of",
        lambda name: (
            page + hook_pages.written_by_hand(text_of(name))
            if name == "reference/hooks/qkv_split.md"
            else text_of(name)
        ),
    )
    assert more() == {"parameter": ["qkv_split(projected_ba)"]}


def test_a_field_of_a_record(monkeypatch: pytest.MonkeyPatch, more: Found) -> None:
    """Whether its class describes it and the page is old, or nobody has described it."""
    told = records_page.meanings
    wider = {"window": "keys that a query sees", "stride": ""}
    monkeypatch.setattr(
        records_page,
        "meanings",
        lambda kind: told(kind) | (wider if kind is plugin.QKVShape else {}),
    )
    assert more() == {"record field": ["QKVShape.window", "QKVShape.stride"]}


def test_a_record(monkeypatch: pytest.MonkeyPatch, more: Found) -> None:
    class Moon:
        """Shines."""

    exported = records_page.exported()
    exported["mortise.spec.qkv"].append(Moon)
    monkeypatch.setattr(records_page, "exported", lambda: exported)
    assert more() == {"record field": ["Moon"]}


def test_a_reason_code(monkeypatch: pytest.MonkeyPatch, more: Found) -> None:
    known = {code.name: code.value for code in reasons.ReasonCode}
    codes = StrEnum("ReasonCode", {**known, "MOON_FULL": "moon_full"})  # type: ignore[misc]
    monkeypatch.setattr(reasons, "ReasonCode", codes)
    assert more() == {"reason code": ["moon_full"]}


def test_a_field_of_the_manifest(monkeypatch: pytest.MonkeyPatch, more: Found) -> None:
    class Wider(manifest.Manifest):
        __doc__ = manifest.Manifest.__doc__
        licence: str = ""

    monkeypatch.setattr(manifest, "Manifest", Wider)
    assert more() == {"manifest field": ["licence"]}


def test_a_capability_of_the_manifest(monkeypatch: pytest.MonkeyPatch, more: Found) -> None:
    class Capabilities(manifest.ManifestCapabilities):
        __doc__ = manifest.ManifestCapabilities.__doc__
        graphs: bool = False

    class Wider(manifest.Manifest):
        __doc__ = manifest.Manifest.__doc__
        capabilities: Capabilities = Capabilities()

    monkeypatch.setattr(manifest, "Manifest", Wider)
    assert more() == {"manifest field": ["capabilities.graphs"]}


def test_a_key_of_the_configuration(monkeypatch: pytest.MonkeyPatch, more: Found) -> None:
    class Wider(EngineConfig):
        colour: str = Field(default="brown", description="of the output")

    rows = tuple(describe.config_rows(Wider))
    monkeypatch.setattr(describe, "config_rows", lambda: rows)
    assert more() == {"configuration key": ["colour"]}


def test_an_option_of_a_command(monkeypatch: pytest.MonkeyPatch, more: Found) -> None:
    tree = command_tree()
    explain = tree.commands["explain"]
    wider = click.Command(
        "explain", params=[*explain.params, click.Option(["--colour"], help="of the output")]
    )
    monkeypatch.setattr(tree, "commands", {**tree.commands, "explain": wider})
    monkeypatch.setattr(completeness, "command_tree", lambda: tree)
    assert more() == {"option": ["mortise explain --colour"]}


def test_a_command(monkeypatch: pytest.MonkeyPatch, more: Found) -> None:
    tree = command_tree()
    monkeypatch.setattr(tree, "commands", {**tree.commands, "serve": click.Command("serve")})
    monkeypatch.setattr(completeness, "command_tree", lambda: tree)
    assert more() == {"option": ["mortise serve"]}


def test_a_class_of_errors(monkeypatch: pytest.MonkeyPatch, more: Found) -> None:
    class MoonError(errors.MortiseError):
        """The moon is full."""

    monkeypatch.setattr(errors, "MoonError", MoonError, raising=False)
    assert more() == {"error class": ["MoonError"]}
