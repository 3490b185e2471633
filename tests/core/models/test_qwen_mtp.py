"""The layer that drafts for Qwen3-Next and Qwen3.5 MoE computes what is published of it."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tests.fixtures.paged_models import reference_ops, scattered_pages
from tests.fixtures.qwen_mtp import (
    OurDraft,
    TheirDraft,
    save_with_draft,
    their_models,
)

from mortise.checkpoint import CheckpointTensors, ModelDirectory, load_weights
from mortise.errors import (
    MissingTensorError,
    ModelConfigError,
    TensorMismatchError,
    UnexpectedTensorError,
)
from mortise.layers.context import LayerContext
from mortise.models.registry import family_of
from mortise.parallel.group import ExpertParallelGroup
from mortise.spec.roles import ForwardMode

if TYPE_CHECKING:
    from pathlib import Path

NEXT, MOE_TEXT = "qwen3_next", "qwen3_5_moe_text"
TOLERANCE = 1e-4
NUM_ROWS = 140
"""More than two pages of 64."""

YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "partial_rotary_factor": 0.5,
}
SIZES: dict[str, dict[str, Any]] = {
    "two query heads a key head": {},
    "tied, one key head, half a head rotated": {
        "tie_word_embeddings": True,
        "num_key_value_heads": 1,
        "partial_rotary_factor": 0.5,
    },
    "biases, as many key heads as query heads, large epsilon": {
        "attention_bias": True,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-3,
    },
    "yarn, four experts a token": {"rope_parameters": YARN, "num_experts_per_tok": 4},
    "no layer of the model is a delta net": {
        "num_hidden_layers": 2,
        "layer_types": ["full_attention"] * 2,
    },
}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    f"{model_type}, {name}": {"model_type": model_type, **fields}
    for model_type in (NEXT, MOE_TEXT)
    for name, fields in SIZES.items()
} | {
    "qwen3_next, weights not normalised": {"model_type": NEXT, "norm_topk_prob": False},
    "qwen3_next, dense layers by step and by list": {
        "model_type": NEXT,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [0, 3],
        "intermediate_size": 56,
    },
}
USUAL = [f"{model_type}, two query heads a key head" for model_type in (NEXT, MOE_TEXT)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(params=CONFIGURATIONS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=USUAL)
def usual(request: pytest.FixtureRequest) -> str:
    return request.param


@cache
def theirs(name: str) -> tuple[torch.nn.Module, TheirDraft]:
    return their_models(**CONFIGURATIONS[name])


@cache
def ours(name: str, root: Path) -> OurDraft:
    path = root / str(list(CONFIGURATIONS).index(name))
    return OurDraft(save_with_draft(path, *theirs(name)))


@cache
@torch.inference_mode()
def rows_of(name: str, seed: int = 0, count: int = NUM_ROWS) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of the token after each position, and the main model's normalised states."""
    main, _ = theirs(name)
    tokens = torch.randint(0, 256, (count + 1,), generator=torch.Generator().manual_seed(seed))
    hidden = main.model(tokens[:-1].unsqueeze(0)).last_hidden_state[0]
    return main.model.embed_tokens(tokens[1:]), hidden


@cache
def expected(name: str, seed: int = 0, count: int = NUM_ROWS) -> torch.Tensor:
    return theirs(name)[1](*rows_of(name, seed, count))


def assert_close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    assert got.shape == wanted.shape
    difference = float((got - wanted).abs().max())
    assert difference < TOLERANCE, f"hidden states differ by {difference}"


def test_logits_of_the_token_after_the_next(name: str, root: Path) -> None:
    our = ours(name, root)
    our.poison()
    request = (*rows_of(name), NUM_ROWS, scattered_pages(NUM_ROWS))
    got = our.forward(ForwardMode.PREFILL, [request])
    assert_close(got, expected(name))
    with torch.inference_mode():
        their_logits = theirs(name)[0].lm_head(expected(name))
        our_logits = our.main.logits(got)
    assert their_logits.abs().max() > 1.0
    assert_close(our_logits, their_logits)


