"""The detokenizer process: token ids become text."""

from quartet.detokenizer_service.decode import Vocabulary
from quartet.detokenizer_service.service import Detokenizer
from quartet.runtime.config import ServerConfig
from quartet.runtime.model_files import model_info, tokenizer_files
from quartet.runtime.service import Boot, run, run_text_service


def load_detokenizer(config: ServerConfig) -> Detokenizer:
    """Raises StartupError with the cause and the flag that mends it."""
    if config.skip_tokenizer_init:
        return Detokenizer(None)
    return Detokenizer(Vocabulary(tokenizer_files.load(model_info.tokenizer_dir(config))))


def main(boot: Boot) -> None:
    run_text_service(boot, load_detokenizer(boot.config))


if __name__ == "__main__":
    run(main)
