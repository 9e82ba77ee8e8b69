"""Builds the encoder of the served model from its files."""

from quartet.runtime.config import ServerConfig
from quartet.runtime.model_files import model_info, tokenizer_files
from quartet.runtime.model_files.model_info import ModelInfo
from quartet.tokenizer_service.answers import Filler
from quartet.tokenizer_service.encode import Encoder
from quartet.tokenizer_service.guarded_template import started_template


def load_encoder(config: ServerConfig, info: ModelInfo | None = None) -> Encoder:
    """Raises StartupError with the cause and the flag that mends it."""
    info = info or model_info.load(config)
    if config.skip_tokenizer_init:
        return Encoder(None, hidden_size=info.hidden_size)
    directory = model_info.tokenizer_dir(config)
    tokenizer = tokenizer_files.load(directory)
    filler = None
    if info.embedding is not None and (many := info.embedding.multi_vector) is not None:
        tokenizer_files.add_marks(tokenizer, many.marks)
        if many.expansion is not None:
            filler = Filler(
                tokenizer_files.filler_id(tokenizer, directory, many.expansion.token), many.expansion.attend
            )
    return Encoder(
        tokenizer,
        template=started_template(info, config),
        hidden_size=info.hidden_size,
        token_types=int(info.config.get("type_vocab_size") or 0) > 1,
        context_length=info.context_length,
        filler=filler,
    )
