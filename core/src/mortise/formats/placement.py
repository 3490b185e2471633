"""Where the row of every choice lies in each row layout, and how rows get there and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, assert_never, cast

import torch

from mortise.formats.layout import TensorLayout
from mortise.spec.dispatch import DispatchMode, RowLayout

if TYPE_CHECKING:
    from mortise.spec.dispatch import DispatchFormat


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where the rows of ``[S, K]`` choices are: sorted by expert, then token, then choice.

    Args:
        choices: int64 ``[R]``, the choices that get a row, as numbers in the flattened ``[S * K]``.
        slots: int64 ``[R]``, the row of each of them.
        slot_of_choice: int64 ``[S, K]``, the row of every choice; ``num_rows`` where it has none.
        counts: int64 ``[E_l]``, rows of each expert without padding.
        group_counts: the same on the host, where the host may wait for them.
        num_rows: rows in all, with padding and unused ones.
    """

    choices: torch.Tensor
    slots: torch.Tensor
    slot_of_choice: torch.Tensor
    counts: torch.Tensor
    group_counts: tuple[int, ...] | None
    num_rows: int


def place_choices(
    expert_ids: torch.Tensor,
    num_experts: int,
    format: DispatchFormat,
    *,
    capacity: int | None = None,
) -> Placement:
    """Give every choice of a local expert its row.

    With a ``capacity`` the number of rows depends on it alone, which is what fixed shapes need; an
    expert that one token names twice then gets one row for both. In the low-latency mode nothing
    waits for a number to reach the host, so choices without a row share an extra one past the
    last.

    Args:
        expert_ids: int64 ``[S, K]``, local experts 0 to ``num_experts - 1``; negative is none.
        num_experts: E_l.
        format: the row layout and its alignment, and the mode.
        capacity: most tokens that may name one expert; None takes as many rows as there are.
    """
    kept = expert_ids >= 0
    first = None
    if capacity is not None:
        first = _first_naming(expert_ids)
        kept &= first == torch.arange(expert_ids.shape[1], device=expert_ids.device)
    # No expert sorts last, behind every group.
    group_of_choice = torch.where(kept, expert_ids, num_experts).flatten()
    choices = group_of_choice.argsort(stable=True)
    all_counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=expert_ids.device)
    all_counts.scatter_add_(0, group_of_choice, torch.ones_like(group_of_choice))
    counts = all_counts[:num_experts]
    group_counts = None
    if format.mode is DispatchMode.NORMAL:
        group_counts = tuple(cast("list[int]", counts.tolist()))
        choices = choices[: sum(group_counts)]
    if capacity is None:
        num_rows = _counted_num_rows(format, group_counts)
    else:
        num_rows = fixed_num_rows(format, expert_ids.shape[1], num_experts, capacity)
    slots = _slots(group_of_choice[choices], all_counts, format, num_rows, capacity)
    slot_of_choice = torch.full_like(group_of_choice, num_rows)
    slot_of_choice = slot_of_choice.index_copy_(0, choices, slots).view(expert_ids.shape)
    if first is not None:
        slot_of_choice = slot_of_choice.gather(1, first)
    return Placement(
        choices=choices,
        slots=slots,
        slot_of_choice=slot_of_choice,
        counts=counts,
        group_counts=group_counts,
        num_rows=num_rows,
    )


def _first_naming(expert_ids: torch.Tensor) -> torch.Tensor:
    """For every choice the first choice ``[S, K]`` of the same token that names its expert."""
    same = expert_ids.unsqueeze(2) == expert_ids.unsqueeze(1)
    return same.to(torch.uint8).argmax(dim=2)


def fixed_num_rows(
    format: DispatchFormat, num_choices: int, num_experts: int, capacity: int
) -> int:
    """Rows that hold whatever may come, when at most ``capacity`` tokens name any one expert."""
    if format.row_layout is RowLayout.MASKED:
        return num_experts * capacity
    padding = num_experts * (_alignment(format) - 1)
    return capacity * min(num_choices, num_experts) + padding


