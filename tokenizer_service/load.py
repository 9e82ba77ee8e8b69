"""Builds the encoder of the served model from its files."""

from quartet.runtime.config import ServerConfig
from quartet.runtime.model_files import model_info, tokenizer_files
from quartet.runtime.model_files.model_info import ModelInfo
from quartet.tokenizer_service.encode import Encoder
from quartet.tokenizer_service.guarded_template import started_template


def load_encoder(config: ServerConfig, info: ModelInfo | None = None) -> Encoder:
    """Raises StartupError with the cause and the flag that mends it."""
    info = info or model_info.load(config)
    if config.skip_tokenizer_init:
        return Encoder(None, hidden_size=info.hidden_size)
    return Encoder(
        tokenizer_files.load(model_info.tokenizer_dir(config)),
        template=started_template(info, config),
        hidden_size=info.hidden_size,
        token_types=int(info.config.get("type_vocab_size") or 0) > 1,
        context_length=info.context_length,
    )
