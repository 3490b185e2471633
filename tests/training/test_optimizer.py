import pytest
import torch
from torch import nn
from training.optimizer import UPDATE_RMS, Muon, build, orthogonalise, uses_muon


@pytest.mark.parametrize("shape", [(3, 32, 16), (2, 16, 32), (1, 24, 24)])
def test_singular_values_end_near_one_and_vectors_stay(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    result = orthogonalise(matrices).float()
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.4
    assert values.max() < 1.4
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    core = u.mT @ result @ vh.mT
    off_diagonal = core - torch.diag_embed(core.diagonal(dim1=-2, dim2=-1))
    assert off_diagonal.abs().max() < 0.05


def test_experts_are_updated_as_single_matrices() -> None:
    torch.manual_seed(0)
    experts = nn.Parameter(torch.randn(4, 16, 8))
    alone = [nn.Parameter(expert.detach().clone()) for expert in experts]
    grads = torch.randn(3, 4, 16, 8)
    together, apart = Muon([experts], lr=0.1), Muon(alone, lr=0.1)
    for grad in grads:
        experts.grad = grad.clone()
        for parameter, part in zip(alone, grad, strict=True):
            parameter.grad = part.clone()
        together.step()
        apart.step()
    torch.testing.assert_close(experts, torch.stack(list(alone)), rtol=0, atol=0)


def test_the_update_has_the_size_of_adamw() -> None:
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.zeros(64, 128))
    parameter.grad = torch.randn(64, 128)
    Muon([parameter], lr=1.0).step()
    size = parameter.square().mean().sqrt()
    assert 0.7 * UPDATE_RMS < size < 1.3 * UPDATE_RMS


def test_a_small_problem_is_learnt_and_decay_is_decoupled() -> None:
    torch.manual_seed(0)
    target = torch.randn(16, 16)
    parameter = nn.Parameter(torch.zeros(16, 16))
    frozen = nn.Parameter(torch.ones(4, 4))
    optimizer = Muon([parameter, frozen], lr=0.05, weight_decay=0.0)
    first = (parameter - target).square().sum().item()
    for _ in range(100):
        optimizer.zero_grad()
        (parameter - target).square().sum().backward()
        optimizer.step()
    assert (parameter - target).square().sum().item() < 0.1 * first
    assert torch.equal(frozen, torch.ones(4, 4))


def test_who_trains_what() -> None:
    matrix, vector = torch.zeros(2, 2), torch.zeros(2)
    assert uses_muon("model.layers.0.self_attn.o_proj.weight", matrix)
    assert uses_muon("model.layers.1.mlp.experts.gate_up_proj", torch.zeros(2, 2, 2))
    assert not uses_muon("model.embed_tokens.weight", matrix)
    assert not uses_muon("model.layers.1.mlp.gate.weight", matrix)
    assert not uses_muon("model.norm.weight", vector)


def test_indexers_have_groups_of_their_own() -> None:
    named = [
        ("layers.0.indexer.wk.weight", nn.Parameter(torch.zeros(2, 2))),
        ("layers.0.indexer.k_norm.bias", nn.Parameter(torch.zeros(2))),
        ("layers.0.o_proj.weight", nn.Parameter(torch.zeros(2, 2))),
        ("norm.weight", nn.Parameter(torch.zeros(2))),
    ]
    optimizers = build(named, momentum=0.9, weight_decay=0.1, betas=(0.9, 0.95), epsilon=1e-8)
    found = {
        (type(optimizer).__name__, group["is_indexer"], len(group["params"]))
        for optimizer in optimizers
        for group in optimizer.param_groups
    }
    assert found == {
        ("Muon", False, 1),
        ("Muon", True, 1),
        ("AdamW", False, 1),
        ("AdamW", True, 1),
    }
