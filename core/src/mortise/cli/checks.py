"""The checks of ``doctor``; each finds one thing and says what to do about it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections import defaultdict
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from packaging.utils import canonicalize_name

from mortise.errors import MortiseError
from mortise.spec.reasons import ReasonCode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mortise.backends import Candidate

CORE: Final = "mortise-core"
# Reasons that say nothing against the installation.
HARMLESS: Final = frozenset({ReasonCode.CANNOT_SERVE_YET})


class Verdict(StrEnum):
    """What a check found, the best first."""

    OK = "ok"
    NOTE = "note"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Check:
    """What was looked at, how it is, what was found, and what to do where that is not well."""

    name: str
    verdict: Verdict
    found: str
    remedy: str = ""


def run_checks() -> Iterator[Check]:
    """Every check, one after the other; what goes wrong in one is its finding."""
    checks: tuple[tuple[str, Callable[[], Iterator[Check]]], ...] = (
        ("python", _python),
        ("torch", _torch),
        ("configuration", _configuration),
        ("backends", _backends),
        ("distributions", _distributions),
        ("built-in model", _builtin_model),
        ("terminal", _terminal),
    )
    for name, check in checks:
        try:
            yield from check()
        except MortiseError as error:
            details = "; ".join([error.what, *error.details])
            yield Check(name, Verdict.FAIL, details, error.remedy or "")


def _python() -> Iterator[Check]:
    found = f"{platform.python_version()} ({sys.executable}) on {platform.platform()}"
    yield Check("python", Verdict.OK, found)


def _torch() -> Iterator[Check]:
    try:
        import torch
    except Exception as error:
        yield Check(
            "torch",
            Verdict.FAIL,
            f"cannot be imported: {type(error).__name__}: {error}",
            "install torch 2.11 or later for this machine",
        )
        return
    yield Check(
        "torch",
        Verdict.OK,
        f"{torch.__version__}, {torch.get_num_threads()} threads on {os.cpu_count()} processors",
    )


def _configuration() -> Iterator[Check]:
    import warnings

    from mortise.config import resolve, standard_layers
    from mortise.env import read_environment

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        environment = read_environment()
    for warning in caught:
        yield Check("environment", Verdict.WARN, str(warning.message))
    layers = standard_layers(environment)
    resolve(layers)
    sources = ", ".join(source for source, _ in layers)
    yield Check("configuration", Verdict.OK, sources or "defaults alone")


def _backends() -> Iterator[Check]:
    from mortise.backends import discover_backends

    for row in discover_backends():
        yield _backend(row)


def _backend(row: Candidate) -> Check:
    name = f"backend {row.name}"
    if row.reason is None:
        return Check(name, Verdict.OK, row.provenance)
    verdict = Verdict.NOTE if row.reason in HARMLESS else Verdict.FAIL
    found = f"{row.reason.value}: {row.explanation}; {row.provenance}"
    return Check(name, verdict, found, row.remedy)


def _distributions() -> Iterator[Check]:
    """The core and the backends: each installed once, no file brought by two of them."""
    from mortise.backends import discover_backends

    names = {CORE, *(row.distribution for row in discover_backends())}
    places: dict[str, set[str]] = defaultdict(set)
    owners: dict[str, set[str]] = defaultdict(set)
    for one in importlib.metadata.distributions():
        name: str = canonicalize_name(one.name or "")
        if name not in names:
            continue
        places[name].add(f"{one.version} in {one.locate_file('')}")
        for file in one.files or ():
            owners[str(one.locate_file(file))].add(name)
    for installed, versions in sorted(places.items()):
        if len(versions) > 1:
            yield Check(
                "distributions",
                Verdict.WARN,
                f"{installed} is installed {len(versions)} times: {', '.join(sorted(versions))}",
                f"uninstall {installed} until it is gone, then install it once",
            )
    shared = {path: claimants for path, claimants in owners.items() if len(claimants) > 1}
    for path, claimants in sorted(shared.items())[:3]:
        yield Check(
            "distributions",
            Verdict.FAIL,
            f"{path} belongs to {' and '.join(sorted(claimants))}",
            "one has overwritten the other: uninstall both, then install one",
        )
    if not shared:
        listed = ", ".join(sorted(places))
        yield Check("distributions", Verdict.OK, f"no file belongs to two of {listed}")


def _builtin_model() -> Iterator[Check]:
    from mortise.checkpoint import CheckpointTensors, ModelDirectory, Tokenizer
    from mortise.models.registry import family_of

    directory = ModelDirectory.open("builtin")
    facts = family_of(directory.config).facts(directory.config)
    tensors = CheckpointTensors(directory.weight_files())
    tokenizer = Tokenizer.load(directory.path)
    yield Check(
        "built-in model",
        Verdict.OK,
        f"{facts.architecture}, {len(tensors)} tensors, {tokenizer.vocab_size} tokens,"
        f" {directory.path}",
    )


def _terminal() -> Iterator[Check]:
    encoding = (sys.stdout.encoding or "unknown").lower()
    kind = "a terminal" if sys.stdout.isatty() else "not a terminal"
    found = f"standard output is {kind}, {encoding}"
    if encoding.replace("-", "") == "utf8":
        yield Check("terminal", Verdict.OK, found)
    else:
        yield Check(
            "terminal", Verdict.WARN, found, "use a UTF-8 locale; other characters become '?'"
        )
