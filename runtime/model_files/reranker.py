"""Which generating models rank documents: those that were trained to answer yes or no to a query and a document.

They have the files of any chat model. So they are known by their name, or by a chat template that asks for the answer.
"""

import re
from pathlib import Path

from quartet.runtime.config import ServerConfig
from quartet.runtime.model_files.files import MAX_SETTINGS_BYTES, read_small_text
from quartet.runtime.model_files.model_info import ModelInfo

FAMILY = "Qwen3ForCausalLM"
NAMED = re.compile(r"qwen3[-_.]?reranker", re.IGNORECASE)
ASKS = 'answer can only be "yes" or "no"'


def ranks_by_answer(model: ModelInfo, config: ServerConfig) -> bool:
    """Whether the model is a Qwen3-Reranker, served for generation."""
    if model.is_embedding or model.architecture != FAMILY:
        return False
    names = (config.model_path, config.served_model_name or "", model.path)
    return has_own_template(config) or any(NAMED.search(name) for name in names)


def has_own_template(config: ServerConfig) -> bool:
    """Whether --chat-template is a file that asks whether a document fits. Raises StartupError."""
    file = Path(config.chat_template or "")
    if config.chat_template is None or not file.is_file():
        return False
    return ASKS in read_small_text(file, MAX_SETTINGS_BYTES)
