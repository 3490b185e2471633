"""The backend under examination: found by name, bound as often as a check wants it."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from mortise.backends import discover_backends, load_backend
from mortise.backends.select import select_by_name
from mortise.backends.validate import REFERENCE
from mortise.conformance.records import NotAskedError
from mortise.errors import MortiseError
from mortise.plugin import ModelRole

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mortise.backends import BoundBackend, Candidate, Ops
    from mortise.plugin import Capabilities

Record = TypeVar("Record")


class Subject:
    """One backend, as a configuration would name it.

    Args:
        name: name of the backend, or ``distribution:name``.
        device: the configured device text, or None for the backend's own.
        options: the backend's own table.
    """

    def __init__(
        self, name: str, device: str | None = None, options: Mapping[str, object] | None = None
    ) -> None:
        self.name = name
        self.device = device
        self.options = MappingProxyType(dict(options or {}))
        # What a process of its own saw of it (``witness``), once it was asked.
        self.testimony: object | None = None

    @cached_property
    def candidates(self) -> Sequence[Candidate]:
        """Everything installed."""
        return discover_backends()

    @cached_property
    def row(self) -> Candidate:
        """Its own row.

        Raises:
            BackendError: there is none, or it cannot be used.
        """
        return select_by_name(self.candidates, self.name).row

    def bind(
        self, role: ModelRole = ModelRole.MAIN, options: Mapping[str, object] | None = None
    ) -> BoundBackend:
        """A binding of its own.

        Raises:
            MortiseError: as ``load_backend``.
        """
        return load_backend(
            self.name,
            role=role,
            device=self.device,
            options=self.options if options is None else options,
            source="the conformance kit",
            candidates=self.candidates,
        )

    def with_binding(self, role: ModelRole) -> Subject:
        """The same backend with a binding of its own for a role; what was read is shared."""
        other = Subject(self.name, self.device, self.options)
        other.__dict__["candidates"] = self.candidates
        other.__dict__["_bound_or_why"] = self.bind(role)
        return other

    @cached_property
    def _bound_or_why(self) -> BoundBackend | str:
        try:
            return self.bind()
        except MortiseError as error:
            return f"it cannot be bound here: {error.what}"
        except Exception as error:
            return f"it cannot be bound here: {type(error).__name__}: {error}"

    @property
    def bound(self) -> BoundBackend:
        """One binding for the main model, shared by the checks.

        Raises:
            NotAskedError: it cannot be bound here; other checks say whose fault that is.
        """
        if isinstance(self._bound_or_why, str):
            raise NotAskedError(self._bound_or_why)
        return self._bound_or_why

    @property
    def ops(self) -> Ops:
        """Its hooks."""
        return self.bound.ops

    @property
    def capabilities(self) -> Capabilities:
        """What it says of itself."""
        return self.bound.ops.capabilities

    @cached_property
    def reference(self) -> Ops:
        """The definition, on the CPU."""
        return load_backend(
            REFERENCE, role=ModelRole.MAIN, device="cpu", candidates=self.candidates
        ).ops

    @property
    def hooks(self) -> Mapping[str, int]:
        """The hooks that it implements itself, with their versions; none where it is not usable."""
        try:
            manifest = self.row.manifest
        except MortiseError:
            return MappingProxyType({})
        return MappingProxyType({} if manifest is None else dict(manifest.implements))

    def answers(self, hook: str) -> bool:
        """Whether it implements a hook itself."""
        return hook in self.hooks

    def require_hook(self, hook: str) -> None:
        """Leave a hook alone that the reference answers.

        Raises:
            NotAskedError: it does not implement it.
        """
        if self.hooks and not self.answers(hook):
            raise NotAskedError(f"the reference answers {hook}")

    def there(self, record: Record) -> Record:
        """A tensor, or a record with tensors in it, on the backend's device."""
        there: Record = moved(record, self.capabilities.device)
        return there


def moved(thing: Any, device: torch.device) -> Any:
    """A tensor, or a record with tensors in it, on a device; the same where it is there already."""
    if isinstance(thing, torch.Tensor):
        return thing.to(device)
    if is_dataclass(thing) and not isinstance(thing, type):
        parts = {
            one.name: moved(getattr(thing, one.name), device)
            for one in fields(thing)
            if isinstance(getattr(thing, one.name), torch.Tensor)
            or is_dataclass(getattr(thing, one.name))
        }
        return replace(thing, **parts)
    return thing
