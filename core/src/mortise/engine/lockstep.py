"""What the ranks of a run agree on before every step, so that none waits for another in vain."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mortise.engine.dispatch_modes import step_mode
from mortise.parallel.collectives import all_gather_integers
from mortise.spec.roles import ForwardMode

if TYPE_CHECKING:
    from mortise.engine.scheduler import Batch
    from mortise.parallel.group import ExpertParallelGroup
    from mortise.spec.dispatch import DispatchMode


class Lockstep:
    """Decides, on every rank alike, whether there is a step and how its tokens travel.

    Every layer of experts is a collective of all ranks: a rank without work takes part in the
    step of the others with no token, and all stop together.

    Args:
        group: the ranks.
        modes: exchanges that the layers are ready for.
        capacity: tokens of one rank in a low-latency exchange.
    """

    def __init__(
        self, group: ExpertParallelGroup, modes: tuple[DispatchMode, ...], capacity: int
    ) -> None:
        self._group = group
        self._modes = modes
        self._capacity = capacity

    def agree(self, batch: Batch | None) -> DispatchMode | None:
        """The exchange of this step, or None when no rank has work.

        Args:
            batch: this rank's work, if any.

        Raises:
            RankLostError: another rank died or does not answer.
        """
        is_prompt = batch is not None and batch.mode is ForwardMode.PREFILL
        own = (batch is not None, is_prompt, 0 if batch is None else sum(batch.query_lens))
        ranks = all_gather_integers(self._group, tuple(map(int, own)))
        if not any(has_work for has_work, _, _ in ranks):
            return None
        return step_mode(
            self._modes,
            reads_prompts=any(reads for _, reads, _ in ranks),
            max_tokens=max(tokens for _, _, tokens in ranks),
            capacity=self._capacity,
        )
