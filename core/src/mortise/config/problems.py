"""What is wrong with a configuration, in the words of its reader."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import BaseModel

from mortise.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pydantic import ValidationError
    from pydantic_core import ErrorDetails

REFERENCE_PAGE = "docs/reference/config.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One mistake in one place.

    Args:
        what: one sentence with key, value and source.
        expected: what would have been right; None for an unknown key, which has no right value.
        suggestion: the key that was probably meant.
    """

    what: str
    expected: str | None = None
    suggestion: str | None = None

    @property
    def hint(self) -> str | None:
        """The question that a misspelt key deserves."""
        return f"did you mean {self.suggestion!r}?" if self.suggestion else None


def config_error(problems: Sequence[Problem], model: type[BaseModel]) -> ConfigError:
    """One error that reports every problem; the known keys are listed if a key is unknown."""
    unknown = any(problem.expected is None for problem in problems)
    keys = f"one of {', '.join(known_keys(model))}" if unknown else None
    remedy = f"correct or remove it; {REFERENCE_PAGE} describes every key"
    if len(problems) == 1:
        (problem,) = problems
        details = [problem.hint] if problem.hint else []
        return ConfigError(
            problem.what, expected=problem.expected or keys, remedy=remedy, details=details
        )
    return ConfigError(
        f"{len(problems)} problems in the engine configuration",
        details=[line for problem in problems for line in lines_of(problem)],
        expected=keys,
        remedy=remedy.replace("it;", "them;"),
    )


def lines_of(problem: Problem) -> Iterator[str]:
    """A problem among others: its sentence, and below it what was meant or expected."""
    yield problem.what
    if problem.hint:
        yield f"  {problem.hint}"
    if problem.expected:
        yield f"  expected: {problem.expected}"


def problems_in(error: ValidationError, model: type[BaseModel], source: str) -> list[Problem]:
    """Translate what pydantic found, in its order.

    Args:
        error: raised by the validation of ``model``.
        model: the section whose keys are known.
        source: where the values came from, such as ``from file engine.toml``.
    """
    details = error.errors(include_url=False, include_context=True)
    return [problem_of(detail, model, source) for detail in details]


def problem_of(detail: ErrorDetails, model: type[BaseModel], source: str) -> Problem:
    """Translate one of pydantic's details."""
    key = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        return Problem(
            what=f"unknown configuration key {key!r} ({source})",
            suggestion=suggested_key(key, tuple(known_keys(model))),
        )
    return Problem(
        what=f"configuration key {key!r} is {shown(detail['input'])} ({source})",
        expected=expected_text(detail),
    )


def expected_text(detail: ErrorDetails) -> str:
    """What pydantic wanted, in the words of TOML."""
    context = detail.get("ctx", {})
    match detail["type"]:
        case "int_type":
            return "an integer"
        case "string_type":
            return "a string"
        case "bool_type":
            return "true or false"
        case "dict_type" | "mapping_type" | "model_type":
            return "a table"
        case "literal_error":
            return str(context["expected"])
        case "greater_than_equal":
            return f"an integer of at least {context['ge']}"
        case "less_than_equal":
            return f"an integer of at most {context['le']}"
        case "string_too_short":
            return "a string that is not empty"
    return detail["msg"].removeprefix("Input should be ")


def shown(value: object) -> str:
    """A value and its type as TOML calls it, shortened."""
    names = {bool: "boolean", dict: "table", float: "float", int: "integer", list: "array"}
    names[str] = "string"
    text = repr(value)
    text = text if len(text) <= 60 else f"{text[:57]}..."
    return f"{text} ({names.get(type(value), type(value).__name__)})"


def known_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The dotted names of every key of a section and of the sections in it."""
    for name, field in model.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            yield from known_keys(section, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def suggested_key(key: str, known: Sequence[str]) -> str | None:
    """The known key or section that ``key`` resembles most, or whose last part it resembles."""
    sections = {name.rpartition(".")[0] for name in known} - {""}
    if close := difflib.get_close_matches(key, [*known, *sorted(sections)], n=1):
        return close[0]
    last_parts = {name.rpartition(".")[2]: name for name in reversed(known)}
    close = difflib.get_close_matches(key.rpartition(".")[2], list(last_parts), n=1)
    return last_parts[close[0]] if close else None
