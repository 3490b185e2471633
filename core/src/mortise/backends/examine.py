"""Ask the configured backend what it finds wrong, for ``mortise doctor``."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from mortise.backends.auto import probe_backends, select_auto
from mortise.backends.bind import import_backend
from mortise.backends.causes import cause_and_consequences
from mortise.backends.discover import discover_backends
from mortise.backends.select import select_by_name
from mortise.backends.validate import AUTO
from mortise.errors import MortiseError
from mortise.spec.doctor import DoctorRequest, Finding, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mortise.backends.candidate import Candidate
    from mortise.plugin import Backend

EMULATED: Final = "emulated"
"""The device that asks any backend to compute elsewhere what its chip would."""


def ask_doctor(name: str, request: Callable[[str], DoctorRequest]) -> tuple[str, Sequence[Finding]]:
    """The findings of the backend of a name; what goes wrong while it looks is one of them.

    Args:
        name: name of a backend, ``distribution:name``, or ``auto``.
        request: what the backend of a plain name is told.

    Returns:
        The plain name, and what was found.

    Raises:
        BackendError: there is no such backend, or it cannot be used or imported.
    """
    rows = discover_backends()
    row = (select_auto(rows) if name == AUTO else select_by_name(rows, name)).row
    asked = request(row.name)
    return row.name, (*_device(row, asked), *_findings(import_backend(row), row, asked))


def _device(row: Candidate, request: DoctorRequest) -> Sequence[Finding]:
    """Whether the device answers, in a process of its own: its driver may crash or hang."""
    needs_none = row.manifest is None or not row.manifest.devices
    if needs_none or request.device == EMULATED:
        return ()
    (probed,) = probe_backends([replace(row, reason=None)])
    verdict = Verdict.OK if probed.reason is None else Verdict.FAIL
    code = "" if probed.reason is None else f"{probed.reason.value}: "
    return (Finding("device", verdict, f"{code}{probed.explanation}", probed.remedy),)


def _findings(owner: type[Backend], row: Candidate, request: DoctorRequest) -> Sequence[Finding]:
    try:
        findings = tuple(owner.doctor(request))
    except MortiseError as error:
        found = "; ".join([error.what, *error.details])
        return (Finding("doctor", Verdict.FAIL, found, error.remedy or ""),)
    except Exception as error:
        cause, lines = cause_and_consequences(error)
        return (_broken(row, "; ".join([cause, *lines])),)
    if all(isinstance(finding, Finding) for finding in findings):
        return findings
    return (_broken(row, "doctor() returned what is no mortise.plugin.Finding"),)


def _broken(row: Candidate, found: str) -> Finding:
    return Finding("doctor", Verdict.FAIL, found, f"report it to the authors of {row.distribution}")
