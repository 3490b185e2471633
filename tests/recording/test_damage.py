"""A recording that is damaged, foreign or of another version is one clear error."""

from __future__ import annotations

import hashlib
import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from mortise.errors import RecordingError
from mortise.recording.reader import Recording
from tests.fixtures.recorded_runs import recorded, replayed

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def sound(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recorded(tiny_model, tmp_path_factory.mktemp("sound") / "recording", max_tokens=1).path


@pytest.fixture
def copy(sound: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sound, tmp_path / "copy")


def refusal(path: Path) -> RecordingError:
    with pytest.raises(RecordingError) as caught:
        Recording.open(path)
    assert caught.value.expected
    assert caught.value.remedy
    return caught.value


def names(path: Path) -> list[str]:
    return sorted(json.loads((path / "recording.json").read_text())["files"])


def header_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "recording.json").read_text())
    return found


def write_header(path: Path, header: dict[str, Any]) -> None:
    (path / "recording.json").write_text(json.dumps(header))


def rewrite_calls(path: Path, text: str) -> None:
    """As somebody does who knows the format."""
    data = text.encode()
    (path / "calls.jsonl").write_bytes(data)
    header = header_of(path)
    facts = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    header["files"]["calls.jsonl"] = facts
    write_header(path, header)


@pytest.mark.parametrize("which", [0, 1])
def test_a_missing_file(copy: Path, which: int) -> None:
    name = names(copy)[which]
    (copy / name).unlink()
    assert f"{name} is missing" in str(refusal(copy))


@pytest.mark.parametrize("which", [0, 1])
def test_a_truncated_file(copy: Path, which: int) -> None:
    file = copy / names(copy)[which]
    file.write_bytes(file.read_bytes()[:-1])
    assert f"{file.name} has" in str(refusal(copy))


@pytest.mark.parametrize("which", [0, 1])
def test_one_other_bit(copy: Path, which: int) -> None:
    file = copy / names(copy)[which]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert f"{file.name} was changed" in str(refusal(copy))


@pytest.mark.parametrize("length", [0, 1, 50, 300])
def test_a_truncated_header(copy: Path, length: int) -> None:
    file = copy / "recording.json"
    file.write_bytes(file.read_bytes()[:length])
    assert "recording.json" in refusal(copy).what


def test_what_is_no_recording(tiny_model: Path, tmp_path: Path) -> None:
    assert "is no recording" in refusal(tiny_model).what
    assert "is no recording" in refusal(tmp_path / "nowhere").what
    (tmp_path / "recording.json").write_text('{"format": "of somebody else"}')
    assert "is not what `mortise record` writes" in refusal(tmp_path).what


def test_another_version(copy: Path) -> None:
    write_header(copy, header_of(copy) | {"schema": 99, "and": "what that brings"})
    error = refusal(copy)
    assert "version 99" in error.what
    assert error.expected == "version 1"


def test_another_format(copy: Path) -> None:
    write_header(copy, header_of(copy) | {"format": "of somebody else"})
    assert "of somebody else" in refusal(copy).what


def test_a_path_out_of_the_directory(copy: Path) -> None:
    header = header_of(copy)
    header["files"]["../copy/calls.jsonl"] = header["files"]["calls.jsonl"]
    write_header(copy, header)
    assert "is missing" in str(refusal(copy))


def test_lines_that_are_no_calls(copy: Path) -> None:
    rewrite_calls(copy, '{"number": 1}\n')
    assert "damaged" in refusal(copy).what


@pytest.mark.parametrize(
    "change",
    [
        ('"tensor":"t1"', '"tensor":"t999"'),
        ('"record":"DispatchFormat"', '"record":"os.system"'),
        ('"enum":"DispatchDtype","value":"bf16"', '"enum":"DispatchDtype","value":"fp64"'),
        ('"dtype":"bfloat16"}', '"dtype":"complex64"}'),
    ],
)
def test_values_that_nobody_writes(copy: Path, change: tuple[str, str]) -> None:
    """They are found when they are read: as an error of the recording, not of a backend."""
    text = (copy / "calls.jsonl").read_text()
    assert change[0] in text
    rewrite_calls(copy, text.replace(*change))
    with pytest.raises(RecordingError):
        replayed(Recording.open(copy))


def test_a_call_that_is_not_there(copy: Path) -> None:
    recording = Recording.open(copy)
    with pytest.raises(RecordingError, match="call 9999 is not in the recording"):
        recording.call(9999)
