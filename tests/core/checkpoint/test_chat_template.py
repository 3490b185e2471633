from __future__ import annotations

import json
from datetime import datetime
from typing import TYPE_CHECKING, Any

import pytest
from tests.core.checkpoint.conftest import ASSISTANT, BOS, EOS, USER

from mortise.checkpoint import Tokenizer
from mortise.errors import ModelConfigError, MortiseError, RequestError

if TYPE_CHECKING:
    from pathlib import Path

    from tokenizers import Tokenizer as Backend

CONVERSATIONS = [
    [{"role": "user", "content": "Hi"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "größer <b>&</b> 🙂"},
        {"role": "assistant", "content": "<think>hm</think>yes"},
        {"role": "tool", "content": {"a": ["<", "é"]}},
        {"role": "user", "content": "line one\nline two\n"},
    ],
]
HELPERS = """\
{%- for message in messages %}
{%- if loop.index0 == 1 %}{% break %}{% endif %}
{% generation %}{{ message | tojson(indent=2) }}{% endgeneration %}
{%- endfor %}
{{ {'b': 1, 'a': '<é>'} | tojson(sort_keys=true, separators=(',', ':')) }}
{{ strftime_now('%Y') }} {{ tools is none }} {{ documents is none }} {{ extra }}
    {# a comment #}
{{ dict(a=1) }} {{ messages | length }}
"""


@pytest.mark.parametrize("messages", CONVERSATIONS, ids=["one turn", "many turns"])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_text_and_ids_are_those_of_transformers(
    save: Any, messages: list[dict[str, Any]], add_generation_prompt: bool
) -> None:
    theirs, directory = save()
    ours = Tokenizer.load(directory)
    text = ours.apply_chat_template(messages, add_generation_prompt=add_generation_prompt)
    arguments = {"add_generation_prompt": add_generation_prompt}
    assert text == theirs.apply_chat_template(messages, tokenize=False, **arguments)
    ids = theirs.apply_chat_template(messages, tokenize=True, return_dict=False, **arguments)
    assert ours.encode(text, add_special_tokens=False) == ids


def test_the_template_says_what_it_should(save: Any) -> None:
    _, directory = save()
    text = Tokenizer.load(directory).apply_chat_template(CONVERSATIONS[1])
    assert text == (
        f"{BOS}Be brief.\n\nBe kind.{USER}größer <b>&</b> 🙂{ASSISTANT}yes{EOS}"
        f'<tool>{{"a": ["<", "é"]}}</tool>{USER}line one\nline two\n{ASSISTANT}'
    )


def test_every_helper_gives_what_it_gives_in_transformers(save: Any) -> None:
    theirs, directory = save(HELPERS)
    messages = CONVERSATIONS[1]
    text = Tokenizer.load(directory).apply_chat_template(messages, extra=[1, "x"])
    assert text == theirs.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, extra=[1, "x"]
    )
    assert str(datetime.now().year) in text


