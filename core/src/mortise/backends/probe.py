"""Ask a backend, in a process of its own with a time limit, whether its device is here."""

from __future__ import annotations

import importlib
import json
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from mortise.backends.causes import cause_and_consequences
from mortise.errors import BackendError
from mortise.spec.reasons import ReasonCode

TIME_LIMIT_S: Final = 30.0
# The child searches the paths that the parent searches, then answers in a file: a vendor's library
# may print whatever it likes.
PROGRAM: Final = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from mortise.backends.probe import answer; answer(*sys.argv[2:])"
)


@dataclass(frozen=True, slots=True)
class ProbeOutcome:
    """What a probe gave: found, with an architecture, or a reason code why not and a remedy."""

    reason: ReasonCode | None
    explanation: str
    arch: str = ""
    remedy: str = ""


def probe_in_child(object_path: str, time_limit_s: float = TIME_LIMIT_S) -> ProbeOutcome:
    """Run ``probe`` of the class ``package.module:Class`` in a child process."""
    with tempfile.TemporaryDirectory(prefix="mortise-probe-") as folder:
        answer_path = Path(folder, "answer.json")
        try:
            child = subprocess.run(
                [sys.executable, "-c", PROGRAM, json.dumps(sys.path), object_path, answer_path],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=time_limit_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            explanation = f"its probe did not answer within {time_limit_s:g} s"
            return ProbeOutcome(ReasonCode.PROBE_TIMEOUT, explanation)
        if child.returncode != 0 or not answer_path.exists():
            return ProbeOutcome(ReasonCode.PROBE_CRASHED, _crash(child.returncode, child.stderr))
        answered = json.loads(answer_path.read_text(encoding="utf-8"))
    reason = ReasonCode(answered["reason"]) if answered["reason"] else None
    return ProbeOutcome(reason, answered["explanation"], answered["arch"], answered["remedy"])


def _crash(returncode: int, stderr: str) -> str:
    try:
        how = f"signal {signal.Signals(-returncode).name}"
    except ValueError:
        how = f"exit code {returncode}"
    last = next((line.strip() for line in reversed(stderr.splitlines()) if line.strip()), "")
    return f"its probe crashed ({how})" + (f": {last}" if last else "")


def answer(object_path: str, answer_path: str) -> None:
    """The child: import the class, ask it, write the answer down."""
    outcome = _ask(object_path)
    Path(answer_path).write_text(json.dumps(asdict(outcome)), encoding="utf-8")


def _ask(object_path: str) -> ProbeOutcome:
    module, _, name = object_path.partition(":")
    try:
        probe = getattr(importlib.import_module(module), name).probe()
        reason = None if probe.found else ReasonCode.DEVICE_ABSENT
        return ProbeOutcome(reason, str(probe.reason), str(probe.arch))
    except BackendError as error:
        cause = "; ".join([error.what, *error.details])
        return ProbeOutcome(error.reason, cause, remedy=error.remedy or "")
    except Exception as error:  # the parent reports whatever it was
        cause, lines = cause_and_consequences(error)
        return ProbeOutcome(ReasonCode.IMPORT_FAILED, "; ".join([cause, *lines]))
