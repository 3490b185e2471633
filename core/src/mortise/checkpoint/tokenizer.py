"""Text to ids, ids to text, and conversations to text, as a model directory defines them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from mortise.checkpoint.chat_template import ChatTemplate, Message
from mortise.checkpoint.json_file import DOWNLOAD_AGAIN, read_json_object
from mortise.checkpoint.pieces import Pieces
from mortise.checkpoint.stream import StreamDecoder
from mortise.errors import ModelConfigError, RequestError

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_DIRECTORY = "additional_chat_templates"


class Tokenizer:
    """The vocabulary, special tokens and chat templates of one model.

    Args:
        backend: the loaded vocabulary; owned and adjusted by this object.
        special_tokens: text of the special tokens by their name in ``tokenizer_config.json``.
        chat_templates: source of each chat template by name; the usual one is ``default``.
    """

    def __init__(
        self,
        backend: Backend,
        special_tokens: Mapping[str, str] | None = None,
        chat_templates: Mapping[str, str] | None = None,
    ) -> None:
        # A length baked into tokenizer.json would cut prompts without a word.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.special_tokens = dict(special_tokens or {})
        self.chat_templates = dict(chat_templates or {})
        self._compiled: dict[str, ChatTemplate] = {}
        self.bos_token_id = self._special_id("bos_token")
        self.eos_token_id = self._special_id("eos_token")
        self.pad_token_id = self._special_id("pad_token")

    @classmethod
    def load(cls, directory: str | Path) -> Tokenizer:
        """Read the tokenizer files of a model directory.

        Raises:
            ModelConfigError: there is no ``tokenizer.json``, or a file cannot be read.
        """
        directory = Path(directory)
        backend = load_backend(directory)
        config = read_optional(directory / CONFIG_FILE)
        named = {**read_optional(directory / SPECIAL_TOKENS_FILE), **config}
        special_tokens = {
            name: text
            for name, value in named.items()
            if name.endswith("_token") and (text := token_text(value)) is not None
        }
        return cls(backend, special_tokens, chat_templates(directory, config))

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text.

        ``tokenizer.json`` says which special tokens are added; as in transformers 5, it outranks
        ``add_bos_token`` and ``add_eos_token`` of ``tokenizer_config.json``. Special tokens that
        stand in the text become their ids. Text from ``apply_chat_template`` already has its
        special tokens: encode it without adding any.

        Raises:
            RequestError: the text holds half of a surrogate pair, which is no character.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"the text is not valid Unicode: {text[error.start]!a} at character {error.start}",
                expected="text that can be written as UTF-8",
                remedy="decode the bytes it came from as what they are, or replace that character",
            ) from None
        return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ids; bytes that are no character become U+FFFD."""
        return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def extensions(self, token_id: int) -> tuple[int, ...]:
        """Ids of the tokens whose bytes begin with the bytes of this one, itself the first of them.

        Empty for a token that stands for no piece of text, such as a special one.
        """
        return self._pieces.extensions(token_id)

    def stream_decoder(self, *, skip_special_tokens: bool = True) -> StreamDecoder:
        """A decoder for one text that is being generated."""
        return StreamDecoder(
            lambda token_ids: self.decode(token_ids, skip_special_tokens=skip_special_tokens)
        )

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        template: str | None = None,
        **extra: Any,
    ) -> str:
        """The text of a conversation as the model was trained on it.

        Args:
            messages: the turns, the oldest first.
            add_generation_prompt: end with what introduces the model's answer.
            template: name of a template; None is ``tool_use`` if there is one and ``tools`` were
                given, else ``default``.
            extra: further variables of the template, such as ``tools``.

        Raises:
            ModelConfigError: the model has no such template, or it is not valid Jinja.
            RequestError: the template refuses the messages.
        """
        if template is None:
            with_tools = extra.get("tools") is not None and "tool_use" in self.chat_templates
            template = "tool_use" if with_tools else "default"
        if template not in self.chat_templates:
            raise no_template(template, sorted(self.chat_templates))
        if template not in self._compiled:
            source = self.chat_templates[template]
            self._compiled[template] = ChatTemplate(source, self.special_tokens)
        return self._compiled[template].render(
            messages, add_generation_prompt=add_generation_prompt, **extra
        )

    @cached_property
    def _pieces(self) -> Pieces:
        # Sorting 129,280 pieces takes 0.2 s: only who asks for it pays.
        return Pieces(self._backend)

    def _special_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        if token is None:
            return None
        token_id = self._backend.token_to_id(token)
        if token_id is None:
            raise ModelConfigError(
                f"{name} is {token!r}, which the vocabulary does not hold",
                expected=f"a token of {TOKENIZER_FILE}",
                remedy=f"correct {CONFIG_FILE}, or {DOWNLOAD_AGAIN}",
            )
        return int(token_id)


