"""Nothing is emulated unless asked for, and two emulated chips do not touch each other."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch

from mortise.errors import ConfigError
from mortise_npu_ascend.emulator import EmulatedNpu, Generation, install
from mortise_npu_ascend.emulator.chip import current_chip

ROWS = torch.tensor([[1.0, -2.0, 0.5, 4.0]], dtype=torch.bfloat16)


def run_child(program: str) -> str:
    """What a fresh interpreter prints; registration holds for a whole process."""
    child = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr
    return child.stdout


def test_importing_registers_nothing() -> None:
    program = (
        "import torch\n"
        "import mortise_npu_ascend.emulator.operators as operators\n"
        "from mortise_npu_ascend.emulator.library import is_registered\n"
        "names = [name for name, _ in operators.OPERATORS]\n"
        "print(len(names) > 10, any(map(is_registered, names)))\n"
        "import mortise_npu_ascend.emulator as emulator\n"
        "emulator.install()\n"
        "print(all(map(is_registered, names)))\n"
    )
    assert run_child(program).splitlines() == ["True False", "True"]


REFUSED = """
import sys, types
import torch
{before}
from mortise.errors import BackendUnusableError
import mortise_npu_ascend.emulator as emulator
try:
    emulator.install()
except BackendUnusableError as error:
    print(error)
print("npu_swiglu:", emulator.library.is_registered("npu_swiglu"))
"""


@pytest.mark.parametrize(
    ("before", "found"),
    [
        ("sys.modules['torch_npu'] = types.ModuleType('torch_npu')", "torch_npu is loaded"),
        (
            "torch.library.define('npu::npu_swiglu', '(Tensor input, int dim=-1) -> Tensor')",
            "torch.ops.npu holds npu_swiglu",
        ),
    ],
)
def test_the_real_library_is_never_shadowed(before: str, found: str) -> None:
    lines = run_child(REFUSED.format(before=before)).splitlines()
    assert lines[0] == (
        f"the emulator of the Ascend NPU cannot be installed: {found} in this process"
    )
    assert lines[-2].startswith("  remedy: ")
    assert lines[-1] == "npu_swiglu: False"


def test_the_real_library_that_comes_later_is_not_shadowed_either() -> None:
    """A second ``install`` looks again, although the operators are there already."""
    program = REFUSED.format(
        before=(
            "import mortise_npu_ascend.emulator as emulator\n"
            "emulator.install()\n"
            "sys.modules['torch_npu'] = types.ModuleType('torch_npu')"
        )
    )
    assert "torch_npu is loaded" in run_child(program)


def test_an_unknown_generation_is_an_error_of_the_configuration() -> None:
    with pytest.raises(ConfigError) as caught:
        install("A4")
    assert str(caught.value).splitlines() == [
        "no generation of the Ascend NPU is called 'A4'",
        "  expected: one of A2, A3, A5",
    ]


def test_operators_called_without_a_chip_raise() -> None:
    install()
    with pytest.raises(RuntimeError, match="without an emulated chip"):
        torch.ops.npu.npu_swiglu(ROWS)


def test_inside_active_they_act_as_the_chip() -> None:
    npu = install("A3")
    with npu.active() as chip:
        assert current_chip() is chip is npu.chip
        assert torch.equal(torch.ops.npu.npu_swiglu(ROWS), npu.npu_swiglu(ROWS))
    with pytest.raises(RuntimeError, match="without an emulated chip"):
        current_chip()


def test_the_chip_is_left_after_a_refusal() -> None:
    npu = install("A5")
    with pytest.raises(RuntimeError, match="emulated Ascend A5"):
        npu.npu_swiglu(ROWS[:, :3])
    with pytest.raises(RuntimeError, match="without an emulated chip"):
        current_chip()


def test_installing_again_gives_another_chip_and_the_same_operators() -> None:
    first, second = install("A2"), install(Generation.A5, strict=True)
    assert (first.chip.generation, first.chip.strict) == (Generation.A2, False)
    assert (second.chip.generation, second.chip.strict) == (Generation.A5, True)
    assert repr(first) == "<torch_npu as an emulated Ascend A2>"
    assert repr(second) == "<torch_npu as an emulated Ascend A5, strict>"
    second.config.allow_internal_format = True
    assert install("A5").config.allow_internal_format is False


def test_two_chips_in_two_threads_do_not_touch_each_other() -> None:
    """``pertensor`` exists on A5 only, so each thread knows its chip by the answer."""
    meeting = threading.Barrier(2)
    outcomes: dict[Generation, set[bool]] = {Generation.A2: set(), Generation.A5: set()}

    def ask(npu: EmulatedNpu) -> None:
        for _ in range(50):
            meeting.wait()
            try:
                npu.npu_dynamic_quant(ROWS, quant_mode="pertensor")
                outcomes[npu.chip.generation].add(True)
            except RuntimeError as refusal:
                outcomes[npu.chip.generation].add("only support socVersion Asc" not in str(refusal))

    threads = [threading.Thread(target=ask, args=(install(name),)) for name in outcomes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == {Generation.A2: {False}, Generation.A5: {True}}


@pytest.mark.parametrize(
    ("generation", "soc"), [("A2", "Ascend910B"), ("A3", "Ascend910_93"), ("A5", "Ascend950")]
)
def test_the_device_says_that_it_is_emulated(generation: str, soc: str) -> None:
    npu = install(generation)
    assert npu.npu.get_device_name() == f"{soc} (emulated)"
    assert npu.emulated
    assert (npu.npu.current_device(), npu.npu.device_count()) == (0, 1)
    assert npu.npu.is_available() is False


def test_what_is_not_emulated_is_no_attribute() -> None:
    npu = install()
    assert not hasattr(npu, "npu_fusion_attention")
    with pytest.raises(AttributeError, match="'npu_moe_update_expert': it is not emulated"):
        npu.npu_moe_update_expert  # noqa: B018 - asking is the test
