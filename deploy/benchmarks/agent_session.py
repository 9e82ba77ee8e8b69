"""A session of an agent with tools, turn by turn: what each turn finds in the prefix cache, and what it computes again.

    python -m deploy.benchmarks.agent_session [--turns 30] [--repeats 3] [--out result.json]

Two sessions over HTTP. In the first one the model's own chat template renders the conversation; in the second one it is
Qwen 3's, whose history has thoughts, and drops them as soon as the user speaks again. A turn must compute its prompt
from the first token on that stands in no earlier prompt or output, in whole pages; a turn that computes more
makes the command fail. At the end the time to the first token of the last turn over that of the second one is measured,
with the cache and with an empty one, in turn.

The model is a real Qwen2.5-Coder-0.5B where QUARTET_REAL_MODELS names its directory; else random weights with the
tokenizer of the embedded model. Three turns of four must call a tool, so that both do.
"""

import argparse
import contextlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import requests

from deploy.benchmarks.serve_vs_transformers import machine
from tests.servers import launched

REAL = "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
DEMO = Path(__file__).resolve().parents[2] / "runtime" / "model_files" / "demo"
POSITIONS = 32768
MAX_TOKENS = 160
WAIT_S = 600
EVERY = 4  # so many turns of the model, then the user speaks again
SYSTEM = "You are a coding agent. You work in a repository with the tools that you have, one step at a time."
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": what,
            "parameters": {
                "type": "object",
                "properties": {argument: {"type": "string", "maxLength": 24}},
                "required": [argument],
                "additionalProperties": False,
            },
        },
    }
    for name, what, argument in (
        ("read_file", "Returns the text of a file.", "path"),
        ("search", "Returns the lines in which a word occurs.", "word"),
        ("run", "Runs a shell command and returns its output.", "command"),
    )
]


class TurnReport(NamedTuple):
    """What one turn took, in tokens."""

    prompt: int
    cached: int
    needed: int  # of the prompt: what stands in no earlier text of the session
    ttft_s: float

    @property
    def computed(self) -> int:
        return self.prompt - self.cached


class Answer(NamedTuple):
    """The model's turn."""

    message: dict[str, Any]
    prompt_ids: list[int]
    output_ids: list[int]
    cached: int
    ttft_s: float


@dataclass
class Session:
    """One conversation, and everything that the model has read and written in it."""

    url: str
    page_size: int
    thinks: bool
    messages: list[dict[str, Any]] = field(default_factory=lambda: [{"role": "system", "content": SYSTEM}])
    known: list[list[int]] = field(default_factory=list)  # sequences whose keys and values were computed
    asked: list[dict[str, Any]] = field(default_factory=list)  # the bodies so far

    def turn(self, number: int) -> TurnReport:
        """The model's next turn, and what its tool answers."""
        if number % EVERY == 0:
            self.messages.append({"role": "user", "content": task(number)})
        body = self._body(number)
        self.asked.append(body)
        answer = ask(self.url, body)
        report = TurnReport(len(answer.prompt_ids), answer.cached, self._needed(answer.prompt_ids), answer.ttft_s)
        self.known.append(answer.prompt_ids + answer.output_ids[:-1])  # the last token was not read
        self._note(answer.message, number)
        return report

    def _body(self, number: int) -> dict[str, Any]:
        last = number % EVERY == EVERY - 1  # of the model's turns before the user speaks again
        choice: Any = "auto"
        if not last:
            choice = {"type": "function", "function": TOOLS[number % len(TOOLS)]["function"]}
        return {
            "messages": list(self.messages),
            "tools": TOOLS,
            "tool_choice": choice,
            "parallel_tool_calls": False,
            "temperature": 0,
            "max_tokens": MAX_TOKENS,
        }

    def _needed(self, prompt: list[int]) -> int:
        most = max((common(prompt, sequence) for sequence in self.known), default=0)
        return len(prompt) - min(most, len(prompt) - 1) // self.page_size * self.page_size

    def _note(self, message: dict[str, Any], number: int) -> None:
        kept = {key: value for key, value in message.items() if key in ("role", "content", "tool_calls") and value}
        kept.setdefault("content", "")
        if self.thinks:
            kept["reasoning_content"] = f"In step {number} the next thing to look at is the caller of this function."
        self.messages.append(kept)
        for call in kept.get("tool_calls", ()):
            self.messages.append({"role": "tool", "tool_call_id": call["id"], "content": output_of_tool(number)})
        assert kept.get("tool_calls") or number % EVERY == EVERY - 1, message


def task(number: int) -> str:
    return f"Task {number // EVERY + 1}: find out why the test of module {number} fails, and mend it."


def output_of_tool(number: int) -> str:
    """Some lines of a file."""
    return "\n".join(
        f"{number}{line:02d}: def step_{line}(state): return state.next({line * number})" for line in range(9)
    )


def common(left: list[int], right: list[int]) -> int:
    """How many tokens two sequences begin with together."""
    return next(
        (i for i, pair in enumerate(zip(left, right, strict=False)) if pair[0] != pair[1]), min(len(left), len(right))
    )


def ask(url: str, body: dict[str, Any]) -> Answer:
    """The answer of a chat completion, streamed; its ids are those of the text that the server has read and written."""
    asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
    asked |= {"return_token_ids": True, "return_prompt_token_ids": True}
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    prompt, output, cached, first = [], [], 0, 0.0
    begun = time.perf_counter()
    with requests.post(f"{url}/v1/chat/completions", json=asked, stream=True, timeout=WAIT_S) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith(b"data: {"):
                continue
            first = first or time.perf_counter() - begun
            chunk = json.loads(line.removeprefix(b"data: "))
            assert "error" not in chunk, chunk
            if chunk.get("usage"):
                cached = chunk["usage"]["prompt_tokens_details"]["cached_tokens"]
            for choice in chunk["choices"]:
                prompt += choice.get("prompt_token_ids") or []
                output += choice.get("token_ids") or []
                extend(message, choice["delta"])
    return Answer(message, prompt, output, cached, first)