def load_backend(directory: Path) -> Backend:
    """Read ``tokenizer.json``.

    Raises:
        ModelConfigError: it is not there or cannot be read.
    """
    path = directory / TOKENIZER_FILE
    if not path.is_file():
        other = sorted(
            file.name for file in directory.glob("*") if file.suffix in {".model", ".tiktoken"}
        )
        raise ModelConfigError(
            f"this model has no {TOKENIZER_FILE}",
            details=[
                f"looked for: {path.absolute()}",
                *([f"found: {', '.join(other)}, which must be converted first"] if other else []),
            ],
            expected=f"{TOKENIZER_FILE}, because text was asked for",
            remedy="use token ids instead of text, or add the file: load the tokenizer with"
            " transformers and call save_pretrained(DIRECTORY)",
        )
    try:
        return Backend.from_file(str(path))
    except Exception as error:
        # The library raises bare Exception for everything that is wrong with the file.
        read_json_object(path)
        raise ModelConfigError(
            f"{TOKENIZER_FILE} is JSON, but not a tokenizer: {error}",
            details=[f"file: {path.absolute()}"],
            expected="a file of the tokenizers library",
            remedy=DOWNLOAD_AGAIN,
        ) from None


def read_optional(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty if there is no such file."""
    return read_json_object(path) if path.is_file() else {}


def token_text(value: object) -> str | None:
    """Text of a special token, which is stored as text or as a table with its ``content``."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def chat_templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Every chat template by name: the files, or else the entry of ``tokenizer_config.json``.

    Raises:
        ModelConfigError: the entry is neither text nor a list of named templates.
    """
    files = {"default": directory / TEMPLATE_FILE}
    files |= {path.stem: path for path in (directory / TEMPLATE_DIRECTORY).glob("*.jinja")}
    found = {
        name: path.read_text(encoding="utf-8") for name, path in files.items() if path.is_file()
    }
    return found or configured_templates(config.get("chat_template"))


def configured_templates(entry: object) -> dict[str, str]:
    """The entry ``chat_template``: none, one text, or a list of names and texts.

    Raises:
        ModelConfigError: it is something else.
    """
    match entry:
        case None:
            return {}
        case str():
            return {"default": entry}
        case list() if all(is_named_template(item) for item in entry):
            return {item["name"]: item["template"] for item in entry}
    raise ModelConfigError(
        f"chat_template in {CONFIG_FILE} is a {type(entry).__name__}",
        expected='a text, or a list of {"name": ..., "template": ...}',
        remedy=f"correct {CONFIG_FILE}, or {DOWNLOAD_AGAIN}",
    )


def is_named_template(item: object) -> bool:
    """Whether an item of the list form has both its texts."""
    return isinstance(item, Mapping) and all(
        isinstance(item.get(key), str) for key in ("name", "template")
    )


def no_template(name: str, known: Sequence[str]) -> ModelConfigError:
    """The error for a chat template that the model does not have."""
    if not known:
        return ModelConfigError(
            "this model has no chat template",
            expected=f"{TEMPLATE_FILE}, or chat_template in {CONFIG_FILE}",
            remedy="give a plain prompt instead of messages",
        )
    return ModelConfigError(
        f"this model has no chat template named {name!r}",
        expected=f"one of {', '.join(known)}",
        remedy="name one of them",
    )
