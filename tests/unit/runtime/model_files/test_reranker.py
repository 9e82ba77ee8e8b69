"""Which models rank documents by their answer."""

import msgspec
import pytest

from quartet.runtime.config import ServerConfig
from quartet.runtime.model_files.model_info import ModelInfo
from quartet.runtime.model_files.reranker import ASKS, answer_ranking

QWEN3 = ModelInfo(
    path="/models/a",
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    vocab_size=10,
    hidden_size=4,
    context_length=64,
    eos_ids=[],
    config={},
)


@pytest.mark.parametrize(
    ("path", "architecture", "ranks"),
    [
        ("Qwen/Qwen3-Reranker-0.6B", "Qwen3ForCausalLM", True),
        ("/data/qwen3_reranker_4b", "Qwen3ForCausalLM", True),
        ("/data/qwen3-reranker/chat", "Qwen3ForCausalLM", False),
        ("Qwen/Qwen3-0.6B", "Qwen3ForCausalLM", False),
        ("Qwen/Qwen3-Reranker-0.6B", "Qwen2ForCausalLM", False),
        ("BAAI/bge-reranker-v2-gemma", "GemmaForCausalLM", True),
        ("google/gemma-2b", "GemmaForCausalLM", False),
        ("BAAI/bge-reranker-v2-gemma", "Qwen3ForCausalLM", False),
    ],
)
def test_a_model_is_known_by_the_last_part_of_its_name(path, architecture, ranks):
    model = msgspec.structs.replace(QWEN3, architecture=architecture)
    assert (answer_ranking(model, ServerConfig(model_path=path)) is not None) == ranks


def test_a_chat_template_that_asks_for_the_answer_is_used(tmp_path):
    template = tmp_path / "rank.jinja"
    template.write_text(f"Note that the {ASKS}. {{{{ messages[0].content }}}}")
    found = answer_ranking(QWEN3, ServerConfig(model_path="/models/a", chat_template=str(template)))
    assert found is not None and found.own_template
