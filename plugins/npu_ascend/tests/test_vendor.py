"""Getting hold of the operators: what is missing is one clear error, and nothing is replaced."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch

from mortise.errors import BackendUnusableError, ConfigError
from mortise.plugin import ReasonCode
from mortise_npu_ascend import vendor
from mortise_npu_ascend.dispatch import Generation
from mortise_npu_ascend.options import Options, read_options

if TYPE_CHECKING:
    from pathlib import Path

MINOR = ".".join(torch.__version__.split(".")[:2])

# A library that was imported stays, and so would the operators it registers: all scenarios run, one
# after the other, in a process of their own.
PROGRAM = """
import importlib, json, sys
from mortise.errors import MortiseError
from mortise_npu_ascend import vendor
from mortise_npu_ascend.options import read_options

def answer(device=None, table={}, rank=0, what="load"):
    if what == "probe":
        probed = vendor.probe()
        return [probed.found, probed.arch, probed.reason]
    if what == "load beside the emulator":
        vendor.load("emulated", read_options({}), 0)
    loaded = vendor.load(device, read_options(table), rank)
    npu = loaded.torch_npu.npu
    assert not loaded.emulated
    return [str(loaded.device), loaded.generation, loaded.tiles, vars(npu.config), npu.chosen]

answers = []
for folder, arguments in json.load(sys.stdin):
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        answers.append(answer(**arguments))
    except MortiseError as error:
        answers.append([type(error).__name__, getattr(error, "reason", None), str(error)])
    sys.path.remove(folder)
    sys.modules.pop("torch_npu", None)
print(json.dumps(answers))
"""

LIBRARY = """
import torch
torch.utils.rename_privateuse1_backend("npu")
class Config: pass
class Npu:
    def __init__(self): self.config, self.chosen = Config(), None
    def is_available(self): return {count} > 0
    def device_count(self): return {count}
    def get_device_name(self, device=None): return {name!r}
    def set_device(self, device): self.chosen = device
npu = Npu()
__version__ = "{minor}.0"
"""

CANN_MISSING = "raise ImportError('libhccl.so: cannot open shared object file: No such file')"
WRAPPED = f"""
try:
    {CANN_MISSING}
except ImportError as error:
    raise RuntimeError('Failed to load the backend extension') from error