def put(directory: Path, backend: Backend, template: object, **files: str) -> Tokenizer:
    directory.mkdir(exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    config = {"bos_token": {"content": BOS}, "chat_template": template}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    for name, text in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(text)
    return Tokenizer.load(directory)


HELLO = [{"role": "user", "content": "hello"}]


def test_a_template_in_the_configuration(backend: Backend, tmp_path: Path) -> None:
    tokenizer = put(tmp_path, backend, "{{ bos_token }}{{ messages[0].content }}")
    assert tokenizer.apply_chat_template(HELLO) == f"{BOS}hello"
    assert tokenizer.apply_chat_template([*HELLO, *HELLO]) == f"{BOS}hello"


def test_named_templates_in_the_configuration(backend: Backend, tmp_path: Path) -> None:
    tokenizer = put(
        tmp_path,
        backend,
        [
            {"name": "default", "template": "D{{ tools }}"},
            {"name": "tool_use", "template": "T{{ tools }}"},
            {"name": "rag", "template": "R"},
        ],
    )
    assert tokenizer.apply_chat_template(HELLO) == "DNone"
    assert tokenizer.apply_chat_template(HELLO, tools=[1]) == "T[1]"
    assert tokenizer.apply_chat_template(HELLO, tools=[1], template="default") == "D[1]"
    assert tokenizer.apply_chat_template(HELLO, template="rag") == "R"


def test_a_file_outranks_the_configuration(backend: Backend, tmp_path: Path) -> None:
    tokenizer = put(tmp_path, backend, "configured", **{"chat_template.jinja": "from the file"})
    assert tokenizer.apply_chat_template(HELLO) == "from the file"


def test_named_files_as_transformers_writes_them(save: Any) -> None:
    theirs, directory = save({"default": "D", "rag": "R{{ messages | length }}"})
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.chat_templates == theirs.chat_template
    assert tokenizer.apply_chat_template(HELLO) == "D"
    assert tokenizer.apply_chat_template(HELLO, template="rag") == "R1"


def error_of(
    kind: type[MortiseError], tokenizer: Tokenizer, *messages: Any, **more: Any
) -> list[str]:
    with pytest.raises(kind) as caught:
        tokenizer.apply_chat_template(list(messages), **more)
    assert type(caught.value) is kind
    return str(caught.value).splitlines()


def test_no_template(backend: Backend, tmp_path: Path) -> None:
    assert error_of(ModelConfigError, put(tmp_path, backend, None), *HELLO) == [
        "this model has no chat template",
        "  expected: chat_template.jinja, or chat_template in tokenizer_config.json",
        "  remedy: give a plain prompt instead of messages",
    ]


def test_no_template_of_that_name(backend: Backend, tmp_path: Path) -> None:
    tokenizer = put(tmp_path, backend, [{"name": "rag", "template": ""}])
    assert error_of(ModelConfigError, tokenizer, *HELLO) == [
        "this model has no chat template named 'default'",
        "  expected: one of rag",
        "  remedy: name one of them",
    ]


@pytest.mark.parametrize("entry", [3, [1], [{"name": "x"}], {"default": "x"}])
def test_a_template_that_is_no_text(backend: Backend, tmp_path: Path, entry: object) -> None:
    with pytest.raises(ModelConfigError) as caught:
        put(tmp_path, backend, entry)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("chat_template in tokenizer_config.json is a ")
    assert lines[1] == '  expected: a text, or a list of {"name": ..., "template": ...}'


def test_a_template_that_cannot_be_parsed(backend: Backend, tmp_path: Path) -> None:
    tokenizer = put(tmp_path, backend, "\n{% if %}")
    lines = error_of(ModelConfigError, tokenizer, *HELLO)
    assert lines[0].startswith("the chat template cannot be parsed: line 2: ")
    assert lines[1] == "  expected: a Jinja template"


def test_a_template_that_refuses_the_messages(save: Any) -> None:
    tokenizer = Tokenizer.load(save()[1])
    assert error_of(RequestError, tokenizer, {"role": "judge", "content": ""}) == [
        "the model's chat template refuses the messages: unknown role judge",
        "  expected: messages as this model was trained on",
        "  remedy: change the roles or their order",
    ]


@pytest.mark.parametrize("message", [{"role": "user"}, {"role": "user", "content": 3}, {}])
def test_messages_that_the_template_fails_on(save: Any, message: dict[str, Any]) -> None:
    lines = error_of(RequestError, Tokenizer.load(save()[1]), message)
    assert lines[0].startswith("the model's chat template fails on the messages: ")
    assert lines[1] == '  expected: messages such as {"role": "user", "content": "text"}'


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now.__globals__['json'] }}",
        "{{ self.__init__.__globals__ }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(
    backend: Backend, tmp_path: Path, template: str
) -> None:
    with pytest.raises(MortiseError) as caught:
        put(tmp_path, backend, template).apply_chat_template(HELLO)
    assert "does what a template must not do" in str(caught.value)
    assert "remedy: do not trust this model directory" in str(caught.value)


def test_rendering_does_not_change_the_messages(backend: Backend, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "x"}]
    with pytest.raises(MortiseError):
        put(tmp_path, backend, "{{ messages[0].update(a=1) }}").apply_chat_template(messages)
    assert messages == [{"role": "user", "content": "x"}]
