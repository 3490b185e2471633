import torch

from mortise import LLM, EngineConfig
from mortise.engine.threads import SMALL_MODEL_BYTES, decide_threads
from tests.fixtures.tiny_models import save_tiny


def test_what_is_asked_for_outranks_the_size():
    threads, decision = decide_threads(3, "engine.toml", 1)
    assert (threads, decision.value, decision.source) == (3, "3", "engine.toml")


def test_a_small_model_gets_one_thread_and_a_large_one_what_torch_chose():
    assert decide_threads(None, "default", SMALL_MODEL_BYTES)[0] == 1
    threads, decision = decide_threads(None, "default", SMALL_MODEL_BYTES + 1)
    assert threads is None
    assert decision.value == str(torch.get_num_threads())


def test_the_process_keeps_its_number(tmp_path):
    before = torch.get_num_threads()
    llm = LLM(EngineConfig(model=str(save_tiny(tmp_path / "model")), threads=before + 1))
    llm.generate([[1, 2, 3]])
    assert torch.get_num_threads() == before
    (decision,) = [one for one in llm.decisions if one.subject == "threads"]
    assert decision.value == str(before + 1)
