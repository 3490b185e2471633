from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.core.checkpoint.conftest import ASSISTANT, BOS, EOS, PAD, USER
from tokenizers import Tokenizer as Backend

from mortise.checkpoint import Tokenizer
from mortise.errors import ModelConfigError, RequestError

if TYPE_CHECKING:
    from pathlib import Path

TEXTS = [
    "",
    " ",
    "def fibonacci(n):\n    return n",
    "größer 中文字 🙂 naïve\r\n\t",
    f"{BOS}{USER}hello{ASSISTANT} there {EOS}",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("add_special_tokens", [True, False])
@pytest.mark.parametrize("extra", [{}, {"add_bos_token": True}, {"add_eos_token": True}], ids=str)
def test_ids_and_text_are_those_of_transformers(
    save: Any, text: str, add_special_tokens: bool, extra: dict[str, bool]
) -> None:
    theirs, directory = save(**extra)
    ours = Tokenizer.load(directory)
    ids = ours.encode(text, add_special_tokens=add_special_tokens)
    assert ids == theirs.encode(text, add_special_tokens=add_special_tokens)
    for skip in (True, False):
        text_of_ids = theirs.decode(ids, skip_special_tokens=skip)
        assert ours.decode(ids, skip_special_tokens=skip) == text_of_ids


def test_special_tokens_are_those_of_transformers(save: Any) -> None:
    theirs, directory = save()
    ours = Tokenizer.load(directory)
    assert ours.bos_token_id == theirs.bos_token_id
    assert ours.eos_token_id == theirs.eos_token_id
    assert ours.pad_token_id == theirs.pad_token_id
    assert ours.special_tokens == theirs.special_tokens_map
    assert ours.vocab_size == len(theirs)


@pytest.mark.parametrize("setting", [None, False, True])
def test_tokenizer_json_outranks_add_bos_token_as_in_transformers(
    bos_backend: Backend, tmp_path: Path, setting: bool | None
) -> None:
    from transformers import PreTrainedTokenizerFast

    bos_backend.save(str(tmp_path / "tokenizer.json"))
    config: dict[str, object] = {"bos_token": BOS, "tokenizer_class": "PreTrainedTokenizerFast"}
    config |= {} if setting is None else {"add_bos_token": setting}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ids = Tokenizer.load(tmp_path).encode("ab")
    assert ids == PreTrainedTokenizerFast.from_pretrained(tmp_path).encode("ab")
    assert ids[0] == 0


def test_special_tokens_as_tables_and_from_the_old_file(backend: Backend, tmp_path: Path) -> None:
    backend.save(str(tmp_path / "tokenizer.json"))
    table = {"__type": "AddedToken", "content": BOS, "lstrip": False, "special": True}
    config = {"bos_token": table, "eos_token": None, "pad_token": PAD}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": "hidden", "unk_token": {"content": EOS}})
    )
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.special_tokens == {"bos_token": BOS, "pad_token": PAD, "unk_token": EOS}
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, None, 2)


def test_the_vocabulary_alone_is_enough(backend: Backend, tmp_path: Path) -> None:
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.decode(tokenizer.encode("größer")) == "größer"
    assert tokenizer.bos_token_id is None


def test_a_length_in_the_file_cuts_no_text_and_pads_none(backend: Backend, tmp_path: Path) -> None:
    own = Backend.from_str(backend.to_str())
    own.enable_truncation(2)
    own.enable_padding(length=50)
    own.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(tmp_path).encode("def fib") == backend.encode("def fib").ids


@settings(
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(text=st.text())
def test_text_survives_the_round_trip(backend: Backend, text: str) -> None:
    tokenizer = Tokenizer(Backend.from_str(backend.to_str()))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_text_that_is_no_unicode(backend: Backend) -> None:
    tokenizer = Tokenizer(Backend.from_str(backend.to_str()))
    with pytest.raises(RequestError) as caught:
        tokenizer.encode("ab\udcff")
    assert str(caught.value).splitlines() == [
        "the text is not valid Unicode: '\\udcff' at character 2",
        "  expected: text that can be written as UTF-8",
        "  remedy: decode the bytes it came from as what they are, or replace that character",
    ]


def load_error(directory: Path) -> list[str]:
    with pytest.raises(ModelConfigError) as caught:
        Tokenizer.load(directory)
    return str(caught.value).splitlines()


def test_no_tokenizer(tmp_path: Path) -> None:
    assert load_error(tmp_path) == [
        "this model has no tokenizer.json",
        f"  looked for: {tmp_path}/tokenizer.json",
        "  expected: tokenizer.json, because text was asked for",
        (
            "  remedy: use token ids instead of text, or add the file: load the tokenizer with"
            " transformers and call save_pretrained(DIRECTORY)"
        ),
    ]


def test_a_tokenizer_of_another_kind_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").touch()
    assert "  found: tokenizer.model, which must be converted first" in load_error(tmp_path)


def test_a_tokenizer_that_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": \n}')
    lines = load_error(tmp_path)
    assert lines[0] == "tokenizer.json is not valid JSON at line 2, column 1: Expecting value"


def test_a_tokenizer_that_is_other_json(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": {}}')
    lines = load_error(tmp_path)
    assert lines[0].startswith("tokenizer.json is JSON, but not a tokenizer: ")
    assert lines[1:] == [
        f"  file: {tmp_path}/tokenizer.json",
        "  expected: a file of the tokenizers library",
        "  remedy: download the file again from where the model was published",
    ]


def test_a_bad_tokenizer_config(backend: Backend, tmp_path: Path) -> None:
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("{]")
    assert load_error(tmp_path)[0].startswith(
        "tokenizer_config.json is not valid JSON at line 1, column 2:"
    )


def test_a_special_token_that_the_vocabulary_lacks(backend: Backend, tmp_path: Path) -> None:
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    assert load_error(tmp_path) == [
        "eos_token is '</s>', which the vocabulary does not hold",
        "  expected: a token of tokenizer.json",
        (
            "  remedy: correct tokenizer_config.json, or download the file again from where the"
            " model was published"
        ),
    ]
