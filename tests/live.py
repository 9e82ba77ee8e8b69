"""A whole scheduler with a real, tiny model between a fake inbox and a fake outbox."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quartet.runtime.control import ControlCommand
from quartet.runtime.messages import Finish, Reply, Tokenized, Tokens, unpack_ids
from quartet.runtime.model_files import model_info
from quartet.scheduler_service.assemble import planner_config
from quartet.scheduler_service.core.planner import Planner
from quartet.scheduler_service.execution.worker import Worker
from quartet.scheduler_service.main import idle_sleep, memory_saver, weight_updates
from quartet.scheduler_service.scheduler import Scheduler
from tests.configs import resolved
from tests.fakes import FakeInbox, FakeOutbox, FakeProgress

DEADLINE_S = 60.0


class Live:
    """Step it, send it requests and commands, read what came out."""

    def __init__(
        self,
        directory: Path,
        run_dir: Path,
        depth: int = 0,
        clock: Callable[[], float] = time.monotonic,
        **settings: Any,
    ) -> None:
        defaults = {"dtype": "float32", "page_size": 4, "max_total_tokens": 16384, "chunked_prefill_size": -1}
        config = resolved(model_path=str(directory), **(defaults | settings))
        info = model_info.load(config)
        self.worker = Worker(config, info)
        self.updates = weight_updates(config, info, self.worker, str(run_dir))
        self.adapters = self.worker.load_adapters(config, str(run_dir))
        self.inbox, self.outbox = FakeInbox(), FakeOutbox()
        self.scheduler = Scheduler(
            Planner(planner_config(config, info, self.worker)),
            self.worker,
            self.inbox,
            self.outbox,
            FakeProgress(),
            depth=depth,
            updates=self.updates,
            saver=memory_saver(config, self.worker, self.updates),
            adapters=self.adapters,
            sleeper=idle_sleep(config, self.worker, self.updates),
            clock=clock,
        )
        self._next = 0

    @property
    def planner(self) -> Planner:
        return self.scheduler.planner

    def send(self, *messages: Tokenized | ControlCommand) -> None:
        self.inbox.put(*messages)

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.scheduler.step()

    def run(self) -> None:
        """Until there is nothing to do."""
        self.step()
        while not self.scheduler.idle:
            self.step()

    def call(self, command: ControlCommand) -> Reply:
        """Step until the command is answered."""
        return self.wait(self.begin(command))

    def begin(self, command: ControlCommand) -> str:
        """Send a command without waiting for its answer; returns its id."""
        self._next += 1
        command.id = f"c{self._next}"
        self.send(command)
        return command.id

    def reply(self, id: str) -> Reply | None:
        return next((m for m in self.outbox.messages if isinstance(m, Reply) and m.id == id), None)

    def wait(self, id: str) -> Reply:
        self.step_until(lambda: self.reply(id) is not None, f"command {id} is answered")
        reply = self.reply(id)
        assert reply is not None
        return reply

    def step_until(self, done: Callable[[], object], what: str) -> None:
        """Files are read by a thread: how many steps that takes depends on the machine."""
        deadline = time.monotonic() + DEADLINE_S
        while not done():
            assert time.monotonic() < deadline, f"waited {DEADLINE_S:.0f} s until {what}"
            self.step()

    def tokens(self, rid: str) -> list[Tokens]:
        return [m for m in self.outbox.messages if isinstance(m, Tokens) and m.rid == rid]

    def output(self, rid: str) -> list[int]:
        return [id for message in self.tokens(rid) for id in unpack_ids(message.ids)]

    def finish(self, rid: str) -> Finish | None:
        return self.tokens(rid)[-1].finish if self.tokens(rid) else None

    def by_version(self, rid: str) -> list[tuple[str, int]]:
        """(weight version, token) of every output token."""
        return [(message.weight_version, id) for message in self.tokens(rid) for id in unpack_ids(message.ids)]

    def logits(self, prompt: list[int]) -> bytes:
        """What the served weights say to a prompt, without touching requests or cache: for comparisons bit by bit."""
        import torch

        from quartet.kernels.reference import layers as reference
        from quartet.scheduler_service.model.batch import Batch

        def attend(spec: Any, q: Any, k: Any, v: Any) -> Any:
            return reference.attention(q, k, v, spec.scale, spec.window, spec.softcap, spec.sinks)

        ids = torch.tensor(prompt)
        starts = torch.tensor([0, len(prompt)])
        batch = Batch(input_ids=ids, positions=torch.arange(len(prompt)), attend=attend, starts=starts)
        with torch.inference_mode():
            logits = self.worker.model.logits(self.worker.model.forward(batch))
        return logits.numpy().tobytes()