def test_every_part_of_the_definition_matters(usual: str) -> None:
    """Otherwise the comparison would not notice another order, norm or position."""
    _, draft = theirs(usual)
    embeddings, hidden = rows_of(usual)
    order = [*reversed(range(NUM_ROWS - 1)), NUM_ROWS - 1]
    others = {
        "hidden state before embedding": draft(hidden, embeddings),
        "embedding alone": draft(embeddings, torch.zeros_like(hidden)),
        "hidden state alone": draft(torch.zeros_like(embeddings), hidden),
        "the row alone": draft(embeddings[-1:], hidden[-1:]),
        "other positions of those before": draft(embeddings[order], hidden[order]),
    }
    for what, other in others.items():
        assert (other - expected(usual))[-1].abs().max() > 100 * TOLERANCE, what


def test_chunks_then_extension_then_single_rows(name: str, root: Path) -> None:
    our = ours(name, root)
    our.poison()
    embeddings, hidden = rows_of(name)
    pages = scattered_pages(NUM_ROWS)
    cuts = [
        *[(ForwardMode.PREFILL, count) for count in (17, 50, 3)],
        *[(ForwardMode.DRAFT_EXTEND, 4)] * 3,
        *[(ForwardMode.DECODE, 1)] * 5,
        (ForwardMode.DRAFT_EXTEND, 2),
        *[(ForwardMode.DECODE, 1)] * (NUM_ROWS - 89),
    ]
    start, got = 0, []
    for mode, count in cuts:
        own = slice(start, start + count)
        start += count
        got.append(our.forward(mode, [(embeddings[own], hidden[own], start, pages)]))
    assert start == NUM_ROWS
    assert_close(torch.cat(got), expected(name))


def test_rejected_rows_are_written_again(usual: str, root: Path) -> None:
    """What was drafted past the accepted tokens is not seen by those that come instead."""
    our = ours(usual, root)
    our.poison()
    embeddings, hidden = rows_of(usual)
    wrong_embeddings, wrong_hidden = rows_of(usual, seed=5)
    pages = scattered_pages(NUM_ROWS)
    our.forward(ForwardMode.PREFILL, [(embeddings[:62], hidden[:62], 62, pages)])
    for length in (63, 64, 65):
        own = slice(length - 1, length)
        our.forward(ForwardMode.DECODE, [(wrong_embeddings[own], wrong_hidden[own], length, pages)])
    own = slice(62, 66)
    request = (embeddings[own], hidden[own], 66, pages)
    assert_close(our.forward(ForwardMode.DRAFT_EXTEND, [request]), expected(usual)[own])


def test_a_batch_is_each_request_alone(usual: str, root: Path) -> None:
    our = ours(usual, root)
    our.poison()
    lens = (70, 1, 23)
    rows = [rows_of(usual, seed, length + 4) for seed, length in enumerate(lens)]
    pages = [[5, 2], [7], [9]]
    prompts = [
        (embeddings[:length], hidden[:length], length, own)
        for (embeddings, hidden), length, own in zip(rows, lens, pages, strict=True)
    ]
    got = [our.forward(ForwardMode.PREFILL, prompts).split(lens)]
    for mode, start, count in ((ForwardMode.DRAFT_EXTEND, 0, 3), (ForwardMode.DECODE, 3, 1)):
        requests = [
            (
                embeddings[length + start : length + start + count],
                hidden[length + start : length + start + count],
                length + start + count,
                own,
            )
            for (embeddings, hidden), length, own in zip(rows, lens, pages, strict=True)
        ]
        got.append(our.forward(mode, requests).split(count))
    for seed, length in enumerate(lens):
        together = torch.cat([one[seed] for one in got])
        assert_close(together, expected(usual, seed, length + 4))


def test_a_rank_without_requests(usual: str, root: Path) -> None:
    assert ours(usual, root).forward(ForwardMode.IDLE, []).shape == (0, 64)


