"""The checks of ``doctor``; each finds one thing and says what to do about it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections import defaultdict
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from packaging.utils import canonicalize_name

from mortise.errors import ConfigError, MortiseError
from mortise.spec.doctor import DoctorRequest, Finding, Verdict
from mortise.spec.reasons import ReasonCode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from mortise.backends import Candidate
    from mortise.config import EngineConfig, Layer
    from mortise.models.family import ModelFacts

CORE: Final = "mortise-core"
# Reasons that say nothing against the installation.
HARMLESS: Final = frozenset({ReasonCode.CANNOT_SERVE_YET})


BUILTIN: Final = "builtin"


def run_checks(options: Mapping[str, Any]) -> Iterator[Finding]:
    """Every check, one after the other; what goes wrong in one is its finding.

    Args:
        options: of the command line, as ``configuration_options`` gives them.
    """
    checks: tuple[tuple[str, Callable[[], Iterator[Finding]]], ...] = (
        ("python", _python),
        ("torch", _torch),
        ("configuration", partial(_configuration, options)),
        ("backends", _backends),
        ("distributions", _distributions),
        ("built-in model", _builtin_model),
        ("configured model", partial(_configured_model, options)),
        ("configured draft", partial(_configured_draft, options)),
        ("configured backend", partial(_configured_backend, options)),
        ("terminal", _terminal),
    )
    for name, check in checks:
        try:
            yield from check()
        except MortiseError as error:
            details = "; ".join([error.what, *error.details])
            yield Finding(name, Verdict.FAIL, details, error.remedy or "")


def _python() -> Iterator[Finding]:
    found = f"{platform.python_version()} ({sys.executable}) on {platform.platform()}"
    yield Finding("python", Verdict.OK, found)


def _torch() -> Iterator[Finding]:
    try:
        import torch
    except Exception as error:
        yield Finding(
            "torch",
            Verdict.FAIL,
            f"cannot be imported: {type(error).__name__}: {error}",
            "install torch 2.11 or later for this machine",
        )
        return
    yield Finding(
        "torch",
        Verdict.OK,
        f"{torch.__version__}, {torch.get_num_threads()} threads on {os.cpu_count()} processors",
    )


def _configuration(options: Mapping[str, Any]) -> Iterator[Finding]:
    from mortise.config import resolve

    layers, warned = _layers(options)
    for text in warned:
        yield Finding("environment", Verdict.WARN, text)
    resolve(layers)
    sources = ", ".join(source for source, _ in layers)
    yield Finding("configuration", Verdict.OK, sources or "defaults alone")


def _layers(options: Mapping[str, Any]) -> tuple[list[Layer], list[str]]:
    """Where the configuration comes from, and what the environment warned of."""
    import warnings

    from mortise.cli.options import configuration_layers
    from mortise.env import read_environment

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        environment = read_environment()
    warned = [str(warning.message) for warning in caught]
    return configuration_layers(environment, options), warned


def _resolved(options: Mapping[str, Any]) -> EngineConfig | None:
    """The configuration, None where it is wrong: another check says so."""
    from mortise.config import resolve

    try:
        return resolve(_layers(options)[0]).config
    except ConfigError:
        return None


def _backends() -> Iterator[Finding]:
    from mortise.backends import discover_backends

    for row in discover_backends():
        yield _backend(row)


def _backend(row: Candidate) -> Finding:
    name = f"backend {row.name}"
    if row.reason is None:
        return Finding(name, Verdict.OK, row.provenance)
    verdict = Verdict.NOTE if row.reason in HARMLESS else Verdict.FAIL
    found = f"{row.reason.value}: {row.explanation}; {row.provenance}"
    return Finding(name, verdict, found, row.remedy)


def _distributions() -> Iterator[Finding]:
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
            yield Finding(
                "distributions",
                Verdict.WARN,
                f"{installed} is installed {len(versions)} times: {', '.join(sorted(versions))}",
                f"uninstall {installed} until it is gone, then install it once",
            )
    shared = {path: claimants for path, claimants in owners.items() if len(claimants) > 1}
    for path, claimants in sorted(shared.items())[:3]:
        yield Finding(
            "distributions",
            Verdict.FAIL,
            f"{path} belongs to {' and '.join(sorted(claimants))}",
            "one has overwritten the other: uninstall both, then install one",
        )
    if not shared:
        listed = ", ".join(sorted(places))
        yield Finding("distributions", Verdict.OK, f"no file belongs to two of {listed}")


def _builtin_model() -> Iterator[Finding]:
    from mortise.checkpoint import CheckpointTensors, ModelDirectory, Tokenizer
    from mortise.models.registry import family_of

    directory = ModelDirectory.open("builtin")
    facts = family_of(directory.config).facts(directory.config)
    tensors = CheckpointTensors(directory.weight_files())
    tokenizer = Tokenizer.load(directory.path)
    yield Finding(
        "built-in model",
        Verdict.OK,
        f"{facts.architecture}, {len(tensors)} tensors, {tokenizer.vocab_size} tokens,"
        f" {directory.path}",
    )


def _configured_model(options: Mapping[str, Any]) -> Iterator[Finding]:
    config = _resolved(options)
    if config is None or config.model == BUILTIN:
        return
    facts = _model_facts(config)
    yield Finding("configured model", Verdict.OK, f"{facts.architecture}, {config.model}")


def _configured_draft(options: Mapping[str, Any]) -> Iterator[Finding]:
    """Whether the directory of the draft model fits the main model, if one is to draft."""
    from mortise.checkpoint import ModelDirectory
    from mortise.engine.draft_loading import open_draft
    from mortise.models.registry import family_of

    config = _resolved(options)
    if config is None or not config.draft.num_tokens:
        return
    main = ModelDirectory.open(config.model)
    family = family_of(main.config)
    draft = open_draft(config.draft, main, family, family.facts(main.config))
    found = f"{config.draft.num_tokens} tokens a step, from {draft.directory.path}"
    yield Finding("configured draft", Verdict.OK, found)


def _model_facts(config: EngineConfig) -> ModelFacts:
    from mortise.checkpoint import ModelDirectory
    from mortise.models.registry import family_of

    raw = ModelDirectory.open(config.model).config
    return family_of(raw).facts(raw)


def _configured_backend(options: Mapping[str, Any]) -> Iterator[Finding]:
    """What the backend that the configuration names finds itself."""
    from mortise.backends import ask_doctor

    config = _resolved(options)
    if config is None:
        return
    name, findings = ask_doctor(config.backend, partial(_doctor_request, config))
    for finding in findings:
        yield Finding(f"{name}: {finding.name}", finding.verdict, finding.found, finding.remedy)


def _doctor_request(config: EngineConfig, name: str) -> DoctorRequest:
    """What the backend of a name is told of the run."""
    from mortise.cli.speaker import own_launch
    from mortise.engine.dispatch_modes import dispatch_modes
    from mortise.parallel.group import ExpertParallelGroup

    try:
        facts = _model_facts(config)
    except MortiseError:
        facts = None  # another check says so
    launch = own_launch()
    world_size = 1 if launch is None else launch.world_size
    scheduler = config.scheduler
    return DoctorRequest(
        device=config.device,
        options=config.backend_options.get(name, {}),
        world_size=world_size,
        modes=dispatch_modes(config, ExpertParallelGroup(world_size=world_size)),
        max_tokens=max(scheduler.max_num_batched_tokens, scheduler.max_num_seqs),
        max_tokens_per_rank=config.dispatch.max_tokens_per_rank,
        hidden_size=facts.hidden_size if facts else 0,
        num_experts=facts.num_experts if facts else 0,
        num_experts_per_tok=facts.num_experts_per_tok if facts else 0,
    )


def _terminal() -> Iterator[Finding]:
    encoding = (sys.stdout.encoding or "unknown").lower()
    kind = "a terminal" if sys.stdout.isatty() else "not a terminal"
    found = f"standard output is {kind}, {encoding}"
    if encoding.replace("-", "") == "utf8":
        yield Finding("terminal", Verdict.OK, found)
    else:
        yield Finding(
            "terminal", Verdict.WARN, found, "use a UTF-8 locale; other characters become '?'"
        )
