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
class Arrangement:
    """Where the rows of ``[S, K]`` choices are: sorted by expert, then token, then choice.

    Args:
        choices: int64 ``[R]``, the choices that get a row, as numbers in the flattened ``[S * K]``.
        slots: int64 ``[R]``, the row of each of them; None where the r-th has the r-th row.
        first_naming: int64 ``[S, K]``, the choice of the same token whose row a choice shares, its
            own as a rule; None where every choice has a row of its own.
        shape: S and K.
        counts: int64 ``[E_l]``, rows of each expert without padding.
        group_counts: the same on the host, where the host may wait for them.
        num_rows: rows in all, with padding and unused ones.
    """

    choices: torch.Tensor
    slots: torch.Tensor | None
    first_naming: torch.Tensor | None
    shape: tuple[int, int]
    counts: torch.Tensor
    group_counts: tuple[int, ...] | None
    num_rows: int

    def slot_of_choice(self) -> torch.Tensor:
        """The row of every choice, int64 ``[S, K]``; ``num_rows`` where it has none."""
        slots = self.slots
        if slots is None:
            slots = torch.arange(self.num_rows, device=self.choices.device)
        num_choices = self.shape[0] * self.shape[1]
        found = self.choices.new_full((num_choices,), self.num_rows)
        found = found.index_copy_(0, self.choices, slots).view(self.shape)
        return found if self.first_naming is None else found.gather(1, self.first_naming)


def arrange_choices(
    expert_ids: torch.Tensor,
    num_experts: int,
    format: DispatchFormat,
    *,
    capacity: int | None = None,
) -> Arrangement:
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
    is_none = expert_ids < 0
    first_naming = None
    if capacity is not None:
        first_naming = _first_naming(expert_ids)
        is_none |= first_naming != torch.arange(expert_ids.shape[1], device=expert_ids.device)
    # No expert sorts last, behind every group.
    group_of_choice = torch.where(is_none, num_experts, expert_ids).flatten()
    choices = group_of_choice.argsort(stable=True)
    group_counts = None
    if format.mode is DispatchMode.NORMAL:
        all_counts = group_of_choice.bincount(minlength=num_experts + 1)
        assert all_counts.shape[0] == num_experts + 1, "an expert was chosen that is not there"
        group_counts = tuple(cast("list[int]", all_counts.tolist()[:num_experts]))
        choices = choices[: sum(group_counts)]
    else:
        # Unlike bincount, this needs to know no number on the host.
        all_counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=expert_ids.device)
        all_counts.scatter_add_(0, group_of_choice, torch.ones_like(group_of_choice))
    if capacity is None:
        num_rows = _counted_num_rows(format, group_counts)
    else:
        num_rows = fixed_num_rows(format, expert_ids.shape[1], num_experts, capacity)
    slots = None
    if format.row_layout is not RowLayout.GROUPED or capacity is not None:
        slots = _slots(group_of_choice[choices], all_counts, format, num_rows, capacity)
    return Arrangement(
        choices=choices,
        slots=slots,
        first_naming=first_naming,
        shape=(expert_ids.shape[0], expert_ids.shape[1]),
        counts=all_counts[:num_experts],
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


def fill_rows(out: torch.Tensor, rows: torch.Tensor, arrangement: Arrangement) -> None:
    """Write the rows ``[S, ...]`` of tokens where their choices' rows are, and nothing else."""
    assert arrangement.slots is not None
    movable(out).index_copy_(0, arrangement.slots, _in_order(rows, arrangement))


def arrange_rows(rows: torch.Tensor, arrangement: Arrangement, *, poison: bool) -> torch.Tensor:
    """Bring the rows of tokens ``[S, ...]`` into their places, ``[num_rows, ...]``."""
    if arrangement.slots is None:
        ordered = _in_order(rows, arrangement)
        # A view of another dtype has no gradient, and training dispatches too.
        return ordered if ordered.dtype is rows.dtype else ordered.view(rows.dtype)
    layout = TensorLayout(tuple(rows.shape[1:]), rows.dtype)
    out = undefined_rows(layout, arrangement.num_rows, rows.device, poison=poison)
    fill_rows(out, rows, arrangement)
    return out[: arrangement.num_rows]


def _in_order(rows: torch.Tensor, arrangement: Arrangement) -> torch.Tensor:
    """The row of each choice that gets one, movable."""
    return movable(rows).index_select(0, arrangement.choices // arrangement.shape[1])


def in_layout(rows: torch.Tensor, row_layout: RowLayout, num_experts: int) -> torch.Tensor:
    """Show flat rows ``[R, ...]`` as their layout has them: masked, ``[E_l, R / E_l, ...]``."""
    if row_layout is not RowLayout.MASKED:
        return rows
    return rows.view(num_experts, rows.shape[0] // num_experts, *rows.shape[1:])


def rows_of_choices(rows: torch.Tensor, arrangement: Arrangement) -> torch.Tensor:
    """The experts' row of every choice, ``[S, K, H]``; zero where a choice has none.

    Args:
        rows: flat rows ``[R, H]``, R at least ``num_rows``; rows of no choice are not used.
        arrangement: how they lie.
    """
    if arrangement.slots is not None:
        return rows_in_slots(rows, arrangement.slot_of_choice(), arrangement.num_rows)
    num_tokens, num_choices = arrangement.shape
    chosen = rows.new_zeros(num_tokens * num_choices, rows.shape[1])
    chosen.index_copy_(0, arrangement.choices, rows[: arrangement.num_rows])
    return chosen.view(num_tokens, num_choices, rows.shape[1])


def rows_in_slots(rows: torch.Tensor, slot_of_choice: torch.Tensor, num_rows: int) -> torch.Tensor:
    """The row of every choice, ``[S, K, H]``; zero where it has none.

    Args:
        rows: flat rows ``[R, H]``, R at least ``num_rows``.
        slot_of_choice: int64 ``[S, K]``; ``num_rows`` is none.
        num_rows: rows there are.
    """
    num_tokens, num_choices = slot_of_choice.shape
    if not num_rows:
        return rows.new_zeros(num_tokens, num_choices, rows.shape[1])
    flat = slot_of_choice.flatten()
    chosen = rows.index_select(0, flat.clamp(max=num_rows - 1))
    # An undefined row may hold anything, also what zero times a weight would not remove.
    chosen.masked_fill_((flat >= num_rows).unsqueeze(1), 0)
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
