"""Tokens that name an expert twice: one row serves both choices where places are counted."""

from __future__ import annotations

import torch


def first_naming(ids_TK: torch.Tensor) -> torch.Tensor:
    """For every choice the first choice of the same token that names its expert, int64."""
    same_TKK = ids_TK.unsqueeze(2) == ids_TK.unsqueeze(1)
    return same_TKK.to(torch.uint8).argmax(dim=2)


def without_repetition(ids_TK: torch.Tensor) -> torch.Tensor:
    """The same experts, -1 in place of one that its token has named before."""
    choices = torch.arange(ids_TK.shape[1], device=ids_TK.device)
    return torch.where(first_naming(ids_TK) == choices, ids_TK, -1)
