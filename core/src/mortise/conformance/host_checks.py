"""What a bound backend says of itself, and what it leaves behind."""

from __future__ import annotations

import gc
import weakref
from typing import TYPE_CHECKING, Final

import torch

from mortise.conformance.records import Check, FaultError, Level, NotAskedError
from mortise.conformance.witness import witness
from mortise.errors import BackendUnusableError, ConfigError, MortiseError
from mortise.plugin import (
    BackendChoice,
    DispatchMode,
    DoctorRequest,
    Finding,
    ModelRole,
    WarmupJob,
    WarmupRequest,
)

if TYPE_CHECKING:
    from mortise.conformance.subject import Subject

UNKNOWN_OPTION: Final = "surely_no_option_of_any_backend"


def it_is_created_or_says_why_not(subject: Subject) -> None:
    """It can be created, or says with one clear error which device or library is missing."""
    try:
        subject.bind()
    except (BackendUnusableError, ConfigError) as error:
        raise NotAskedError(f"it cannot be bound here: {error.what}") from error
    except MortiseError as error:
        raise FaultError(str(error)) from error


def its_capabilities_are_sound(subject: Subject) -> None:
    """Capabilities are the same every time, possible, and no more than the manifest lists."""
    backend, first = subject.bound.backend, subject.capabilities
    if backend.capabilities() != first:
        raise FaultError("capabilities() answers something else when it is asked again")
    positive = {
        "num_workers": first.num_workers,
        "max_native_next_n": first.max_native_next_n,
        **{f"a page size of {size}": size for size in first.page_sizes},
    }
    wrong = [f"{name} is {value}" for name, value in positive.items() if value < 1]
    empty = ("schemes", "dispatch_dtypes", "compute_dtypes", "page_sizes", "index_key_dtypes")
    wrong += [f"{name} is empty" for name in empty if not getattr(first, name)]
    wrong += [
        f"{dtype} is no compute dtype"
        for dtype in first.compute_dtypes
        if dtype not in {torch.float32, torch.bfloat16}
    ]
    if wrong:
        raise FaultError(f"capabilities() cannot be: {'; '.join(wrong)}")
    _require_declared(subject)


def _require_declared(subject: Subject) -> None:
    manifest, found = subject.row.manifest, subject.capabilities
    assert manifest is not None
    stated = manifest.capabilities
    pairs = (
        ("schemes", stated.schemes, found.schemes),
        ("dispatch_dtypes", stated.dispatch_dtypes, found.dispatch_dtypes),
        ("page_sizes", stated.page_sizes, found.page_sizes),
        ("compute_dtypes", stated.compute_dtypes, [str(one)[6:] for one in found.compute_dtypes]),
    )
    for name, listed, served in pairs:
        if listed and (more := sorted(map(str, set(served) - set(listed)))):
            raise FaultError(f"capabilities() has {name} that its manifest lacks: {more}")
    if found.emulated and not stated.emulation:
        raise FaultError("it is emulated, and its manifest does not say that it can be")


def unknown_options_are_refused(subject: Subject) -> None:
    """An option that it does not know is a ConfigError which names it, not silence."""
    assert subject.bound is not None
    try:
        subject.bind(options={**subject.options, UNKNOWN_OPTION: 1})
    except ConfigError as error:
        if UNKNOWN_OPTION not in str(error):
            raise FaultError(f"the error for an unknown option does not name it: {error}") from None
        return
    raise FaultError("an unknown option is taken in silence: a misspelt one would be too")


def roles_share_nothing(subject: Subject) -> None:
    """Each role has an object of its own, and binding one changes nothing that another says."""
    before = subject.capabilities
    main, draft = subject.bind(ModelRole.MAIN), subject.bind(ModelRole.DRAFT)
    if main.backend is draft.backend:
        raise FaultError("process-wide state: create() gives both roles the same object")
    shared = [
        name
        for name, value in vars(main.backend).items()
        if isinstance(value, dict | list | set) and vars(draft.backend).get(name) is value
    ]
    if shared:
        raise FaultError(f"process-wide state: both roles share {', '.join(shared)}")
    if subject.bound.backend.capabilities() != before:
        raise FaultError("process-wide state: capabilities() changed when another role was bound")


