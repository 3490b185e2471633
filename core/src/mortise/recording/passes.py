"""Which module of a model is running, and in which forward pass, for hooks that do not say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mortise.layers.paged_attention import BatchLayout

if TYPE_CHECKING:
    from torch import nn

    from mortise.spec.roles import ForwardMode


class RunningModules:
    """The modules of one or more models that are being called, the innermost last.

    A pass begins when a module that no other module calls is given what plans a pass: the whole
    model, its decoder, or the layer that drafts.
    """

    def __init__(self) -> None:
        self.num_passes = 0
        self.mode: ForwardMode | None = None
        self._names: list[str] = []
        self._is_loaded = False
        self._in_pass = False

    def watch(self, model: nn.Module) -> None:
        """Follow the calls of a model's modules from now on; loading is over."""
        self._is_loaded = True
        for name, module in model.named_modules():

            def enter(_: nn.Module, given: tuple[Any, ...], name: str = name) -> None:
                self._enter(name, given)

            module.register_forward_pre_hook(enter)
            module.register_forward_hook(self._leave, always_call=True)

    @property
    def layer(self) -> str:
        """Dotted name of the innermost module; empty where none runs."""
        return self._names[-1] if self._names else ""

    @property
    def number(self) -> int:
        """Number of the pass, or of the one that is being planned; 0 while a model is loaded."""
        if not self._is_loaded:
            return 0
        return self.num_passes if self._in_pass else self.num_passes + 1

    def _enter(self, name: str, given: tuple[Any, ...]) -> None:
        if not self._names and (layout := _layout(given)) is not None:
            self.num_passes += 1
            self._in_pass, self.mode = True, layout.mode
        self._names.append(name)

    def _leave(self, *_: Any) -> None:
        if self._names:
            self._names.pop()
        if not self._names:
            self._in_pass, self.mode = False, None


def _layout(given: tuple[Any, ...]) -> BatchLayout | None:
    found = (getattr(one, "layout", None) for one in given)
    return next((one for one in found if isinstance(one, BatchLayout)), None)
