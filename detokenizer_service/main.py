"""The detokenizer process: token ids become text."""

from detokenizer_service.decode import Vocabulary
from detokenizer_service.service import Detokenizer
from runtime import model_info, tokenizer_files
from runtime.config import ServerConfig
from runtime.service import Boot, run, run_text_service


def load_detokenizer(config: ServerConfig) -> Detokenizer:
    """Raises StartupError with the cause and the flag that mends it."""
    if config.skip_tokenizer_init:
        return Detokenizer(None)
    return Detokenizer(Vocabulary(tokenizer_files.load(model_info.tokenizer_dir(config))))


def main(boot: Boot) -> None:
    run_text_service(boot, load_detokenizer(boot.config))


if __name__ == "__main__":
    run(main)
