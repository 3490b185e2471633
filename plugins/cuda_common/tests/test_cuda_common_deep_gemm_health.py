"""What is said where DeepGEMM is missing or broken: root cause first, remedy last."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
from packaging.version import Version
from plugins.cuda_common.tests.deep_gemm_cases import BLACKWELL, HOPPER

from mortise.plugin import BackendUnusableError, ReasonCode
from mortise_cuda_common.environment import VendorEnvironment, read_environment
from mortise_cuda_common.libraries.deep_gemm_health import (
    failure_of_import,
    look,
    toolkit_folder,
)

if TYPE_CHECKING:
    from pathlib import Path

# Imports "deep_gemm" from each folder in turn, as if it were installed there.
PROGRAM = """
import importlib, json, sys
from mortise.plugin import MortiseError
from mortise_cuda_common.libraries.deep_gemm import DeepGEMM, require_installed

def answers(function):
    try:
        return [function()]
    except MortiseError as error:
        return [type(error).__name__, getattr(error, "reason", None), str(error)]

found = []
for folder in json.load(sys.stdin):
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    found.append([answers(require_installed), answers(DeepGEMM.imported_version)])
    sys.path.remove(folder)
    for name in [name for name in sys.modules if name.split(".")[0] == "deep_gemm"]:
        del sys.modules[name]
print(json.dumps(found))
"""

SYMBOL = "_ZN3c1010ValueErrorC1ENS_14SourceLocationENSt7__cxx1112basic_stringE"
UNDEFINED = f"/x/deep_gemm/_C.so: undefined symbol: {SYMBOL}"


@dataclass(frozen=True)
class Library:
    """A library called deep_gemm, with the metadata of a distribution."""

    source: str
    version: str = "0.1.5.post1"
    distribution: str = "sgl-deep-gemm"

    def install(self, folder: Path) -> None:
        name = self.distribution.replace("-", "_")
        metadata = folder / f"{name}-{self.version}.dist-info"
        metadata.mkdir(parents=True)
        written = f"Metadata-Version: 2.1\nName: {self.distribution}\nVersion: {self.version}\n"
        (metadata / "METADATA").write_text(written)
        (metadata / "top_level.txt").write_text("deep_gemm\n")
        (folder / "deep_gemm").mkdir()
        (folder / "deep_gemm" / "__init__.py").write_text(self.source)


LIBRARIES: dict[str, Library | None] = {
    "none": None,
    "good": Library("__version__ = '0.1.5.post1'"),
    "upstream": Library("__version__ = '2.6.1'", "2.6.1", "deep-gemm"),
    "no version": Library(""),
    "symbol": Library(f"raise OSError({UNDEFINED!r})"),
    "symbol, wrapped": Library(
        f"""
try:
    raise ImportError({UNDEFINED!r})
except ImportError as error:
    raise RuntimeError('cannot load the library') from error
