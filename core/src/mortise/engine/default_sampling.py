"""How a model wants its tokens chosen when the user says nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from mortise.engine.sampling_params import SamplingParams
from mortise.errors import ModelConfigError, RequestError

if TYPE_CHECKING:
    from collections.abc import Mapping

FILTERS: Final = ("temperature", "top_p", "top_k")


def default_sampling(generation_config: Mapping[str, Any]) -> SamplingParams:
    """What ``generation_config.json`` recommends: with ``do_sample``, its filters; else greedy.

    A filter it does not mention stays off; with ``do_sample`` and no temperature, that is 1. Its
    ``token_healing`` holds in either case.

    Raises:
        ModelConfigError: a value of it is of the wrong type or out of range.
    """
    is_sampled = bool(generation_config.get("do_sample"))
    names = [*(FILTERS if is_sampled else ()), "token_healing"]
    found = {name: generation_config.get(name) for name in names}
    given = {name: value for name, value in found.items() if value is not None}
    try:
        return SamplingParams(**{"temperature": 1.0 if is_sampled else 0.0, **given})
    except RequestError as error:
        raise ModelConfigError(
            f"generation_config.json: {error.what}",
            expected=error.expected,
            remedy="correct the file, or take it from the published model",
        ) from None
