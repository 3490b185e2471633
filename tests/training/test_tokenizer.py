import inspect
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from training import corpus, tokenizer

VOCAB_SIZE = 400


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return tokenizer.train([inspect.getsource(corpus), inspect.getsource(tokenizer)], VOCAB_SIZE)


def test_it_has_the_size_asked_for_and_the_special_tokens_first(trained: Tokenizer) -> None:
    assert trained.get_vocab_size() == VOCAB_SIZE
    specials = [trained.token_to_id(t) for t in (tokenizer.BOS, tokenizer.EOS, tokenizer.PAD)]
    assert specials == [0, 1, 2]


@settings(deadline=None)
@given(text=st.text(st.characters(exclude_categories=("Cs",))))
def test_every_text_survives_the_round_trip(trained: Tokenizer, text: str) -> None:
    ids = trained.encode(text, add_special_tokens=False).ids
    assert trained.decode(ids, skip_special_tokens=False) == text


def test_the_post_processor_adds_the_beginning(trained: Tokenizer) -> None:
    with_bos = trained.encode("def f():\n    return 1\n").ids
    without = trained.encode("def f():\n    return 1\n", add_special_tokens=False).ids
    assert with_bos == [tokenizer.BOS_ID, *without]


def test_too_little_text_is_an_error() -> None:
    with pytest.raises(ValueError, match="not 4096"):
        tokenizer.train(["def f(): pass"])


def test_transformers_reads_it(trained: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer.save(trained, tmp_path, model_max_length=64)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "def f():\n\treturn 'é'\r\n"
    assert loaded(text).input_ids == trained.encode(text).ids
    assert loaded.decode(loaded(text).input_ids, skip_special_tokens=True) == text
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (0, 1, 2)
    assert "chat_template" not in json.loads((tmp_path / "tokenizer_config.json").read_text())
