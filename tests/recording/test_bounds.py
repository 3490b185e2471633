"""A recording keeps to its size and sample, and says what it left out."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from mortise import EngineConfig
from mortise.config import ResolvedConfig
from mortise.errors import RecordingError
from mortise.recording.codec import DTYPES, encode
from mortise.recording.documents import FORMAT, SCHEMA, Header
from mortise.recording.outcome import Verdict
from mortise.recording.reader import Recording
from mortise.recording.sampling import Sampling, bytes_of
from mortise.recording.session import record
from mortise.recording.writer import RecordingWriter
from tests.fixtures.recorded_runs import recorded, replayed

if TYPE_CHECKING:
    from pathlib import Path


HEADER = Header(
    format=FORMAT,
    schema=SCHEMA,
    mortise="0",
    model="",
    dtype="bfloat16",
    threads=1,
    backends={},
    sample="everything",
    max_bytes=10**6,
    tensor_bytes=0,
    num_calls=0,
    left_out=[],
    files={},
)


@pytest.fixture(scope="module")
def whole(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Recording:
    return recorded(tiny_model, tmp_path_factory.mktemp("whole") / "recording", max_tokens=5)


def stored_bytes(recording: Recording) -> int:
    """Bytes of tensors in its files, read by the library that wrote them."""
    total = 0
    for path in recording.path.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            total += sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    return total


def require_accounted(part: Recording, whole: Recording) -> None:
    """Every call of the run was kept, or is counted among those left out."""
    assert part.header.num_calls == whole.header.num_calls
    kept = Counter((call.hook, call.layer) for call in part.calls)
    left_out = Counter()
    for one in part.header.left_out:
        left_out[one.hook, one.layer] += one.calls
    assert kept + left_out == Counter((call.hook, call.layer) for call in whole.calls)
    numbers = {call.number: call for call in whole.calls}
    assert all(numbers[call.number].hook == call.hook for call in part.calls)


def test_a_recording_says_its_size(whole: Recording) -> None:
    assert whole.header.tensor_bytes == stored_bytes(whole)
    assert not whole.header.left_out


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.95])
def test_the_size_is_kept(tiny_model: Path, tmp_path: Path, whole: Recording, share: float) -> None:
    limit = max(int(share * whole.header.tensor_bytes), 1)
    part = recorded(tiny_model, tmp_path / "recording", max_tokens=5, max_bytes=limit)
    assert part.header.tensor_bytes == stored_bytes(part) <= limit
    assert {one.reason for one in part.header.left_out} == {"max_bytes"}
    require_accounted(part, whole)
    report = replayed(part)
    assert {one.verdict for one in report.outcomes} <= {Verdict.SAME, Verdict.NOT_COMPARED}


def test_passes_are_sampled(tiny_model: Path, tmp_path: Path, whole: Recording) -> None:
    part = recorded(tiny_model, tmp_path / "recording", max_tokens=5, sample=["every:2", "first:4"])
    assert {call.forward_pass for call in whole.calls} == {0, 1, 2, 3, 4, 5}
    assert {call.forward_pass for call in part.calls} == {0, 1, 3}
    assert part.header.sample == "every:2 first:4"
    require_accounted(part, whole)
    assert replayed(part).is_clean


def test_layers_are_sampled(tiny_model: Path, tmp_path: Path, whole: Recording) -> None:
    part = recorded(tiny_model, tmp_path / "recording", max_tokens=5, sample=["layers:*.2.mlp"])
    assert {call.layer for call in part.calls} == {"model.layers.2.mlp", ""}
    assert part.header.tensor_bytes < whole.header.tensor_bytes / 1.5
    require_accounted(part, whole)
    assert replayed(part).is_clean


@given(every=st.integers(1, 5), first=st.integers(1, 9), number=st.integers(1, 12))
def test_the_first_pass_is_always_kept(every: int, first: int, number: int) -> None:
    sampling = Sampling.parse([f"every:{every}", f"first:{first}"])
    kept = [one for one in range(1, number + 1) if sampling.has_pass(one)]
    assert kept == list(range(1, min(first, number) + 1, every))
    assert sampling.has_pass(0)


@pytest.mark.parametrize("text", ["every:0", "every:x", "first:", "layers:", "some", "every:-1"])
def test_a_wrong_sample_is_refused(text: str) -> None:
    with pytest.raises(RecordingError, match="--sample") as caught:
        Sampling.parse([text])
    assert text in caught.value.what


@pytest.mark.parametrize(
    ("text", "number"), [("1500", 1500), ("64MB", 64_000_000), ("2 GiB", 2**31), ("0.5KiB", 512)]
)
def test_sizes_are_read(text: str, number: int) -> None:
    assert bytes_of(text) == number


@pytest.mark.parametrize("text", ["", "0", "-5", "5 parsecs", "GiB", "1e3"])
def test_a_wrong_size_is_refused(text: str) -> None:
    with pytest.raises(RecordingError, match="--max-bytes"):
        bytes_of(text)


def test_a_run_that_fails_leaves_nothing(tiny_model: Path, tmp_path: Path) -> None:
    def fail(_: object) -> None:
        raise KeyboardInterrupt

    resolved = ResolvedConfig.of(EngineConfig(model=str(tiny_model), cache={"max_num_tokens": 256}))
    with pytest.raises(KeyboardInterrupt):
        record(resolved, tmp_path / "recording", fail)
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_not_overwritten(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("kept")
    resolved = ResolvedConfig.of(EngineConfig(model=str(tiny_model)))
    with pytest.raises(RecordingError, match="there already"):
        record(resolved, tmp_path / "mine", lambda _llm: None)
    assert (tmp_path / "mine").read_text() == "kept"


def test_tensors_are_spread_over_shards(tmp_path: Path) -> None:
    """No tensor is cut, every one is found again, and equal ones are one."""
    writer = RecordingWriter(tmp_path / "recording", max_bytes=10**6, shard_bytes=1000)
    tensors = [torch.full((n, 10), float(n), dtype=torch.bfloat16) for n in (10, 40, 70, 0, 5)]
    names = [writer.keep(tensor) for tensor in (*tensors, tensors[1].clone())]
    assert names[5] == names[1]
    assert len(set(names)) == 5
    writer.finish(HEADER)
    files = sorted(path.name for path in (tmp_path / "recording").glob("*.safetensors"))
    assert files == [f"tensors-0000{number}.safetensors" for number in (1, 2, 3)]
    found = Recording.open(tmp_path / "recording")
    for name, tensor in zip(names, tensors, strict=False):
        assert torch.equal(found.tensor(name), tensor)


def test_bits_of_every_dtype_come_back(tmp_path: Path) -> None:
    writer = RecordingWriter(tmp_path / "recording", max_bytes=10**6)
    octets = torch.arange(256, dtype=torch.uint8).view(-1, 16)
    tensors = [octets.view(dtype) for dtype in DTYPES.values() if dtype is not torch.bool]
    encoded = [encode(tensor, writer.keep) for tensor in tensors]
    writer.finish(HEADER)
    found = Recording.open(tmp_path / "recording")
    for value, tensor in zip(encoded, tensors, strict=True):
        back = found.value(value)
        assert back.dtype is tensor.dtype
        assert torch.equal(back.view(torch.uint8), octets)
