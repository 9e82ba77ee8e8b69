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
ASKS = 'answer can only be "yes" or "no"'


@dataclass(slots=True)
class AnswerRanking:
    """How a model is asked whether a document fits."""

    own_template: bool  # by that of --chat-template
    labels: list[int] = field(default_factory=list)  # tokens of both answers, once the tokenizer has told them


def answer_ranking(model: ModelInfo, config: ServerConfig) -> AnswerRanking | None:
    """Of a Qwen3-Reranker that is served for generation; None for any other model. Raises StartupError."""
    if model.is_embedding or model.architecture != FAMILY:
        return None
    own_template = has_own_template(config)
    names = (config.model_path, config.served_model_name or "", model.path)
    if own_template or any(NAMED.search(Path(name).name) for name in names):
        return AnswerRanking(own_template)
    return None


def has_own_template(config: ServerConfig) -> bool:
    """Whether --chat-template is a file that asks whether a document fits. Raises StartupError."""
    file = Path(config.chat_template or "")
    return config.chat_template is not None and file.is_file() and ASKS in read_small_text(file, MAX_TEMPLATE_BYTES)
