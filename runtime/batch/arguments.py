"""The arguments of `quartet run-batch`. Imports nothing slow, for --help and completion."""

import argparse

from quartet.runtime.client.arguments import KEY_HELP, parser_of

ABOUT = """Answer the requests of a file in OpenAI's batch format, and write a line for each to another file.
A run that was interrupted or killed goes on where it was when the same command is given again.

What stands behind -- are flags for the server that is started: quartet run-batch in out MODEL -- --dtype half"""
AT_ONCE = 256
LONGEST_S = 3600.0  # a request waits behind those that were sent with it


def run_batch_parser() -> argparse.ArgumentParser:
    """The arguments of `quartet run-batch`."""
    parser = parser_of("run-batch", ABOUT)
    parser.add_argument("input", help='lines {"custom_id", "method", "url", "body"}')
    parser.add_argument("output", help='lines {"custom_id", "response", "error"}, in the order of their ends')
    parser.add_argument("model", nargs="?", help="directory, GGUF file or hub id (default: the embedded model)")
    parser.add_argument("--url", help="a server that runs, instead of one that is started")
    parser.add_argument("--api-key", help=KEY_HELP)
    parser.add_argument(
        "--concurrency", type=int, default=AT_ONCE, metavar="COUNT", help="requests at once (default: %(default)s)"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=LONGEST_S,
        metavar="SECONDS",
        help="for a request and its whole answer (default: %(default)g)",
    )
    return parser