def _counted_num_rows(format: DispatchFormat, group_counts: tuple[int, ...] | None) -> int:
    assert group_counts is not None, "fixed shapes need a size"
    assert format.row_layout is not RowLayout.MASKED, "masked rows need a size"
    alignment = _alignment(format)
    return sum(-(-count // alignment) * alignment for count in group_counts)


def _alignment(format: DispatchFormat) -> int:
    return format.alignment if format.row_layout is RowLayout.GROUPED_ALIGNED else 1


def _slots(
    group_of_row: torch.Tensor,
    all_counts: torch.Tensor,
    format: DispatchFormat,
    num_rows: int,
    capacity: int | None,
) -> torch.Tensor:
    """The rows of choices that are sorted by group; those of the group behind all get the last."""
    num_experts = all_counts.shape[0] - 1
    row_numbers = torch.arange(group_of_row.shape[0], device=group_of_row.device)
    within_group = row_numbers - (all_counts.cumsum(0) - all_counts)[group_of_row]
    match format.row_layout:
        case RowLayout.GROUPED:
            starts = all_counts.cumsum(0) - all_counts
        case RowLayout.GROUPED_ALIGNED:
            padded = (all_counts + format.alignment - 1) // format.alignment * format.alignment
            starts = padded.cumsum(0) - padded
        case RowLayout.MASKED:
            assert capacity is not None
            starts = torch.arange(num_experts + 1, device=group_of_row.device) * capacity
        case _:
            assert_never(format.row_layout)
    slots = starts[group_of_row] + within_group
    return torch.where(group_of_row == num_experts, num_rows, slots)


def undefined_rows(
    layout: TensorLayout, num_rows: int, device: torch.device, *, poison: bool
) -> torch.Tensor:
    """Memory for rows ``[num_rows + 1, ...]``; the extra row takes what has no place.

    Args:
        layout: shape and dtype of one row.
        num_rows: rows that count.
        device: where.
        poison: fill with bytes of ones: not a number in every float format and in packed scales.
    """
    rows = torch.empty(num_rows + 1, *layout.shape, dtype=layout.dtype, device=device)
    if poison:
        rows.view(torch.uint8).fill_(0xFF)
    return rows


def fill_rows(out: torch.Tensor, rows: torch.Tensor, placement: Placement) -> None:
    """Write the rows ``[S, ...]`` of tokens where their choices' rows are, and nothing else."""
    num_choices = placement.slot_of_choice.shape[1]
    arrived = movable(rows).index_select(0, placement.choices // num_choices)
    movable(out).index_copy_(0, placement.slots, arrived)


def arrange_rows(rows: torch.Tensor, placement: Placement, *, poison: bool) -> torch.Tensor:
    """Bring the rows of tokens ``[S, ...]`` into their places, ``[num_rows, ...]``."""
    if placement.group_counts is not None and placement.num_rows == placement.choices.shape[0]:
        # Neither padding nor unused rows: the choices' order is the order of the rows.
        num_choices = placement.slot_of_choice.shape[1]
        arranged = movable(rows).index_select(0, placement.choices // num_choices)
        # A view of another dtype has no gradient, and training dispatches too.
        return arranged if arranged.dtype is rows.dtype else arranged.view(rows.dtype)
    layout = TensorLayout(tuple(rows.shape[1:]), rows.dtype)
    out = undefined_rows(layout, placement.num_rows, rows.device, poison=poison)
    fill_rows(out, rows, placement)
    return out[: placement.num_rows]


def in_layout(rows: torch.Tensor, row_layout: RowLayout, num_experts: int) -> torch.Tensor:
    """Show flat rows ``[R, ...]`` as their layout has them: masked, ``[E_l, R / E_l, ...]``."""
    if row_layout is not RowLayout.MASKED:
        return rows
    return rows.view(num_experts, rows.shape[0] // num_experts, *rows.shape[1:])


def rows_of_choices(
    rows: torch.Tensor, slot_of_choice: torch.Tensor, num_rows: int
) -> torch.Tensor:
    """The experts' row of every choice, ``[S, K, H]``; zero where a choice has none.

    Args:
        rows: flat rows ``[R, H]``, R at least ``num_rows``; rows of no choice are not used.
        slot_of_choice: int64 ``[S, K]``, as in :class:`Placement`.
        num_rows: what stands for "no row" in it.
    """
    num_tokens, num_choices = slot_of_choice.shape
    if not num_rows:
        return rows.new_zeros(num_tokens, num_choices, rows.shape[1])
    flat = slot_of_choice.flatten()
    chosen = rows.index_select(0, flat.clamp(max=num_rows - 1))
    # An undefined row may hold anything, also what zero times a weight would not remove.
    chosen = torch.where((flat < num_rows).unsqueeze(1), chosen, 0)
    return chosen.view(num_tokens, num_choices, rows.shape[1])


def sum_choices(chosen: torch.Tensor, routing_weights: torch.Tensor) -> torch.Tensor:
    """Weight and sum the rows of each token's choices in float32.

    A token's sum does not depend on which other tokens are summed beside it.

    Args:
        chosen: ``[T, K, H]``, zero where there is no expert.
        routing_weights: float32 ``[T, K]``, finite.

    Returns:
        ``[T, H]`` in the dtype of ``chosen``.
    """
    return (
        torch.bmm(routing_weights.float().unsqueeze(1), chosen.float()).squeeze(1).to(chosen.dtype)
    )


def movable(rows: torch.Tensor) -> torch.Tensor:
    """The same memory in a dtype that can be copied by index and sent: one-byte floats as bytes."""
    if rows.dtype.is_floating_point and rows.dtype.itemsize == 1:
        return rows.view(torch.uint8)
    return rows
