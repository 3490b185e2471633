"""The traps of pluggy, T1 to T15: each is reproduced by a backend, and each ends in a clear error.

Where a trap lies in the core's own use of pluggy, the test shows that the core cannot step into it.
"""

from __future__ import annotations

import inspect
import sys
from importlib.metadata import requires
from typing import TYPE_CHECKING

import pluggy
import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version

from mortise.backends import load_backend
from mortise.errors import BackendError, ContractError
from mortise.plugin import QKVLayout, QKVParts, QKVShape
from mortise.spec import hooks
from mortise.spec.reasons import ReasonCode
from mortise.spec.roles import ModelRole
from mortise.testing.distributions import QKV_SPLIT, backend_code

if TYPE_CHECKING:
    from mortise.testing.distributions import FakeDistribution

SHAPE = QKVShape(
    num_key_heads=1,
    num_value_heads=1,
    key_head_dim=2,
    value_head_dim=3,
    layout=QKVLayout.CONTIGUOUS,
)
QKVZ, BA = torch.arange(20.0).view(2, 10), torch.arange(4.0).view(2, 2)


def rejected(
    installed: FakeDistribution,
    methods: str,
    *,
    before: str = "",
    manifest: dict[str, object] | None = None,
) -> BackendError:
    """The error of loading a backend with these methods; it says whose backend it is."""
    installed.add_backend(
        "trap", version="3.2", code=backend_code(methods, before=before), manifest=manifest
    )
    with pytest.raises(BackendError) as caught:
        load_backend("trap", role=ModelRole.MAIN)
    assert "backend 'trap' of mortise-trap 3.2" in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("parameters", "problem"),
    [
        pytest.param(
            "projected_qkvz, projected_ba, shape=None", "'shape' has a default", id="T1 default"
        ),
        pytest.param(
            "projected_qkvz, projected_ba, shap=None", "'shap' has a default", id="T2 default"
        ),
        pytest.param(
            "projected_qkvz, projected_ba, shap",
            "'shap' stands where 'shape' belongs",
            id="T2 misspelt",
        ),
        pytest.param(
            "projected_qkvz, projected_ba, *, shape", "'shape' is keyword-only", id="T3 keyword"
        ),
        pytest.param(
            "projected_qkvz, projected_ba, *, shape=None",
            "'shape=None' is keyword-only",
            id="T3 keyword with default",
        ),
        pytest.param(
            "projected_qkvz, projected_ba, shape, /", "is positional-only", id="positional-only"
        ),
        pytest.param("*arguments", "'*arguments' is variadic positional", id="T3 variadic"),
        pytest.param("**arguments", "'**arguments' is variadic keyword", id="T3 keywords"),
        pytest.param(
            "projected_ba, projected_qkvz, shape",
            "'projected_ba' stands where 'projected_qkvz' belongs",
            id="order",
        ),
        pytest.param("projected_qkvz, projected_ba", "'shape' is missing", id="subset"),
        pytest.param(
            "projected_qkvz, projected_ba, shape, more", "'more' is one too many", id="more"
        ),
    ],
)
def test_t1_t2_t3_signatures_are_exact(
    installed: FakeDistribution, parameters: str, problem: str
) -> None:
    error = rejected(installed, f"@hookimpl\ndef qkv_split(self, {parameters}): pass")
    assert isinstance(error, ContractError)
    assert error.reason is ReasonCode.SIGNATURE_MISMATCH
    assert error.what.startswith("hook qkv_split has the wrong signature: parameter ")
    assert error.what.endswith(problem)
    assert error.expected == "qkv_split(projected_qkvz, projected_ba, shape)"
    assert "backend.py, line " in str(error)


@pytest.mark.parametrize(
    ("methods", "before", "kind"),
    [
        pytest.param(
            "qkv_split = hookimpl(functools.partial(print, 1))",
            "import functools",
            "a functools.partial object",
            id="partial",
        ),
        pytest.param(
            "qkv_split = hookimpl(Compiled())",
            "class Compiled:\n    def __call__(self, projected_qkvz, projected_ba, shape): pass",
            "a fake_trap.backend.Compiled object",
            id="callable object",
        ),
        pytest.param(
            "@property\n@hookimpl\ndef qkv_split(self): raise RuntimeError('evaluated')",
            "",
            "a builtins.property object",
            id="property",
        ),
    ],
)
def test_t4_callables_that_pluggy_skips(
    installed: FakeDistribution, methods: str, before: str, kind: str
) -> None:
    error = rejected(installed, methods, before=before)
    assert error.reason is ReasonCode.HOOK_MISSING
    assert error.what == f"hook qkv_split is {kind}"
    assert "skipped in silence" in str(error)


