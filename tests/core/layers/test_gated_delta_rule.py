"""The rule, computed for many tokens at once, is the definition, computed for one after another."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fixtures.paged_models import CPU

from mortise.layers.gated_delta_rule import gated_delta_rule
from mortise.layers.sequences import Sequences

lengths = st.lists(st.sampled_from([0, 1, 2, 5, 63, 64, 65, 129]), max_size=4)


def by_definition(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_decay: torch.Tensor,
    beta: torch.Tensor,
    memory: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Arguments ``[T, ...]`` of one head and one sequence; equation 10 of arXiv 2412.06464."""
    identity = torch.eye(key.shape[1], dtype=key.dtype)
    outputs = []
    for q, k, v, g, b in zip(query, key, value, log_decay, beta, strict=True):
        memory = g.exp() * (identity - b * torch.outer(k, k)) @ memory + b * torch.outer(k, v)
        outputs.append(q @ memory)
    return torch.stack(outputs) if outputs else value, memory


@given(
    lens=lengths,
    forgetting=st.sampled_from([0.0, 0.01, 1.0, 30.0]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=40, deadline=None)
def test_it_is_the_definition(lens: list[int], forgetting: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens, heads, key_dim, value_dim = sum(lens), 2, 6, 3

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    query, value = normal(tokens, heads, key_dim), normal(tokens, heads, value_dim)
    key = torch.nn.functional.normalize(normal(tokens, heads, key_dim), dim=-1)
    # Up to a decay of exp(-90) a token, whose products over a chunk vanish in float32.
    log_decay = -normal(tokens, heads).abs() * forgetting
    beta = normal(tokens, heads).sigmoid()
    memory = normal(len(lens), heads, key_dim, value_dim)
    output, after = gated_delta_rule(
        *(part.float() for part in (query, key, value, log_decay, beta, memory)),
        Sequences(lens, 4, CPU),
    )
    parts = [one.split(lens) for one in (query, key, value, log_decay, beta)]
    for number in range(len(lens)):
        for head in range(heads):
            own = [part[number][:, head] for part in parts]
            expected, expected_memory = by_definition(*own, memory[number, head])
            got = output.split(lens)[number][:, head]
            torch.testing.assert_close(got.double(), expected, atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(
                after[number, head].double(), expected_memory, atol=2e-5, rtol=1e-4
            )
