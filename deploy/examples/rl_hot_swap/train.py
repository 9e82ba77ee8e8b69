"""Reinforcement learning against a server that never stops: sample, learn, put the new weights under it, again.

    python -m deploy.examples.rl_hot_swap.train [--learn weights|adapter|both] [--iterations 20] [--out directory]
                                                [--url http://host:port]

What learns is all weights, or a LoRA adapter, of which each update sends a small part of the bytes (needs peft). `both`
trains both in turn, an iteration each, and compares what they learn and what their updates cost.

Without --url it starts a server of its own with the embedded model. With --url the trainer reads the served model's
directory, so the two must share a file system; start that server with --dtype float32, and for an adapter with
--enable-lora.
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
from statistics import fmean, median
from typing import Any

from deploy.examples.rl_hot_swap import plot, rollouts, streams
from deploy.examples.rl_hot_swap.policy import Batch, Policy
from deploy.examples.rl_hot_swap.rollouts import PROMPTS, WISHES, Rollout, reward
from deploy.examples.rl_hot_swap.server import Server, started
from deploy.examples.rl_hot_swap.sync import Adapter, WholeWeights, sent_bytes

STEPS = 2  # of the optimizer in one iteration, each on its share of the rollouts
AGREEMENT = 1e-3  # the largest difference between the server's logprobs and ours that float32 explains
WEIGHTS, ADAPTER = "weights", "adapter"
LEARNERS = {WEIGHTS: [WEIGHTS], ADAPTER: [ADAPTER], "both": [WEIGHTS, ADAPTER]}


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--learn", choices=LEARNERS, default=WEIGHTS, help="what learns (default: %(default)s)")
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--samples", type=int, default=16, help="answers to each of the prompts in one iteration")
    parser.add_argument("--streams", type=int, default=4, help="clients that read during each update")
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="of all weights")
    parser.add_argument("--adapter-learning-rate", type=float, default=5e-3)
    parser.add_argument("--lora-rank", type=int, default=16, help="of the adapter")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--url", help="a server that runs already")
    parser.add_argument("--out", type=Path, help="directory of the history, the picture, the log and the checkpoints")
    options = parser.parse_args(argv)
    if options.url and options.learn == "both":
        parser.error("--learn both needs two servers, and --url names one")
    return options


class Trainer:
    """The loop's state: a server, a policy, and how far they have come."""

    def __init__(self, server: Server, learner: str, options: argparse.Namespace, out: Path) -> None:
        self.server = server
        self.learner = learner
        self.out = out
        if learner == ADAPTER:
            self.policy = Policy(server.model_directory(), options.adapter_learning_rate, options.lora_rank)
            self.sync: WholeWeights | Adapter = Adapter(server)
        else:
            self.policy, self.sync = Policy(server.model_directory(), options.learning_rate), WholeWeights(server)
        self.prompts = [self.policy.prompt_ids(prompt) for prompt in PROMPTS]
        self.history: list[dict[str, Any]] = []
        self._options = options
        self._checkpoint: Path | None = None  # the one that is served
        self._version = ""  # of what serves
        self._shuffle = random.Random(options.seed)
        if learner == ADAPTER:  # there is none yet that requests could name
            self._version, _ = self.send(self.save("start"))

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

    def save(self, version: str) -> Path:
        """A checkpoint of what the policy has learned."""
        self.policy.save(self.out / version)
        return self.out / version

    def send(self, checkpoint: Path) -> tuple[str, float]:
        """Serve a checkpoint: the version that the server tells from now on, and the seconds that it took.

        The one that served before is removed.
        """
        told, latency_s = self.sync.send(checkpoint, checkpoint.name)
        if self._checkpoint:
            shutil.rmtree(self._checkpoint)
        self._checkpoint = checkpoint
        return told, latency_s

    def sample(self, iteration: int) -> list[list[Rollout]]:
        """A group of rollouts for each prompt, all of them made by what was sent last."""
        samples = self._options.samples
        seed = self._options.seed + iteration * samples * len(self.prompts)
        answers = self.server.call("/generate", rollouts.request(self.prompts, samples, seed, self.sync.lora_path))
        groups = rollouts.groups(self.prompts, answers)
        key = self.sync.version_key
        self._version = self._version or groups[0][0].versions[0][key]  # the first weights are not ours
        check_versions([rollout for group in groups for rollout in group], key, self._version)
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
        """Put what was learned under the server while clients read."""
        checkpoint = self.save(version)
        sent = sent_bytes(checkpoint)
        prompts = [self.prompts[i % len(self.prompts)] for i in range(self._options.streams)]
        with streams.running(self.server.url, prompts, self.sync.lora_path, self.sync.version_key) as watch:
            told, latency_s = self.send(checkpoint)
        report = watch.report(self._version, told)
        self._version = told
        return {"version": version, "bytes": sent, "latency_s": latency_s, **report}


