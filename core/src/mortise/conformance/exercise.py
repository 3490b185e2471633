"""A short run of every hook that a backend answers, and a digest of what came out."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch

from mortise.conformance.comparison import tensors_of
from mortise.conformance.draws import draw_rows
from mortise.conformance.expert_cases import USUAL_COUNTS, draw_tokens, layer_of, plain_layers
from mortise.conformance.indexer_cases import draw_launch, plain_launches, visible
from mortise.conformance.linear_checks import plain_projections, projection_of
from mortise.conformance.records import NotAskedError
from mortise.conformance.split_checks import one_shape
from mortise.plugin import ForwardMode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mortise.conformance.subject import Subject


def exercise(subject: Subject, most_cases: int = 2) -> str:
    """Run up to so many cases of each kernel that the backend answers.

    Returns:
        SHA-256 of the bytes of every result, in order.
    """
    digest = hashlib.sha256()
    for result in _results(subject, most_cases):
        copy = result.detach().cpu().contiguous().view(-1)
        digest.update(copy.unsqueeze(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _results(subject: Subject, most_cases: int) -> Iterator[torch.Tensor]:
    kinds: tuple[tuple[str, Callable[..., Iterator[Any]], Callable[..., Any]], ...] = (
        ("quantized_moe_apply", plain_layers, _experts),
        ("quantized_linear", plain_projections, _projection),
        ("paged_mqa_logits", plain_launches, _scores),
        ("qkv_split", one_shape, _split),
    )
    for hook, cases, run in kinds:
        if not subject.answers(hook):
            continue
        served = 0
        for case in cases(subject.capabilities):
            try:
                results = run(subject, case)
            except NotAskedError:
                continue
            yield from tensors_of(results, hook).values()
            served += 1
            if served == most_cases:
                break


def _experts(subject: Subject, case: Any) -> torch.Tensor:
    layer = layer_of(subject, case)
    tokens = draw_tokens(USUAL_COUNTS, case.hidden, case.dtype, layer.arrivals[0].format)
    return layer.found(subject, tokens)


def _projection(subject: Subject, case: Any) -> torch.Tensor:
    return projection_of(subject, case).found(subject, draw_rows(5, case.in_features, case.dtype))


def _scores(subject: Subject, case: Any) -> torch.Tensor:
    launch = draw_launch(case).on(subject.capabilities.device)
    workers = subject.capabilities.num_workers
    plan = launch.planned(subject.ops, case.block_size, ForwardMode.DECODE, workers)
    return visible(launch.scored(subject.ops, plan), launch.lens)


def _split(subject: Subject, case: Any) -> Any:
    qkvz, ba = map(subject.there, case.draw(5))
    return subject.ops.qkv_split(qkvz, ba, case.shape)
