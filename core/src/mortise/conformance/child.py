"""The process in which pytest runs the kit: no configuration, no terminal, one thread."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from mortise.conformance import plugin, suite
from mortise.conformance.records import Level, NotAskedError
from mortise.conformance.subject import Subject


def run(request_text: str, answer_path: str) -> None:
    """Ask, and write down how each check ended."""
    # The sizes are tiny: threads would wait for each other, and sums depend on their number.
    torch.set_num_threads(1)
    request = json.loads(request_text)
    subject = Subject(request["backend"], request["device"], request["options"])
    levels = tuple(Level(level) for level in request["levels"])
    kit = plugin.Run(subject, levels)
    is_usage_error = _pytest(kit, request["keyword"])
    device, emulated = _device(subject)
    answer = {
        "is_usage_error": is_usage_error,
        "ended": kit.ended,
        "device": device,
        "emulated": emulated,
    }
    Path(answer_path).write_text(json.dumps(answer), encoding="utf-8")


def _pytest(kit: plugin.Run, keyword: str) -> bool:
    """Whether the expression was none."""
    import pytest

    place = Path(suite.__file__)
    arguments = [
        str(place),
        f"--rootdir={place.parent}",
        "--import-mode=importlib",
        "--noconftest",
        "--disable-plugin-autoload",
        *("-c", os.devnull),
        *("-p", "no:terminal"),
        *("-p", "no:cacheprovider"),
        *("-p", "no:logging"),
        *(("-k", keyword) if keyword else ()),
    ]
    code = pytest.main(arguments, plugins=[_Named(kit)])
    if code == pytest.ExitCode.USAGE_ERROR:
        return True
    legal = (
        pytest.ExitCode.OK,
        pytest.ExitCode.TESTS_FAILED,
        pytest.ExitCode.NO_TESTS_COLLECTED,
    )
    assert code in legal, f"pytest ended with {code}"
    return False


class _Named:
    """Gives a run its name among pytest's plugins."""

    def __init__(self, kit: plugin.Run) -> None:
        self.kit = kit

    def pytest_configure(self, config: Any) -> None:
        """Register it."""
        config.pluginmanager.register(self.kit, plugin.NAME)


def _device(subject: Subject) -> tuple[str, bool]:
    try:
        capabilities = subject.capabilities
    except NotAskedError:
        return "", False
    return str(capabilities.device), capabilities.emulated
