"""The exchange on torch.distributed for a device that has none of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, assert_never

from mortise.errors import ConfigError
from mortise.parallel.dispatch_low_latency import LowLatencyDispatcher
from mortise.parallel.dispatch_normal import NormalDispatcher
from mortise.spec.dispatch import DispatchMode, TokenDispatcher, TokenDispatcherRequest

if TYPE_CHECKING:
    from mortise.parallel.group import ExpertParallelGroup


def create_portable_dispatcher(
    request: TokenDispatcherRequest, group: ExpertParallelGroup, *, poison: bool = False
) -> TokenDispatcher:
    """Make the dispatcher of the mode that is asked for.

    It keeps no state: any number of dispatches may be under way at once, as long as every rank
    calls its dispatches and combines in the same order.

    Args:
        request: the layer; the same on every rank but for ``rank``.
        group: the ranks.
        poison: fill undefined rows with what is not a number, to find who reads them.

    Raises:
        ConfigError: the experts cannot be shared evenly, or a low-latency exchange has no size.
    """
    assert (request.rank, request.world_size) == (group.rank, group.world_size)
    match request.mode:
        case DispatchMode.NORMAL:
            return NormalDispatcher(request, group, poison=poison)
        case DispatchMode.LOW_LATENCY:
            if request.max_tokens_per_rank < 1:
                raise ConfigError(
                    f"layer {request.layer}: a low-latency exchange of"
                    f" {request.max_tokens_per_rank} tokens a rank",
                    expected="dispatch.max_tokens_per_rank of at least 1",
                    remedy="set dispatch.max_tokens_per_rank, the same on every rank",
                )
            return LowLatencyDispatcher(request, group, poison=poison)
        case _:
            assert_never(request.mode)
