import json

import pytest

from mortise import LLM, EngineConfig, MortiseError, SamplingParams
from mortise.engine.default_sampling import default_sampling
from mortise.errors import ModelConfigError
from tests.fixtures.tiny_models import save_tiny


def test_silence_and_no_sampling_are_greedy():
    assert default_sampling({}) == SamplingParams()
    assert default_sampling({"do_sample": False, "temperature": 0.6}).is_greedy


def test_what_the_model_recommends_is_taken_and_nothing_else():
    found = default_sampling({"do_sample": True, "top_p": 0.95, "temperature": None, "top_k": 20})
    assert found == SamplingParams(temperature=1.0, top_p=0.95, top_k=20)


def test_token_healing_is_recommended_with_sampling_or_without():
    assert default_sampling({"token_healing": True}) == SamplingParams(token_healing=True)
    assert default_sampling({"do_sample": True, "token_healing": True}) == SamplingParams(
        temperature=1.0, token_healing=True
    )
    assert not default_sampling({"token_healing": None}).token_healing


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -1), ("top_p", 2.0), ("top_k", "many"), ("token_healing", "yes")],
)
def test_a_wrong_recommendation_names_the_file_the_value_and_the_remedy(field, value):
    with pytest.raises(ModelConfigError) as caught:
        default_sampling({"do_sample": True, field: value})
    message = str(caught.value)
    assert f"generation_config.json: {field} is {value!r}" in message
    assert "expected:" in message
    assert "remedy:" in message


def test_a_request_outranks_the_model_and_the_decision_is_listed(tmp_path):
    path = save_tiny(tmp_path / "model")
    recommended = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
    (path / "generation_config.json").write_text(json.dumps(recommended), encoding="utf-8")
    llm = LLM(EngineConfig(model=str(path), dtype="float32"))
    assert llm.default_sampling == SamplingParams(temperature=0.6, top_p=0.9)
    (decision,) = [one for one in llm.decisions if one.subject == "sampling"]
    assert decision.value == "temperature 0.6, top_p 0.9, top_k 0"
    greedy = [llm.generate([[1, 2, 3]], SamplingParams(max_tokens=6))[0] for _ in range(2)]
    assert greedy[0].token_ids == greedy[1].token_ids
    (sampled,) = llm.generate([[1, 2, 3]])
    again = SamplingParams(temperature=0.6, top_p=0.9, seed=sampled.seed)
    assert llm.generate([[1, 2, 3]], again)[0].token_ids == sampled.token_ids


def test_token_healing_alone_is_a_decision_too(tmp_path):
    path = save_tiny(tmp_path / "model")
    text = json.dumps({"token_healing": True})
    (path / "generation_config.json").write_text(text, encoding="utf-8")
    llm = LLM(EngineConfig(model=str(path), dtype="float32"))
    (decision,) = [one for one in llm.decisions if one.subject == "sampling"]
    assert (decision.value, decision.rule) == ("greedy, token healing", "checkpoint")


def test_a_wrong_recommendation_stops_before_weights_are_read(tmp_path):
    path = save_tiny(tmp_path / "model")
    text = json.dumps({"do_sample": True, "top_p": 0})
    (path / "generation_config.json").write_text(text, encoding="utf-8")
    (path / "model.safetensors").write_bytes(b"never read")
    with pytest.raises(MortiseError, match="top_p is 0"):
        LLM(EngineConfig(model=str(path)))
