"""A backend built for the previous version of a hook is served, and says so, while promised."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import pytest
import torch

from mortise.backends import adapters, discover_backends, load_backend
from mortise.backends.adapters import HookAdapter
from mortise.backends.select import select_by_name
from mortise.errors import BackendUnusableError, ContractError
from mortise.reference.qkv import qkv_split
from mortise.spec import hooks
from mortise.spec.hooks import HookSpec
from mortise.spec.qkv import QKVLayout, QKVShape
from mortise.spec.reasons import ReasonCode
from mortise.spec.roles import ModelRole, Phase
from mortise.testing.distributions import backend_code

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mortise.backends import Candidate
    from mortise.backends.select import Selection
    from mortise.testing.distributions import FakeDistribution

SHAPE = QKVShape(
    num_key_heads=2,
    num_value_heads=4,
    key_head_dim=3,
    value_head_dim=5,
    layout=QKVLayout.INTERLEAVED,
)
# As the hook might have been once: both projections in one tensor.
OLD = """
@hookimpl
def qkv_split(self, projected, shape):
    width = 2 * (shape.num_key_heads * shape.key_head_dim
                 + shape.num_value_heads * shape.value_head_dim)
    return reference.qkv_split(projected[:, :width], projected[:, width:], shape)
"""
RENAMED = OLD.replace("@hookimpl", '@hookimpl(specname="qkv_split")').replace(
    "def qkv_split", "def split"
)


def joined(previous: Callable[..., Any]) -> Callable[..., Any]:
    """An implementation with one projection as one with two."""

    def current(projected_qkvz: torch.Tensor, projected_ba: torch.Tensor, shape: QKVShape) -> Any:
        return previous(torch.cat([projected_qkvz, projected_ba], dim=-1), shape)

    return current


def up_to_date_reference(rows: Sequence[Candidate], name: str) -> Selection:
    """The row of a name; that of the reference as the changed core would ship it."""
    selection = select_by_name(rows, name)
    manifest = selection.row.manifest
    if name != "reference" or manifest is None:
        return selection
    implements = {**manifest.implements, "qkv_split": 2}
    row = replace(selection.row, manifest=manifest.model_copy(update={"implements": implements}))
    return replace(selection, row=row)


@pytest.fixture(autouse=True)
def changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A core in which ``qkv_split`` has changed, and serves the version before."""
    spec = HookSpec(name="qkv_split", version=2, phase=Phase.KERNEL)
    changed = MappingProxyType({**hooks.HOOKS, "qkv_split": spec})
    for module in ("spec.hooks", "backends.validate", "backends.load"):
        monkeypatch.setattr(f"mortise.{module}.HOOKS", changed)
    monkeypatch.setattr("mortise.backends.load.select_by_name", up_to_date_reference)
    adapter = HookAdapter(
        hook="qkv_split",
        version=1,
        parameters=("projected", "shape"),
        adapt=joined,
        removed_in="0.4",
    )
    monkeypatch.setattr(adapters, "ADAPTERS", MappingProxyType({"qkv_split": adapter}))


def arguments() -> tuple[torch.Tensor, torch.Tensor, QKVShape]:
    generator = torch.Generator().manual_seed(0)
    width = 2 * (2 * 3 + 4 * 5)
    return (
        torch.randn(7, width, generator=generator),
        torch.randn(7, 8, generator=generator),
        SHAPE,
    )


@pytest.mark.parametrize("methods", [OLD, RENAMED])
def test_it_answers_through_the_adapter_and_says_so(
    installed: FakeDistribution, methods: str
) -> None:
    installed.add_backend("old", code=backend_code(methods))
    bound = load_backend("old", role=ModelRole.MAIN)
    expected, got = qkv_split(*arguments()), bound.ops.qkv_split(*arguments())
    for name in ("mixed_qkv", "z", "b", "a"):
        assert torch.equal(getattr(got, name), getattr(expected, name))
    (decision,) = bound.adapted
    assert (decision.subject, decision.rule) == ("qkv_split", "adapted")
    assert decision.reason == (
        "its manifest implements version 1, adapted to 2; mortise-core 0.4 will refuse it"
    )
    assert "qkv_split" not in {one.subject for one in bound.fallbacks}


def test_strict_takes_it_for_an_answer(installed: FakeDistribution) -> None:
    """What is strict about is the reference in another's place."""
    installed.add_backend("old", code=backend_code(OLD))
    with pytest.raises(BackendUnusableError) as caught:
        load_backend("old", role=ModelRole.MAIN, strict=True)
    assert "qkv_split" not in caught.value.what


def test_an_exception_of_it_names_hook_and_backend(installed: FakeDistribution) -> None:
    failing = "@hookimpl\ndef qkv_split(self, projected, shape):\n    raise ValueError('no')\n"
    installed.add_backend("old", code=backend_code(failing))
    ops = load_backend("old", role=ModelRole.MAIN).ops
    with pytest.raises(ValueError, match="no") as caught:
        ops.qkv_split(*arguments())
    assert "hook qkv_split of backend old (mortise-old 1.0)" in caught.value.__notes__[0]


def test_its_signature_is_that_of_its_version(installed: FakeDistribution) -> None:
    installed.add_backend("old")
    with pytest.raises(ContractError) as caught:
        load_backend("old", role=ModelRole.MAIN)
    assert caught.value.reason is ReasonCode.SIGNATURE_MISMATCH
    assert caught.value.expected == "qkv_split(projected, shape)"


def test_the_current_version_needs_no_adapter(installed: FakeDistribution) -> None:
    installed.add_backend("new", manifest={"implements": {"qkv_split": 2}})
    bound = load_backend("new", role=ModelRole.MAIN)
    assert bound.adapted == ()
    assert bound.ops.qkv_split(*arguments()).z.shape == (7, 4, 5)


@pytest.mark.parametrize(("version", "remedy"), [(3, "a newer core")])
def test_any_other_version_is_refused(
    installed: FakeDistribution, version: int, remedy: str
) -> None:
    installed.add_backend("odd", manifest={"implements": {"qkv_split": version}})
    (row,) = (row for row in discover_backends() if row.name == "odd")
    assert row.reason is ReasonCode.HOOK_VERSION_UNSUPPORTED
    assert remedy in row.remedy


def test_a_version_that_is_no_longer_promised_is_refused(
    installed: FakeDistribution, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapters, "ADAPTERS", MappingProxyType({}))
    installed.add_backend("old", code=backend_code(OLD))
    (row,) = (row for row in discover_backends() if row.name == "old")
    assert row.reason is ReasonCode.HOOK_VERSION_UNSUPPORTED
    assert "a newer version of the backend" in row.remedy


def test_every_adapter_serves_the_version_before_the_current_one() -> None:
    for hook, adapter in adapters.ADAPTERS.items():
        assert adapter.hook == hook
        assert adapter.version == hooks.HOOKS[hook].version - 1
