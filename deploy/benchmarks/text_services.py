"""What the tokenizer and detokenizer cost, on one core, with the messages decoded and encoded as on the ring.

    python -m deploy.benchmarks.text_services [--model-path DIRECTORY] [--tokens 100000]

Without a model directory a byte-level tokenizer of 32,000 tokens is trained on this repository's text first.
"""

import argparse
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from quartet.detokenizer_service.decode import Vocabulary
from quartet.detokenizer_service.service import Detokenizer
from quartet.runtime import sockets
from quartet.runtime.messages import Finish, Generate, LogprobOptions, Logprobs, Request, Tokens, pack_ids
from quartet.runtime.model_files import tokenizer_files
from quartet.runtime.sampling import SamplingParams
from quartet.tokenizer_service.encode import Encoder

ROOT = Path(__file__).parents[2]
STREAMS = 64
PROMPT_TOKENS = 1024
STEP_MODULES = {"tokenizer": "quartet.tokenizer_service.encode", "detokenizer": "quartet.detokenizer_service.service"}


def corpus() -> str:
    files = sorted(
        file for pattern in ("**/*.py", "**/*.md") for file in ROOT.glob(pattern) if ".venv" not in file.parts
    )
    return "\n".join(file.read_text(errors="ignore") for file in files)


def trained(text: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=32000, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return tokenizer


def seconds(work: Callable[..., Any], *arguments: Any) -> float:
    start = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - start


def through(step: Callable[[list[Any]], list[Any]], frames: list[bytes]) -> None:
    """Each frame through a service as its loop does it, without the socket."""
    for frame in frames:
        sockets.encode(step(sockets.decode(frame)))


def encode_report(tokenizer: Tokenizer, ids: list[int], prompts: int) -> None:
    length = min(PROMPT_TOKENS, len(ids) // 2)
    rng = random.Random(0)
    starts = [rng.randrange(len(ids) - length) for _ in range(prompts)]
    texts = [tokenizer.decode(ids[start : start + length]) for start in starts]
    messages = [Generate(request=Request(rid=str(n), params=SamplingParams()), text=t) for n, t in enumerate(texts)]
    for batch in (1, 16):
        frames = [sockets.encode(messages[at : at + batch]) for at in range(0, prompts, batch)]
        encoder = Encoder(tokenizer)
        took = seconds(through, encoder.step, frames)
        made = encoder.counters.prompt_tokens
        print(f"encode  {made // prompts:5d} tokens a prompt, {batch:2d} a frame   "
              f"{prompts / took:9,.0f} prompts/s {made / took:12,.0f} tokens/s")  # fmt: skip


def token_frames(request: SamplingParams, logprobs: bool, ids: list[int], steps: int, seed: int) -> list[bytes]:
    """What the scheduler sends: one message a stream in each step."""
    rng = random.Random(seed)
    starts = [rng.randrange(len(ids) - steps) for _ in range(STREAMS)]
    options = LogprobOptions(text=True) if logprobs else None
    frames = []
    for step in range(steps):
        frame = []
        for stream, start in enumerate(starts):
            new = pack_ids([ids[start + step]])
            tokens = Tokens(rid=f"{stream:032x}", ids=new, prompt_tokens=1024, weight_version="default")
            if step == 0:
                tokens.request, tokens.prompt_tail = Request(rid=tokens.rid, params=request, logprobs=options), new
            if step == steps - 1:
                tokens.finish = Finish(reason="length", length=steps)
            if logprobs:
                tokens.logprobs = Logprobs(ids=new, values=new)
            frame.append(tokens)
        frames.append(sockets.encode(frame))
    return frames


def decode_report(tokenizer: Tokenizer, ids: list[int], total: int, label: str) -> None:
    kinds = {
        "plain": (SamplingParams(), False),
        "4 stop strings": (SamplingParams(stop=["\n\n\n\n", "<|end|>", "</answer>", "Observation:"]), False),
        "1 stop pattern": (SamplingParams(stop_regex=r"\d{5}-[A-Z]{3}"), False),
        "logprobs, text": (SamplingParams(), True),
    }
    steps = total // STREAMS
    for name, (params, logprobs) in kinds.items():
        frames = token_frames(params, logprobs, ids, steps, seed=len(name))
        detokenizer = Detokenizer(Vocabulary(tokenizer))
        took = seconds(through, detokenizer.step, frames)
        made = steps * STREAMS
        each_us = took / made * 1e6
        print(f"decode  {label:11} {STREAMS} streams, {name:15} {made / took:9,.0f} tokens/s {each_us:7.1f} us a token")


def import_report() -> None:
    for role, module in STEP_MODULES.items():
        command = [sys.executable, "-c", f"import {module}"]
        took = min(seconds(subprocess.run, command) for _ in range(3))
        print(f"import  {role:11} {took * 1e3:.0f} ms with the interpreter")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", type=Path)
    parser.add_argument("--tokens", type=int, default=100_000, help="tokens to decode in each row")
    parser.add_argument("--prompts", type=int, default=320)
    options = parser.parse_args()
    text = corpus()
    tokenizer = tokenizer_files.load(options.model_path) if options.model_path else trained(text)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    import_report()
    encode_report(tokenizer, ids, options.prompts)
    decode_report(tokenizer, ids, options.tokens, "byte table")
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])  # equal, but not in the table
    decode_report(tokenizer, ids, options.tokens // 5, "window")


if __name__ == "__main__":
    main()
