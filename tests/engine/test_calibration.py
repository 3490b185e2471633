"""What inputs are said to be is what transformers' model of the same weights is given."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F

from mortise import LLM, EngineConfig
from mortise.checkpoint.quantization.write.input_range import InputRange
from mortise.config import DraftConfig
from mortise.engine.calibration import calibrate, first_sequences, own_sequences
from mortise.engine.input_ranges import InputRanges
from tests.fixtures.nextn_models import TransformersNextN

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> LLM:
    return LLM(model=str(tiny_model))


SEQUENCES = [[257, *range(1, 41)], [256, 7, 9], list(range(100, 130))]


def rows_of_experts(
    module: Any, arguments: tuple[torch.Tensor, ...]
) -> Iterator[tuple[str, torch.Tensor]]:
    """What every expert of transformers' fused module is given, by projection."""
    hidden, chosen, _ = arguments
    for expert, (gate_up, down) in enumerate(
        zip(module.gate_up_proj, module.down_proj, strict=True)
    ):
        rows = hidden[(chosen == expert).any(dim=-1)]
        gate, up = F.linear(rows, gate_up).chunk(2, dim=-1)
        assert down.shape[1] == gate.shape[1]
        yield f"{expert}.gate_proj", rows
        yield f"{expert}.up_proj", rows
        yield f"{expert}.down_proj", F.silu(gate) * up


def watched(root: torch.nn.Module) -> dict[str, list[torch.Tensor]]:
    """What every projection of transformers' module is given from now on, by name."""
    seen: dict[str, list[torch.Tensor]] = defaultdict(list)
    for name, module in root.named_modules():
        if name.endswith(".experts"):

            def watch(module: Any, arguments: Any, name: str = name) -> None:
                for projection, rows in rows_of_experts(module, arguments):
                    seen[f"{name}.{projection}"].append(rows)

            module.register_forward_pre_hook(watch)
        elif isinstance(module, torch.nn.Linear):

            def note(module: Any, arguments: Any, name: str = name) -> None:
                seen[name].append(arguments[0])

            module.register_forward_pre_hook(note)
    return seen


def ranges(seen: dict[str, list[torch.Tensor]]) -> dict[str, InputRange]:
    return {
        name: InputRange(
            float(min(rows.min() for rows in found if rows.numel())),
            float(max(rows.max() for rows in found if rows.numel())),
        )
        for name, found in seen.items()
        if any(rows.numel() for rows in found)
    }


@torch.no_grad()
def seen_by_transformers(model: Path) -> dict[str, InputRange]:
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    seen = watched(theirs)
    for sequence in SEQUENCES:
        theirs(torch.tensor([sequence]))
    return ranges(seen)