"""


@dataclass(frozen=True)
class Library:
    """A library called torch_npu, with the metadata of a distribution."""

    source: str
    version: str = f"{MINOR}.0"

    def install(self, folder: Path) -> None:
        metadata = folder / f"torch_npu-{self.version}.dist-info" / "METADATA"
        metadata.parent.mkdir(parents=True)
        metadata.write_text(f"Metadata-Version: 2.1\nName: torch_npu\nVersion: {self.version}\n")
        (folder / "torch_npu").mkdir()
        (folder / "torch_npu" / "__init__.py").write_text(self.source)


def working(count: int = 2, name: str = "Ascend910B3") -> Library:
    return Library(LIBRARY.format(count=count, name=name, minor=MINOR))


NOT_MADE_FOR_IT = ("2.1.0.post17", "3.0.0", f"{MINOR}9.0")
NAMES = {"Ascend910B3": "A2", "Ascend910_9382": "A3", "Ascend950PR_9599": "A5"}

LIBRARIES: dict[str, Library | None] = {
    "none": None,
    "cann missing": Library(CANN_MISSING),
    "cann missing, as torch says it": Library(WRAPPED),
    "no chip": working(0),
    "another chip": working(name="Ascend310P3"),
    **{name: working(name=name) for name in NAMES},
    **{version: Library("raise SystemError('imported')", version) for version in NOT_MADE_FOR_IT},
}

ND: dict[str, object] = {"weight_format": "nd"}
SCENARIOS: list[tuple[str, dict[str, Any]]] = [
    *((library, {}) for library in LIBRARIES),
    *((library, {"what": "probe"}) for library in LIBRARIES),
    ("Ascend910B3", {"device": "npu:1", "table": ND}),
    ("Ascend910B3", {"rank": 1}),
    ("Ascend910B3", {"device": "npu:0", "rank": 1}),
    ("Ascend910B3", {"device": "npu:2"}),
    ("Ascend910B3", {"device": "npu", "rank": 3}),
    ("Ascend910B3", {"table": {"generation": "A2"}}),
    ("Ascend910B3", {"table": {"generation": "A5"}}),
    ("Ascend910B3", {"what": "load beside the emulator"}),
]


class Answers:
    """What the process said, scenario by scenario."""

    def __init__(self, answers: list[list[Any]]) -> None:
        self._answers = answers

    def __call__(self, library: str, **arguments: object) -> list[Any]:
        return self._answers[SCENARIOS.index((library, arguments))]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    folder = tmp_path_factory.mktemp("libraries")
    for name, library in LIBRARIES.items():
        (folder / name).mkdir()
        if library is not None:
            library.install(folder / name)
    asked = [(str(folder / library), arguments) for library, arguments in SCENARIOS]
    child = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    return Answers(json.loads(child.stdout.splitlines()[-1]))


@pytest.mark.parametrize("what", [{}, {"what": "probe"}], ids=["load", "probe"])
def test_the_library_is_missing(answers: Answers, what: dict[str, str]) -> None:
    kind, reason, text = answers("none", **what)
    assert (kind, reason) == ("BackendUnusableError", ReasonCode.IMPORT_FAILED)
    first, *_, last = text.splitlines()
    assert first == "torch_npu is not installed"
    assert f'pip install "torch-npu=={MINOR}.*"' in last
    assert 'device = "emulated"' in last


@pytest.mark.parametrize("version", NOT_MADE_FOR_IT)
def test_the_library_is_made_for_another_torch(answers: Answers, version: str) -> None:
    """It is said before the import, which would crash in some other way."""
    kind, reason, text = answers(version)
    assert (kind, reason) == ("BackendUnusableError", ReasonCode.IMPORT_FAILED)
    assert text.startswith(f"torch_npu {version} is installed beside torch {torch.__version__}")
    assert f"expected: torch_npu {MINOR}: each is made for one minor version of torch" in text


@pytest.mark.parametrize("library", ["cann missing", "cann missing, as torch says it"])
def test_the_library_misses_libraries_of_its_own(answers: Answers, library: str) -> None:
    kind, reason, text = answers(library)
    assert (kind, reason) == ("BackendUnusableError", ReasonCode.IMPORT_FAILED)
    first, *_, last = text.splitlines()
    assert first == "ImportError: libhccl.so: cannot open shared object file: No such file"
    assert "set_env.sh" in last


@pytest.mark.parametrize(
    ("library", "arguments", "missing"),
    [
        ("no chip", {}, "npu:0: torch_npu sees none"),
        ("Ascend910B3", {"device": "npu:2"}, "npu:2: torch_npu sees 2"),
        ("Ascend910B3", {"device": "npu", "rank": 3}, "npu:3: torch_npu sees 2"),
    ],
)
def test_the_chip_is_missing(
    answers: Answers, library: str, arguments: dict[str, object], missing: str
) -> None:
    kind, reason, text = answers(library, **arguments)
    assert (kind, reason) == ("BackendUnusableError", ReasonCode.DEVICE_ABSENT)
    assert text.startswith(f"there is no device {missing}")
    assert "npu-smi" in text


def test_the_chip_is_of_no_known_generation(answers: Answers) -> None:
    kind, reason, text = answers("another chip")
    assert (kind, reason) == ("BackendUnusableError", ReasonCode.ARCH_MISMATCH)
    assert text.startswith("the device calls itself 'Ascend310P3'")
    assert "Ascend910B*" in text


@pytest.mark.parametrize("name", NAMES)
def test_the_device_says_what_it_is(answers: Answers, name: str) -> None:
    tiles = {"allow_internal_format": True}
    assert answers(name) == ["npu:0", NAMES[name], True, tiles, 0]
    assert answers(name, what="probe") == [True, name, f"torch_npu sees {name}"]


def test_which_device(answers: Answers) -> None:
    assert answers("Ascend910B3", rank=1)[::4] == ["npu:1", 1], "the number of the process"
    assert answers("Ascend910B3", device="npu:0", rank=1)[::4] == ["npu:0", 0]


def test_the_librarys_setting_of_tiles_is_left_alone_where_there_are_none(answers: Answers) -> None:
    assert answers("Ascend910B3", device="npu:1", table=ND) == ["npu:1", "A2", False, {}, 1]


def test_a_generation_that_is_not_the_devices(answers: Answers) -> None:
    assert answers("Ascend910B3", table={"generation": "A2"})[1] == "A2"
    kind, _, text = answers("Ascend910B3", table={"generation": "A5"})
    assert kind == "ConfigError"
    assert "is A5, and the device is Ascend910B3" in text


def test_a_probe_without_a_chip(answers: Answers) -> None:
    assert answers("no chip", what="probe") == [False, "", "torch_npu sees no device"]


def test_the_device_beside_the_emulator(answers: Answers) -> None:
    """Their operators have the same names."""
    kind, _, text = answers("Ascend910B3", what="load beside the emulator")
    assert kind == "BackendUnusableError"
    assert text.startswith("the emulator of the Ascend NPU is in use in this process")


def test_the_emulator_is_never_a_substitute() -> None:
    for device in (None, "npu", "npu:0"):
        with pytest.raises(BackendUnusableError):
            vendor.load(device, Options(), 0)


@pytest.mark.parametrize("device", ["cpu", "cuda", "npu:", "npu:x", "Emulated"])
def test_an_unknown_device(device: str) -> None:
    with pytest.raises(ConfigError, match=f"device is '{device}'"):
        vendor.load(device, Options(), 0)


def test_emulated_chips() -> None:
    loaded = vendor.load("emulated", Options(), 0)
    assert (loaded.generation, loaded.emulated, loaded.device) == (
        Generation.A2,
        True,
        torch.device("cpu"),
    )
    for generation in Generation:
        for strict in (False, True):
            options = read_options({"generation": generation.value, "strict": strict})
            chip = vendor.load("emulated", options, 0).torch_npu.chip
            assert (chip.generation, chip.strict) == (generation, strict)


def test_strictness_is_the_emulators() -> None:
    with pytest.raises(ConfigError, match="strict of backend npu_ascend is True"):
        vendor.load("npu", Options(strict=True), 0)


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        ({"generation": "A4"}, "generation is 'A4': input should be 'A2', 'A3' or 'A5'"),
        ({"generatoin": "A2"}, "unknown key 'generatoin', did you mean 'generation'?"),
        ({"x": 1}, "unknown key 'x'"),
        ({"strict": 1}, "strict is 1: input should be a valid boolean"),
        ({"weight_format": "NZ"}, "weight_format is 'NZ'"),
        ({"num_workers": 0}, "num_workers is 0: input should be greater than or equal to 1"),
        ({"num_workers": True}, "num_workers is True"),
        ({"num_workers": 2.0, "y": 1}, "num_workers is 2.0"),
    ],
)
def test_wrong_options(table: dict[str, object], complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_options(table)
    assert caught.value.what.startswith("backend_options.npu_ascend is wrong: ")
    assert complaint in caught.value.what
    assert caught.value.expected == (
        "keys generation, strict, weight_format, num_workers, exchange, triton"
    )


def test_all_wrong_options_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        read_options({"generation": 2, "what": 1})
    assert "generation is 2" in caught.value.what
    assert "unknown key 'what'" in caught.value.what
