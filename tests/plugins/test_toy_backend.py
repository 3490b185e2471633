"""The example backend is a real third-party distribution, and its page shows it as it is."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from typing import TYPE_CHECKING

import pytest
import torch
from tests.docs.pages import DOCS, blocks_of

from mortise.backends import load_backend
from mortise.errors import ConfigError
from mortise.plugin import (
    NOT_SUPPORTED,
    DecisionRule,
    DispatchDecision,
    DispatchDtype,
    DispatchFormat,
    ExpertLayerRequest,
    ExpertWeights,
    ModelRole,
    Routing,
    StoredWeight,
    TokenDispatcherRequest,
    WeightScheme,
)
from mortise.testing.distributions import FakeDistribution

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from mortise.backends import Ops

TOY = DOCS / "examples" / "toy_backend"
LAYER = "model.layers.3.mlp"
NUM_EXPERTS, HIDDEN, INTERMEDIATE, TOKENS, CHOSEN = 4, 8, 6, 5, 2


def project() -> dict[str, object]:
    return tomllib.loads((TOY / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The example as an editable install leaves it: metadata here, sources where they are."""
    distributions = FakeDistribution(tmp_path)
    groups = project()["entry-points"]
    lines = [
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in entries.items())
        for group, entries in groups.items()
    ]
    distributions.add_metadata("mortise-toy", project()["version"], entry_points="\n".join(lines))
    distributions.packages.append("mortise_toy")
    monkeypatch.syspath_prepend(str(TOY / "src"))
    with distributions.installed():
        yield


def experts() -> ExpertWeights:
    generator = torch.Generator().manual_seed(0)
    return ExpertWeights(
        layer=LAYER,
        w13=StoredWeight(
            scheme=WeightScheme.FLOAT,
            weight=torch.randn(NUM_EXPERTS, 2 * INTERMEDIATE, HIDDEN, generator=generator),
        ),
        w2=StoredWeight(
            scheme=WeightScheme.FLOAT,
            weight=torch.randn(NUM_EXPERTS, HIDDEN, INTERMEDIATE, generator=generator),
        ),
        num_local_experts=NUM_EXPERTS,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
    )


def run_layer(ops: Ops) -> torch.Tensor:
    """One layer of experts, through the table alone."""
    generator = torch.Generator().manual_seed(1)
    dispatcher = ops.create_token_dispatcher(
        TokenDispatcherRequest(
            role=ops.role,
            layer=LAYER,
            num_experts=NUM_EXPERTS,
            num_experts_per_tok=CHOSEN,
            hidden_size=HIDDEN,
        )
    )
    assert dispatcher is not NOT_SUPPORTED
    decision = DispatchDecision(
        format=DispatchFormat(dtype=DispatchDtype.FP32),
        rule=DecisionRule.DEVICE_DEFAULT,
        reason="a test",
    )
    prepared = ops.prepare_expert_weights(experts(), decision)
    routing = Routing(
        topk_ids=torch.tensor([[0, 1], [2, 3], [1, 0], [3, 3], [0, 2]]),
        topk_weights=torch.rand(TOKENS, CHOSEN, generator=generator),
    )
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
    tokens, handle = dispatcher.dispatch(hidden, routing, decision.format)
    return dispatcher.combine(ops.quantized_moe_apply(tokens, prepared, torch.float32), handle)


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("columns", [1, 3])
def test_its_sums_are_its_own(columns: int) -> None:
    own = run_layer(load_backend("toy", role=ModelRole.MAIN, options={"columns": columns}).ops)
    expected = run_layer(load_backend("reference", role=ModelRole.MAIN).ops)
    torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(own, expected), "it added in another order"


@pytest.mark.usefixtures("toy")
def test_it_leaves_seven_hooks_to_the_reference() -> None:
    bound = load_backend("toy", role=ModelRole.MAIN)
    assert len(bound.fallbacks) == 7
    assert bound.row.manifest_path == str(TOY / "src" / "mortise_toy" / "backend.toml")


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": "many"}, "columns is 'many'"),
        ({"columns": 0}, "columns is 0"),
        ({"columns": True}, "columns is True"),
        ({"colums": 4}, "unknown options: colums"),
    ],
)
def test_it_checks_its_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_backend("toy", role=ModelRole.MAIN, options=options)


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("scheme", WeightScheme)
def test_it_says_which_layers_it_serves(scheme: WeightScheme) -> None:
    answer = load_backend("toy", role=ModelRole.MAIN).ops.supports(
        ExpertLayerRequest(
            role=ModelRole.MAIN,
            layer=LAYER,
            scheme_w13=scheme,
            scheme_w2=WeightScheme.FLOAT,
            num_experts=NUM_EXPERTS,
            num_experts_per_tok=CHOSEN,
            hidden_size=HIDDEN,
            intermediate_size=INTERMEDIATE,
            compute_dtype=torch.float32,
        )
    )
    assert answer.ok is (scheme is WeightScheme.FLOAT)
    assert (scheme.value in answer.reason) is not answer.ok


@pytest.mark.parametrize("file", ["src/mortise_toy/backend.toml", "src/mortise_toy/backend.py"])
def test_the_page_shows_the_example_as_it_is(file: str) -> None:
    shown = {block.title: block.text for block in blocks_of(DOCS / "how-to/write-a-backend.md")}
    assert shown[file] == (TOY / file).read_text(encoding="utf-8")


def test_the_example_can_be_installed(tmp_path: Path) -> None:
    """Its wheel would be found: the manifest lies in the package that the entry point names."""
    entries = project()["entry-points"]["mortise.backends"]
    package, _, manifest = entries["toy"].partition(":")
    assert (TOY / "src" / package / manifest).is_file()
    child = subprocess.run(
        [sys.executable, "-W", "error", "-c", "import mortise_toy.backend"],
        cwd=TOY / "src",
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr
