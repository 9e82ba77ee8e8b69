"""Reinforcement learning against a server that never stops: sample, learn, put the new weights under it, again.

    python -m deploy.examples.rl_hot_swap.train [--iterations 20] [--out directory] [--url http://host:port]

Without --url it starts a server of its own with the embedded model. With --url the trainer reads the served model's
directory, so the two must share a file system; start that server with --dtype float32.
"""

import argparse
import contextlib
import json
import random
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from deploy.examples.rl_hot_swap import plot, rollouts, streams
from deploy.examples.rl_hot_swap.policy import Batch, Policy
from deploy.examples.rl_hot_swap.rollouts import PROMPTS, WISHES, Rollout, reward
from deploy.examples.rl_hot_swap.server import Server, started

STEPS = 2  # of the optimizer in one iteration, each on its share of the rollouts
AGREEMENT = 1e-3  # the largest difference between the server's logprobs and ours that float32 explains


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--samples", type=int, default=16, help="answers to each of the prompts in one iteration")
    parser.add_argument("--streams", type=int, default=4, help="clients that read during each update")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--url", help="a server that runs already")
    parser.add_argument("--out", type=Path, help="directory of the history, the picture, the log and the checkpoints")
    return parser.parse_args(argv)


class Trainer:
    """The loop's state: a server, a policy, and how far they have come."""

    def __init__(self, server: Server, options: argparse.Namespace, out: Path) -> None:
        self.server = server
        self.policy = Policy(server.model_directory(), options.learning_rate)
        self.prompts = [self.policy.prompt_ids(prompt) for prompt in PROMPTS]
        self.history: list[dict[str, Any]] = []
        self._options = options
        self._out = out
        self._checkpoint: Path | None = None  # the one that is served
        self._version = ""  # of the weights that serve
        self._shuffle = random.Random(options.seed)

    def iterate(self, iteration: int) -> dict[str, Any]:
        """Sample, learn, swap. Returns what the history keeps of it."""
        began = time.perf_counter()
        groups = self.sample(iteration)
        sampled = time.perf_counter()
        disagreement = self.learn(groups)
        learned = time.perf_counter()
        update = self.swap(f"step-{iteration}")
        told = [rollout for group in groups for rollout in group]
        self.history.append(
            {
                "iteration": iteration,
                "reward": fmean(map(reward, told)),
                "wishes": {name: fmean(map(wish, told)) for name, wish in WISHES.items()},
                "example": " ".join(told[0].text.split()),
                "logprob_disagreement": disagreement,
                "sampling_s": sampled - began,
                "learning_s": learned - sampled,
                "update": update,
            }
        )
        return self.history[-1]

    def sample(self, iteration: int) -> list[list[Rollout]]:
        """A group of rollouts for each prompt, all of them made by the weights that were sent last."""
        samples = self._options.samples
        seed = self._options.seed + iteration * samples * len(self.prompts)
        answers = self.server.call("/generate", rollouts.request(self.prompts, samples, seed))
        groups = rollouts.groups(self.prompts, answers)
        self._version = self._version or groups[0][0].versions[0]["version"]  # the first weights are not ours
        check_versions([rollout for group in groups for rollout in group], self._version)
        return groups

    def learn(self, groups: list[list[Rollout]]) -> float:
        """A few steps. Returns how far our logprobs were from the server's while the weights were still the same."""
        judged = [pair for group in groups for pair in zip(group, rollouts.advantages(group), strict=True)]
        self._shuffle.shuffle(judged)
        parts = [judged[step::STEPS] for step in range(STEPS)]
        first, *_ = [self.policy.learn(Batch.of([r for r, _ in part]), [a for _, a in part]) for part in parts]
        if first > AGREEMENT:
            raise SystemExit(f"the server's logprobs and the trainer's differ by {first:.2g}; are both in float32?")
        return first

    def swap(self, version: str) -> dict[str, Any]:
        """Put the learned weights under the server while clients read. Checkpoints that served before are removed."""
        checkpoint = self._out / version
        self.policy.save(checkpoint)
        prompts = [self.prompts[i % len(self.prompts)] for i in range(self._options.streams)]
        with streams.running(self.server.url, prompts) as watch:
            latency_s = self.server.update_weights(checkpoint, version)
        if self._checkpoint:
            shutil.rmtree(self._checkpoint)
        report = watch.report(self._version, version)
        self._checkpoint, self._version = checkpoint, version
        return {"version": version, "latency_s": latency_s, **report}


def check_versions(told: list[Rollout], version: str) -> None:
    """Every token must have been made by these weights."""
    for rollout in told:
        expected = [{"version": version, "start": 0, "end": len(rollout.output_ids)}]
        if rollout.versions != expected:
            raise SystemExit(f"the server says {rollout.versions} of its tokens, expected {expected}")


def line(entry: dict[str, Any]) -> str:
    update = entry["update"]
    return (
        f"{entry['iteration']:3}  reward {entry['reward']:.3f}  "
        f"sampled in {entry['sampling_s']:.1f} s, learned in {entry['learning_s']:.1f} s, "
        f"logprobs within {entry['logprob_disagreement']:.1e}  "
        f"{update['version']} in {update['latency_s'] * 1000:.0f} ms, "
        f"{update['complete_streams']}/{update['streams']} streams complete, {update['streams_across']} across, "
        f"largest gap {update['largest_gap_s'] * 1000:.0f} ms (usually {update['usual_gap_s'] * 1000:.1f})"
    )


def summary(history: list[dict[str, Any]], seconds: float) -> str:
    first, last = history[0], history[-1]
    total = {
        name: sum(entry["update"][name] for entry in history)
        for name in ("streams", "complete_streams", "streams_across")
    }
    return (
        f"\n{len(history)} iterations in {seconds:.0f} s: reward {first['reward']:.2f} → {last['reward']:.2f}; "
        f"logprobs within {max(entry['logprob_disagreement'] for entry in history):.1e} of the server's.\n"
        f"{len(history)} updates: {total['complete_streams']} of {total['streams']} streams complete, "
        f"{total['streams_across']} of them made by two versions.\n\n"
        f"before: {first['example']}\nafter:  {last['example']}\n"
    )


@contextlib.contextmanager
def server_of(options: argparse.Namespace, out: Path) -> Iterator[Server]:
    if options.url:
        yield Server(options.url.rstrip("/"))
        return
    with started("demo", out / "server.log") as server:
        yield server


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments(argv)
    out = (options.out or Path(tempfile.mkdtemp(prefix="rl_hot_swap_"))).resolve()
    out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    with server_of(options, out) as server:
        trainer = Trainer(server, options, out)
        for iteration in range(options.iterations):
            print(line(trainer.iterate(iteration)), flush=True)
    print(summary(trainer.history, time.perf_counter() - began))
    (out / "history.json").write_text(json.dumps(trainer.history, indent=1))
    try:
        plot.draw(trainer.history, out / "rl_hot_swap.png")
    except ModuleNotFoundError as error:
        print(f"no picture: {error}; pip install 'quartet-serve[plot]'")
    print(f"all of it is in {out}")


if __name__ == "__main__":
    main()