def test_t4_an_attribute_of_the_object_hides_the_hook(installed: FakeDistribution) -> None:
    error = rejected(
        installed,
        QKV_SPLIT
        + "\ndef __init__(self):\n    self.qkv_split = functools.partial(self.qkv_split)\n",
        before="import functools",
    )
    assert error.reason is ReasonCode.HOOK_MISSING
    assert "hook qkv_split is declared, but the created object hides it" in str(error)


def test_t4_declared_but_not_implemented(installed: FakeDistribution) -> None:
    error = rejected(installed, "")
    assert error.reason is ReasonCode.HOOK_MISSING
    assert error.what == "hook qkv_split is declared in backend.toml but not implemented"


def test_t4_implemented_but_not_declared(installed: FakeDistribution) -> None:
    more = "@hookimpl\ndef create_token_dispatcher(self, request): return NOT_SUPPORTED"
    error = rejected(installed, QKV_SPLIT + more)
    assert error.reason is ReasonCode.CONTRACT_BROKEN
    assert error.what == "hook create_token_dispatcher is implemented but not declared"


@pytest.mark.parametrize("declared", ["qkv_split", "create_token_dispatcher"])
def test_t4_a_forgotten_marker(installed: FakeDistribution, declared: str) -> None:
    methods = "def qkv_split(self, projected_qkvz, projected_ba, shape): pass\n"
    if declared != "qkv_split":
        methods += f"@hookimpl\ndef {declared}(self, request): return NOT_SUPPORTED\n"
    error = rejected(installed, methods, manifest={"implements": {declared: 1}})
    assert error.reason is ReasonCode.HOOK_MISSING
    assert error.what == "method qkv_split is not marked as a hook"


def test_t5_two_distributions_of_one_name(
    installed: FakeDistribution, elsewhere: FakeDistribution
) -> None:
    first = installed.add_backend("trap", distribution="first", package="fake_first")
    second = elsewhere.add_backend("trap", distribution="second", package="fake_second")
    with pytest.raises(BackendError) as caught:
        load_backend("trap", role=ModelRole.MAIN)
    assert caught.value.reason is ReasonCode.NAME_DUPLICATE
    assert str(first) in str(caught.value)
    assert str(second) in str(caught.value)


def test_t6_a_backend_that_fails_to_import_stops_no_other(installed: FakeDistribution) -> None:
    installed.add_backend("broken", code="import a_library_nobody_has")
    installed.add_backend("good")
    assert load_backend("good", role=ModelRole.MAIN).ops.backend.name == "good"
    assert "fake_broken" not in sys.modules
    with pytest.raises(BackendError) as caught:
        load_backend("broken", role=ModelRole.MAIN)
    assert caught.value.what == "ModuleNotFoundError: No module named 'a_library_nobody_has'"


def test_t7_an_unknown_hook(installed: FakeDistribution) -> None:
    error = rejected(installed, QKV_SPLIT + QKV_SPLIT.replace("qkv_split", "qkv_spilt", 1))
    assert error.reason is ReasonCode.HOOK_UNKNOWN
    assert error.what == "'qkv_spilt' is no hook, did you mean 'qkv_split'?"


def test_t7_an_optional_hook_does_not_excuse_it(installed: FakeDistribution) -> None:
    methods = QKV_SPLIT + "@hookimpl(optionalhook=True)\ndef qkv_spilt(self): pass"
    assert rejected(installed, methods).reason is ReasonCode.HOOK_UNKNOWN


def test_t8_t9_the_core_passes_every_argument_by_position(installed: FakeDistribution) -> None:
    installed.add_backend("trap")
    ops = load_backend("trap", role=ModelRole.MAIN).ops
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        ops.qkv_split(QKVZ, BA)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        ops.qkv_split(projected_qkvz=QKVZ, projected_ba=BA, shape=SHAPE)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        ops.qkv_split(QKVZ, BA, SHAPE, scael=1)  # type: ignore[call-arg]


def test_t10_none_is_an_error_and_no_other_backend_runs(installed: FakeDistribution) -> None:
    returns_none = "@hookimpl\ndef qkv_split(self, projected_qkvz, projected_ba, shape): pass"
    installed.add_backend("trap", version="3.2", code=backend_code(returns_none))
    installed.add_backend("other", code="raise SystemExit('imported without being chosen')")
    ops = load_backend("trap", role=ModelRole.DRAFT).ops
    with pytest.raises(ContractError) as caught:
        ops.qkv_split(QKVZ, BA, SHAPE)
    assert caught.value.reason is ReasonCode.RETURNED_NONE
    assert caught.value.what == "hook qkv_split returned None"
    assert "hook qkv_split of backend trap (mortise-trap 3.2), role draft" in str(caught.value)


WRAPPER = """
@hookimpl(wrapper=True)
def qkv_split(self, projected_qkvz, projected_ba, shape):
    yield
    return "altered"
"""


