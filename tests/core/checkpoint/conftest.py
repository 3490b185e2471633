"""A small byte-level tokenizer with a chat template, saved by transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

if TYPE_CHECKING:
    from pathlib import Path

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"

# Of the kind DeepSeek publishes: a namespace, a loop, tool calls, trimmed blocks.
TEMPLATE = """\
{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}
{% set ns = namespace(system='', first=true) %}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}
        {%- if ns.first %}
            {%- set ns.system = ns.system + message['content'] %}
            {%- set ns.first = false %}
        {%- else %}
            {%- set ns.system = ns.system + '\\n\\n' + message['content'] %}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{{ bos_token }}{{ ns.system }}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}{% continue %}{% endif %}
    {%- if message['role'] == 'user' %}
        {{- '<｜User｜>' + message['content'] }}
    {%- elif message['role'] == 'assistant' %}
        {%- set content = message['content'] %}
        {%- if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}
        {{- '<｜Assistant｜>' + content + eos_token }}
    {%- elif message['role'] == 'tool' %}
        {{- '<tool>' + message['content'] | tojson + '</tool>' }}
    {%- else %}
        {{- raise_exception('unknown role ' + message['role']) }}
    {%- endif %}
{%- endfor %}
{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}
"""


@pytest.fixture(scope="session")
def backend() -> Backend:
    """A vocabulary of bytes and a few merges, with the special tokens of DeepSeek."""
    own = Backend(models.BPE())
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[
            AddedToken(token, special=True, normalized=False) for token in (BOS, EOS, PAD)
        ],
        show_progress=False,
    )
    own.train_from_iterator(["def fibonacci(n): return n", "größer 中文字 🙂🙂 naïve"] * 4, trainer)
    own.add_tokens([AddedToken(token, normalized=False) for token in (USER, ASSISTANT)])
    return own


@pytest.fixture
def save(backend: Backend, tmp_path: Path) -> Any:
    """Wrap and save the tokenizer with transformers; returns its object and the directory."""

    def saved(template: Any = TEMPLATE, **settings: Any) -> tuple[Any, Path]:
        from transformers import PreTrainedTokenizerFast

        settings = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD} | settings
        theirs = PreTrainedTokenizerFast(
            tokenizer_object=backend, chat_template=template, **settings
        )
        theirs.save_pretrained(tmp_path)
        return PreTrainedTokenizerFast.from_pretrained(tmp_path), tmp_path

    return saved


@pytest.fixture
def bos_backend(backend: Backend) -> Backend:
    """The same vocabulary, with a tokenizer.json that puts the first token before a text."""
    own = Backend.from_str(backend.to_str())
    own.post_processor = processors.TemplateProcessing(
        single=[BOS, "$A"], special_tokens=[(BOS, own.token_to_id(BOS))]
    )
    return own
