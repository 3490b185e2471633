"""What the ranks of a run agree on before every step, so that none waits for another in vain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mortise.engine.dispatch_modes import step_mode
from mortise.parallel.collectives import all_gather_integers
from mortise.spec.roles import ForwardMode

if TYPE_CHECKING:
    from mortise.engine.batch import Batch
    from mortise.parallel.group import ExpertParallelGroup
    from mortise.spec.dispatch import DispatchMode


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """The passes of one step, the same on every rank.

    Args:
        dispatch_mode: how the tokens of all its passes travel to their experts.
        drafts: whether any rank drafts, which takes passes of the draft before the main model's.
        extends: whether any rank has rows for the draft after the main model's pass.
    """

    dispatch_mode: DispatchMode
    drafts: bool = False
    extends: bool = False


class Lockstep:
    """Decides, on every rank alike, whether there is a step and how its tokens travel.

    Every layer of experts is a collective of all ranks: a rank without work takes part in the
    step of the others with no token, and all stop together.

    Args:
        group: the ranks.
        modes: exchanges that the layers are ready for.
        capacity: tokens of one rank in a low-latency exchange.
        is_drafting: whether there is a draft.
    """

    def __init__(
        self,
        group: ExpertParallelGroup,
        modes: tuple[DispatchMode, ...],
        capacity: int,
        *,
        is_drafting: bool = False,
    ) -> None:
        self._group = group
        self._modes = modes
        self._capacity = capacity
        self._is_drafting = is_drafting

    def agree(self, batch: Batch | None) -> StepPlan | None:
        """The passes of this step, or None when no rank has work.

        Args:
            batch: this rank's work, if any.

        Raises:
            RankLostError: another rank died or does not answer.
        """
        mode = None if batch is None else batch.mode
        own = (
            batch is not None,
            mode is ForwardMode.PREFILL,
            mode is ForwardMode.TARGET_VERIFY,
            0 if batch is None else sum(batch.query_lens),
        )
        ranks = all_gather_integers(self._group, tuple(map(int, own)))
        if not any(has_work for has_work, *_ in ranks):
            return None
        reads_prompts, verifies = (any(rank[place] for rank in ranks) for place in (1, 2))
        return StepPlan(
            dispatch_mode=step_mode(
                self._modes,
                reads_prompts=reads_prompts,
                max_tokens=max(tokens for *_, tokens in ranks),
                capacity=self._capacity,
            ),
            drafts=verifies,
            extends=self._is_drafting and (verifies or reads_prompts),
        )