def test_a_chain_of_drafts(usual: str, root: Path) -> None:
    """Every further draft reads the layer's own normalised state and the token drafted before."""
    our, (main, draft) = ours(usual, root), theirs(usual)
    our.poison()
    embeddings, hidden = rows_of(usual, 3, 30)
    pages = [4]
    out = our.forward(ForwardMode.PREFILL, [(embeddings, hidden, 30, pages)])[-1:]
    with torch.inference_mode():
        token = our.main.logits(out).argmax(-1)
        for length in range(31, 35):
            their_out = draft(embeddings, hidden)[-1:]
            their_token = main.lm_head(their_out).argmax(-1)
            assert token.tolist() == their_token.tolist()
            embeddings = torch.cat([embeddings, main.model.embed_tokens(their_token)])
            hidden = torch.cat([hidden, their_out])
            request = (our.main.embed(token), out, length, pages)
            out = our.forward(ForwardMode.DECODE, [request])
            token = our.main.logits(out).argmax(-1)
            assert_close(out, draft(embeddings, hidden)[-1:])


def test_what_the_layer_is_called_and_caches(usual: str, root: Path) -> None:
    our = ours(usual, root)
    assert list(our.decisions) == ["mtp.layers.0.mlp"]
    # Two heads of keys and of values, 16 numbers each, 24 pages of 64 rows, in float32.
    assert our.pool.num_bytes == 2 * 2 * 16 * 24 * 64 * 4
    assert not any(parameter.isnan().any() for parameter in our.draft.parameters())
    assert set(our.report.skipped.values()) == {"the main model's"}
    assert set(our.report.absent) == {"mtp.embed_tokens.weight", "mtp.lm_head.weight"}
    stored = set(theirs(usual)[1].tensors())
    assert set(our.report.placed) == stored
    # Qwen3.5-122B-A10B has 785: 17, and 3 of each of its 256 experts (llama.cpp, pull 20533).
    assert len(stored) == 17 + 3 * 6


def changed(usual: str, path: Path, tensors: dict[str, Any]) -> Path:
    return save_with_draft(path, *theirs(usual), tensors)


@pytest.mark.parametrize(
    "name",
    [
        "mtp.fc.weight",
        "mtp.pre_fc_norm_embedding.weight",
        "mtp.pre_fc_norm_hidden.weight",
        "mtp.norm.weight",
        "mtp.layers.0.self_attn.q_norm.weight",
        "mtp.layers.0.mlp.shared_expert_gate.weight",
        "mtp.layers.0.mlp.experts.5.up_proj.weight",
    ],
)
def test_a_missing_tensor(tmp_path: Path, name: str) -> None:
    with pytest.raises(MissingTensorError, match=name.replace(".", r"\.")):
        OurDraft(changed(USUAL[0], tmp_path, {name: None}))


@pytest.mark.parametrize(
    "name",
    [
        "mtp.fc.bias",
        "mtp.layers.0.linear_attn.A_log",
        "mtp.layers.0.mlp.experts.6.up_proj.weight",
        "mtp.shared_head.norm.weight",
    ],
)
def test_a_tensor_that_nobody_knows(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnexpectedTensorError, match=name.replace(".", r"\.")):
        OurDraft(changed(USUAL[1], tmp_path, {name: torch.ones(2)}))


def test_a_wrong_shape(tmp_path: Path) -> None:
    with pytest.raises(TensorMismatchError, match=r"mtp\.fc\.weight is \[64, 64\]"):
        OurDraft(changed(USUAL[0], tmp_path, {"mtp.fc.weight": torch.ones(64, 64)}))


def test_further_layers_are_left_with_the_reason(tmp_path: Path) -> None:
    more = {"mtp.layers.1.input_layernorm.weight": torch.ones(64), "mtp.layers.10.x": torch.ones(1)}
    report = OurDraft(changed(USUAL[0], tmp_path, more)).report
    for name in more:
        assert report.skipped[name] == "only the first multi-token prediction layer drafts"


