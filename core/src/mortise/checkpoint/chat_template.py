"""Rendering a chat template, which is untrusted code, with the helpers it expects."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mortise.errors import ModelConfigError, RequestError

if TYPE_CHECKING:
    from jinja2.parser import Parser

Message = Mapping[str, Any]
"""One turn of a conversation: ``role``, ``content`` and whatever else the template reads."""


# What an expression in a template can raise when a message is not what it expects.
PROGRAM_ERRORS = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


class RefusedByTemplateError(jinja2.TemplateError):
    """The template called ``raise_exception``: the messages are not what the model was made for."""


class GenerationBlock(Extension):
    """``{% generation %} ... {% endgeneration %}`` marks training targets; here it is only text."""

    tags = frozenset({"generation"})  # type: ignore[assignment]

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        """Keep the statements inside the block."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: text of the template.
        variables: what it sees beside the messages: ``bos_token`` and other special tokens.

    Raises:
        ModelConfigError: the template is not valid Jinja.
    """

    def __init__(self, source: str, variables: Mapping[str, str]) -> None:
        self._variables = dict(variables)
        try:
            self._template = sandbox().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ModelConfigError(
                f"the chat template cannot be parsed: line {error.lineno}: {error.message}",
                expected="a Jinja template",
                remedy="correct chat_template.jinja, or chat_template in tokenizer_config.json",
            ) from None

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **extra: Any
    ) -> str:
        """The text of a conversation, special tokens included.

        Args:
            messages: the turns, the oldest first.
            add_generation_prompt: end with what introduces the model's answer.
            extra: further variables of this template, such as ``tools``.

        Raises:
            RequestError: the template refuses the messages, or does not find in them what it needs.
            ModelConfigError: the template tries to leave its sandbox.
        """
        variables: dict[str, Any] = {"tools": None, "documents": None, **self._variables, **extra}
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                **variables,
            )
        except RefusedByTemplateError as error:
            raise RequestError(
                f"the model's chat template refuses the messages: {error.message}",
                expected="messages as this model was trained on",
                remedy="change the roles or their order",
            ) from None
        except SecurityError as error:
            raise ModelConfigError(
                f"the model's chat template does what a template must not do: {error.message}",
                expected="a template that only writes text",
                remedy="do not trust this model directory before you have read its chat template",
            ) from None
        except (jinja2.TemplateError, *PROGRAM_ERRORS) as error:
            raise RequestError(
                f"the model's chat template fails on the messages: {error}",
                expected='messages such as {"role": "user", "content": "text"}',
                remedy="compare the messages with the template in the model directory",
            ) from error


def sandbox() -> ImmutableSandboxedEnvironment:
    """The environment that templates are written for; they can change nothing outside it."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as transformers writes it: Jinja's own filter would escape HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def raise_exception(message: str) -> NoReturn:
    """What a template calls to refuse a conversation."""
    raise RefusedByTemplateError(message)


def strftime_now(format: str) -> str:
    """The local time, for templates that put the date into the system prompt."""
    return datetime.now().strftime(format)
