from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest
import torch

from mortise.backends import load_backend
from mortise.errors import BackendError, BackendUnusableError, ConfigError, ContractError
from mortise.plugin import ExpertLayerRequest, LinearLayerRequest, WeightScheme
from mortise.spec.reasons import ReasonCode
from mortise.spec.roles import ModelRole
from mortise.testing.distributions import QKV_SPLIT, backend_code

if TYPE_CHECKING:
    from mortise.testing.distributions import FakeDistribution


def failing(installed: FakeDistribution, code: str, **changes: object) -> BackendError:
    installed.add_backend("toy", version="3.2", code=code, manifest=changes)
    with pytest.raises(BackendError) as caught:
        load_backend("toy", role=ModelRole.MAIN)
    assert "backend 'toy' of mortise-toy 3.2" in str(caught.value)
    return caught.value


def test_an_import_failure_starts_with_its_root_cause(installed: FakeDistribution) -> None:
    code = """
try:
    import a_library_nobody_has
except ImportError as error:
    raise RuntimeError("failed to load the toy backend") from error
"""
    error = failing(installed, code)
    assert isinstance(error, BackendUnusableError)
    assert error.reason is ReasonCode.IMPORT_FAILED
    first, *middle, last = str(error).splitlines()
    assert first == "ModuleNotFoundError: No module named 'a_library_nobody_has'"
    assert middle[0].endswith("fake_toy/backend.py, line 3")
    assert middle[1] == "  which led to RuntimeError: failed to load the toy backend"
    assert middle[2] == "  while importing fake_toy.backend"
    assert last.startswith("  remedy: ")
    assert isinstance(error.__cause__, RuntimeError)


@pytest.mark.parametrize(
    ("code", "cause"),
    [
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("raise OSError('libvendor.so: undefined symbol')", "OSError: libvendor.so: undefined"),
        ("def broken(:", "SyntaxError: "),
        ("raise ValueError", "ValueError"),
    ],
)
def test_whatever_an_import_raises(installed: FakeDistribution, code: str, cause: str) -> None:
    error = failing(installed, code)
    assert error.reason is ReasonCode.IMPORT_FAILED
    assert error.what.startswith(cause)
    assert "backend.py, line 1" in str(error)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("", "fake_toy.backend:FakeBackend is nothing"),
        ("FakeBackend = 3", "fake_toy.backend:FakeBackend is a int"),
        ("class FakeBackend: pass", "fake_toy.backend:FakeBackend is a type"),
        (
            "from mortise.plugin import Backend\nclass FakeBackend(Backend): pass",
            "does not define capabilities, create, supports",
        ),
    ],
)
def test_the_object_must_be_a_backend(installed: FakeDistribution, code: str, said: str) -> None:
    error = failing(installed, code)
    assert isinstance(error, ContractError)
    assert error.reason is ReasonCode.CONTRACT_BROKEN
    assert said in error.what


CREATE = """
@classmethod
def create(cls, context):
    {body}
"""


def creating(body: str) -> str:
    return backend_code(QKV_SPLIT + CREATE.format(body=body))


@pytest.mark.parametrize(
    ("body", "reason", "said"),
    [
        ("return None", ReasonCode.RETURNED_NONE, "FakeBackend.create returned None"),
        ("return 3", ReasonCode.CONTRACT_BROKEN, "FakeBackend.create returned a builtins.int"),
        ("raise OSError('no driver')", ReasonCode.CREATE_FAILED, "OSError: no driver"),
    ],
)
def test_create_must_give_a_backend(
    installed: FakeDistribution, body: str, reason: ReasonCode, said: str
) -> None:
    error = failing(installed, creating(body))
    assert error.reason is reason
    assert error.what == said


def test_create_may_give_a_subclass_that_keeps_the_contract(installed: FakeDistribution) -> None:
    subclass = "\nclass Emulated(FakeBackend):\n    pass\n"
    installed.add_backend("toy", code=creating("return Emulated()") + subclass)
    assert load_backend("toy", role=ModelRole.MAIN).ops.backend.name == "toy"


def test_a_subclass_that_create_gives_is_checked_too(installed: FakeDistribution) -> None:
    subclass = """
class Emulated(FakeBackend):
    @hookimpl
    def qkv_split(self, projected_qkvz, projected_ba, shape=None): pass
"""
    error = failing(installed, creating("return Emulated()") + subclass)
    assert error.reason is ReasonCode.SIGNATURE_MISMATCH
    assert "Emulated.qkv_split" in str(error)


def test_create_may_refuse_its_options(installed: FakeDistribution) -> None:
    body = "raise ConfigError(f'unknown option {sorted(context.options)[0]!r}')"
    installed.add_backend("toy", code=creating(body))
    with pytest.raises(ConfigError, match="unknown option 'sped'") as caught:
        load_backend("toy", role=ModelRole.MAIN, options={"sped": 3})
    (note,) = caught.value.__notes__
    assert note.startswith("backend 'toy' of mortise-toy 1.0")
    assert note.endswith("creating it for the main model")


CAPABILITIES = """
def capabilities(self):
    {body}
"""


@pytest.mark.parametrize(
    ("body", "reason", "said"),
    [
        ("return None", ReasonCode.RETURNED_NONE, "capabilities() returned None"),
        ("return {}", ReasonCode.CONTRACT_BROKEN, "capabilities() returned a builtins.dict"),
        ("raise OSError('no driver')", ReasonCode.CREATE_FAILED, "OSError: no driver"),
    ],
)
def test_capabilities_must_be_capabilities(
    installed: FakeDistribution, body: str, reason: ReasonCode, said: str
) -> None:
    error = failing(installed, backend_code(QKV_SPLIT + CAPABILITIES.format(body=body)))
    assert error.reason is reason
    assert error.what == said