def test_copies_of_embedding_and_head(tmp_path: Path) -> None:
    main, _ = theirs(USUAL[0])
    copies = {
        "mtp.embed_tokens.weight": main.model.embed_tokens.weight.detach(),
        "mtp.lm_head.weight": main.lm_head.weight.detach(),
    }
    same = OurDraft(changed(USUAL[0], tmp_path / "same", copies))
    assert not same.report.absent
    for number, (name, what) in enumerate(zip(copies, ("embedding", "head"), strict=True)):
        path = changed(USUAL[0], tmp_path / str(number), {**copies, name: copies[name] + 1})
        with pytest.raises(
            TensorMismatchError, match=f"{name} differs from the main model's {what}"
        ):
            OurDraft(path)


def test_the_head_of_a_tied_model_is_its_embedding(tmp_path: Path) -> None:
    name = f"{NEXT}, tied, one key head, half a head rotated"
    embedding = theirs(name)[0].model.embed_tokens.weight.detach()
    path = save_with_draft(tmp_path, *theirs(name), {"mtp.lm_head.weight": embedding.clone()})
    assert "mtp.lm_head.weight" in OurDraft(path).report.placed


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mtp_num_hidden_layers": 0}, "has no multi-token prediction layer"),
        ({"mtp_use_dedicated_embeddings": True}, "an embedding of its own"),
        ({"mtp_num_hidden_layers": -1}, "mtp_num_hidden_layers"),
    ],
)
def test_configurations_without_such_a_layer(fields: dict[str, Any], message: str) -> None:
    for name in USUAL:
        raw = theirs(name)[0].config.to_dict() | fields
        context = LayerContext(ops=reference_ops())
        with pytest.raises(ModelConfigError, match=message):
            family_of(raw).build_draft(raw, context)


def test_silence_of_the_configuration_is_no_answer() -> None:
    """Qwen3-Next says nothing of its layer; whether it is there is seen by the tensors."""
    raw = theirs(USUAL[0])[0].config.to_dict()
    assert "mtp_num_hidden_layers" not in raw
    family_of(raw).build_draft(raw, LayerContext(ops=reference_ops()))


def test_ranks_hold_their_share_of_the_experts(usual: str, root: Path) -> None:
    whole = ours(usual, root)
    directory = ModelDirectory.open(root / str(list(CONFIGURATIONS).index(usual)))
    raw, family = directory.config, family_of(directory.config)
    for rank in range(2):
        group = ExpertParallelGroup(rank=rank, world_size=2)
        draft = family.build_draft(raw, LayerContext(ops=reference_ops(), group=group))
        report = load_weights(
            CheckpointTensors(directory.weight_files()),
            family.draft_placements(draft, whole.main),
            family.draft_skips(raw, group),
        )
        own = slice(3 * rank, 3 * rank + 3)
        for mine, all_of_them in zip(
            (draft.layer.mlp.experts.w13, draft.layer.mlp.experts.w2),
            (whole.draft.layer.mlp.experts.w13, whole.draft.layer.mlp.experts.w2),
            strict=True,
        ):
            assert torch.equal(mine.weight, all_of_them.weight[own])
        others = [name for name, why in report.skipped.items() if why == "experts of other ranks"]
        assert len(others) == 9


def test_the_whole_model_of_texts_and_pictures(root: Path) -> None:
    """Its text model has another name in the checkpoint, the layer that drafts has not."""
    name = USUAL[1]
    raw = theirs(name)[0].config.to_dict() | {"mtp_num_hidden_layers": 1}
    whole = {"model_type": "qwen3_5_moe", "text_config": raw, "vision_config": {}}
    context = LayerContext(ops=reference_ops())
    family = family_of(whole)
    draft, main = family.build_draft(whole, context), family.build(whole, context)
    names = {one.name for one in family.draft_placements(draft, main) if not one.optional}
    assert names == set(theirs(name)[1].tensors())
    raw["mtp_num_hidden_layers"] = 0
    with pytest.raises(ModelConfigError, match="has no multi-token prediction layer"):
        family.build_draft(whole, context)
