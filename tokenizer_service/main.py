"""The tokenizer process: text becomes token ids."""

from quartet.runtime.service import Boot, run, run_text_service
from quartet.tokenizer_service.load import load_encoder
from quartet.tokenizer_service.way_out import way_out


def main(boot: Boot) -> None:
    run_text_service(boot, load_encoder(boot.config), way_out)


if __name__ == "__main__":
    run(main)
