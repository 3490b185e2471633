"""The lightning indexer against the published definition, computed from scratch in numpy float64.

The definition is equation (1) of the DeepSeek-V3.2-Exp report and the authors' own inference code
as corrected in November 2025; ``docs/explanation/which-keys-the-indexer-picks.md`` says where each
detail comes from. The code under test is called by the two ``ours_*`` functions alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from tests.fixtures.paged_models import CPU, poison_index_keys, reference_context, reference_ops
from tests.fixtures.tiny_models import YARN, tiny_transformers_model

from mortise.kv.latent import LatentPool
from mortise.layers.mla import LightningIndexer
from mortise.layers.paged_attention import BatchLayout, PagedAttention
from mortise.layers.rotary import RotaryEmbedding, YarnScaling
from mortise.spec.roles import ForwardMode

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mortise.layers.mla import IndexProjections

    Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Indexer:
    """Sizes of one indexer."""

    hidden_size: int = 48
    latent_size: int = 40
    num_heads: int = 8
    head_dim: int = 32
    rope_dim: int = 16
    topk: int = 12
    theta: float = 10000.0
    yarn: bool = False


INDEXERS = {
    "small": Indexer(),
    "published heads and head size": Indexer(num_heads=64, head_dim=128, rope_dim=64),
    "everything rotated": Indexer(head_dim=16, rope_dim=16),
    "little rotated, other base": Indexer(head_dim=64, rope_dim=8, theta=500.0, topk=33),
    "yarn": Indexer(num_heads=16, yarn=True),
}
NUM_TOKENS = 96


@pytest.fixture(params=INDEXERS)
def shape(request: pytest.FixtureRequest) -> Indexer:
    return INDEXERS[request.param]


# --- the definition --------------------------------------------------------------------------


def frequencies(shape: Indexer) -> Array:
    """Radians per position of each rotated pair."""
    pairs = np.arange(shape.rope_dim // 2)
    plain = shape.theta ** (-2 * pairs / shape.rope_dim)
    if not shape.yarn:
        return plain
    original = YARN["original_max_position_embeddings"]

    def pair_with(rotations: float) -> float:
        wavelength = original / (2 * np.pi * rotations)
        return shape.rope_dim * np.log(wavelength) / (2 * np.log(shape.theta))

    low = max(np.floor(pair_with(YARN["beta_fast"])), 0)
    high = min(np.ceil(pair_with(YARN["beta_slow"])), shape.rope_dim - 1)
    stretched = np.clip((pairs - low) / (high - low), 0, 1)
    return plain * (1 - stretched) + plain / YARN["factor"] * stretched


def rotated(x: Array, shape: Indexer, *, interleaved: bool) -> Array:
    """Rotate the first ``rope_dim`` dimensions of ``[T, ..., D]`` by the position."""
    half = shape.rope_dim // 2
    angles = np.arange(len(x))[:, None] * frequencies(shape)
    angles = angles.reshape(len(x), *[1] * (x.ndim - 2), half)
    if interleaved:
        first, second = slice(0, shape.rope_dim, 2), slice(1, shape.rope_dim, 2)
    else:
        first, second = slice(0, half), slice(half, shape.rope_dim)
    out = x.copy()
    out[..., first] = x[..., first] * np.cos(angles) - x[..., second] * np.sin(angles)
    out[..., second] = x[..., first] * np.sin(angles) + x[..., second] * np.cos(angles)
    return out


def hadamard(size: int) -> Array:
    """Sylvester's matrix, orthonormal."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.sqrt(size)


def layer_norm(x: Array, weight: Array, bias: Array) -> Array:
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-6) * weight + bias


def index_scores(
    shape: Indexer,
    tensors: dict[str, Array],
    hidden: Array,
    query_latent: Array,
    *,
    interleaved: bool = False,
    with_hadamard: bool = False,
) -> Array:
    """``I[t, s] = sum over heads j of w[t, j] * relu(q[t, j] . k[s])``."""
    num_tokens = len(hidden)
    query = query_latent @ tensors["wq_b.weight"].T
    query = query.reshape(num_tokens, shape.num_heads, shape.head_dim)
    key = hidden @ tensors["wk.weight"].T
    key = layer_norm(key, tensors["k_norm.weight"], tensors["k_norm.bias"])
    query = rotated(query, shape, interleaved=interleaved)
    key = rotated(key, shape, interleaved=interleaved)
    if with_hadamard:
        query, key = query @ hadamard(shape.head_dim), key @ hadamard(shape.head_dim)
    weights = hidden @ tensors["weights_proj.weight"].T
    weights = weights * shape.num_heads**-0.5 * shape.head_dim**-0.5
    scores = np.zeros((num_tokens, num_tokens))
    for head in range(shape.num_heads):
        scores += weights[:, head, None] * np.maximum(query[:, head] @ key.T, 0)
    return scores