def test_t11_another_installed_plugin_cannot_wrap_a_hook(installed: FakeDistribution) -> None:
    installed.add_backend("trap")
    installed.add_backend("wrapping", code=backend_code(WRAPPER))
    parts = load_backend("trap", role=ModelRole.MAIN).ops.qkv_split(QKVZ, BA, SHAPE)
    assert isinstance(parts, QKVParts)
    assert "fake_wrapping" not in sys.modules


@pytest.mark.parametrize(
    "option", ["wrapper", "hookwrapper", "tryfirst", "trylast", "optionalhook"]
)
def test_t11_options_that_order_or_wrap(installed: FakeDistribution, option: str) -> None:
    error = rejected(installed, QKV_SPLIT.replace("@hookimpl", f"@hookimpl({option}=True)"))
    assert error.reason is ReasonCode.CONTRACT_BROKEN
    assert error.what == f"hook qkv_split is marked {option}"


def test_t11_a_real_wrapper_is_refused(installed: FakeDistribution) -> None:
    # It is a generator as well, and either is enough.
    assert rejected(installed, WRAPPER).reason is ReasonCode.SIGNATURE_MISMATCH


def test_t12_a_failed_registration_leaves_nothing_behind(installed: FakeDistribution) -> None:
    good = "@hookimpl\ndef create_token_dispatcher(self, request): return NOT_SUPPORTED\n"
    bad = "@hookimpl\ndef qkv_split(self, wrong): pass\n"
    rejected(
        installed,
        good + bad,
        manifest={"implements": {"create_token_dispatcher": 1, "qkv_split": 1}},
    )
    ops = load_backend("reference", role=ModelRole.MAIN).ops
    assert ops.backend.name == "reference"
    assert isinstance(ops.qkv_split(QKVZ, BA, SHAPE), QKVParts)


def test_t12_pluggy_is_new_enough() -> None:
    pinned = [Requirement(text) for text in requires("mortise-core") or ()]
    (specifier,) = [found.specifier for found in pinned if found.name == "pluggy"]
    assert not specifier.contains("1.6.0")
    assert not specifier.contains("2.0")
    assert Version(pluggy.__version__) in specifier


@pytest.mark.parametrize("name", hooks.HOOKS)
def test_t13_a_specification_has_no_default_yet(name: str) -> None:
    """An additive parameter has the default None, which the exact check must learn first."""
    for parameter in inspect.signature(getattr(hooks, name)).parameters.values():
        assert parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        assert parameter.default is inspect.Parameter.empty


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("async def qkv_split(self, projected_qkvz, projected_ba, shape): pass", "asynchronous"),
        (
            "async def qkv_split(self, projected_qkvz, projected_ba, shape): yield 1",
            "asynchronous",
        ),
        ("def qkv_split(self, projected_qkvz, projected_ba, shape): yield 1", "a generator"),
    ],
)
def test_t14_coroutines_and_generators(installed: FakeDistribution, method: str, said: str) -> None:
    error = rejected(installed, f"@hookimpl\n{method}")
    assert error.reason is ReasonCode.SIGNATURE_MISMATCH
    assert error.what == f"hook qkv_split is {said}"


def test_t15_a_property_that_raises_is_never_evaluated(installed: FakeDistribution) -> None:
    raising = "@property\ndef device(self): raise RuntimeError('evaluated')\n"
    installed.add_backend("trap", code=backend_code(QKV_SPLIT + raising))
    ops = load_backend("trap", role=ModelRole.MAIN).ops
    assert isinstance(ops.qkv_split(QKVZ, BA, SHAPE), QKVParts)


def test_one_hook_implemented_twice(installed: FakeDistribution) -> None:
    second = QKV_SPLIT.replace("def qkv_split", "def other").replace(
        "@hookimpl", "@hookimpl(specname='qkv_split')"
    )
    error = rejected(installed, QKV_SPLIT + second)
    assert error.reason is ReasonCode.CONTRACT_BROKEN
    assert error.what == "hook qkv_split is implemented twice, by other and qkv_split"


@pytest.mark.parametrize(
    "methods",
    [
        pytest.param(
            QKV_SPLIT.replace("qkv_split", "split", 1).replace(
                "@hookimpl", "@hookimpl(specname='qkv_split')"
            ),
            id="another name for the method",
        ),
        pytest.param("@staticmethod" + QKV_SPLIT.replace("self, ", ""), id="a static method"),
        pytest.param("@classmethod" + QKV_SPLIT.replace("self", "cls"), id="a class method"),
        pytest.param(
            QKV_SPLIT.replace("@hookimpl", "@hookimpl\n@torch.no_grad()"), id="a decorated method"
        ),
    ],
)
def test_plain_methods_of_every_kind_are_taken(installed: FakeDistribution, methods: str) -> None:
    installed.add_backend("plain", code=backend_code(methods))
    ops = load_backend("plain", role=ModelRole.MAIN).ops
    assert isinstance(ops.qkv_split(QKVZ, BA, SHAPE), QKVParts)
