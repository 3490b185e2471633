"""Which modules of a checkpoint are projections, and how each of them is to be stored."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections import defaultdict
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from mortise.checkpoint.quantization.module_scheme import ModuleScheme
from mortise.checkpoint.quantization.write.recipe import scheme_name
from mortise.errors import QuantizationConfigError
from mortise.spec.weights import WeightScheme

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from mortise.checkpoint.quantization.write.recipe import Recipe
    from mortise.checkpoint.tensors import CheckpointTensors

LAYER: Final = re.compile(r"(?:^|\.)layers\.(\d+)\.")
EMBEDDING: Final = re.compile(r"(?:^|\.)embed\w*$")
HEAD: Final = "lm_head"
MTP: Final = "multi-token prediction layer"
MTP_PREFIX: Final = "mtp."

KEPT: Final[Mapping[str, str]] = MappingProxyType(
    {
        "gate": "router",
        "shared_expert_gate": "gate of the shared expert",
        "in_proj_ba": "gates of the delta net",
        "in_proj_b": "gates of the delta net",
        "in_proj_a": "gates of the delta net",
        "weights_proj": "weights of the indexer's heads, computed in float32",
    }
)
"""Projections inside the decoder layers that stay as they are."""

KEPT_OF_DRAFTS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "eh_proj": "joins embedding and hidden state, outside the draft's block",
        "head": "head",
    }
)
"""Those that only multi-token prediction layers have; published checkpoints leave them too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """A module with a weight ``[N, K]``, and how to store it.

    ``scheme.reason`` says why; a projection that stays unquantised has the scheme ``FLOAT``.
    ``is_draft`` says that it is in a multi-token prediction layer.
    """

    module: str
    out_features: int
    in_features: int
    scheme: ModuleScheme
    is_draft: bool = False

    @property
    def is_quantised(self) -> bool:
        """Whether it is stored as anything but floats."""
        return self.scheme.scheme is not WeightScheme.FLOAT

    @property
    def kind(self) -> str:
        """The module's name within its layer, every number as ``*``."""
        within = LAYER.split(self.module, maxsplit=1)[-1]
        kind = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", within)
        return f"draft's {kind}" if self.is_draft else kind


def select_projections(
    tensors: CheckpointTensors, config: Mapping[str, Any], recipe: Recipe
) -> tuple[Projection, ...]:
    """Say how every projection of a checkpoint is to be stored, those outside the layers too.

    Args:
        tensors: the opened checkpoint.
        config: its ``config.json``, which says how many layers the decoder has.
        recipe: what is asked for.

    Raises:
        QuantizationConfigError: a pattern matches no projection that can be quantised, projections
            that are computed together would be stored differently, or nothing would be quantised.
    """
    num_layers = config.get("num_hidden_layers")
    drafts = recipe.quantises_drafts
    projections = tuple(
        Projection(
            module=module,
            out_features=shape[0],
            in_features=shape[1],
            scheme=kept_scheme(module, num_layers, drafts=drafts)
            or recipe.module_scheme(module, *shape, of_draft=is_of_draft(module, num_layers)),
            is_draft=is_of_draft(module, num_layers),
        )
        for module, shape in matrices(tensors)
    )
    if config.get("tie_word_embeddings") and f"{HEAD}.weight" not in tensors:
        projections += (tied_head(),)
    eligible = [
        one for one in projections if not kept_scheme(one.module, num_layers, drafts=drafts)
    ]
    require_draft(recipe, eligible)
    require_matches(recipe, [one.module for one in eligible])
    require_agreement(projections)
    if not any(projection.is_quantised for projection in projections):
        raise QuantizationConfigError(
            "no projection would be quantised",
            details=sorted({f"{one.kind}: {one.scheme.reason}" for one in projections})[:10],
            expected="at least one projection that the scheme fits and no pattern excludes",
            remedy="choose another scheme, or fewer exceptions",
        )
    return projections


def matrices(tensors: CheckpointTensors) -> Iterator[tuple[str, tuple[int, int]]]:
    """Every module with a two-dimensional weight that is not a table of embeddings."""
    for name in tensors.names():
        module, _, leaf = name.rpartition(".")
        shape = tensors.shape(name)
        if leaf == "weight" and len(shape) == 2 and not EMBEDDING.search(module):
            yield module, (shape[0], shape[1])


