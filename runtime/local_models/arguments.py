"""The arguments of the commands for models that are kept on this machine. They import nothing slow."""

import argparse

from quartet.runtime.client.arguments import parser_of

PULL = """Fetch a model from the hub, so that a server starts without waiting for it: what `quartet serve` would fetch.

    quartet pull Qwen/Qwen2.5-0.5B-Instruct
    quartet pull Qwen/Qwen2.5-0.5B-Instruct-GGUF:Q4_K_M

HF_TOKEN is used for gated models, HF_ENDPOINT for another hub."""

MODELS = """List the models that the hub's cache keeps on this machine, or remove some of them.

    quartet models
    quartet models rm Qwen/Qwen2.5-0.5B-Instruct"""

DIRECTORY_HELP = "where models are kept (default: the hub's own cache)"


def pull_parser() -> argparse.ArgumentParser:
    """The arguments of `quartet pull`."""
    parser = parser_of("pull", PULL)
    parser.add_argument("model", help="hub id (owner/name); owner/name:Q4_K_M for one of its GGUF files")
    parser.add_argument("--revision", help="branch, tag or commit")
    parser.add_argument("--download-dir", metavar="DIRECTORY", help=DIRECTORY_HELP)
    return parser


def models_parser() -> argparse.ArgumentParser:
    """The arguments of `quartet models`."""
    parser = parser_of("models", MODELS)
    parser.add_argument("action", nargs="?", choices=["list", "rm"], default="list", help="(default: %(default)s)")
    parser.add_argument("model", nargs="*", help="what to remove, as the list names it")
    parser.add_argument("--download-dir", metavar="DIRECTORY", help=DIRECTORY_HELP)
    parser.add_argument("-y", "--yes", action="store_true", help="remove without asking")
    return parser
