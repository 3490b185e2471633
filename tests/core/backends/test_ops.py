from __future__ import annotations

import dataclasses
import traceback
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from mortise.backends import BackendIdentity, Ops, load_backend, shims
from mortise.errors import ContractError
from mortise.plugin import NOT_SUPPORTED
from mortise.spec.hooks import HOOKS
from mortise.spec.reasons import ReasonCode
from mortise.spec.roles import ModelRole
from mortise.testing.distributions import backend_code

if TYPE_CHECKING:
    from mortise.testing.distributions import FakeDistribution

TOY = BackendIdentity(name="toy", distribution="mortise-toy", version="3.2", emulated=True)
GUARDS = [
    (shims.guard_1, 1),
    (shims.guard_declining, 1),
    (shims.guard_2, 2),
    (shims.guard_3, 3),
    (shims.guard_4, 4),
    (shims.guard_5, 5),
]


def test_the_table_has_the_hooks_in_their_order() -> None:
    fields = [field.name for field in dataclasses.fields(Ops)]
    assert sorted(fields[: len(HOOKS)]) == sorted(HOOKS)


def test_the_table_is_frozen_and_has_slots() -> None:
    ops = load_backend("reference", role=ModelRole.MAIN).ops
    with pytest.raises(dataclasses.FrozenInstanceError):
        ops.qkv_split = print  # type: ignore[misc]
    assert not hasattr(ops, "__dict__")


@pytest.mark.parametrize(("guard", "arity"), GUARDS)
def test_a_guard_passes_the_answer_and_the_arguments(guard, arity: int) -> None:
    def hook(*arguments):
        return ("answer", *arguments)

    call = guard(hook, shims.BoundHook("qkv_split", TOY, ModelRole.MAIN))
    assert call(*range(arity)) == ("answer", *range(arity))
    with pytest.raises(TypeError):
        call(*range(arity + 1))


@pytest.mark.parametrize(("guard", "arity"), GUARDS)
def test_a_guard_refuses_none(guard, arity: int) -> None:
    call = guard(lambda *_: None, shims.BoundHook("qkv_split", TOY, ModelRole.MAIN))
    with pytest.raises(ContractError) as caught:
        call(*range(arity))
    assert caught.value.reason is ReasonCode.RETURNED_NONE
    message = str(caught.value)
    assert message.startswith("hook qkv_split returned None\n")
    assert "backend toy (mortise-toy 3.2, emulated), role main" in message


@pytest.mark.parametrize(("guard", "arity"), GUARDS)
def test_only_one_hook_may_decline(guard, arity: int) -> None:
    call = guard(lambda *_: NOT_SUPPORTED, shims.BoundHook("qkv_split", TOY, ModelRole.MAIN))
    if guard is shims.guard_declining:
        assert call(*range(arity)) is NOT_SUPPORTED
        return
    with pytest.raises(ContractError, match="returned NOT_SUPPORTED") as caught:
        call(*range(arity))
    assert caught.value.reason is ReasonCode.CONTRACT_BROKEN


@pytest.mark.parametrize(("guard", "arity"), GUARDS)
def test_an_exception_says_whose_it_is(guard, arity: int) -> None:
    def hook(*_):
        raise ValueError("grid too large")

    call = guard(hook, shims.BoundHook("qkv_split", TOY, ModelRole.DRAFT))
    arguments = [object()] * (arity - 1) + [SimpleNamespace(layer="model.layers.7.mlp")]
    with pytest.raises(ValueError, match="grid too large") as caught:
        call(*arguments)
    (note,) = caught.value.__notes__
    hook_and_backend = "in hook qkv_split of backend toy (mortise-toy 3.2, emulated)"
    assert note == f"{hook_and_backend}, role draft, layer model.layers.7.mlp"


def test_every_bound_hook_is_guarded(installed: FakeDistribution) -> None:
    """A backend whose every hook returns None fails at every entry of the table."""
    from mortise.backends.adapters import PARAMETERS

    methods = "".join(
        f"@hookimpl\ndef {name}(self, {', '.join(parameters)}): pass\n"
        for name, parameters in PARAMETERS.items()
    )
    installed.add_backend(
        "silent",
        code=backend_code(methods),
        manifest={"implements": {name: spec.version for name, spec in HOOKS.items()}},
    )
    ops = load_backend("silent", role=ModelRole.MAIN, strict=True).ops
    for name, parameters in PARAMETERS.items():
        with pytest.raises(ContractError, match=f"hook {name} returned None"):
            getattr(ops, name)(*[None] * len(parameters))


def test_a_fallback_fails_in_its_own_name(installed: FakeDistribution) -> None:
    installed.add_backend("toy")
    ops = load_backend("toy", role=ModelRole.MAIN).ops
    with pytest.raises(AttributeError) as caught:
        ops.quantized_moe_apply(None, None, None)  # type: ignore[arg-type]
    text = "".join(traceback.format_exception(caught.value))
    assert "in hook quantized_moe_apply of backend reference (mortise-core " in text
