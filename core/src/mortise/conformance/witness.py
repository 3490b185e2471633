"""A process of its own that imports and uses a backend, and tells what changed meanwhile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from mortise.conformance.records import FaultError

if TYPE_CHECKING:
    from mortise.conformance.subject import Subject

TIME_LIMIT_S: Final = 300.0
PROGRAM: Final = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from mortise.conformance.witness import testify; testify(*sys.argv[2:])"
)
ENVIRONMENT_EVENTS: Final = frozenset({"os.putenv", "os.unsetenv"})
# Python's and libraries' own, whoever is imported.
LIBRARY_VARIABLES: Final = frozenset({"OPENBLAS_MAIN_FREE", "TORCHINDUCTOR_CACHE_DIR"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Testimony:
    """What a process saw.

    Args:
        not_imported: the error that importing the backend raised; empty if none.
        failed: the error that creating or using it raised; empty if none.
        after_import, after_use: changes of the core's modules.
        state: attributes of the plugin's modules that hold something else after the use.
        variables: environment variables that were written.
        digest: of the results.
        forked: of the results of a fork of the process; an error's text where it raised.
    """

    not_imported: str = ""
    failed: str = ""
    after_import: tuple[str, ...] = ()
    after_use: tuple[str, ...] = ()
    state: tuple[str, ...] = ()
    variables: tuple[str, ...] = ()
    digest: str = ""
    forked: str = ""


def witness(subject: Subject) -> Testimony:
    """Start the process, once for each subject.

    Raises:
        FaultError: the process crashed or did not end.
    """
    if subject.testimony is None:
        subject.testimony = _in_child(subject)
    assert isinstance(subject.testimony, Testimony)
    return subject.testimony


def _in_child(subject: Subject) -> Testimony:
    request = {
        "backend": subject.name,
        "device": subject.device,
        "options": dict(subject.options),
    }
    with tempfile.TemporaryDirectory(prefix="mortise-witness-") as folder:
        answer = Path(folder, "answer.json")
        try:
            child = subprocess.run(
                [sys.executable, "-c", PROGRAM, json.dumps(sys.path), json.dumps(request), answer],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=TIME_LIMIT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise FaultError(
                f"a process of its own did not import and use it within {TIME_LIMIT_S:g} s"
            ) from None
        if not answer.exists():
            last = "\n".join(child.stderr.strip().splitlines()[-3:])
            raise FaultError(
                f"a process that imports and uses it ended with code {child.returncode}\n{last}"
            )
        told: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    for name in ("after_import", "after_use", "state", "variables"):
        told[name] = tuple(told[name])
    return Testimony(**told)


class _Listener:
    """Hears every variable that Python writes, also those that are taken back."""

    def __init__(self) -> None:
        self.heard: set[str] = set()

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in ENVIRONMENT_EVENTS:
            self.heard.add(os.fsdecode(arguments[0]))


def testify(request_text: str, answer_path: str) -> None:
    """The child: import, create, use, fork, and write down what changed."""
    import torch

    from mortise.conformance import exercise
    from mortise.conformance.subject import Subject

    assert exercise is not None, "imported before anything is compared"
    torch.set_num_threads(1)
    request = json.loads(request_text)
    subject = Subject(request["backend"], request["device"], request["options"])
    told = _testimony(subject)
    Path(answer_path).write_text(json.dumps(asdict(told)), encoding="utf-8")


def _testimony(subject: Subject) -> Testimony:
    from mortise.backends.bind import import_backend
    from mortise.conformance import mutation
    from mortise.conformance.exercise import exercise

    mutation.import_core()
    listener = _Listener()
    sys.addaudithook(listener.hear)
    before = mutation.snapshot()
    state: list[str] = []
    digest = forked = failed = ""
    try:
        owner = import_backend(subject.row)
    except Exception as error:
        return Testimony(not_imported=f"{type(error).__name__}: {error}")
    after_import = mutation.changes(before, mutation.snapshot())
    try:
        package = owner.__module__.split(".")[0]
        subject.bind()
        held = mutation.state_of_package(package) if package != "mortise" else {}
        digest = exercise(subject)
        if held:
            state = mutation.differences(held, mutation.state_of_package(package))
        if subject.capabilities.device.type == "cpu":
            forked = _forked(subject)
    except Exception as error:
        failed = f"{type(error).__name__}: {error}"
    after_use = mutation.changes(before, mutation.snapshot())
    return Testimony(
        failed=failed,
        after_import=tuple(after_import),
        after_use=tuple(after_use),
        state=tuple(state),
        variables=tuple(sorted(listener.heard - LIBRARY_VARIABLES)),
        digest=digest,
        forked=forked,
    )


def _forked(subject: Subject) -> str:
    """What a fork of this process computes."""
    from mortise.conformance.exercise import exercise

    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            text = exercise(subject)
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
        os.write(writer, text[:4000].encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        text = pipe.read().decode()
    os.waitpid(child, 0)
    return text or "it ended without a word"
