"""Reading what a file says of the quantisation, with errors in the words of that file."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from mortise.errors import QuantizationConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pydantic_core import ErrorDetails

CONFIG = "quantization_config of config.json"
OTHER_VERSION = "use a version of the model that is quantised in one of these ways, or unquantised"


class Section(BaseModel):
    """A part of a quantisation's configuration; keys that change nothing are left unread."""

    model_config = ConfigDict(frozen=True, extra="ignore")


SectionType = TypeVar("SectionType", bound=Section)


def parse(section: type[SectionType], raw: object, where: str) -> SectionType:
    """Check what a file holds.

    Args:
        section: what is known.
        raw: what the file holds.
        where: the place for messages, such as :data:`CONFIG`.

    Raises:
        QuantizationConfigError: a value is missing or unknown; every one is named.
    """
    try:
        return section.model_validate(raw)
    except ValidationError as error:
        first, *others = error.errors(include_url=False)
        raise QuantizationConfigError(
            f"{where}: {problem(first)}",
            details=[f"also: {problem(other)}" for other in others],
            expected=wanted(first),
            remedy=OTHER_VERSION,
        ) from None


def problem(detail: ErrorDetails) -> str:
    """Key and value of one of pydantic's details."""
    key = ".".join(map(str, detail["loc"]))
    if detail["type"] == "missing":
        return f"{key} is missing"
    return f"{key} is {shortened(detail['input'])}"


def wanted(detail: ErrorDetails) -> str:
    """What pydantic would have taken."""
    if detail["type"] == "missing":
        return f"{detail['loc'][-1]}, which says how the weights are stored"
    return detail["msg"].removeprefix("Input should be ").removeprefix("Value error, ")


def unknown_value(where: str, key: str, value: object, known: Iterable[str]) -> Exception:
    """The error for a value that names no scheme or format that can be read."""
    return QuantizationConfigError(
        f"{where}: {key} is {shortened(value)}",
        expected=f"one of {', '.join(sorted(known))}",
        remedy=OTHER_VERSION,
    )


def contradiction(tensor: str, found: str, said: str) -> Exception:
    """The error where the checkpoint holds something else than is said of it.

    Args:
        tensor: its name.
        found: what it is, such as ``int8``.
        said: by whom and what, as a sentence.
    """
    return QuantizationConfigError(
        f"tensor {tensor} is {found}, which contradicts what the checkpoint says of it",
        details=[said],
        expected="tensors stored as the checkpoint says",
        remedy="check that the configuration and the safetensors files belong to the same model,"
        " and download them again if in doubt",
    )


def shortened(value: object, limit: int = 80) -> str:
    """A value as Python writes it, cut where it is long."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
