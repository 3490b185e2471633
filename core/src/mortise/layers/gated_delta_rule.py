"""The gated delta rule: a memory that forgets, is corrected, and is read, token by token."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from mortise.layers.sequences import Sequences

# Shape suffixes: B sequences, T tokens of all, A sequences that still have tokens, C tokens of a
# chunk, N value heads, D key head dimension, V value head dimension.


def gated_delta_rule(
    query_TND: torch.Tensor,
    key_TND: torch.Tensor,
    value_TNV: torch.Tensor,
    log_decay_TN: torch.Tensor,
    beta_TN: torch.Tensor,
    memory_BNDV: torch.Tensor,
    sequences: Sequences,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Read several sequences, each with a memory of its own (arXiv 2412.06464, equation 10).

    For every token ``S = S * exp(log_decay)``, then ``S += key (beta * (value - key @ S))``, then
    ``output = query @ S``; computed for up to 64 tokens of each sequence at a time. Everything is
    float32, also where a model computes in less: errors in the memory add up.

    Returns:
        Outputs ``[T, N, V]``, and the memories after the last token of each sequence.
    """
    tokens, memory_BNDV = sequences.num_tokens, memory_BNDV.clone()
    # One spare row takes what is computed past the end of a sequence.
    output = value_TNV.new_empty(tokens + 1, *value_TNV.shape[1:])
    for chunk in sequences.chunks:
        reads_AC, absent_A1C = chunk.reads, ~chunk.present.unsqueeze(1)
        output_ANCV, memory_ANDV = delta_chunk(
            query_TND[reads_AC].transpose(1, 2),
            key_TND[reads_AC].transpose(1, 2),
            value_TNV[reads_AC].transpose(1, 2),
            # A token that is not there forgets nothing and writes nothing.
            log_decay_TN[reads_AC].transpose(1, 2).masked_fill(absent_A1C, 0.0),
            beta_TN[reads_AC].transpose(1, 2).masked_fill(absent_A1C, 0.0),
            memory_BNDV[chunk.sequences],
        )
        output.index_copy_(0, chunk.writes.flatten(), output_ANCV.transpose(1, 2).flatten(0, 1))
        memory_BNDV.index_copy_(0, chunk.sequences, memory_ANDV)
    return output[:tokens], memory_BNDV


def delta_chunk(
    query_ANCD: torch.Tensor,
    key_ANCD: torch.Tensor,
    value_ANCV: torch.Tensor,
    log_decay_ANC: torch.Tensor,
    beta_ANC: torch.Tensor,
    memory_ANDV: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Several tokens at once, by the products that the rule comes to (arXiv 2412.06464, 3.3).

    What token i writes under its key, ``u_i``, depends on what the tokens before it wrote: a
    triangular system. Its solution makes outputs and memory products of matrices.

    Returns:
        Outputs ``[A, N, C, V]`` and the memories ``[A, N, D, V]`` after the last token.
    """
    total_ANC = log_decay_ANC.cumsum(-1)
    later_CC = torch.ones(
        total_ANC.shape[-1], total_ANC.shape[-1], dtype=torch.bool, device=total_ANC.device
    ).triu(1)
    # What is left at token i of what token j wrote; masked first, lest the exponential overflow.
    left_ANCC = (total_ANC.unsqueeze(-1) - total_ANC.unsqueeze(-2)).masked_fill(
        later_CC, float("-inf")
    )
    left_ANCC = left_ANCC.exp()
    from_start_ANC1 = total_ANC.exp().unsqueeze(-1)
    recalled_ANCV = (key_ANCD * from_start_ANC1) @ memory_ANDV
    written_ANCV = torch.linalg.solve_triangular(
        key_ANCD @ key_ANCD.transpose(-1, -2) * left_ANCC * beta_ANC.unsqueeze(-1),
        (value_ANCV - recalled_ANCV) * beta_ANC.unsqueeze(-1),
        upper=False,
        unitriangular=True,
    )
    within_ANCC = query_ANCD @ key_ANCD.transpose(-1, -2) * left_ANCC
    output_ANCV = (query_ANCD * from_start_ANC1) @ memory_ANDV + within_ANCC @ written_ANCV
    to_end_ANC1 = left_ANCC[..., -1, :].unsqueeze(-1)
    kept_ANDV = memory_ANDV * from_start_ANC1[..., -1:, :]
    return output_ANCV, kept_ANDV + (key_ANCD * to_end_ANC1).transpose(-1, -2) @ written_ANCV
