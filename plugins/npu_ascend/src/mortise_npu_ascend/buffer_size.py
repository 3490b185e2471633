"""How large HCCL's communication buffer must be for DeepEP's exchanges, and how large it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from mortise.plugin import ConfigError, DispatchMode
from mortise_npu_ascend.dispatch import Generation
from mortise_npu_ascend.environment import BUFFER, OWN_BUFFER

if TYPE_CHECKING:
    from mortise_npu_ascend.environment import VendorEnvironment

DEFAULT_MEGABYTES: Final = 200
"""What HCCL sets aside where no variable says otherwise."""

_MEGABYTE: Final = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeSize:
    """What the size of a buffer depends on.

    Args:
        generation: of the chip.
        mode: the exchange.
        max_tokens: most tokens of one rank in one exchange.
        world_size, num_experts, num_experts_per_tok, hidden_size: G, E, K and H.
        in_two_levels: machines of A2 exchange rows in two levels.
    """

    generation: Generation
    mode: DispatchMode
    max_tokens: int
    world_size: int
    num_experts: int
    num_experts_per_tok: int
    hidden_size: int
    in_two_levels: bool = False


def required_megabytes(size: ExchangeSize) -> int:
    """The smallest value of ``HCCL_BUFFSIZE`` with which an exchange starts.

    As the kernels of sgl-kernel-npu check it themselves (commit f425bdf1: ``csrc/deepep/ops`` for
    A3 and A5, ``ops2`` for A2); for the normal exchange that is more than its manual says, and more
    than HCCL's default for any model.
    """
    if size.mode is DispatchMode.NORMAL:
        needed = _normal_bytes(size)
    elif size.generation is Generation.A2:
        needed = _low_latency_bytes_of_a2(size)
    else:
        needed = _low_latency_bytes(size)
    if size.generation is Generation.A5:
        needed += _MEGABYTE  # for the state of the exchange
    return -(-needed // _MEGABYTE)


def configured_megabytes(environment: VendorEnvironment) -> tuple[int, str]:
    """The buffer's size and the variable that says so, or the one that could.

    Raises:
        ConfigError: the variable is no number.
    """
    name, text = (
        (OWN_BUFFER, environment.own_buffer)
        if environment.own_buffer is not None
        else (BUFFER, environment.buffer)
    )
    if text is None:
        return DEFAULT_MEGABYTES, name
    if not text.isdecimal():
        raise ConfigError(
            f"environment variable {name} is {text!r}",
            expected="a number of megabytes",
            remedy=f"correct or unset {name}",
        )
    return int(text), name


def _row_bytes(hidden_size: int) -> tuple[int, int]:
    """Memory of one row: sent to an expert with its scale and origin, and on its way back."""
    plain = 2 * hidden_size
    return _aligned(_aligned(plain, 32) + 44, 512), _aligned(plain, 512)


def _normal_bytes(size: ExchangeSize) -> int:
    sent, returned = _row_bytes(size.hidden_size)
    rows = size.max_tokens * size.num_experts_per_tok * (sent + returned)
    if size.generation is Generation.A2:
        return 2 * (rows + (8 + 404) * _MEGABYTE) + 8 * _MEGABYTE
    return 2 * (rows + (4 + 102) * _MEGABYTE)


def _low_latency_bytes(size: ExchangeSize) -> int:
    sent, returned = _row_bytes(size.hidden_size)
    arriving = size.world_size * (size.num_experts // size.world_size) * sent
    # One more than K: a place for a shared expert is kept, whether there is one or not.
    returning = (size.num_experts_per_tok + 1) * returned
    return 2 * size.max_tokens * (arriving + returning)


def _low_latency_bytes_of_a2(size: ExchangeSize) -> int:
    row = 2 * size.hidden_size
    if size.in_two_levels:
        row += 4 * _aligned(size.num_experts_per_tok, 8) * 4
        return size.num_experts * size.max_tokens * row + 804 * _MEGABYTE
    most_experts = min(size.num_experts // size.world_size, size.num_experts_per_tok)
    return 2 * (size.max_tokens * size.world_size * most_experts * row + 2 * _MEGABYTE)


def _aligned(number: int, step: int) -> int:
    return -(-number // step) * step
