"""Which generating models rank documents: those that were trained to answer yes or no to a query and a document.

They have the files of any chat model. So they are known by their name, or by a chat template that asks for the answer.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

from quartet.runtime.config import ServerConfig
from quartet.runtime.model_files.files import MAX_TEMPLATE_BYTES, read_small_text
from quartet.runtime.model_files.model_info import ModelInfo

FAMILY = "Qwen3ForCausalLM"
NAMED = re.compile(r"qwen3[-_.]?reranker", re.IGNORECASE)
BGE_FAMILY = "GemmaForCausalLM"
BGE_NAMED = re.compile(r"bge[-_.]?reranker[-_.]?v2[-_.]?gemma", re.IGNORECASE)
ASKS = 'answer can only be "yes" or "no"'


@dataclass(slots=True)
class AnswerRanking:
    """How a model is asked whether a document fits."""

    own_template: bool = False  # by that of --chat-template
    by_logit: bool = (
        False  # by that of "Yes" alone behind a prompt of BGE's, rather than by its share among two answers
    )
    labels: list[int] = field(default_factory=list)  # tokens of the answers, once the tokenizer has told them
    beginning: list[int] = field(default_factory=list)  # tokens that stand before any text, likewise


def answer_ranking(model: ModelInfo, config: ServerConfig) -> AnswerRanking | None:
    """Of a reranker that is served for generation; None for any other model. Raises StartupError."""
    if model.is_embedding or model.architecture not in (FAMILY, BGE_FAMILY):
        return None
    names = [Path(name).name for name in (config.model_path, config.served_model_name or "", model.path)]
    if model.architecture == BGE_FAMILY:
        return AnswerRanking(by_logit=True) if any(map(BGE_NAMED.search, names)) else None
    own_template = has_own_template(config)
    return AnswerRanking(own_template) if own_template or any(map(NAMED.search, names)) else None


def has_own_template(config: ServerConfig) -> bool:
    """Whether --chat-template is a file that asks whether a document fits. Raises StartupError."""
    file = Path(config.chat_template or "")
    return config.chat_template is not None and file.is_file() and ASKS in read_small_text(file, MAX_TEMPLATE_BYTES)
