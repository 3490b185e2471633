"""Compare results with the reference, and with each other, in the words of the fault."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

import torch

from mortise.conformance.records import FaultError, Measured

if TYPE_CHECKING:
    from collections.abc import Callable

    from mortise.conformance.tolerances import Tolerance


def require_shape(
    found: object, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, what: str
) -> torch.Tensor:
    """A tensor of this shape and dtype on this device.

    Raises:
        FaultError: it is something else.
    """
    if not isinstance(found, torch.Tensor):
        raise FaultError(f"{what} is a {type(found).__name__}, not a tensor")
    if tuple(found.shape) != shape:
        raise FaultError(f"{what} has the shape {list(found.shape)}, not {list(shape)}")
    if found.dtype is not dtype:
        raise FaultError(f"{what} has the wrong dtype: {found.dtype}, not {dtype}")
    if found.device.type != device.type:
        raise FaultError(
            f"{what} is on {found.device}, not on {device}: it was computed on, or silently copied"
            " to, another device"
        )
    return found


def relative_errors(
    found: torch.Tensor, expected: torch.Tensor, sizes: torch.Tensor | None = None
) -> tuple[float, torch.Tensor]:
    """Of the whole and of each row, in float64; what is not a number is infinitely far off.

    Args:
        found: ``[R, ...]``.
        expected: likewise.
        sizes: norms that rows have at least, ``[R]``: of rows of few numbers that may cancel.
    """
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    off = (found - expected).flatten(1)
    size = expected.flatten(1).norm(dim=1)
    if sizes is not None:
        size = size.maximum(sizes.double())
    # A row of zeros has no size of its own.
    floor = max(float(size.max()) if len(size) else 0.0, 1e-30) * 1e-6
    rows = torch.nan_to_num(off.norm(dim=1) / size.clamp(min=floor), nan=torch.inf)
    whole = float(off.norm() / max(float(expected.norm()), floor))
    return (whole if whole == whole else float("inf")), rows


def is_within(found: torch.Tensor, expected: torch.Tensor, tolerance: Tolerance) -> bool:
    """Whether both errors are allowed."""
    whole, rows = relative_errors(found, expected)
    return whole <= tolerance.whole and bool((rows <= tolerance.row).all())


def require_close(
    found: torch.Tensor,
    expected: torch.Tensor,
    tolerance: Tolerance,
    *,
    subject: str,
    case: object,
    explain: Callable[[], str] | None = None,
    sizes: torch.Tensor | None = None,
) -> Measured:
    """Rows ``[R, ...]`` within a tolerance of the reference.

    Args:
        found: of the backend.
        expected: of the reference, of the same shape.
        tolerance: the errors that are allowed.
        subject: hook and scheme.
        case: named in the message.
        explain: looks for a likely cause, when something is wrong.
        sizes: as :func:`relative_errors` takes them.

    Raises:
        FaultError: they are further apart; with the worst row, and what it looks like.
    """
    if not expected.numel():
        return Measured(subject=subject, error=0.0, tolerance=tolerance.whole)
    whole, rows = relative_errors(found, expected, sizes)
    if whole <= tolerance.whole and bool((rows <= tolerance.row).all()):
        scaled = max(whole / tolerance.whole, float(rows.max()) / tolerance.row)
        return Measured(subject=subject, error=scaled * tolerance.whole, tolerance=tolerance.whole)
    wrong = (rows > tolerance.row).nonzero().flatten().tolist()
    what = f"{subject}: results differ from the reference by {whole:.2g} of their norm"
    lines = [f"{what} (allowed: {tolerance.whole:.2g})", f"case: {case}"]
    if wrong:
        worst = int(rows.argmax())
        lines.append(
            f"{len(wrong)} of {len(rows)} rows are wrong, the worst is row {worst} by"
            f" {float(rows[worst]):.2g} (allowed: {tolerance.row:.2g}): {_listed(wrong)}"
        )
    looks = (explain() if explain is not None else "") or _not_a_number(found)
    raise FaultError("\n".join([*lines, *([f"it looks as if {looks}"] if looks else [])]))


def _not_a_number(found: torch.Tensor) -> str:
    if not found.is_floating_point() or bool(found.float().isfinite().all()):
        return ""
    return "an undefined row, or a number past the end, was read: results are not finite"


def _listed(rows: list[int]) -> str:
    return ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are equal bit by bit; not a number equals itself."""
    if one.shape != other.shape or one.dtype is not other.dtype:
        return False
    one, other = (tensor.detach().cpu().contiguous() for tensor in (one, other))
    if not one.numel():
        return True
    return torch.equal(
        one.view(-1).unsqueeze(-1).view(torch.uint8), other.view(-1).unsqueeze(-1).view(torch.uint8)
    )


def require_same(one: torch.Tensor, other: torch.Tensor, what: str) -> None:
    """Equal bit by bit.

    Raises:
        FaultError: with how far apart they are.
    """
    if same_bytes(one, other):
        return
    if one.shape != other.shape or not one.numel():
        raise FaultError(f"{what}: shapes {list(one.shape)} and {list(other.shape)}")
    _, rows = relative_errors(one.reshape(len(one), -1), other.reshape(len(other), -1))
    wrong = (rows > 0).nonzero().flatten().tolist()
    raise FaultError(f"{what}: {len(wrong)} of {len(rows)} rows differ ({_listed(wrong)})")


def tensors_of(thing: Any, name: str = "") -> dict[str, torch.Tensor]:
    """The tensors of a record by their names, deep."""
    if isinstance(thing, torch.Tensor):
        return {name: thing}
    if not is_dataclass(thing) or isinstance(thing, type):
        return {}
    found: dict[str, torch.Tensor] = {}
    for one in fields(thing):
        if one.name != "prepared":
            found |= tensors_of(getattr(thing, one.name), f"{name}.{one.name}".lstrip("."))
    return found


class Untouched:
    """Remembers the bytes of a hook's arguments, and where they lie.

    Args:
        arguments: by the names of the hook's parameters.
    """

    def __init__(self, **arguments: Any) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        for name, argument in arguments.items():
            self.tensors |= tensors_of(argument, name)
        self.copies = {name: tensor.clone() for name, tensor in self.tensors.items()}

    def require(self, hook: str, case: object) -> None:
        """The arguments are what they were.

        Raises:
            FaultError: the hook wrote into one of them.
        """
        for name, tensor in self.tensors.items():
            if not same_bytes(tensor, self.copies[name]):
                raise FaultError(f"{hook} wrote into its argument {name}\ncase: {case}")

    def require_apart(self, result: Any, hook: str, case: object) -> None:
        """The result has memory of its own.

        Raises:
            FaultError: it aliases an argument.
        """
        for place, tensor in tensors_of(result, "its result").items():
            for name, argument in self.tensors.items():
                if tensor.numel() and _memory(tensor) == _memory(argument):
                    raise FaultError(
                        f"{hook}: aliasing: {place} shares the memory of its argument {name}, and"
                        f" changes with it\ncase: {case}"
                    )


def _memory(tensor: torch.Tensor) -> tuple[str, int]:
    return str(tensor.device), tensor.untyped_storage().data_ptr()