def chosen_sets(scores: Array, topk: int) -> list[set[int]]:
    """The best ``topk`` of the keys up to each token itself; all of them while there are fewer."""
    return [
        {int(position) for position in np.argsort(-row[: token + 1], kind="stable")[:topk]}
        for token, row in enumerate(scores)
    ]


def margins(scores: Array, topk: int) -> Array:
    """How far the last chosen key is ahead of the first one left out, infinite if none is."""
    ahead = np.full(len(scores), np.inf)
    for token in range(topk, len(scores)):
        ranked = np.sort(scores[token, : token + 1])[::-1]
        ahead[token] = ranked[topk - 1] - ranked[topk]
    return ahead


# --- the code under test ---------------------------------------------------------------------


def random_inputs(shape: Indexer, seed: int = 0) -> tuple[dict[str, Array], Array, Array]:
    generator = np.random.default_rng(seed)
    tensors = {
        "wq_b.weight": generator.normal(
            size=(shape.num_heads * shape.head_dim, shape.latent_size), scale=0.2
        ),
        "wk.weight": generator.normal(size=(shape.head_dim, shape.hidden_size), scale=0.2),
        "k_norm.weight": generator.normal(size=shape.head_dim, loc=1, scale=0.2),
        "k_norm.bias": generator.normal(size=shape.head_dim, scale=0.2),
        "weights_proj.weight": generator.normal(size=(shape.num_heads, shape.hidden_size)),
    }
    hidden = generator.normal(size=(NUM_TOKENS, shape.hidden_size))
    query_latent = generator.normal(size=(NUM_TOKENS, shape.latent_size))
    return tensors, hidden, query_latent


def ours_projected(
    shape: Indexer, tensors: dict[str, Array], hidden: Array, query_latent: Array
) -> IndexProjections:
    """What our indexer makes of the tokens."""
    indexer = LightningIndexer(
        reference_context(),
        "indexer",
        hidden_size=shape.hidden_size,
        q_lora_rank=shape.latent_size,
        num_heads=shape.num_heads,
        head_dim=shape.head_dim,
        rope_dim=shape.rope_dim,
        topk=shape.topk,
    )
    indexer.load_state_dict({name: torch.tensor(value) for name, value in tensors.items()})
    scaling = {name: YARN[name] for name in YARN if name not in {"rope_type", "rope_theta"}}
    rotary = RotaryEmbedding(
        shape.rope_dim, shape.theta, NUM_TOKENS, YarnScaling(**scaling) if shape.yarn else None
    )
    with torch.inference_mode():
        return indexer(
            torch.tensor(hidden, dtype=torch.float32),
            torch.tensor(query_latent, dtype=torch.float32),
            rotary(torch.arange(NUM_TOKENS)),
        )


def ours_scored(shape: Indexer, projected: IndexProjections) -> tuple[Array, list[set[int]]]:
    """Scores and chosen keys by the way of the model: keys to pages, the hooks, the selection."""
    seen = []

    def recorded(*arguments: object) -> torch.Tensor:
        seen.append(ops.paged_mqa_logits(*arguments))
        return seen[-1]

    ops = reference_ops()
    pool = LatentPool(
        num_layers=1,
        num_pages=6,
        latent_dim=4,
        index_dim=shape.head_dim,
        dtype=torch.float32,
        device=CPU,
    )
    poison_index_keys(pool.index_keys.pages(0))
    layout = BatchLayout.build(ForwardMode.PREFILL, [NUM_TOKENS], [NUM_TOKENS], [[4, 1]], CPU)
    attention = PagedAttention(replace(ops, paged_mqa_logits=recorded), pool, layout, shape.topk)
    pool.index_keys.write(0, attention.slots_T, projected.key)
    chosen_TK = attention._choose(0, projected)
    assert chosen_TK is not None
    sets = [{position for position in row if position >= 0} for row in chosen_TK.tolist()]
    return seen[0][:, :NUM_TOKENS].double().numpy(), sets


