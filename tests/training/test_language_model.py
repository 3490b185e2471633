"""What is trained is what is served: the training's attention and experts against the engine's."""

import pytest
import torch
from tests.fixtures.paged_models import reference_context
from tests.training import tiny
from training.attention import DenseAttention, IndexedAttention
from training.language_model import LanguageModel, initialise

from mortise.kv.latent import LatentPool
from mortise.layers.moe import MoELayer
from mortise.layers.paged_attention import BatchLayout, PagedAttention
from mortise.models.deepseek_v32.model import DeepseekV32ForCausalLM
from mortise.spec.roles import ForwardMode

SEQUENCES, LENGTH = 2, 24


def make(has_indexer: bool) -> LanguageModel:
    model = LanguageModel(tiny.recipe().model, has_indexer=has_indexer, compute_dtype=torch.float32)
    initialise(model, seed=3, embedding_std=1.0, num_layers=2)
    return model


def served_hidden(trained: LanguageModel, token_ids: torch.Tensor) -> torch.Tensor:
    """Hidden states [S, H] of one sequence from the engine's paged prefill."""
    config = trained.config
    model = DeepseekV32ForCausalLM(config, reference_context())
    model.load_state_dict(trained.main.state_dict())
    model.finish_loading()
    pool = LatentPool(
        num_layers=config.num_hidden_layers,
        num_pages=2,
        latent_dim=config.latent_dim,
        index_dim=config.index_head_dim,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    length = len(token_ids)
    layout = BatchLayout.build(ForwardMode.PREFILL, [length], [length], [[1]], torch.device("cpu"))
    attend = PagedAttention(model.context.ops, pool, layout, config.index_topk)
    return model(token_ids, layout.positions(), attend)


@torch.no_grad()
@pytest.mark.parametrize("has_indexer", [False, True])
def test_training_computes_what_the_engine_serves(has_indexer: bool) -> None:
    model = make(has_indexer)
    token_ids = torch.randint(
        0, 64, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(1)
    )
    positions = torch.arange(LENGTH).repeat(SEQUENCES)
    topk = tiny.MODEL["index_topk"]
    attend = IndexedAttention(SEQUENCES, topk) if has_indexer else DenseAttention(SEQUENCES)
    hidden = model.main(token_ids.flatten(), positions, attend).unflatten(0, (SEQUENCES, -1))
    for row in range(SEQUENCES):
        expected = served_hidden(model, token_ids[row])
        torch.testing.assert_close(hidden[row], expected, rtol=1e-4, atol=1e-4)


def test_the_gradients_are_those_of_the_reference() -> None:
    model, plain = make(has_indexer=False), make(has_indexer=False)
    for layer in plain.modules():
        if isinstance(layer, MoELayer):
            layer.context = reference_context()
            layer.finish_loading(torch.float32)
    windows = torch.randint(0, 64, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(2))
    for candidate in (model, plain):
        losses = candidate(windows, DenseAttention(SEQUENCES), with_mtp=True)
        assert losses.mtp is not None
        (losses.next_token + losses.mtp).backward()
    for (name, one), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert one.grad is not None, name
        assert other.grad is not None, name
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_the_loss_of_an_indexer_trains_that_indexer_alone() -> None:
    model = make(has_indexer=True)
    attend = IndexedAttention(SEQUENCES, topk=8)
    windows = torch.randint(0, 64, (SEQUENCES, LENGTH + 2))
    losses = model(windows, attend, with_mtp=True)
    assert len(attend.index_losses) == 3  # two layers and the MTP layer
    torch.stack(attend.index_losses).sum().backward(retain_graph=True)
    learning = {name for name, p in model.named_parameters() if p.grad is not None}
    assert learning == {name for name, _ in model.named_parameters() if ".indexer." in name}
    model.zero_grad()
    losses.next_token.backward()
    learning = {name for name, p in model.named_parameters() if p.grad is not None}
    assert not any(".indexer." in name for name in learning)
    assert learning
