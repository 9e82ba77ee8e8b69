"""Print an answer while it is written, with nothing but the standard library.

python -m deploy.examples.stream_client "Tell me a story." [--url http://127.0.0.1:30000]
"""

import argparse
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

DEFAULT_URL = "http://127.0.0.1:30000"
PREFIX = b"data: "
END = b"[DONE]"


class StreamError(Exception):
    """The server refused the request, or gave it up half-way."""


def stream(url: str, body: dict[str, Any], timeout_s: float = 120) -> Iterator[dict[str, Any]]:
    """Each chunk of one answer of /generate: `text`, `output_ids` and counters so far. Raises StreamError."""
    data = json.dumps(body | {"stream": True}).encode()
    request = urllib.request.Request(f"{url}/generate", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as lines:
            for line in lines:
                event = line.removeprefix(PREFIX).strip()
                if event == END:
                    return
                if event:
                    yield checked(json.loads(event))
    except urllib.error.HTTPError as error:
        raise StreamError(error.read().decode()) from error
    except urllib.error.URLError as error:
        raise StreamError(f"no server at {url} ({error.reason}); start one with `make serve`") from error
    raise StreamError("the stream ended without [DONE]")


def checked(chunk: dict[str, Any]) -> dict[str, Any]:
    """The chunk, unless it tells of an error after the answer began."""
    if "error" in chunk:
        raise StreamError(chunk["error"]["message"])
    return chunk


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt")
    parser.add_argument("--url", default=DEFAULT_URL)
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, help="the same seed gives the same answer")
    options = parser.parse_args()
    sampling = {
        "temperature": options.temperature,
        "max_new_tokens": options.max_new_tokens,
        "sampling_seed": options.seed,
    }
    shown = 0
    try:
        for chunk in stream(options.url, {"text": options.prompt, "sampling_params": sampling}):
            print(chunk["text"][shown:], end="", flush=True)
            shown = len(chunk["text"])
    except StreamError as error:
        print(error, file=sys.stderr)
        return 1
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
