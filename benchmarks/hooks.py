"""What a hook costs: a bound call beside a direct one and a pluggy one, binding, and discovery.

The hooks of the measured backend return a constant, so a call costs what the way to it costs. The
ways are measured in turn within each round, so that a change of the machine's load meets them all.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median
from timeit import Timer

import click
import pluggy

from benchmarks.report import Measurement, report, save, show
from mortise.backends import BoundBackend, discover_backends, load_backend
from mortise.backends.implementations import PARAMETERS
from mortise.spec import hooks
from mortise.spec.roles import ModelRole
from mortise.testing.distributions import FakeDistribution, backend_code

CALLED = {1: "resolve_dispatch_dtype", 3: "qkv_split", 5: "paged_mqa_logits"}
"""One hook for each number of parameters that is measured."""

NUM_DISTRIBUTIONS = 300
NUM_WITH_ENTRY_POINTS = 120
NUM_BACKENDS = 3
OVERHEAD_TARGET_NS = 100.0
BIND_TARGET_MS = 1.0

DISCOVERY = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
start = time.perf_counter()
from mortise.backends.discover import discover_backends
imported = time.perf_counter()
rows = discover_backends()
first = time.perf_counter()
warm = []
for _ in range(int(sys.argv[2])):
    begin = time.perf_counter()
    discover_backends()
    warm.append(time.perf_counter() - begin)
import importlib.metadata
installed = sum(1 for _ in importlib.metadata.distributions())
print(json.dumps({"import": imported - start, "first": first - imported, "warm": warm,
                  "installed": installed, "rows": len(rows)}))
"""


def constant_backend(folder: Path) -> FakeDistribution:
    """A backend that implements every hook by returning a constant."""
    methods = "".join(
        f"@hookimpl\ndef {name}(self, {', '.join(parameters)}): return 1\n"
        for name, parameters in PARAMETERS.items()
    )
    distributions = FakeDistribution(folder)
    distributions.add_backend(
        "constant",
        code=backend_code(methods),
        manifest={"implements": {name: spec.version for name, spec in hooks.HOOKS.items()}},
    )
    return distributions


def call_rounds(bound: BoundBackend, hook: str, rounds: int, number: int) -> dict[str, list[float]]:
    """Nanoseconds a call, per round, of each way to reach one hook; the empty loop is taken off."""
    manager = pluggy.PluginManager(hooks.PROJECT)
    manager.add_hookspecs(hooks)
    manager.register(bound.backend)
    values = {name: object() for name in PARAMETERS[hook]}
    positional = ", ".join(values)
    keywords = ", ".join(f"{name}={name}" for name in values)
    names = {"backend": bound.backend, "ops": bound.ops, "relay": manager.hook, **values}
    timers = {
        "empty": Timer("pass", globals=names),
        "direct": Timer(f"backend.{hook}({positional})", globals=names),
        "bound": Timer(f"ops.{hook}({positional})", globals=names),
        "pluggy": Timer(f"relay.{hook}({keywords})", globals=names),
    }
    found: dict[str, list[float]] = {way: [] for way in timers}
    for _ in range(rounds):
        for way, timer in timers.items():
            found[way].append(timer.timeit(number) / number * 1e9)
    empty = min(found.pop("empty"))
    return {way: [time - empty for time in times] for way, times in found.items()}


def summary(name: str, unit: str, times: list[float], target: float | None = None) -> Measurement:
    """Median and best of the rounds."""
    return Measurement(
        name=name,
        unit=unit,
        median=round(median(times), 3),
        best=round(min(times), 3),
        rounds=len(times),
        target=target,
    )


def measure_calls(rounds: int, number: int) -> list[Measurement]:
    """A direct call, a bound call, what binding adds, and a pluggy call, by arity."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        with constant_backend(Path(folder)).installed():
            bound = load_backend("constant", role=ModelRole.MAIN)
        for arity, hook in CALLED.items():
            times = call_rounds(bound, hook, rounds, number)
            # Each round's own difference: both were measured under the same load.
            over = [
                after - before
                for before, after in zip(times["direct"], times["bound"], strict=True)
            ]
            label = f"{hook}, {arity} parameter{'s' if arity > 1 else ''}"
            found += [
                summary(f"direct call: {label}", "ns", times["direct"]),
                summary(f"bound call: {label}", "ns", times["bound"]),
                replace(
                    summary(f"bound over direct: {label}", "ns", over, OVERHEAD_TARGET_NS),
                    # The least difference of two noisy times is noise; that of the best is not.
                    best=round(min(times["bound"]) - min(times["direct"]), 3),
                ),
                summary(f"pluggy call: {label}", "ns", times["pluggy"]),
            ]
    return found


def measure_binding(rounds: int) -> list[Measurement]:
    """Select, check, create and bind one role, from rows that were read once."""
    rows = discover_backends()

    def bind() -> None:
        load_backend("reference", role=ModelRole.MAIN, candidates=rows)

    bind()
    times = [timing * 1e3 for timing in Timer(bind).repeat(repeat=rounds * 20, number=1)]
    name = f"bind one role (reference, {len(hooks.HOOKS)} hooks)"
    return [summary(name, "ms", times, BIND_TARGET_MS)]


def measure_discovery(rounds: int) -> tuple[list[Measurement], dict[str, object]]:
    """List backends among 300 more distributions, in a process of its own per round."""
    first, imports, warm = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        distributions = FakeDistribution(Path(folder))
        for index in range(NUM_DISTRIBUTIONS - NUM_BACKENDS):
            scripts = f"[console_scripts]\ntool{index} = tool{index}:main\n"
            has_entries = index < NUM_WITH_ENTRY_POINTS - NUM_BACKENDS
            distributions.add_metadata(
                f"filler-{index}", "1.0", entry_points=scripts if has_entries else None
            )
        for index in range(NUM_BACKENDS):
            distributions.add_backend(f"measured{index}")
        for _ in range(rounds):
            child = subprocess.run(
                [sys.executable, "-c", DISCOVERY, folder, "5"],
                capture_output=True,
                text=True,
                check=True,
            )
            seen = json.loads(child.stdout)
            first.append(seen["first"] * 1e3)
            imports.append(seen["import"] * 1e3)
            warm.append(median(seen["warm"]) * 1e3)
    facts: dict[str, object] = {
        "distributions": seen["installed"],
        "of_these_synthetic": NUM_DISTRIBUTIONS,
        "backends_listed": seen["rows"],
    }
    return [
        summary("discovery, first call", "ms", first),
        summary("discovery, further calls", "ms", warm),
        summary("importing what discovery needs", "ms", imports),
    ], facts


@click.command()
@click.option("--rounds", default=15, show_default=True, help="Rounds of each measurement.")
@click.option("--number", default=100_000, show_default=True, help="Calls of a hook in a round.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("--save", "keep", is_flag=True, help="Write the result to benchmarks/results.")
def main(rounds: int, number: int, as_json: bool, keep: bool) -> None:
    """Measure what hooks cost: calls, binding, discovery."""
    measurements = [*measure_calls(rounds, number), *measure_binding(rounds)]
    discovery, facts = measure_discovery(max(3, rounds // 3))
    measurements += discovery
    command = f"python -m benchmarks.hooks --rounds {rounds} --number {number}"
    text = report(command, measurements, facts)
    if as_json:
        click.echo(text)
    else:
        show("hooks", measurements)
        click.echo(f"{facts['distributions']} distributions, {facts['backends_listed']} backends")
    if keep:
        click.echo(f"written: {save('hooks', text).relative_to(Path.cwd())}", err=True)


if __name__ == "__main__":
    main()