# --- the comparison --------------------------------------------------------------------------


def visible(scores: Array) -> Array:
    return scores[np.tril_indices(len(scores))]


def test_scores_are_the_published_ones(shape: Indexer) -> None:
    inputs = random_inputs(shape)
    expected = index_scores(shape, *inputs)
    got, _ = ours_scored(shape, ours_projected(shape, *inputs))
    spread = visible(expected).std()
    assert spread > 0.05
    np.testing.assert_allclose(visible(got), visible(expected), atol=2e-5 * max(spread, 1.0))


def test_chosen_keys_are_the_published_ones(shape: Indexer) -> None:
    inputs = random_inputs(shape, seed=1)
    expected = index_scores(shape, *inputs)
    _, got = ours_scored(shape, ours_projected(shape, *inputs))
    # Where float32 cannot tell the last key from the next, both choices are right.
    clear = margins(expected, shape.topk) > 1e-4
    assert clear.mean() > 0.9
    wanted = chosen_sets(expected, shape.topk)
    assert [got[row] for row in clear.nonzero()[0]] == [wanted[row] for row in clear.nonzero()[0]]
    assert {len(row) for row in got[shape.topk :]} == {shape.topk}


def test_every_choice_is_a_best_one_where_scores_tie() -> None:
    """One head: half of the scores are exactly zero; keys above and below are not misplaced."""
    shape = Indexer(num_heads=1)
    inputs = random_inputs(shape, seed=2)
    scores = index_scores(shape, *inputs)
    _, got = ours_scored(shape, ours_projected(shape, *inputs))
    tied = margins(scores, shape.topk) == 0
    assert tied.mean() > 0.2
    for token, row in enumerate(got):
        left_out = set(range(token + 1)) - row
        assert max(row) <= token
        assert len(row) == min(shape.topk, token + 1)
        if left_out:
            assert scores[token, list(row)].min() >= scores[token, list(left_out)].max() - 1e-5


def test_the_hadamard_rotation_changes_no_score() -> None:
    """The original rotates query and key before it quantises them; the rotation is orthogonal."""
    for name in ("small", "published heads and head size", "yarn"):
        inputs = random_inputs(INDEXERS[name])
        plain = index_scores(INDEXERS[name], *inputs)
        turned = index_scores(INDEXERS[name], *inputs, with_hadamard=True)
        np.testing.assert_allclose(turned, plain, atol=1e-12)


def test_the_demo_before_november_2025_picked_other_keys(shape: Indexer) -> None:
    """It rotated interleaved pairs, which the published weights were not trained with."""
    inputs = random_inputs(shape)
    _, got = ours_scored(shape, ours_projected(shape, *inputs))
    before = chosen_sets(index_scores(shape, *inputs, interleaved=True), shape.topk)
    differing = [ours != old for ours, old in zip(got, before, strict=True)][shape.topk :]
    assert np.mean(differing) > 0.5


def test_transformers_picks_the_published_keys() -> None:
    """The oracle of the other tests, itself against the definition."""
    model = tiny_transformers_model(num_hidden_layers=1, index_n_heads=16, index_topk=12)
    indexer = model.model.layers[0].self_attn.indexer
    seen: dict[str, torch.Tensor] = {}

    def remember(_: object, arguments: tuple[torch.Tensor, ...], chosen: torch.Tensor) -> None:
        seen.update(hidden=arguments[0][0], query_latent=arguments[1][0], chosen=chosen[0])

    indexer.register_forward_hook(remember)
    with torch.inference_mode():
        model(torch.randint(0, 256, (1, NUM_TOKENS), generator=torch.Generator().manual_seed(0)))
    shape = Indexer(hidden_size=64, latent_size=48, num_heads=16)
    tensors = {name: value.double().numpy() for name, value in indexer.state_dict().items()}
    hidden, latent = seen["hidden"].double().numpy(), seen["query_latent"].double().numpy()
    scores = index_scores(shape, tensors, hidden, latent)
    clear = [row for row in (margins(scores, 12) > 1e-5).nonzero()[0] if row >= 12]
    assert len(clear) > 0.8 * (NUM_TOKENS - 12)
    wanted = chosen_sets(scores, 12)
    assert [set(seen["chosen"][row].tolist()) for row in clear] == [wanted[row] for row in clear]
