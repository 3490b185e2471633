"""Cheap guesses at what went wrong: the reference with one thing changed, compared again."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from mortise.conformance.comparison import is_within, relative_errors
from mortise.plugin import StoredWeight, WeightScheme
from mortise.testing.poison import defined_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mortise.conformance.expert_cases import Layer
    from mortise.conformance.subject import Subject
    from mortise.conformance.tolerances import Tolerance
    from mortise.plugin import DispatchedTokens, ExpertWeights


def wrong_experts(
    subject: Subject,
    layer: Layer,
    tokens: DispatchedTokens,
    found: torch.Tensor,
    expected: torch.Tensor,
    tolerance: Tolerance,
) -> str:
    """What the results of experts look like; nothing where no guess fits."""
    if text := missing_tokens(found, expected, _ends(tokens), tolerance):
        return text
    if not bool(found.any()):
        return "nothing was computed: all results are zero"
    for text, changed in changed_experts(layer.stored):
        again = subject.reference.prepare_expert_weights(changed, layer.arrivals[0])
        other = subject.reference.quantized_moe_apply(tokens, again, layer.case.dtype)
        if is_within(found, other[defined_rows(tokens)], tolerance):
            return text
    return ""


def wrong_projection(
    stored: StoredWeight,
    found: torch.Tensor,
    multiply: Callable[[StoredWeight], torch.Tensor],
    tolerance: Tolerance,
) -> str:
    """The same of a projection outside the experts."""
    for text, changed in changed_weights(stored):
        if is_within(found, multiply(changed), tolerance):
            return text
    return ""


def missing_tokens(
    found: torch.Tensor, expected: torch.Tensor, ends: list[int], tolerance: Tolerance
) -> str:
    """Whether the last row, or the last row of each group, is the only wrong one.

    Args:
        found: ``[R, H]``.
        expected: likewise.
        ends: the last row of each group.
        tolerance: of a row.
    """
    _, errors = relative_errors(found, expected)
    wrong = (errors > tolerance.row).nonzero().flatten().tolist()
    if wrong == ends and len(expected) > len(ends) > 1:
        return "the last token of each group is missing"
    if wrong == [len(expected) - 1] and len(expected) > 1:
        return "the last token is missing"
    return ""


def _ends(tokens: DispatchedTokens) -> list[int]:
    counts = tokens.group_counts or tuple(tokens.group_list.tolist())
    ends, total = [], 0
    for count in counts:
        total += count
        if count:
            ends.append(total - 1)
    return ends


def changed_experts(experts: ExpertWeights) -> Iterator[tuple[str, ExpertWeights]]:
    """Experts as they would be with a usual mistake in them."""
    for text, w13 in changed_weights(experts.w13):
        yield f"{text} (w13)", replace(experts, w13=w13)
    for text, w2 in changed_weights(experts.w2):
        yield f"{text} (w2)", replace(experts, w2=w2)
    both = dict(changed_weights(experts.w13)).keys() & dict(changed_weights(experts.w2)).keys()
    w13s, w2s = dict(changed_weights(experts.w13)), dict(changed_weights(experts.w2))
    for text in sorted(both):
        yield text, replace(experts, w13=w13s[text], w2=w2s[text])
    rolled = (_every_tensor(stored, _next_expert) for stored in (experts.w13, experts.w2))
    w13, w2 = rolled
    yield "rows met the expert behind their own", replace(experts, w13=w13, w2=w2)
    if experts.w13.num_parts == 2:
        swapped = _every_tensor(experts.w13, _halves_swapped)
        yield "gate and up are swapped", replace(experts, w13=swapped)


def changed_weights(stored: StoredWeight) -> Iterator[tuple[str, StoredWeight]]:
    """A weight as it would be with a usual mistake in it."""
    if stored.num_parts == 2:
        if stored.scale is not None:
            swapped = _halves_swapped(stored.scale)
            yield "scales of gate and up are swapped", replace(stored, scale=swapped)
        if stored.global_scale is not None:
            flipped = stored.global_scale.flip(-1)
            yield (
                "global scales of gate and up are swapped",
                replace(stored, global_scale=flipped),
            )
    if stored.scale is not None and stored.scheme is not WeightScheme.NVFP4:
        ones = torch.ones_like(stored.scale)
        yield "scales of the weight are ignored", replace(stored, scale=ones)
    if nibbles := _nibbles_swapped(stored):
        yield "nibbles are read in the wrong order", nibbles


def _nibbles_swapped(stored: StoredWeight) -> StoredWeight | None:
    if stored.weight.dtype is torch.uint8:
        return replace(stored, weight=(stored.weight << 4) | (stored.weight >> 4))
    if stored.weight.dtype is not torch.int32:
        return None
    words = stored.weight.long()
    turned = torch.zeros_like(words)
    for place in range(8):
        turned |= ((words >> (4 * place)) & 15) << (4 * (7 - place))
    return replace(stored, weight=torch.where(turned < 2**31, turned, turned - 2**32).int())


def _halves_swapped(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.shape[-2] % 2:
        return tensor
    as_bytes = tensor.view(torch.uint8) if tensor.dtype is torch.float8_e4m3fn else tensor
    return as_bytes.roll(tensor.shape[-2] // 2, dims=-2).view(tensor.dtype)


def _next_expert(tensor: torch.Tensor) -> torch.Tensor:
    as_bytes = tensor.view(torch.uint8) if tensor.dtype is torch.float8_e4m3fn else tensor
    return as_bytes.roll(-1, dims=0).view(tensor.dtype)


def _every_tensor(
    stored: StoredWeight, change: Callable[[torch.Tensor], torch.Tensor]
) -> StoredWeight:
    scale = None if stored.scale is None else change(stored.scale)
    return replace(stored, weight=change(stored.weight), scale=scale)