def tied_head() -> Projection:
    """The head that is the table of embeddings: no tensor of its own, and still no projection."""
    reason = ModuleScheme(reason="tied to the embedding")
    return Projection(module=HEAD, out_features=0, in_features=0, scheme=reason)


def is_of_draft(module: str, num_layers: object) -> bool:
    """Whether a module is in a multi-token prediction layer.

    Args:
        module: dotted name.
        num_layers: layers of the decoder; later ones guess tokens further ahead.
    """
    layer = LAYER.search(module)
    if layer is None:
        return False
    is_later = isinstance(num_layers, int) and int(layer[1]) >= num_layers
    return is_later or module.startswith(MTP_PREFIX)


def kept_scheme(module: str, num_layers: object, *, drafts: bool) -> ModuleScheme | None:
    """Why a module is never quantised; None if it can be.

    Args:
        module: dotted name.
        num_layers: layers of the decoder.
        drafts: whether multi-token prediction layers are quantised too.
    """
    if LAYER.search(module) is None:
        return ModuleScheme(reason="outside the decoder layers")
    of_draft, leaf = is_of_draft(module, num_layers), module.rpartition(".")[2]
    if of_draft and not drafts:
        return ModuleScheme(reason=MTP)
    reason = KEPT.get(leaf) or (KEPT_OF_DRAFTS.get(leaf) if of_draft else None)
    return None if reason is None else ModuleScheme(reason=reason)


def require_draft(recipe: Recipe, eligible: Sequence[Projection]) -> None:
    """Require a draft where one is to be quantised.

    Raises:
        QuantizationConfigError: there is none.
    """
    if recipe.quantises_drafts and not any(one.is_draft for one in eligible):
        raise QuantizationConfigError(
            f"--draft-scheme is {recipe.draft_scheme!r}, and the model has no multi-token"
            " prediction layer",
            expected="projections under mtp. or in layers past num_hidden_layers of config.json",
            remedy="leave --draft-scheme out, or give a model with such a layer",
        )


def require_matches(recipe: Recipe, modules: Sequence[str]) -> None:
    """Require that every pattern matches something.

    Raises:
        QuantizationConfigError: one does not.
    """
    asked = [(f"--ignore {pattern}", pattern) for pattern in recipe.ignore]
    asked += [(rule.option, rule.pattern) for rule in recipe.rules]
    for option, pattern in asked:
        if not any(fnmatch.fnmatchcase(module, pattern) for module in modules):
            close = difflib.get_close_matches(pattern, modules, n=1, cutoff=0.0)
            raise QuantizationConfigError(
                f"{option} matches no projection that can be quantised",
                details=[f"closest: {name}" for name in close],
                expected="the dotted name of a projection in a decoder layer, with * for any part",
                remedy="correct the pattern, or leave it out",
            )


def require_agreement(projections: Sequence[Projection]) -> None:
    """Require one scheme for projections that engines compute as one product.

    These are gate and up of a block, and the same projection of every expert of a layer.

    Raises:
        QuantizationConfigError: naming two that differ.
    """
    together: dict[tuple[str, str], list[Projection]] = defaultdict(list)
    for projection in projections:
        parent, _, leaf = projection.module.rpartition(".")
        block = re.sub(r"\.experts\.\d+$", ".experts", parent)
        if leaf in {"gate_proj", "up_proj"}:
            together[block, "gate_up"].append(projection)
        elif block != parent:
            together[block, leaf].append(projection)
    for first, *others in together.values():
        for other in others:
            if stored_form(other) != stored_form(first):
                raise QuantizationConfigError(
                    f"{first.module} and {other.module} would be stored differently",
                    details=[described(first), described(other)],
                    expected="one scheme, because they are computed as one product",
                    remedy="give patterns that match both or neither",
                )


def stored_form(projection: Projection) -> tuple[object, ...]:
    """What has to agree."""
    scheme = projection.scheme
    return scheme.scheme, scheme.group_size, scheme.static_input


def described(projection: Projection) -> str:
    """A projection, its scheme and its reason."""
    scheme = projection.scheme
    return f"{projection.module}: {scheme_name(scheme)} ({scheme.reason})"
