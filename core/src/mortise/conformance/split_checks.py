"""The split of fused projections, bit by bit as the reference cuts them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Final

import torch

from mortise.conformance.comparison import Untouched, same_bytes
from mortise.conformance.draws import draw_rows
from mortise.conformance.records import Check, FaultError, Level
from mortise.plugin import QKVLayout, QKVParts, QKVShape

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mortise.conformance.subject import Subject
    from mortise.plugin import Capabilities

HOOK: Final = "qkv_split"
NUMBERS_OF_TOKENS: Final = (0, 1, 3, 64, 65)
MOST_TOKENS: Final = 70_000
"""More than a launch grid of 16 bits holds."""

HEADS: Final = ((1, 1, 8, 8), (1, 4, 16, 8), (2, 4, 16, 32), (4, 8, 32, 32), (3, 6, 24, 40))
"""Key heads, value heads, their sizes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitCase:
    """Heads, layout and dtype."""

    shape: QKVShape
    dtype: torch.dtype

    def __str__(self) -> str:
        one = self.shape
        heads = f"{one.num_key_heads}x{one.key_head_dim}+{one.num_value_heads}x{one.value_head_dim}"
        return f"{one.layout.value}-{heads}-{str(self.dtype)[6:]}"

    @property
    def widths(self) -> tuple[int, int]:
        """Columns of both projections."""
        one = self.shape
        keys = 2 * one.num_key_heads * one.key_head_dim
        return keys + 2 * one.num_value_heads * one.value_head_dim, 2 * one.num_value_heads

    def draw(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Both projections."""
        wide, narrow = self.widths
        return (
            draw_rows(tokens, wide, self.dtype, seed=tokens),
            draw_rows(tokens, narrow, self.dtype, seed=tokens + 1),
        )


def shapes(capabilities: Capabilities) -> Iterator[SplitCase]:
    """Both layouts, one head and more, sizes that are no powers of two."""
    for dtype in capabilities.compute_dtypes:
        for layout in QKVLayout:
            for keys, values, key_dim, value_dim in HEADS:
                shape = QKVShape(
                    num_key_heads=keys,
                    num_value_heads=values,
                    key_head_dim=key_dim,
                    value_head_dim=value_dim,
                    layout=layout,
                )
                yield SplitCase(shape=shape, dtype=dtype)


def one_shape(capabilities: Capabilities) -> Iterator[SplitCase]:
    """One of each layout, in the best dtype."""
    for case in shapes(capabilities):
        is_plain = case.shape.num_key_heads == 2 and case.shape.num_value_heads == 4
        if is_plain and case.dtype is capabilities.compute_dtypes[0]:
            yield case


def _require_equal(
    subject: Subject, case: SplitCase, qkvz: torch.Tensor, ba: torch.Tensor, what: str
) -> None:
    found = subject.ops.qkv_split(subject.there(qkvz), subject.there(ba), case.shape)
    _require_parts(found, subject.reference.qkv_split(qkvz, ba, case.shape), f"{case}, {what}")


def _require_parts(found: object, expected: QKVParts, case: str) -> None:
    if not isinstance(found, QKVParts):
        raise FaultError(f"{HOOK} returned a {type(found).__name__}, not QKVParts\ncase: {case}")
    for one in fields(QKVParts):
        part: torch.Tensor = getattr(found, one.name)
        wanted: torch.Tensor = getattr(expected, one.name)
        if part.shape != wanted.shape:
            text = f"has the shape {list(part.shape)}, not {list(wanted.shape)}"
        elif part.dtype is not wanted.dtype:
            text = f"has the wrong dtype: {part.dtype}, not {wanted.dtype}"
        elif not part.is_contiguous():
            text = f"is not contiguous: strides {part.stride()}"
        elif not same_bytes(part, wanted):
            text = f"holds other numbers than the reference's{_looks(part.cpu(), wanted)}"
        else:
            continue
        raise FaultError(f"{HOOK}: {one.name} {text}\ncase: {case}")


def _looks(part: torch.Tensor, wanted: torch.Tensor) -> str:
    wrong = (part != wanted).flatten(1).any(dim=1).nonzero().flatten().tolist()
    if wrong == [len(wanted) - 1] and len(wanted) > 1:
        return ": the last token is missing"
    if torch.equal(part.flatten().sort().values, wanted.flatten().sort().values):
        return ": the right numbers in other places, as if the layout were the other one"
    return f": {len(wrong)} of {len(wanted)} tokens"


def splits_equal_the_reference(subject: Subject, case: SplitCase) -> None:
    """Every part has the numbers of the reference bit by bit, is contiguous, and has its dtype;
    also for one head, one token and no token.
    """
    for tokens in NUMBERS_OF_TOKENS:
        _require_equal(subject, case, *case.draw(tokens), f"{tokens} tokens")


def splits_take_inputs_that_are_not_contiguous(subject: Subject, case: SplitCase) -> None:
    """Columns of one wider projection are read as they lie."""
    qkvz, ba = case.draw(5)
    fused = subject.there(torch.cat([ba, qkvz, ba], dim=1))
    narrow = ba.shape[1]
    found = subject.ops.qkv_split(fused[:, narrow:-narrow], fused[:, :narrow], case.shape)
    expected = subject.reference.qkv_split(qkvz, ba, case.shape)
    _require_parts(found, expected, f"{case}, inputs that are not contiguous")


def splits_have_memory_of_their_own(subject: Subject, case: SplitCase) -> None:
    """Neither input is written to, and no part shares memory with one."""
    for tokens in (1, 5):
        qkvz, ba = map(subject.there, case.draw(tokens))
        before = Untouched(projected_qkvz=qkvz, projected_ba=ba)
        parts = subject.ops.qkv_split(qkvz, ba, case.shape)
        before.require(HOOK, case)
        before.require_apart(parts, HOOK, case)


def splits_take_many_tokens(subject: Subject, case: SplitCase) -> None:
    """70,000 tokens are split, more than 16 bits of a launch grid count."""
    small = SplitCase(
        shape=QKVShape(
            num_key_heads=1,
            num_value_heads=1,
            key_head_dim=8,
            value_head_dim=8,
            layout=case.shape.layout,
        ),
        dtype=case.dtype,
    )
    _require_equal(subject, small, *small.draw(MOST_TOKENS), f"{MOST_TOKENS} tokens")


CHECKS: Final = (
    Check(run=splits_equal_the_reference, level=Level.DEVICE, hook=HOOK, cases=shapes),
    Check(
        run=splits_take_inputs_that_are_not_contiguous,
        level=Level.DEVICE,
        hook=HOOK,
        cases=one_shape,
    ),
    Check(run=splits_have_memory_of_their_own, level=Level.DEVICE, hook=HOOK, cases=shapes),
    Check(run=splits_take_many_tokens, level=Level.DEVICE, hook=HOOK, cases=one_shape),
)
