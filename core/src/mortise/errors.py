"""Every error a user of Mortise can cause.

::

    MortiseError                    anything the command line reports as one message, exit code 2
    |-- ConfigError                 the engine configuration: unknown key, wrong type, bad value
    |-- BackendError                a hardware backend; carries a reason code
    |   |-- BackendNotFoundError    no backend of that name is installed
    |   |-- BackendConflictError    two distributions claim one name
    |   |-- BackendUnusableError    found, but it cannot serve here: versions, import, device
    |   |-- WarmupError             what it compiles before a model runs could not be compiled
    |   `-- ContractError           its code does not keep the contract of the hooks
    |       `-- StaleScheduleError  a kernel was launched with a schedule made for other lengths
    |-- ModelError                  a model directory
    |   |-- ModelNotFoundError      no such directory, or no config.json in it
    |   |-- ModelConfigError        config.json or a tokenizer file cannot be read or does not fit
    |   `-- UnknownArchitectureError
    |-- WeightsError                tensors of a checkpoint
    |   |-- CorruptFileError        a safetensors file is truncated or not one
    |   |-- MissingTensorError      the model needs it, the checkpoint lacks it
    |   |-- UnexpectedTensorError   the checkpoint has it, nothing places or skips it
    |   |-- TensorMismatchError     wrong shape or dtype
    |   |-- QuantizationConfigError how a checkpoint is, or is to be, quantised: unknown, unclear
    |   `-- ScaleError              scales that are not finite, not positive, or of a wrong shape
    |-- RequestError                one generation request
    |   `-- PromptTooLongError      prompt (and new tokens) exceed the model's context
    |-- RecordingError              a recording of hook calls: damaged, foreign, not to be written
    |-- CapacityError               the machine or the configured cache is too small
    |-- NewPluginError              a new plugin cannot be called, or written, as asked
    `-- ParallelError               several processes that work on one model
        |-- RankLostError           a process died, or did not answer in time
        `-- RankDisagreementError   processes were started with different configurations
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mortise.spec.reasons import ReasonCode


class MortiseError(Exception):
    """What happened, what was expected, and what to do, for the reader of a terminal.

    Args:
        what: one sentence, lower case, no full stop, with the offending value in it.
        expected: what would have been right.
        remedy: what the reader can do next.
        details: further lines (what was found, root cause), shown below ``what``.
    """

    exit_code = 2

    def __init__(
        self,
        what: str,
        *,
        expected: str | None = None,
        remedy: str | None = None,
        details: Sequence[str] = (),
    ) -> None:
        super().__init__(what)
        self.what = what
        self.expected = expected
        self.remedy = remedy
        self.details = tuple(details)

    def __str__(self) -> str:
        lines = [self.what, *(f"  {detail}" for detail in self.details)]
        if self.expected:
            lines.append(f"  expected: {self.expected}")
        if self.remedy:
            lines.append(f"  remedy: {self.remedy}")
        return "\n".join(lines)


class ConfigError(MortiseError):
    """The engine configuration is wrong: unknown key, wrong type, value out of range."""


class BackendError(MortiseError):
    """A backend could not be found, loaded or used; ``reason`` is its stable code."""

    def __init__(
        self,
        what: str,
        *,
        reason: ReasonCode,
        expected: str | None = None,
        remedy: str | None = None,
        details: Sequence[str] = (),
    ) -> None:
        super().__init__(what, expected=expected, remedy=remedy, details=details)
        self.reason = reason


class BackendNotFoundError(BackendError):
    """No installed backend has the configured name."""


class BackendConflictError(BackendError):
    """Two installed distributions claim the same backend name."""


class BackendUnusableError(BackendError):
    """The named backend is installed but cannot serve here."""


class WarmupError(BackendError):
    """Something that a backend compiles before a model runs could not be compiled."""


class ContractError(BackendError):
    """A backend's code does not keep the contract of the hooks it declares."""


class StaleScheduleError(ContractError):
    """A kernel was given a schedule that was planned for other context lengths."""


class ModelError(MortiseError):
    """A model directory cannot be used."""


class ModelNotFoundError(ModelError):
    """The model directory does not exist or holds no ``config.json``."""


class ModelConfigError(ModelError):
    """``config.json`` or a tokenizer file is unreadable or describes an impossible model."""


class UnknownArchitectureError(ModelError):
    """No model family of Mortise answers to the checkpoint's ``model_type``."""


class WeightsError(MortiseError):
    """The tensors of a checkpoint do not fit the model."""


class CorruptFileError(WeightsError):
    """A safetensors file is truncated or is not a safetensors file."""


class MissingTensorError(WeightsError):
    """The model needs tensors that the checkpoint does not hold."""


class UnexpectedTensorError(WeightsError):
    """The checkpoint holds tensors that nothing places and no skip list declares."""


class TensorMismatchError(WeightsError):
    """A tensor of the checkpoint has the wrong shape or dtype."""


class QuantizationConfigError(WeightsError):
    """How a checkpoint is, or is to be, quantised: unknown, contradictory, or naming nothing."""


class ScaleError(WeightsError):
    """Scales of a quantised tensor are not finite, not positive, or of the wrong shape."""


class RequestError(MortiseError):
    """One generation request cannot be served as asked."""


class PromptTooLongError(RequestError):
    """The prompt, with the tokens asked for, is longer than the model's context."""


class RecordingError(MortiseError):
    """A recording of hook calls cannot be written, read or replayed as asked."""


class CapacityError(MortiseError):
    """Memory or the configured number of cache pages is too small for what was asked."""


class NewPluginError(MortiseError):
    """A new plugin cannot have the name, or be written to the place, that was asked for."""


class ParallelError(MortiseError):
    """Several processes cannot work on one model as they were started."""


class RankLostError(ParallelError):
    """Another process died, or did not take part in time."""


class RankDisagreementError(ParallelError):
    """Processes were started with different configurations, versions or checkpoints."""
