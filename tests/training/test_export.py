import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from tests.training import tiny
from training import baselines, export, tokenizer
from training.attention import DenseAttention, IndexedAttention
from training.baselines import count, save
from training.data import load_tokens
from training.evaluate import documents, model_score, mtp_score, windows
from training.language_model import LanguageModel, initialise
from training.train import prepare, run_stage

from mortise.checkpoint import builtin_model_path
from mortise.evaluation.ngrams import Ngrams
from mortise.evaluation.texts import NGRAMS_FILE, TEXT_FILE, read_documents


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that the scripts before the export leave behind, tiny."""
    work = tmp_path_factory.mktemp("work")
    for name in ("corpus", "data", "baselines", "tokenizer", "run"):
        (work / name).mkdir()
    tiny.write_data(work / "data")
    parts = {}
    for name in ("train", "held_out"):
        tokens = load_tokens(work / "data" / f"{name}.bin")
        parts[name] = {"tokens": len(tokens), "documents": 1, "text_bytes": 3 * len(tokens)}
    (work / "data" / "data.json").write_text(json.dumps(parts))
    shares = {"bytes": 10, "library_bytes": 5, "documentation_bytes": 4, "test_bytes": 1}
    (work / "corpus" / "corpus.json").write_text(json.dumps({"train": shares}))
    save(count(load_tokens(work / "data" / "train.bin"), 64), work / "baselines/ngrams.safetensors")
    tokenizer.save(tokenizer.train(["def f(): pass"], 260), work / "tokenizer", 64)
    for _ in tiny.recipe().stages:
        run = prepare(tiny.recipe(), work / "data", work / "run")
        assert run is not None
        run_stage(run)
    return work


@pytest.fixture(scope="module")
def exported(work: Path) -> Path:
    output = work / "model"
    (work / "recipe.toml").write_text(tiny.as_toml())
    (work / "corpus" / "held_out.jsonl").write_text('{"path": "Lib/a.py", "text": "x = 1"}\n')
    arguments = [str(work), str(output), "--recipe", str(work / "recipe.toml")]
    arguments += ["--held-out", str(work / "held-out")]
    result = CliRunner().invoke(export.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return output


def test_every_file_is_there(exported: Path) -> None:
    assert {file.name for file in exported.iterdir()} == {
        "LICENSE",
        "LICENSE.PSF",
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_the_recommendation_is_the_one_that_is_shipped(exported: Path) -> None:
    found = json.loads((exported / "generation_config.json").read_text())
    shipped = json.loads((builtin_model_path() / "generation_config.json").read_text())
    assert found == shipped


def test_the_held_out_part_is_what_the_command_reads(work: Path, exported: Path) -> None:
    documents = read_documents(work / "held-out" / TEXT_FILE)
    assert [(document.name, document.text) for document in documents] == [("Lib/a.py", "x = 1")]
    assert Ngrams.load(work / "held-out" / NGRAMS_FILE).vocab_size == 64


def test_names_and_dtypes_are_the_hubs(exported: Path) -> None:
    tensors = load_file(exported / "model.safetensors")
    for name in (
        "model.embed_tokens.weight",
        "model.layers.1.mlp.experts.7.gate_proj.weight",
        "model.layers.1.mlp.shared_experts.up_proj.weight",
        "model.layers.0.self_attn.indexer.k_norm.bias",
        "model.layers.2.eh_proj.weight",
        "model.layers.2.enorm.weight",
        "model.layers.2.hnorm.weight",
        "model.layers.2.shared_head.norm.weight",
        "model.layers.2.self_attn.kv_b_proj.weight",
    ):
        assert tensors[name].dtype == torch.bfloat16, name
    assert tensors["model.layers.2.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    assert "model.layers.2.embed_tokens.weight" not in tensors
    assert "lm_head.weight" not in tensors


def test_the_card_states_what_was_measured(work: Path, exported: Path) -> None:
    facts = json.loads((work / "run" / "facts.json").read_text())
    card = (exported / "README.md").read_text()
    for name in ("unigram", "bigram", "selected keys, 24 tokens", "recent keys, 64 tokens"):
        assert f"| {facts['measures'][name]['perplexity']:.2f} |" in card, name
    assert f"{facts['log'][-1]['tokens']:,} tokens" in card


def test_transformers_reads_it_and_agrees(exported: Path, recwarn: object) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.from_pretrained(exported)
    rope = config.rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == ("yarn", 4, 10000)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    ours = export.new_model(tiny.recipe())
    export.fill(ours, load_file(exported / "model.safetensors"))
    token_ids = torch.arange(2, 32)
    with torch.no_grad():
        expected = theirs(token_ids[None]).logits[0]
        attend = IndexedAttention(1, tiny.MODEL["index_topk"])
        logits = ours.main.logits(ours.main(token_ids, torch.arange(30), attend))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_windows_predict_every_token_but_bos_once() -> None:
    stream = torch.tensor([0, 5, 6, 7, 8, 1, 0, 9, 1], dtype=torch.uint16).numpy()
    assert [len(document) for document in documents(stream)] == [6, 3]
    found = [window.tolist() for window in windows(stream, 3)]
    assert found == [[0, 5, 6, 7], [7, 8, 1], [0, 9, 1]]
    targets = [token for window in found for token in window[1:]]
    assert sorted(targets) == sorted(baselines.pairs(stream)[1].tolist())


def test_the_scores_agree_with_the_training_loss() -> None:
    model = LanguageModel(tiny.recipe().model, has_indexer=True, compute_dtype=torch.float32)
    initialise(model, seed=0, embedding_std=1.0, num_layers=2)
    token_ids = torch.randint(2, 64, (18,), generator=torch.Generator().manual_seed(0))
    token_ids[0] = 0
    stream = token_ids.to(torch.uint16).numpy()
    measured = model_score(model, stream, 40, 64, lambda: DenseAttention(1))
    assert measured.predicted_tokens == 17
    with torch.no_grad():
        losses = model(token_ids[None], IndexedAttention(1, topk=8), with_mtp=True)
    assert losses.mtp is not None
    mtp = mtp_score(model, stream, 64, topk=8)
    assert mtp.predicted_tokens == 16
    assert mtp.nats_per_token == pytest.approx(losses.mtp.item(), rel=0.01)
    assert mtp.accuracy == pytest.approx(round(16 * mtp.accuracy) / 16)