def a_released_binding_is_forgotten(subject: Subject) -> None:
    """Nothing keeps the object of a binding that was dropped."""
    assert subject.bound is not None
    bound = subject.bind()
    kept = weakref.ref(bound.backend)
    del bound
    gc.collect()
    if kept() is not None:
        holders = [type(one).__name__ for one in gc.get_referrers(kept())][:3]
        raise FaultError(
            f"process-wide state: a released binding is kept alive by {', '.join(holders)}"
        )


def choices_findings_and_jobs_are_records(subject: Subject) -> None:
    """choices(), doctor() and warmup() answer with their records, for a run of one process."""
    backend = subject.bound.backend
    answers: dict[str, tuple[object, type]] = {
        "choices()": (backend.choices(), BackendChoice),
        "doctor()": (
            type(backend).doctor(
                DoctorRequest(
                    device=subject.device, options=subject.options, modes=tuple(DispatchMode)
                )
            ),
            Finding,
        ),
        "warmup()": (
            backend.warmup(
                WarmupRequest(
                    role=ModelRole.MAIN,
                    modes=tuple(DispatchMode),
                    max_tokens=16,
                    max_tokens_per_rank=16,
                    compute_dtype=subject.capabilities.compute_dtypes[0],
                )
            ),
            WarmupJob,
        ),
    }
    for name, (answer, kind) in answers.items():
        if not isinstance(answer, list | tuple):
            raise FaultError(f"{name} returned a {type(answer).__name__}, not a sequence")
        if wrong := [one for one in answer if not isinstance(one, kind)]:
            raise FaultError(f"{name} returned a {type(wrong[0]).__name__}, not {kind.__name__}")


def it_runs_in_a_process_of_its_own(subject: Subject) -> None:
    """It can be imported, created and used in a spawned process."""
    assert subject.bound is not None
    if failed := witness(subject).failed:
        raise FaultError(f"in a spawned process: {failed}")


def it_runs_in_a_fork(subject: Subject) -> None:
    """A fork of a process that used it computes the same bits."""
    told, device = witness(subject), subject.capabilities.device
    if device.type != "cpu":
        raise NotAskedError(f"a process that used {device} cannot be forked")
    if told.forked != told.digest:
        text = "other results" if len(told.forked) == len(told.digest) else told.forked
        raise FaultError(f"a fork of a process that used it gives {text}")


def using_it_changes_nothing_of_the_core(subject: Subject) -> None:
    """Creating and using it replaces, adds and removes no attribute of the core."""
    assert subject.bound is not None
    if changed := witness(subject).after_use:
        raise FaultError(f"using it mutates the core: {'; '.join(changed)}")


def it_keeps_nothing_in_its_modules(subject: Subject) -> None:
    """Using it changes nothing that its modules and classes hold: no process-wide state."""
    assert subject.bound is not None
    if kept := witness(subject).state:
        raise FaultError(f"process-wide state: using it changed {', '.join(kept)}")


def it_writes_no_environment_variable(subject: Subject) -> None:
    """Importing, creating and using it writes no environment variable, not even for a moment."""
    assert subject.bound is not None
    if written := witness(subject).variables:
        raise FaultError(f"environment variables are written: {', '.join(written)}")


def _check(run: object) -> Check:
    return Check(run=run, level=Level.HOST)  # type: ignore[arg-type]


CHECKS: Final = (
    _check(it_is_created_or_says_why_not),
    _check(its_capabilities_are_sound),
    _check(unknown_options_are_refused),
    _check(choices_findings_and_jobs_are_records),
    _check(roles_share_nothing),
    _check(a_released_binding_is_forgotten),
    _check(it_runs_in_a_process_of_its_own),
    _check(it_runs_in_a_fork),
    _check(using_it_changes_nothing_of_the_core),
    _check(it_keeps_nothing_in_its_modules),
    _check(it_writes_no_environment_variable),
)