"""
    ),
    "library": Library("raise OSError('libcudart.so.13: cannot open shared object file: No')"),
    "no toolkit": Library("cuda_home = None\nassert cuda_home is not None"),
    "dependency": Library("import tvm_ffi_that_nobody_has"),
    "driver": Library("raise RuntimeError('CUDA driver error: 35 (insufficient driver)')"),
    "newer": Library("raise SystemError('imported')", "0.2.5"),
}


@pytest.fixture(scope="module")
def toolkit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cuda")
    (folder / "bin").mkdir()
    (folder / "bin" / "nvcc").touch(mode=0o755)
    return folder


@pytest.fixture(scope="module")
def answers(toolkit: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By library: what the doctor says, and what an import does."""
    folder = tmp_path_factory.mktemp("libraries")
    for name, library in LIBRARIES.items():
        (folder / name).mkdir()
        if library is not None:
            library.install(folder / name)
    child = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps([str(folder / name) for name in LIBRARIES]),
        env={"CUDA_HOME": str(toolkit), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    return dict(zip(LIBRARIES, json.loads(child.stdout.splitlines()[-1]), strict=True))


def test_a_library_that_is_there(answers: dict[str, Any], toolkit: Path) -> None:
    (looked,), (imported,) = answers["good"]
    assert looked == (
        f"sgl-deep-gemm 0.1.5.post1, which compiles its kernels with the CUDA toolkit at {toolkit}"
    )
    assert imported == "0.1.5.post1"
    assert answers["no version"][1] == ["unknown"]
    assert answers["upstream"][0][0].startswith("deep-gemm 2.6.1, ")


def test_the_library_is_missing(answers: dict[str, Any]) -> None:
    for kind, reason, text in answers["none"]:
        assert (kind, reason) == ("BackendUnusableError", ReasonCode.IMPORT_FAILED)
        first, *_, last = text.splitlines()
        assert first == "deep_gemm is not installed"
        assert 'pip install "sgl-deep-gemm==0.1.5.post1"' in last
        assert '"triton"' in last


@pytest.mark.parametrize(
    ("library", "first", "middle", "last"),
    [
        ("symbol", f"OSError: {UNDEFINED}", f"{SYMBOL} is not in torch", "pip install"),
        ("symbol, wrapped", f"ImportError: {UNDEFINED}", "built for another", "pip install"),
        ("library", "OSError: libcudart.so.13: cannot open", "for CUDA", "brings libcudart.so.13"),
        ("no toolkit", "AssertionError", "a CUDA toolkit", "set CUDA_HOME to its folder"),
        (
            "dependency",
            "ModuleNotFoundError: No module named 'tvm_ffi_that_nobody_has'",
            "while importing sgl-deep-gemm 0.1.5.post1",
            "pip install",
        ),
        ("driver", "RuntimeError: CUDA driver error: 35", "while importing", "check the driver"),
    ],
)
def test_the_library_cannot_be_imported(
    answers: dict[str, Any], library: str, first: str, middle: str, last: str
) -> None:
    looked, (kind, reason, text) = answers[library]
    assert looked[0].startswith("sgl-deep-gemm 0.1.5.post1"), "that is not seen from outside"
    assert (kind, reason) == ("BackendUnusableError", ReasonCode.IMPORT_FAILED)
    lines = text.splitlines()
    assert lines[0].startswith(first)
    assert middle in " ".join(lines[1:-1])
    assert last in lines[-1]
    assert "remedy" in lines[-1]


@pytest.mark.skipif(
    Version(torch.__version__) >= Version("2.14"), reason="this torch is what the wheel is for"
)
def test_a_wheel_for_a_newer_torch_is_told_before_it_is_imported(answers: dict[str, Any]) -> None:
    for kind, _, text in answers["newer"]:
        assert kind == "BackendUnusableError"
        assert text.startswith("sgl-deep-gemm 0.2.5 is installed beside torch")
        assert "torch 2.14 or later" in text


def test_an_error_without_text_is_called_by_its_name() -> None:
    assert failure_of_import(AssertionError()).what == "AssertionError"


# ---- the CUDA toolkit


def refusal(environment: VendorEnvironment, **chip: Any) -> BackendUnusableError:
    with pytest.raises(BackendUnusableError) as caught:
        look(environment=environment, **chip)
    return caught.value


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that is there, to come as far as the toolkit."""
    good = LIBRARIES["good"]
    assert good is not None
    good.install(tmp_path / "library")
    monkeypatch.syspath_prepend(tmp_path / "library")


def test_where_the_toolkit_is_looked_for(toolkit: Path) -> None:
    home, path = str(toolkit), str(toolkit / "bin")
    assert toolkit_folder(VendorEnvironment(cuda_home=home, cuda_path="/elsewhere")) == toolkit
    assert toolkit_folder(VendorEnvironment(cuda_path=home)) == toolkit
    assert toolkit_folder(VendorEnvironment(search_path=f"/nowhere:{path}")) == toolkit


@pytest.mark.usefixtures("installed")
def test_no_toolkit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(
        "mortise_cuda_common.libraries.deep_gemm_health.USUAL_TOOLKIT", tmp_path / "none"
    )
    error = refusal(VendorEnvironment())
    assert error.what == "there is no CUDA toolkit, and deep_gemm compiles its kernels with one"
    assert "CUDA_HOME is not set" in error.details[0]
    assert "install CUDA 13.0 with nvcc" in (error.remedy or "")


@pytest.mark.usefixtures("installed")
def test_a_toolkit_without_a_compiler(tmp_path: Path) -> None:
    environment = VendorEnvironment(cuda_home=str(tmp_path))
    assert refusal(environment).what == f"the CUDA toolkit at {tmp_path} has no bin/nvcc"
    without = VendorEnvironment(cuda_home=str(tmp_path), use_nvrtc="1")
    assert look(environment=without).toolkit == tmp_path


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("version", "chip", "fits"),
    [
        ("12.1.0", HOPPER, False),
        ("12.3.0", HOPPER, True),
        ("12.8.1", BLACKWELL, False),
        ("13.0.2", BLACKWELL, True),
        ("nobody knows", BLACKWELL, True),
    ],
)
def test_the_version_of_the_toolkit(tmp_path: Path, version: str, chip: Any, fits: bool) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch()
    (tmp_path / "version.json").write_text(json.dumps({"cuda": {"version": version}}))
    environment = VendorEnvironment(cuda_home=str(tmp_path))
    if fits:
        assert look(chip, environment).toolkit == tmp_path
    else:
        error = refusal(environment, chip=chip)
        assert error.what == f"the CUDA toolkit at {tmp_path} is {version}"
        assert "or later" in (error.expected or "")


def test_variables_are_read_as_the_library_reads_them() -> None:
    read = read_environment({"CUDA_HOME": " ", "CUDA_PATH": "/c", "DG_JIT_USE_NVRTC": "0"})
    assert (read.cuda_home, read.cuda_path, read.compiles_without_nvcc) == (None, "/c", False)
    assert read_environment({"DG_JIT_USE_NVRTC": "1"}).compiles_without_nvcc