def test_ranges_are_those_of_transformers(llm: LLM, tiny_model: Path) -> None:
    found = calibrate(llm, SEQUENCES)
    assert (found.sequences, found.tokens) == (3, 74)
    expected = seen_by_transformers(tiny_model)
    quantisable = {
        name
        for name in expected
        if "layers" in name and not name.endswith((".weights_proj", ".mlp.gate"))
    }
    assert len(quantisable) == 3 * 7 + 3 + 2 * 3 * (8 + 1)
    assert quantisable <= set(found.input_ranges)
    for name in quantisable:
        own, theirs = found.input_ranges[name], expected[name]
        assert own.low == pytest.approx(theirs.low, rel=1e-3, abs=1e-4), name
        assert own.high == pytest.approx(theirs.high, rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize("model_type", ["deepseek_v32", "glm4_moe"])
@torch.no_grad()
def test_ranges_of_a_draft_are_those_of_transformers(tmp_path: Path, model_type: str) -> None:
    theirs = TransformersNextN(model_type)
    path = theirs.save(tmp_path / "model")
    found = calibrate(LLM(EngineConfig(model=path, draft=DraftConfig(num_tokens=1))), SEQUENCES)
    seen = watched(theirs.layer)
    for sequence in SEQUENCES:
        # A prompt is read with the token that follows it.
        next_token = int(theirs.model(torch.tensor([sequence])).logits[0, -1].argmax())
        theirs.states(torch.tensor([*sequence, next_token]))
    expected = {
        f"model.layers.3.{name.removeprefix('mtp_block.')}": one
        for name, one in ranges(seen).items()
        if not name.endswith((".weights_proj", ".mlp.gate"))
    }
    assert len(expected) >= 1 + 4 + 3 + 3 * 6
    for name, one in expected.items():
        own = found.input_ranges[name]
        assert own.low == pytest.approx(one.low, rel=1e-3, abs=1e-4), name
        assert own.high == pytest.approx(one.high, rel=1e-3, abs=1e-4), name
    # Those of the main model are what they are without a draft.
    alone = calibrate(LLM(model=str(path)), SEQUENCES).input_ranges
    assert {name: found.input_ranges[name] for name in alone} == alone


def test_a_prompt_that_fills_the_context_is_read_with_its_draft(tmp_path: Path) -> None:
    path = TransformersNextN("deepseek_v32", max_position_embeddings=32).save(tmp_path / "model")
    llm = LLM(EngineConfig(model=path, draft=DraftConfig(num_tokens=1)))
    found = calibrate(llm, [list(range(32))])
    assert found.tokens == 32
    assert "model.layers.3.eh_proj" in found.input_ranges
    assert [len(one) for one in own_sequences(llm)] == [32] * 16


def test_the_model_computes_as_before(llm: LLM) -> None:
    before = llm.logits(SEQUENCES[0])
    contexts = [layer.mlp.context for layer in llm.loaded.model.model.layers[1:]]  # type: ignore[attr-defined]
    calibrate(llm, SEQUENCES[1:2])
    assert torch.equal(llm.logits(SEQUENCES[0]), before)
    for layer, context in zip(llm.loaded.model.model.layers[1:], contexts, strict=True):  # type: ignore[attr-defined]
        assert layer.mlp.context is context
    assert not any(module._forward_pre_hooks for module in llm.loaded.model.modules())  # type: ignore[attr-defined]


def test_an_expert_that_no_token_reached_has_the_range_of_all(llm: LLM) -> None:
    # Two tokens reach at most six of the eight experts.
    found = calibrate(llm, [[1, 2]]).input_ranges
    for projection in ("gate_proj", "up_proj", "down_proj"):
        experts = [found[f"model.layers.1.mlp.experts.{n}.{projection}"] for n in range(8)]
        widest = InputRange(
            min(expert.low for expert in experts), max(expert.high for expert in experts)
        )
        assert experts.count(widest) >= 2
        assert any(expert != widest for expert in experts)


def test_rows_are_gathered() -> None:
    seen = InputRanges()
    seen.see(["a", "b"], torch.tensor([[1.0, -2.0]]))
    seen.see(["a"], torch.tensor([[0.5, 3.0]]))
    seen.see(["c"], torch.empty(0, 2))
    assert seen.ranges == {"a": InputRange(-2.0, 3.0), "b": InputRange(-2.0, 1.0)}
    assert seen.ranges["a"].amax == 3.0
    seen.share(["a", "b", "c"])
    assert seen.ranges["c"] == InputRange(-2.0, 3.0)
    seen.share(["nobody", "nothing"])
    assert "nobody" not in seen.ranges


def test_the_model_writes_the_same_text_every_time(llm: LLM) -> None:
    told: list[tuple[int, int]] = []
    sequences = own_sequences(llm, lambda *progress: told.append(progress))
    assert [len(one) for one in sequences] == [128] * 16
    assert len({one[0] for one in sequences}) > 8
    assert told[-1] == (16 * 127, 16 * 127)
    assert own_sequences(llm) == sequences


def test_the_beginning_of_texts() -> None:
    texts = [list(range(300)), [], [7], list(range(5000))]
    sequences = first_sequences(texts, 1024)
    assert [len(one) for one in sequences] == [128, 128, 44, 1, *[128] * 12]
    assert sequences[2][-1] == 299
    assert [len(one) for one in first_sequences(texts, 100)][:4] == [100, 100, 100, 1]
