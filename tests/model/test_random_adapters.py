"""A thousand random loads, replacements, unloads and requests: each answer is that of the adapter it named."""

import random
from pathlib import Path
from typing import Any

from quartet.runtime.errors import RequestError
from quartet.runtime.messages import Request, Tokenized, pack_ids
from quartet.runtime.sampling import SamplingParams
from quartet.scheduler_service.control.adapter_queue import AdapterQueue
from tests.adapters import write_adapter
from tests.engine import Answer, Engine
from tests.model.tiny import build

ACTIONS = 1000
NAMES = ["a", "b", "c", "d", "e"]
MOST_LOADED = 3
CONTENTS = 8  # different adapters, of which a name has one at a time
PROMPTS = [[5, 9, 200, 31, 77, 120, 14, 8, 251], [5, 9, 200, 31, 77, 120, 14, 8, 60, 61]]  # with a prefix in common
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=3, ignore_eos=True)


class Case:
    """An engine with adapters, a queue before it, and what its users know: which content each name has."""

    def __init__(self, directory: Path) -> None:
        base = build("qwen2", directory / "base")
        limits: dict[str, Any] = {"max_loaded_loras": MOST_LOADED, "max_loras_per_batch": 2, "max_total_tokens": 96}
        self.engine = Engine(base, enable_lora=True, max_running_requests=6, **limits)
        store = self.engine.worker.load_adapters(self.engine.config, str(directory))
        assert store is not None
        self.store, self.planner = store, self.engine.planner
        self.queue = AdapterQueue(store, self.planner, self.tell_versions)
        self.directories = [
            write_adapter(base, directory / str(i), rank=1 + 3 * i, seed=i, size=2.0) for i in range(CONTENTS)
        ]
        self.content: dict[str, int] = {}  # by name
        self.waited = 0  # requests, for an adapter that was not in memory
        self.asked: dict[str, tuple[int, int]] = {}  # rid → content, or -1 for the base; prompt

    def tell_versions(self) -> None:
        self.planner.waiting.set_adapter_versions(self.store.version_of)

    def running(self) -> set[str]:
        return {sequence.request.adapter for sequence in self.planner.live.values()}

    def in_use(self) -> set[str]:
        return {*self.running(), *(request.adapter for request in self.queue.requests)}

    def load(self, name: str, content: int) -> None:
        """Under a name that no request uses, so that each answer is of one content."""
        store = self.store
        if name in self.in_use():
            return
        if not (name in store.loaded or store.has_room() or store.evict_unused(self.running())):
            return
        directory = self.directories[content]
        store.install(name, name, str(directory), store.read(directory), pinned=False)
        self.content[name] = content
        self.tell_versions()

    def unload(self, name: str) -> None:
        if name in self.content and name not in self.in_use():
            self.store.forget(name)
            del self.content[name]
            self.tell_versions()

    def ask(self, name: str, prompt: int) -> None:
        rid = f"r{len(self.asked)}"
        request = Request(rid=rid, params=GREEDY, adapter=name)
        message = Tokenized(request=request, prompt_ids=pack_ids(PROMPTS[prompt]))
        try:
            self.queue.check(request)
            waits = self.queue.takes(message, None)
        except RequestError:
            assert name not in self.content
            return
        assert not name or name in self.content
        self.asked[rid] = self.content.get(name, -1), prompt
        self.engine.answers[rid] = Answer()
        if waits:
            self.waited += 1
        else:
            self.engine.take(self.planner.add(message, float(self.engine.steps), None))

    def turn(self) -> None:
        """As one turn of the scheduler's loop."""
        for message, outcome in self.queue.take_ready():
            assert outcome is None, outcome
            self.engine.take(self.planner.add(message, float(self.engine.steps), None))
        self.engine.step()
        assert len(self.store.loaded) <= MOST_LOADED and {*self.store.loaded} <= {*self.content}

    def finish(self) -> None:
        while len(self.queue) or not self.planner.idle:
            self.turn()
        self.engine.run()

    def expected(self) -> dict[tuple[int, int], list[int]]:
        """What each content gives for each prompt, alone and with nothing cached."""
        found = {}
        for name in list(self.content):
            self.unload(name)
        for content in range(-1, CONTENTS):
            if content >= 0:
                self.load("a", content)
            for prompt, ids in enumerate(PROMPTS):
                self.planner.forget_prefixes()
                [answer] = self.engine.generate([ids], GREEDY, adapter="a" if content >= 0 else "")
                found[content, prompt] = answer.ids
        return found


def test_random_loads_replacements_unloads_and_requests_give_what_the_named_adapters_give(tmp_path: Path) -> None:
    case, dice = Case(tmp_path), random.Random(0)
    for _ in range(ACTIONS):
        name = dice.choice(NAMES)
        match dice.choice(["load", "unload", "ask", "ask", "ask", "turn", "turn"]):
            case "load":
                case.load(name, dice.randrange(CONTENTS))
            case "unload":
                case.unload(name)
            case "ask":
                case.ask(dice.choice([name, name, ""]), dice.randrange(len(PROMPTS)))
            case _:
                case.turn()
    case.finish()
    assert not case.planner.audit(), "pages are counted exactly"
    answers = {rid: case.engine.answers[rid] for rid in case.asked}
    cached = sum(answer.cached_tokens > 0 for answer in answers.values())
    expected = case.expected()
    assert len({tuple(ids) for ids in expected.values()}) > CONTENTS, "the adapters answer differently"
    assert len(answers) > ACTIONS // 5 and cached and case.waited, (len(answers), cached, case.waited)
    for rid, asked in case.asked.items():
        assert answers[rid].ids == expected[asked], (rid, asked)