def test_create_runs_once_per_role_and_nothing_is_shared(installed: FakeDistribution) -> None:
    methods = """
@classmethod
def create(cls, context):
    created.append(context)
    return cls()
"""
    code = backend_code(QKV_SPLIT + methods, before="created = []")
    installed.add_backend("toy", code=code)
    main = load_backend("toy", role=ModelRole.MAIN, device="cpu", options={"speed": 3})
    draft = load_backend("toy", role=ModelRole.DRAFT)
    first, second = sys.modules["fake_toy.backend"].created
    assert (first.role, first.device, first.options) == (ModelRole.MAIN, "cpu", {"speed": 3})
    assert (second.role, second.device, second.options) == (ModelRole.DRAFT, None, {})
    assert main.ops.role is ModelRole.MAIN
    assert draft.ops.role is ModelRole.DRAFT
    assert main.ops.qkv_split is not draft.ops.qkv_split


def request(scheme: WeightScheme, compute_dtype: torch.dtype = torch.float32) -> ExpertLayerRequest:
    return ExpertLayerRequest(
        role=ModelRole.MAIN,
        layer="model.layers.1.mlp",
        scheme_w13=scheme,
        scheme_w2=WeightScheme.FLOAT,
        num_experts=2,
        num_experts_per_tok=1,
        hidden_size=4,
        intermediate_size=4,
        compute_dtype=compute_dtype,
    )


MOE = """
@hookimpl
def prepare_expert_weights(self, experts, decision): return experts

@hookimpl
def quantized_moe_apply(self, tokens, experts, out_dtype): return tokens.rows
"""
IMPLEMENTS_MOE = {"prepare_expert_weights": 1, "quantized_moe_apply": 1}


def test_who_computes_the_experts_says_which_it_supports(installed: FakeDistribution) -> None:
    installed.add_backend("toy")
    half = request(WeightScheme.FLOAT, torch.float16)
    answer = load_backend("toy", role=ModelRole.MAIN).ops.supports(half)
    assert not answer.ok
    assert answer.reason == "the compute dtype is torch.float16"

    installed.add_backend("own", code=backend_code(MOE), manifest={"implements": IMPLEMENTS_MOE})
    assert load_backend("own", role=ModelRole.MAIN).ops.supports(half).ok


LINEAR = """
@hookimpl
def prepare_linear_weight(self, linear): return linear

@hookimpl
def quantized_linear(self, rows, linear, out_dtype): return rows
"""
IMPLEMENTS_LINEAR = {"prepare_linear_weight": 1, "quantized_linear": 1}


def projection(scheme: WeightScheme) -> LinearLayerRequest:
    return LinearLayerRequest(
        role=ModelRole.MAIN,
        layer="model.layers.0.mlp.down_proj",
        scheme=scheme,
        out_features=4,
        in_features=16,
        num_groups=1,
        static_input=False,
        compute_dtype=torch.float32,
    )


def test_who_computes_the_projections_says_which_it_supports(installed: FakeDistribution) -> None:
    manifest = {"implements": IMPLEMENTS_LINEAR}
    installed.add_backend("own", code=backend_code(LINEAR), manifest=manifest)
    ops = load_backend("own", role=ModelRole.MAIN).ops
    # Its capabilities list FLOAT alone, and it does not override the method.
    assert ops.supports_linear(projection(WeightScheme.FLOAT)).ok
    answer = ops.supports_linear(projection(WeightScheme.W4A8))
    assert not answer.ok
    assert answer.reason == "its weight is stored as w4a8"

    anything = LINEAR + "def supports_linear(self, request): return Support(ok=True)"
    installed.add_backend("wide", code=backend_code(anything), manifest=manifest)
    ops = load_backend("wide", role=ModelRole.MAIN).ops
    assert ops.supports_linear(projection(WeightScheme.W4A8)).ok
    # The experts are the reference's, and it answers for them.
    assert not ops.supports(request(WeightScheme.FLOAT, torch.float16)).ok


def test_a_pair_of_projection_hooks_is_whole_or_absent(installed: FakeDistribution) -> None:
    installed.add_backend("half", manifest={"implements": {"quantized_linear": 1}})
    with pytest.raises(BackendUnusableError, match="without prepare_linear_weight"):
        load_backend("half", role=ModelRole.MAIN)


@pytest.mark.parametrize("answer", ["None", "True"])
def test_supports_linear_must_answer_with_a_reason(
    installed: FakeDistribution, answer: str
) -> None:
    methods = LINEAR + f"def supports_linear(self, request): return {answer}"
    manifest = {"implements": IMPLEMENTS_LINEAR}
    installed.add_backend("toy", code=backend_code(methods), manifest=manifest)
    ops = load_backend("toy", role=ModelRole.MAIN).ops
    with pytest.raises(ContractError, match=r"supports_linear.* returned") as caught:
        ops.supports_linear(projection(WeightScheme.FLOAT))
    assert "toy" in str(caught.value)


def test_supports_must_answer_with_a_reason(installed: FakeDistribution) -> None:
    methods = MOE + "def supports(self, request): return True"
    manifest = {"implements": IMPLEMENTS_MOE}
    installed.add_backend("toy", code=backend_code(methods), manifest=manifest)
    ops = load_backend("toy", role=ModelRole.MAIN).ops
    with pytest.raises(ContractError, match=r"returned a builtins\.bool"):
        ops.supports(request(WeightScheme.FLOAT))