def check_versions(told: list[Rollout], key: str, version: str) -> None:
    """Every token must have been made by this version."""
    for rollout in told:
        runs = [(run[key], run["start"], run["end"]) for run in rollout.versions]
        if runs != [(version, 0, len(rollout.output_ids))]:
            raise SystemExit(f"the server says {rollout.versions} of its tokens, expected {key} {version} of all")


def line(trainer: Trainer, entry: dict[str, Any]) -> str:
    update = entry["update"]
    return (
        f"{trainer.learner}  {entry['iteration']:3}  reward {entry['reward']:.3f}  "
        f"sampled in {entry['sampling_s']:.1f} s, learned in {entry['learning_s']:.1f} s, "
        f"logprobs within {entry['logprob_disagreement']:.1e}  "
        f"{update['version']}: {update['bytes'] / 1e6:.1f} MB in {update['latency_s'] * 1000:.0f} ms, "
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


def comparison(trainers: Sequence[Trainer]) -> str:
    """What each learner learned, and what its updates cost: medians over them."""
    told = ["learns    reward       sent each time   update   longest gap while it was made (usual gap)"]
    for trainer in trainers:
        updates = [entry["update"] for entry in trainer.history]
        sent, latency_ms, gap_ms, usual_ms = (
            median(update[name] for update in updates) * scale
            for name, scale in (("bytes", 1e-6), ("latency_s", 1e3), ("largest_gap_s", 1e3), ("usual_gap_s", 1e3))
        )
        first, last = trainer.history[0]["reward"], trainer.history[-1]["reward"]
        told.append(
            f"{trainer.learner:8}  {first:.2f} → {last:.2f}  {sent:11.2f} MB  {latency_ms:6.0f} ms   "
            f"{gap_ms:.0f} ms ({usual_ms:.1f} ms)"
        )
    return "\n".join(told) + "\n"


@contextlib.contextmanager
def server_of(learner: str, options: argparse.Namespace, out: Path) -> Iterator[Server]:
    if options.url:
        yield Server(options.url.rstrip("/"))
        return
    flags = ("--enable-lora", "--max-lora-rank", str(options.lora_rank)) if learner == ADAPTER else ()
    with started("demo", out / "server.log", *flags) as server:
        yield server


def finish(trainer: Trainer, seconds: float) -> None:
    """Print what came of it, and keep the history and the picture."""
    print(summary(trainer.history, seconds))
    (trainer.out / "history.json").write_text(json.dumps(trainer.history, indent=1))
    try:
        plot.draw(trainer.history, trainer.out / "rl_hot_swap.png")
    except ModuleNotFoundError as error:
        print(f"no picture: {error}; pip install 'quartet-serve[plot]'")
    print(f"all of it is in {trainer.out}\n")


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments(argv)
    out = (options.out or Path(tempfile.mkdtemp(prefix="rl_hot_swap_"))).resolve()
    learners = LEARNERS[options.learn]
    began = time.perf_counter()
    with contextlib.ExitStack() as servers:
        trainers = []
        for learner in learners:
            place = out if len(learners) == 1 else out / learner
            place.mkdir(parents=True, exist_ok=True)
            server = servers.enter_context(server_of(learner, options, place))
            trainers.append(Trainer(server, learner, options, place))
        for iteration in range(options.iterations):
            for trainer in trainers:
                print(line(trainer, trainer.iterate(iteration)), flush=True)
    for trainer in trainers:
        finish(trainer, time.perf_counter() - began)
    print(comparison(trainers))


if __name__ == "__main__":
    main()
