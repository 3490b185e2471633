"""What a model is loaded with: dtype, backend and its options, and what speaks against them."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest
import torch

from mortise import LLM
from mortise.errors import BackendUnusableError, ConfigError
from mortise.testing.distributions import FakeDistribution, backend_code
from tests.fixtures.tiny_models import save_tiny

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

WITH_OPTIONS = """
@classmethod
def create(cls, context):
    assert dict(context.options) == {"workers": 3}, context.options
    return cls()

@hookimpl
def qkv_split(self, projected_qkvz, projected_ba, shape):
    return reference.qkv_split(projected_qkvz, projected_ba, shape)
"""


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeDistribution]:
    with FakeDistribution(tmp_path / "site").installed() as installed:
        yield installed


def with_dtype(path: Path, source: Path, dtype: str | None) -> Path:
    """A copy of a model that says another dtype of itself, or none."""
    import json

    shutil.copytree(source, path)
    config = json.loads((path / "config.json").read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = dtype
    (path / "config.json").write_text(json.dumps(config))
    return path


def dtype_of(llm: LLM) -> tuple[torch.dtype, str, str]:
    decision = next(one for one in llm.decisions if one.subject == "dtype")
    return llm.loaded.dtype, decision.value, decision.rule


def test_auto_takes_what_the_checkpoint_says(tiny_model: Path, tmp_path: Path) -> None:
    assert dtype_of(LLM(model=tiny_model)) == (torch.float32, "float32", "checkpoint")
    half = with_dtype(tmp_path / "bf16", tiny_model, "bfloat16")
    assert dtype_of(LLM(model=half)) == (torch.bfloat16, "bfloat16", "checkpoint")
    assert dtype_of(LLM(model=half, dtype="float32")) == (torch.float32, "float32", "override")


def test_a_silent_checkpoint_gets_what_the_backend_prefers(
    tiny_model: Path, tmp_path: Path
) -> None:
    silent = with_dtype(tmp_path / "silent", tiny_model, None)
    assert dtype_of(LLM(model=silent)) == (torch.float32, "float32", "backend")


def test_a_dtype_that_is_not_computed_in_must_be_replaced_by_the_user(
    tiny_model: Path, tmp_path: Path
) -> None:
    half = with_dtype(tmp_path / "fp16", tiny_model, "float16")
    with pytest.raises(ConfigError, match="the checkpoint's is 'float16'") as caught:
        LLM(model=half)
    assert "set dtype" in str(caught.value.remedy)
    assert LLM(model=half, dtype="float32").loaded.dtype is torch.float32


def test_a_backend_that_does_not_compute_in_it_is_named(
    tiny_model: Path, fake: FakeDistribution
) -> None:
    fake.add_backend("single")
    with pytest.raises(BackendUnusableError, match="'single' does not compute in bfloat16") as e:
        LLM(model=tiny_model, backend="single", dtype="bfloat16")
    assert e.value.expected == "one of float32"


def test_a_backend_without_pages_of_this_size_is_refused(
    tiny_model: Path, fake: FakeDistribution
) -> None:
    fake.add_backend("small", code=backend_code().replace("{64}", "{16, 32}"))
    with pytest.raises(BackendUnusableError, match="no cache pages of 64 tokens") as caught:
        LLM(model=tiny_model, backend="small")
    assert caught.value.details == ("it serves: 16, 32",)


@pytest.mark.parametrize("name", ["keen", "mortise-keen:keen"])
def test_a_backend_gets_its_own_table_of_options(
    tiny_model: Path, fake: FakeDistribution, name: str
) -> None:
    fake.add_backend("keen", code=backend_code(WITH_OPTIONS))
    tables = {"keen": {"workers": 3}, "reference": {"num_workers": 2}}
    llm = LLM(model=tiny_model, backend=name, backend_options=tables)
    assert llm.loaded.bound.ops.backend.name == "keen"


def test_what_the_checkpoint_holds_beyond_the_model_is_a_decision(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = save_tiny(tmp_path / "model", num_nextn_predict_layers=1)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.3.enorm.weight"] = torch.ones(64)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    (decision,) = [one for one in LLM(model=model).decisions if one.subject == "weights"]
    assert (decision.value, decision.rule) == ("1 tensors not loaded", "skip")
    assert "multi-token prediction" in decision.reason


def test_progress_counts_to_the_end(tiny_model: Path) -> None:
    seen: list[tuple[int, int]] = []
    LLM(model=tiny_model, progress=lambda done, total: seen.append((done, total)))
    done, total = seen[-1]
    assert done == total > 0
    assert [step for step, _ in seen] == sorted(step for step, _ in seen)
