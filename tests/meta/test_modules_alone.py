"""Every module can be imported first and without a warning; only what needs torch loads it.

One child process serves all modules: importing torch takes more than a second and none of our
modules may depend on it being there or not, so torch stays loaded while every module of ours is
thrown away before each import. Modules that must not load torch get a child of their own.
"""

from __future__ import annotations

import json
import subprocess
import sys

from tests.meta.tree import module_name, python_files

ALONE = """
import importlib, json, sys, traceback, warnings
import torch
warnings.simplefilter("error")
failures = {}
for name in json.load(sys.stdin):
    for loaded in [loaded for loaded in sys.modules if loaded.split(".")[0].startswith("mortise")]:
        del sys.modules[loaded]
    try:
        importlib.import_module(name)
    except BaseException:
        failures[name] = traceback.format_exc(limit=-3)
print(json.dumps(failures))
"""

WITHOUT_TORCH = (
    "mortise",
    "mortise.__main__",
    "mortise.backends.discover",
    "mortise.cli",
    "mortise.config",
    "mortise.env",
    "mortise.errors",
    "mortise.plugin",
    "mortise.spec",
    "mortise.spec.hooks",
    "mortise.spec.reasons",
)


def run_child(program: str, *arguments: str, stdin: str = "") -> str:
    outcome = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
    )
    assert outcome.returncode == 0, outcome.stderr
    return outcome.stdout


def test_every_module_imports_alone() -> None:
    names = [module_name(path) for path in python_files()]
    assert "mortise.spec.hooks" in names
    failures = json.loads(run_child(ALONE, stdin=json.dumps(names)).splitlines()[-1])
    assert not failures, "\n".join(f"{name}:\n{trace}" for name, trace in failures.items())


def test_modules_that_need_no_tensor_load_no_torch() -> None:
    program = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    print(name, 'torch' in sys.modules)\n"
    )
    lines = run_child(program, *WITHOUT_TORCH).splitlines()
    assert lines == [f"{name} False" for name in WITHOUT_TORCH]


def test_help_loads_no_torch() -> None:
    program = (
        "import sys\n"
        "from mortise.__main__ import main\n"
        "sys.argv = ['mortise', '--help']\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        "print('torch loaded:', 'torch' in sys.modules)\n"
    )
    assert run_child(program).splitlines()[-1] == "torch loaded: False"
