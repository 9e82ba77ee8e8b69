"""Prints the tokenizer.json that transformers would use for a model directory without one. The only user of it here.

Run as `python -m quartet.tokenizer_service.convert <directory>`; the text services start it and read its output.
"""

import sys


def main(directory: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise SystemExit(f"{type(tokenizer).__name__} is written in Python and cannot be converted")
    sys.stdout.write(backend.to_str())


if __name__ == "__main__":
    main(sys.argv[1])
