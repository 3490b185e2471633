"""How index keys are cached is decided once: by the user, by exactness, by the backend."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import torch

from mortise import LLM
from mortise.engine.index_keys import decide_index_key_dtype
from mortise.errors import ConfigError
from mortise.spec.paged_mqa import IndexKeyDtype
from mortise.spec.roles import ModelRole
from mortise.testing.distributions import FakeDistribution
from tests.fixtures.tiny_models import save_tiny

if TYPE_CHECKING:
    from pathlib import Path

COMPUTE, FP8 = IndexKeyDtype.COMPUTE, IndexKeyDtype.FP8_E4M3


def decided(
    asked: str, dtype: torch.dtype, served: tuple[IndexKeyDtype, ...]
) -> tuple[IndexKeyDtype, str]:
    ops = SimpleNamespace(
        capabilities=SimpleNamespace(index_key_dtypes=served),
        backend=SimpleNamespace(name="quick"),
        role=ModelRole.MAIN,
    )
    chosen, decision = decide_index_key_dtype(asked, "file engine.toml", dtype, ops)
    assert decision.subject == "index keys"
    assert decision.value == chosen.value
    assert decision.reason
    return chosen, decision.rule


@pytest.mark.parametrize(
    ("asked", "dtype", "served", "chosen", "rule"),
    [
        ("auto", torch.bfloat16, (COMPUTE,), COMPUTE, "backend"),
        ("auto", torch.bfloat16, (FP8, COMPUTE), FP8, "backend"),
        ("auto", torch.float32, (FP8, COMPUTE), COMPUTE, "exact"),
        ("auto", torch.float32, (FP8,), FP8, "backend"),
        ("fp8", torch.float32, (COMPUTE, FP8), FP8, "override"),
        ("fp8", torch.bfloat16, (COMPUTE, FP8), FP8, "override"),
        ("compute", torch.bfloat16, (FP8, COMPUTE), COMPUTE, "override"),
    ],
)
def test_the_order_of_authority(
    asked: str,
    dtype: torch.dtype,
    served: tuple[IndexKeyDtype, ...],
    chosen: IndexKeyDtype,
    rule: str,
) -> None:
    assert decided(asked, dtype, served) == (chosen, rule)


@pytest.mark.parametrize(("asked", "served"), [("fp8", COMPUTE), ("compute", FP8)])
def test_what_the_backend_lacks_cannot_be_asked_for(asked: str, served: IndexKeyDtype) -> None:
    with pytest.raises(ConfigError, match=f"index_key_dtype is '{asked}'") as caught:
        decided(asked, torch.bfloat16, (served,))
    assert caught.value.details == ("set by file engine.toml",)
    assert caught.value.expected == f"one of auto, {served.value}"
    assert "'quick'" in caught.value.what


def index_keys(llm: LLM) -> tuple[str, str]:
    (decision,) = [one for one in llm.decisions if one.subject == "index keys"]
    return decision.value, decision.rule


def test_a_model_is_loaded_with_them(tiny_model: Path) -> None:
    plain = LLM(model=tiny_model)
    llm = LLM(model=tiny_model, index_key_dtype="fp8")
    assert index_keys(plain) == ("compute", "exact")
    assert index_keys(llm) == ("fp8", "override")
    assert llm.loaded.index_key_dtype is FP8
    # The tiny model has 3 layers, and keys of 32 numbers, which were float32.
    tokens = plain.loaded.pool.num_pages * 64
    saved = plain.loaded.pool.num_bytes - llm.loaded.pool.num_bytes
    assert saved == 3 * tokens * (32 * 4 - (32 + 4))
    prompt = list(range(40))
    assert llm.logits(prompt).isfinite().all()
    assert not torch.equal(llm.logits(prompt), plain.logits(prompt))


def test_chunks_do_not_change_what_is_picked(tiny_model: Path) -> None:
    prompt = torch.randint(0, 256, (150,), generator=torch.Generator().manual_seed(1)).tolist()
    whole, cut = (
        LLM(
            model=tiny_model,
            index_key_dtype="fp8",
            scheduler={"max_num_batched_tokens": tokens},
        ).logits(prompt)
        for tokens in (512, 37)
    )
    torch.testing.assert_close(cut, whole, atol=1e-4, rtol=0)


def test_a_model_without_indexer_has_nothing_to_decide(tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "v3", model_type="deepseek_v3", num_hidden_layers=1)
    llm = LLM(model=path, index_key_dtype="fp8")
    assert not [one for one in llm.decisions if one.subject == "index keys"]
    assert llm.loaded.index_key_dtype is COMPUTE


def test_a_backend_serves_plain_keys_alone_unless_it_says_otherwise(
    tiny_model: Path, tmp_path: Path
) -> None:
    with FakeDistribution(tmp_path / "site").installed() as fake:
        fake.add_backend("plain")
        with pytest.raises(ConfigError, match="backend 'plain' does not serve"):
            LLM(model=tiny_model, backend="plain", index_key_dtype="fp8")
        assert index_keys(LLM(model=tiny_model, backend="plain"))[0] == "compute"
