"""What a model family gives the engine, whatever its architecture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import torch

    from mortise.checkpoint.placement import Placement, Skip
    from mortise.layers.context import LayerContext
    from mortise.layers.paged_attention import BatchLayout
    from mortise.parallel.group import ExpertParallelGroup
    from mortise.spec.dispatch import DispatchDecision, DispatchMode


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What the engine plans with.

    ``dtype`` is what the checkpoint says of itself (``torch_dtype``), None where it is silent.
    ``num_experts`` and ``num_experts_per_tok`` are 0 of a model without experts,
    ``index_num_heads`` and ``index_head_dim`` of one without an indexer.
    """

    architecture: str
    vocab_size: int
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]
    dtype: str | None
    hidden_size: int = 0
    num_experts: int = 0
    num_experts_per_tok: int = 0
    index_num_heads: int = 0
    index_head_dim: int = 0


class CachePool(Protocol):
    """The cache of one model; its pages are handed out by a ``PageAllocator``."""

    @property
    def num_pages(self) -> int:
        """Pages there are."""
        ...

    @property
    def num_bytes(self) -> int:
        """Memory they take."""
        ...


class PagedPass(Protocol):
    """One forward pass over the cache: built per pass, handed to the model."""

    @property
    def positions(self) -> torch.Tensor:
        """int64 ``[T]``: position of each token in its request."""
        ...

    @property
    def dispatch_mode(self) -> DispatchMode:
        """How the tokens travel to their experts."""
        ...

    def accept(self, num_tokens: Sequence[int]) -> None:
        """After a ``TARGET_VERIFY`` pass: keep what the first tokens of each request left.

        Rows in pages need no care, since a row past a request's tokens is written again before it
        is read. States are moved past the accepted tokens, and past no other; until then they are
        those from before the pass.

        Args:
            num_tokens: accepted rows of each request, at least one, in the order of the layout.
        """
        ...


class CausalLM(Protocol):
    """A language model of one role, built on bound hooks."""

    def finish_loading(self) -> Mapping[str, tuple[DispatchDecision, ...]]:
        """Decide and prepare, once the weights are in; again after weight updates.

        Returns:
            What was decided for each layer of experts, one for each mode, by its dotted name.
        """
        ...

    def new_pool(
        self, num_pages: int, dtype: torch.dtype, device: torch.device, num_slots: int = 0
    ) -> CachePool:
        """An empty cache of ``num_pages`` pages, with a state for each of ``num_slots`` requests.

        A model without recurrent layers keeps no states.
        """
        ...

    def new_pass(self, pool: CachePool, layout: BatchLayout) -> PagedPass:
        """Plan one forward pass."""
        ...

    def embed(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        """``[T, H]`` of int64 token ids; the draft model reads them too."""
        ...

    def run(self, token_ids_T: torch.Tensor, paged_pass: PagedPass) -> torch.Tensor:
        """Normalised hidden states ``[T, H]``, which :meth:`logits` and the draft model read.

        Writes the tokens' rows to the cache.
        """
        ...

    def logits(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        """float32 ``[T, vocab]``."""
        ...


class DraftModel(Protocol):
    """A multi-token prediction layer, run as a model of the draft role with a cache of its own.

    Row i reads the hidden state at position i beside the embedding of token i + 1, and predicts
    token i + 2. The first draft reads the main model's hidden states, every further one those that
    the draft itself gave. Embedding and head are the main model's: whoever runs a draft calls
    ``embed`` and ``logits`` of the main model.
    """

    def finish_loading(self) -> Mapping[str, tuple[DispatchDecision, ...]]:
        """See :meth:`CausalLM.finish_loading`."""
        ...

    def new_pool(
        self, num_pages: int, dtype: torch.dtype, device: torch.device, num_slots: int = 0
    ) -> CachePool:
        """See :meth:`CausalLM.new_pool`; of the same pages as the main model's."""
        ...

    def new_pass(self, pool: CachePool, layout: BatchLayout) -> PagedPass:
        """See :meth:`CausalLM.new_pass`."""
        ...

    def run(
        self, embeddings_TH: torch.Tensor, hidden_TH: torch.Tensor, paged_pass: PagedPass
    ) -> torch.Tensor:
        """Normalised hidden states ``[T, H]`` for the main model's head and for the next draft.

        Args:
            embeddings_TH: of the token after each position.
            hidden_TH: normalised hidden states of each position.
            paged_pass: where the rows sit; they are written to the draft's cache.
        """
        ...


class ModelFamily(Protocol):
    """One architecture: how to read its configuration, build it, and place its weights."""

    @property
    def model_types(self) -> tuple[str, ...]:
        """Values of ``model_type`` in ``config.json`` that this family answers to."""
        ...

    def facts(self, raw: Mapping[str, object]) -> ModelFacts:
        """Check ``config.json`` and say what the engine needs to know.

        Raises:
            ModelConfigError: it does not describe a model of this family.
        """
        ...

    def build(self, raw: Mapping[str, object], context: LayerContext) -> CausalLM:
        """The model with empty parameters on the current default device and dtype."""
        ...

    def placements(self, model: CausalLM) -> Iterable[Placement]:
        """Where every tensor of the checkpoint goes."""
        ...

    def skips(self, raw: Mapping[str, object], group: ExpertParallelGroup) -> tuple[Skip, ...]:
        """Tensors a checkpoint may hold beyond those, each with the reason why they are left."""
        ...

    def build_draft(self, raw: Mapping[str, object], context: LayerContext) -> DraftModel:
        """The multi-token prediction layer, empty, as :meth:`build` makes the model.

        Args:
            raw: ``config.json`` of the directory that the layer is read from.
            context: of the draft role.

        Raises:
            ModelConfigError: the configuration has no such layer.
        """
        ...

    def draft_placements(self, draft: DraftModel, main: CausalLM) -> Iterable[Placement]:
        """Where every tensor of the layer goes.

        Embedding and head may be stored beside the layer once more; they are required to be the
        main model's (:func:`~mortise.models.shared_tensors.same_as_main`).
        """
        ...

    def draft_skips(
        self, raw: Mapping[str, object], group: ExpertParallelGroup
    ) -> tuple[Skip, ...]:
        """All other tensors of the checkpoint, each with the reason why the draft leaves it."""
        ...
