"""The static description of a backend, ``backend.toml``, read as text."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Annotated, Literal

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    ValidationError,
    model_validator,
)

from mortise.errors import BackendUnusableError
from mortise.spec.dispatch import DispatchDtype
from mortise.spec.reasons import ReasonCode
from mortise.spec.weights import WeightScheme

if TYPE_CHECKING:
    from typing import Self

    from pydantic_core import ErrorDetails

OBJECT_PATTERN = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$"


def _check_specifier(text: str) -> str:
    try:
        SpecifierSet(text)
    except InvalidSpecifier as error:
        raise ValueError(str(error)) from error
    return text


def _check_pattern(text: str) -> str:
    if not PurePosixPath(text).is_absolute():
        raise ValueError("a device node is an absolute path")
    return text


class ManifestCapabilities(BaseModel):
    """What the backend can serve at most; binding says what it serves here.

    Args:
        schemes: schemes of weights.
        dispatch_dtypes: formats of dispatched rows.
        compute_dtypes: dtypes of the hidden state, as torch names them.
        page_sizes: tokens per cache page.
        emulation: whether it can compute what its chip computes on a machine without one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schemes: tuple[WeightScheme, ...] = ()
    dispatch_dtypes: tuple[DispatchDtype, ...] = ()
    compute_dtypes: tuple[str, ...] = ()
    page_sizes: tuple[StrictInt, ...] = ()
    emulation: StrictBool = False


class Manifest(BaseModel):
    """One ``backend.toml``.

    Args:
        schema: version of this format, 1.
        name: the backend's name, which is also the name of its entry point: lower-case letters,
            digits, underscores.
        summary: one line for the table of ``mortise backends``.
        object: ``package.module:Class`` of the backend class; imported only when it was chosen.
        engine: versions of the core it works with, as a Python version specifier; pre-releases are
            admitted, a local version is ignored.
        status: whether it serves; ``planned`` is listed but refused, with ``status_reason``.
        status_reason: why a planned backend does not serve; shown with its row.
        implements: version of each hook it answers; the reference answers the others.
        devices: paths of device nodes, as shell patterns; one must exist for ``auto`` to look
            further. Empty: it needs no device.
        arch: architectures it is made for, exact or as shell patterns, compared with its ``probe``.
        capabilities: what it can serve at most.
        gaps: what it knowingly does not do.
        docs: where to read more.
        conformance: name of the file beside this one that holds what the conformance kit found.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = Field(alias="schema")
    name: str
    summary: str = Field(min_length=1)
    object: str | None = Field(default=None, pattern=OBJECT_PATTERN)
    engine: Annotated[str, AfterValidator(_check_specifier)]
    status: Literal["serves", "planned"] = "serves"
    status_reason: str = ""
    implements: Mapping[str, StrictInt] = Field(default_factory=dict)
    devices: tuple[Annotated[str, AfterValidator(_check_pattern)], ...] = ()
    arch: tuple[str, ...] = ()
    capabilities: ManifestCapabilities = ManifestCapabilities()
    gaps: tuple[str, ...] = ()
    docs: str = ""
    conformance: str = Field(default="", pattern=r"^([\w-]+\.json)?$")

    @model_validator(mode="after")
    def _check_status(self) -> Self:
        if self.status == "planned" and not self.status_reason:
            raise ValueError("status 'planned' needs a status_reason")
        if self.status == "serves" and not self.object:
            raise ValueError("status 'serves' needs an object")
        if self.status == "serves" and not self.implements:
            raise ValueError("status 'serves' needs at least one hook under implements")
        return self


def parse_manifest(text: str) -> Manifest:
    """Read a manifest.

    Raises:
        BackendUnusableError: reason ``manifest_invalid``; every wrong field is one of its details.
    """
    try:
        return Manifest.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise _invalid([f"not TOML: {error}"]) from error
    except ValidationError as error:
        raise _invalid([_complaint(wrong) for wrong in error.errors()]) from error


def _invalid(complaints: list[str]) -> BackendUnusableError:
    return BackendUnusableError(
        "the manifest is wrong: " + "; ".join(complaints),
        reason=ReasonCode.MANIFEST_INVALID,
        remedy="mend backend.toml; its fields are described in docs/reference/manifest.md",
    )


def _complaint(wrong: ErrorDetails) -> str:
    place = ".".join(str(part) for part in wrong["loc"])
    if wrong["type"] == "extra_forbidden":
        return f"unknown key {place!r}{_similar_field(wrong['loc'])}"
    if wrong["type"] == "missing":
        return f"key {place!r} is missing"
    message = wrong["msg"].removeprefix("Value error, ")
    if not place:
        return message
    return f"{place} = {wrong['input']!r}: {message[:1].lower()}{message[1:]}"


def _similar_field(place: tuple[int | str, ...]) -> str:
    model = ManifestCapabilities if len(place) > 1 else Manifest
    known = [field.alias or name for name, field in model.model_fields.items()]
    close = difflib.get_close_matches(str(place[-1]), known, n=1)
    return f", did you mean {close[0]!r}?" if close else ""