def extend(message: dict[str, Any], delta: dict[str, Any]) -> None:
    """Add the delta of a chunk to a message."""
    message["content"] += delta.get("content") or ""
    for piece in delta.get("tool_calls") or ():
        calls = message.setdefault("tool_calls", [])
        if piece.get("id"):
            calls.append(
                {
                    "id": piece["id"],
                    "type": "function",
                    "function": {"name": piece["function"]["name"], "arguments": ""},
                }
            )
        calls[-1]["function"]["arguments"] += piece["function"].get("arguments") or ""


def flush(url: str) -> None:
    requests.post(f"{url}/flush_cache", timeout=WAIT_S).raise_for_status()


def first_token_s(url: str, bodies: list[dict[str, Any]]) -> float:
    """The time to the first token of the last of these calls, which find an empty cache."""
    flush(url)
    *before, last = bodies
    for body in before:
        ask(url, body)
    return ask(url, {**last, "max_tokens": 1, "tool_choice": "auto"}).ttft_s


def run(url: str, page_size: int, turns: int, repeats: int, *, thinks: bool) -> dict[str, Any]:
    """One session. Print its turns and ratios, and return them; `too_much`: turns that computed more than they must."""
    flush(url)
    session = Session(url, page_size, thinks)
    reports = [session.turn(number) for number in range(turns)]
    print("turn | prompt | cached | computed | needed | cached share | first token (ms)")
    for number, report in enumerate(reports, 1):
        share, first = report.cached / report.prompt, report.ttft_s * 1e3
        counts = f"{report.prompt} | {report.cached} | {report.computed} | {report.needed}"
        print(f"{number} | {counts} | {share:.1%} | {first:.0f}", flush=True)
    prompts, computed = sum(r.prompt for r in reports), sum(r.computed for r in reports)
    print(f"All turns: {prompts} tokens of prompts, {computed} computed ({prompts / computed:.1f} times less).")
    first_tokens = compare_first_tokens(session, repeats)
    too_much = [number for number, report in enumerate(reports, 1) if report.computed > report.needed]
    if too_much:
        print(f"Turns that computed more than they must: {too_much}")
    rows = [{**report._asdict(), "computed": report.computed} for report in reports]
    totals = {"prompts": prompts, "computed": computed}
    return {"turns": rows, "totals": totals, "first token": first_tokens, "too_much": too_much}


def compare_first_tokens(session: Session, repeats: int) -> dict[str, Any]:
    """The time to the first token of the last turn over that of the second, with the cache and without, in turn."""
    second, last = session.asked[:2], session.asked[-2:]
    times: dict[str, list[float]] = {"second": [], "last": [], "second, empty": [], "last, empty": []}
    for _ in range(repeats):
        times["second"].append(first_token_s(session.url, second))
        times["last"].append(first_token_s(session.url, last))
        times["second, empty"].append(first_token_s(session.url, second[-1:]))
        times["last, empty"].append(first_token_s(session.url, last[-1:]))
    median = {name: statistics.median(found) for name, found in times.items()}
    print("first token (ms, median): " + ", ".join(f"{name} {value * 1e3:.0f}" for name, value in median.items()))
    with_cache, without = median["last"] / median["second"], median["last, empty"] / median["second, empty"]
    print(f"Turn {len(session.asked)} over turn 2: {with_cache:.2f} with the cache, {without:.2f} without.", flush=True)
    return {"seconds": times, "last over second": with_cache, "the same, empty cache": without}


@contextlib.contextmanager
def model_directory() -> Iterator[str]:
    """The path of the model: the real one, or one with random weights that is made for this run."""
    real = Path(os.environ.get("QUARTET_REAL_MODELS") or "/nowhere") / REAL
    if real.is_file():
        yield str(real)
        return
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as made:
        directory = Path(made)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
            shutil.copy(DEMO / name, directory / name)
        torch.manual_seed(0)
        config = AutoConfig.from_pretrained(DEMO, max_position_embeddings=POSITIONS)
        AutoModelForCausalLM.from_config(config).save_pretrained(directory)
        yield str(directory)


def serve_session(model: str, options: argparse.Namespace, *, thinks: bool) -> dict[str, Any]:
    """One session on a server of its own, and what `run` found."""
    real = model.endswith(".gguf")
    template = () if real and not thinks else ("--chat-template", "qwen3")
    flags = ("--max-total-tokens", str(POSITIONS), "--enable-cache-report", "--tool-call-parser", "hermes")
    flags += ("--reasoning-parser", "none")  # the thoughts of the history are made up
    with launched("--model-path", model, *flags, *template) as server:
        page_size = requests.get(f"{server.url}/server_info", timeout=WAIT_S).json()["page_size"]
        name = Path(model).name if real else "random weights"
        rendered = "Qwen 3's template" if template else "its own template"
        what = f"{name}, {rendered}, {'thoughts in the history, ' if thinks else ''}pages of {page_size} tokens"
        print(f"\n{what}")
        return {"session": what} | run(server.url, page_size, options.turns, options.repeats, thinks=thinks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="file for the result")
    options = parser.parse_args()
    here = machine()
    print(json.dumps(here))
    with model_directory() as model:
        found = [serve_session(model, options, thinks=thinks) for thinks in (False, True)]
    if options.out:
        options.out.write_text(json.dumps({"machine": here, "sessions": found}, indent=1) + "\n")
    sys.exit(1 if any(session["too_much"] for session in found) else 0)


if __name__ == "__main__":
    main()
