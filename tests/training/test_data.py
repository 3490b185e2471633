import numpy as np
import pytest
import torch
from training.data import Batches, pack
from training.tokenizer import BOS_ID, EOS_ID, train


def stream(length: int) -> np.ndarray:
    return np.arange(length, dtype=np.uint16)


def test_documents_are_packed_between_bos_and_eos() -> None:
    tokenizer = train(["ab abc abcd"], vocab_size=260)
    packed = pack([("a", "ab"), ("b", "é")], tokenizer)
    assert packed.documents == 2
    assert packed.text_bytes == 4
    assert packed.tokens_N.dtype == np.uint16
    assert np.count_nonzero(packed.tokens_N == BOS_ID) == 2
    texts = tokenizer.decode(packed.tokens_N.tolist(), skip_special_tokens=True)
    assert sorted(texts) == sorted("abé")
    assert packed.tokens_N[0] == BOS_ID
    assert packed.tokens_N[-1] == EOS_ID


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    batches = [Batches(stream(1000), 16, 4, seed=7) for _ in range(2)]
    in_order = [batches[0].batch(step) for step in range(40)]
    assert torch.equal(batches[1].batch(33), in_order[33])
    other = Batches(stream(1000), 16, 4, seed=8)
    assert not torch.equal(other.batch(0), in_order[0])


def test_windows_hold_two_tokens_more_than_inputs() -> None:
    windows = Batches(stream(1000), 16, 4, seed=7).batch(0)
    assert windows.shape == (4, 18)
    assert windows.dtype == torch.int64
    assert torch.equal(windows, windows[:, :1] + torch.arange(18))


def test_an_epoch_visits_every_window_once() -> None:
    batches = Batches(stream(1000), 16, 1, seed=7)
    num_windows = (1000 - 2) // 16 - 1
    starts = [batches.start(index) for index in range(num_windows)]
    phase = min(starts)
    assert sorted(starts) == [phase + 16 * n for n in range(num_windows)]
    second = [batches.start(index) for index in range(num_windows, 2 * num_windows)]
    assert second != starts


def test_too_short_a_stream_is_an_error() -> None:
    with pytest.raises(ValueError, match="20 tokens"):
        Batches(stream(20), 16, 1, seed=0)
