"""The backends that are measured, each bound with one choice of what multiplies."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from mortise.backends import load_backend
from mortise.errors import MortiseError
from mortise.spec.roles import ModelRole

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mortise.backends import BoundBackend

RUNNERS = ("auto", "deep_gemm", "triton")


def bound(backend: str, device: str | None, **options: Any) -> BoundBackend:
    """One backend for the main model.

    Raises:
        MortiseError: it cannot serve here.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return load_backend(backend, role=ModelRole.MAIN, device=device, options=options)


def by_runner(
    backend: str, device: str | None, option: str = "runner"
) -> Iterator[tuple[str, BoundBackend | str]]:
    """The backend with each choice of an option, or why it cannot have it."""
    for runner in RUNNERS:
        try:
            yield runner, bound(backend, device, **{option: runner})
        except MortiseError as error:
            yield runner, error.what
