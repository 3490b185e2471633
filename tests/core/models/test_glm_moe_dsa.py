"""GLM-5: which layers pick keys, whose choice the others take, and what its checkpoints hold."""

from __future__ import annotations

import json
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.fixtures.paged_models import CPU, PagedModel, Request
from tests.fixtures.tiny_models import save_tiny, tiny_transformers_model

from mortise import LLM, EngineConfig
from mortise.errors import MissingTensorError, UnexpectedTensorError
from mortise.models.registry import family_of
from mortise.parallel.group import ExpertParallelGroup
from mortise.spec.roles import ForwardMode

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SHARED: dict[str, Any] = {
    "model_type": "glm_moe_dsa",
    "num_hidden_layers": 4,
    "indexer_types": ["full", "shared", "full", "shared"],
    "num_nextn_predict_layers": 1,
}
TOKENS = torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model", tokenizer=False, **SHARED)


def load(path: Path) -> LLM:
    return LLM(EngineConfig(model=str(path), dtype="float32", cache={"max_num_tokens": 128}))


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Rewrite the only file of weights."""
    file = path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def edit_config(path: Path, **fields: object) -> None:
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@cache
@torch.inference_mode()
def their_choices() -> dict[int, list[set[int]]]:
    """The keys that each layer of transformers' model attends to, by layer and token."""
    model, found = tiny_transformers_model(**SHARED), {}
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_hook(
            lambda _, __, output, number=number: found.update({number: output[2][0]})
        )
    model(TOKENS[None])
    return {
        number: [{key for key in row.tolist() if key <= token} for token, row in enumerate(chosen)]
        for number, chosen in found.items()
    }


@pytest.mark.parametrize("mode", [ForwardMode.PREFILL, ForwardMode.TARGET_VERIFY])
def test_layers_attend_to_the_keys_that_transformers_picks(path: Path, mode: ForwardMode) -> None:
    model, found = PagedModel(path), {}
    layers = model.model.model.layers
    attended = [layer.self_attn.layer for layer in layers]
    request = Request(TOKENS, len(TOKENS), [1], prompt_len=len(TOKENS))
    new_pass = model.model.new_pass

    def watched(*arguments: Any) -> Any:
        paged = new_pass(*arguments)
        call = type(paged).__call__

        class Watched(type(paged)):
            def __call__(self, attention: Any, projections: Any) -> torch.Tensor:
                output = call(self, attention, projections)
                found[attention.layer] = self._chosen_TK
                return output

        paged.__class__ = Watched
        return paged

    model.model.new_pass = watched
    model.forward(mode, [request])
    assert attended == list(found) == [0, 1, 2, 3]
    choices = {
        layer: [{key for key in row if key >= 0} for row in chosen.tolist()]
        for layer, chosen in found.items()
    }
    assert choices == their_choices()
    assert choices[0] == choices[1] != choices[2] == choices[3]


def test_only_layers_with_an_indexer_cache_its_keys(path: Path) -> None:
    model = PagedModel(path).model
    assert [layer.self_attn.indexer is not None for layer in model.model.layers] == [
        True,
        False,
        True,
        False,
    ]
    pool = model.new_pool(3, torch.float32, CPU)
    assert pool.index_keys.layers == (0, 2)
    latents, keys = 4 * (32 + 16), 2 * 32
    assert pool.num_bytes == 3 * 64 * 4 * (latents + keys)


def test_an_indexer_that_rotates_halves(path: Path) -> None:
    """The field is read, as engines do; transformers, which ignores it, gets its rows reordered."""
    theirs = tiny_transformers_model(**SHARED)
    # Places i and i + 8 are a pair of halves, which interleaved stands at 2i and 2i + 1.
    pairs = torch.arange(16).view(2, -1).T.flatten()

    def reorder(rows: torch.Tensor) -> torch.Tensor:
        """Halves to pairs, in each head of 32."""
        heads = rows.detach().unflatten(0, (-1, 32)).clone()
        heads[:, :16] = heads[:, pairs]
        return heads.flatten(0, 1)

    with torch.inference_mode():
        unchanged = theirs(TOKENS[None]).logits[0]
        for layer in theirs.model.layers:
            indexer = layer.self_attn.indexer
            if indexer is not None:
                for parameter in (
                    indexer.wq_b.weight,
                    indexer.wk.weight,
                    indexer.k_norm.weight,
                    indexer.k_norm.bias,
                ):
                    parameter.data = reorder(parameter)
        expected = theirs(TOKENS[None]).logits[0]
    edit_config(path, indexer_rope_interleave=False)
    assert (load(path).logits(TOKENS.tolist()) - expected).abs().max() < 1e-4
    assert (unchanged - expected).abs().max() > 0.05


def test_an_indexer_in_a_layer_that_shares_is_a_tensor_too_many(path: Path) -> None:
    name = "model.layers.1.self_attn.indexer.wk.weight"
    edit_tensors(path, lambda tensors: tensors.update({name: torch.zeros(32, 64)}))
    with pytest.raises(UnexpectedTensorError, match=name):
        load(path)


def test_a_layer_that_picks_needs_its_indexer(path: Path) -> None:
    name = "model.layers.2.self_attn.indexer.k_norm.bias"
    edit_tensors(path, lambda tensors: tensors.pop(name))
    with pytest.raises(MissingTensorError, match=name):
        load(path)


def test_the_drafting_layer_is_left_with_its_reason(path: Path) -> None:
    before = load(path).logits(TOKENS.tolist())
    edit_tensors(
        path, lambda tensors: tensors.update({"model.layers.4.enorm.weight": torch.ones(64)})
    )
    assert torch.equal(load(path).logits(TOKENS.tolist()), before)
    raw = json.loads((path / "config.json").read_text())
    reasons = [
        skip.reason
        for skip in family_of(raw).skips(raw, ExpertParallelGroup())
        if "layers\\.4" in skip.pattern
    ]
    assert reasons == ["multi-token prediction layer, read when drafting"]
    edit_config(path, num_nextn_predict_layers=0)
    with pytest.raises(UnexpectedTensorError, match=r"model\.layers\.4\.enorm"):
        load(path)
