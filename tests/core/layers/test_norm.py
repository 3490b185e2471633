"""The root mean square norms are transformers'."""

from __future__ import annotations

import pytest
import torch

from mortise.layers.norm import RMSNorm, ZeroCentredRMSNorm


@pytest.mark.parametrize("shape", [(0, 8), (1, 8), (5, 8), (2, 3, 8)])
@pytest.mark.parametrize("eps", [1e-6, 1e-2])
@torch.inference_mode()
def test_it_is_transformers(shape: tuple[int, ...], eps: float) -> None:
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RMSNorm

    ours, theirs = RMSNorm(8, eps), DeepseekV3RMSNorm(8, eps)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, generator=generator)
    for norm in (ours, theirs):
        norm.load_state_dict({"weight": weight})
    x = torch.randn(shape, generator=generator) * 3
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-6, rtol=1e-6)


@torch.inference_mode()
def test_the_mean_is_taken_in_float32() -> None:
    """The squares of these overflow float16 and lose their sum in bfloat16."""
    norm = RMSNorm(512, 1e-6).to(torch.bfloat16)
    norm.weight.data.fill_(1)
    x = torch.full((1, 512), 3.0, dtype=torch.bfloat16)
    got = norm(x)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, torch.ones_like(x))


@torch.inference_mode()
def test_zeros_stay_zeros() -> None:
    norm = RMSNorm(4, 1e-6)
    norm.weight.data.fill_(2)
    assert torch.equal(norm(torch.zeros(3, 4)), torch.zeros(3, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 8), (5, 8), (2, 3, 8)])
@torch.inference_mode()
def test_the_zero_centred_one_is_transformers(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNorm

    ours, theirs = ZeroCentredRMSNorm(8, 1e-4), Qwen3NextRMSNorm(8, 1e-4)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, generator=generator)
    for norm in (ours, theirs):
        norm.load_state_dict({"weight": weight})
        norm.to(dtype)
    x = (torch.randn(shape, generator=generator) * 3).to(dtype)
    got = ours(x)
    assert got.dtype == dtype
    # In bfloat16 the last bit may fall either way.
    tolerance = 1e-6 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(got, theirs(x), atol=tolerance, rtol=tolerance)


@torch.inference_mode()
def test_small_weights_are_not_lost_beside_the_one() -> None:
    """One and 2**-9 are one in bfloat16, in which the weight is stored."""
    norm = ZeroCentredRMSNorm(2, 0.0).to(torch.bfloat16)
    norm.weight.data.copy_(torch.tensor([2.0**-9, 0.0]))
    got = norm(torch.ones(1, 2))
    assert got.tolist() == [[1 + 2**-9, 1.0]]
