"""What clients do: calls of one or several requests, some impatient, some aborted; and an operator's commands."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from random import Random

from tokenizers import Tokenizer

from quartet.detokenizer_service.decode import Vocabulary
from quartet.http_gateway.ring.ring_client import RingClient
from quartet.runtime.control import (
    ContinueGeneration,
    ControlCommand,
    Detokenize,
    FlushCache,
    PauseGeneration,
    Probe,
    Tokenize,
    UpdateWeightsFromDisk,
)
from quartet.runtime.errors import RequestError
from quartet.runtime.messages import Generate, LogprobOptions, Message, Reply, Request, Text, pack_ids
from quartet.runtime.sampling import SamplingParams
from tests.simulated_ring.directories import NEW_PATH
from tests.simulated_ring.services import POISON
from tests.tokenizers_to_try import KINDS

VOCAB_SIZE = 400
LONGEST_PROMPT = 20
MOST_NEW_TOKENS = 24
COMMAND_TIMEOUT_S = 600.0
STOPS = ["e", "th", "o ", "ü", "世", "qu", "\n", "0"]
PATTERNS = ["[a-z]{4}", "a+b", "e .", "[0-9]"]


@cache
def tokenizer() -> Tokenizer:
    return KINDS["byte level"]()


@cache
def vocabulary() -> Vocabulary:
    return Vocabulary(tokenizer())


@dataclass(eq=False)
class Call:
    """One call of a client: what it asked for and what it got."""

    batch: list[Generate]
    parent: str = ""  # the rid that the client gave, of a batch
    leaves_after: int | None = None  # steps
    poison: str = ""  # the role that it ends
    opened: int = -1  # place in the order of all that was sent
    texts: list[list[Text]] = field(default_factory=list)  # by index
    refusal: RequestError | None = None
    unwanted: bool = False  # somebody asked for its end
    left: bool = False
    orphaned: bool = False  # its gateway died
    done: bool = False

    @property
    def under_way(self) -> bool:
        return not (self.done or self.left or self.refusal or self.orphaned)

    @property
    def parents(self) -> list[str] | None:
        return [self.parent] * len(self.batch) if self.parent else None

    async def run(self, ring: RingClient, order: Callable[[], int]) -> None:
        self.texts = [[] for _ in self.batch]
        steps = 0
        try:
            with ring.open(self.batch, self.parents) as group:
                self.opened = order()
                while not group.finished:
                    if self.leaves_after is not None and steps >= self.leaves_after:
                        self.left = True
                        return
                    for index, text in await group.next():
                        self.texts[index].append(text)
                    steps += 1
            self.done = True
        except RequestError as refusal:
            self.refusal = refusal


class Clients:
    """Draws calls. A rid is used again now and then, also while it is in use."""

    def __init__(self, random: Random, likes_prefixes: bool = False) -> None:
        """`likes_prefixes`: many prompts begin alike."""
        self._random = random
        self._stems = [[2 + (place * stem) % 11 for place in range(LONGEST_PROMPT)] for stem in (1, 2, 3)]
        self._likes_prefixes = likes_prefixes
        self._made = 0

    def call(self, poison: str = "") -> Call:
        random = self._random
        self._made += 1
        rid = f"r{random.randint(1, self._made)}" if random.random() < 0.1 else f"r{self._made}"
        copies = random.choice([1, 1, 1, 2, 4])
        first = self._generate(rid, poison)
        call = Call([first], poison=poison)
        if copies > 1:
            call = Call(
                [self._generate(f"{rid}_{i}", poison if not i else "") for i in range(copies)], rid, poison=poison
            )
        if random.random() < 0.15:
            call.leaves_after = random.randint(0, 8)
        return call

    def _generate(self, rid: str, poison: str) -> Generate:
        random = self._random
        params = SamplingParams(
            max_new_tokens=random.choice([0, 1, 2, *range(3, MOST_NEW_TOKENS)]),
            stop=random.sample(STOPS, random.randint(1, 2)) if random.random() < 0.3 else None,
            stop_regex=random.choice(PATTERNS) if random.random() < 0.1 else None,
            stop_token_ids=random.sample(range(2, VOCAB_SIZE), 40) if random.random() < 0.2 else None,
            no_stop_trim=random.random() < 0.2,
            regex=str(random.randint(1, MOST_NEW_TOKENS)) if random.random() < 0.3 else None,  # see FakeGrammars
        )
        request = Request(
            rid=rid,
            params=params,
            seed=random.randrange(1 << 31),
            logprobs=LogprobOptions(start=random.choice([-1, 0, 1])) if random.random() < 0.3 else None,
            task="embed" if random.random() < 0.05 else "generate",
            priority=random.randint(0, 2),
        )
        if not poison and random.random() < 0.3:
            words = random.choices(["The", " quick", " brown", "über", " 世界", "0", "\n"], k=random.randint(1, 6))
            return Generate(request=request, text="".join(words))
        prompt = [random.randint(2, 12) for _ in range(random.randint(1, LONGEST_PROMPT))]
        if self._likes_prefixes and random.random() < 0.8:
            shared = random.randint(0, LONGEST_PROMPT)
            prompt = random.choice(self._stems)[:shared] + prompt[: max(1, LONGEST_PROMPT - shared)]
        if poison:
            prompt[-1] = POISON[poison]
        return Generate(request=request, input_ids=pack_ids(prompt))


@dataclass(eq=False)
class Order:
    """A command and what became of it."""

    command: ControlCommand
    sent: int  # place in the order of all that was sent
    answered: int = 1 << 60
    orphaned: bool = False  # its gateway died
    may_wait: bool = False
    answer: Message | None = None
    error: Exception | None = None

    def may_end(self, call: "Call") -> bool:
        """Whether the command ends requests and that one was there: as it came, or as an update was put in place.

        Where there are several schedulers, it may have waited for one that was away.
        """
        last = self.answered if isinstance(self.command, UpdateWeightsFromDisk) or self.may_wait else self.sent
        return self.command.ends_requests and last > call.opened

    @property
    def under_way(self) -> bool:
        return self.answer is None and self.error is None


def is_done(order: Order) -> bool:
    """Whether a command was carried out for sure."""
    return isinstance(order.answer, Reply) and order.answer.success


class Operator:
    """Gives commands one after the other, each when the one before has been answered."""

    def __init__(self, random: Random) -> None:
        self.orders: list[Order] = []
        self._random = random
        self._version = 0

    async def carry_out(self, ring: RingClient, command: ControlCommand, next_order: Callable[[], int]) -> Order:
        order = Order(command, next_order(), may_wait=ring.schedulers.several)
        self.orders.append(order)
        try:
            order.answer = await ring.command(command, COMMAND_TIMEOUT_S)
        except (RequestError, TimeoutError) as error:
            order.error = error
        order.answered = next_order()
        return order

    def update(self, model_path: str) -> UpdateWeightsFromDisk:
        """To a version of its own."""
        self._version += 1
        return UpdateWeightsFromDisk(model_path=model_path, weight_version=f"v{self._version}")

    def draw(self) -> ControlCommand:
        random = self._random
        kind = random.choice(["flush", "probe", "pause", "continue", "continue", "update", "text", "ids"])
        match kind:
            case "flush":
                return FlushCache(timeout=random.choice([0.0, 0.05]))
            case "probe":
                return Probe()
            case "pause":
                return PauseGeneration(mode=random.choice(["abort", "retract", "in_place", "in_place"]))
            case "continue":
                return ContinueGeneration()
            case "text":
                return Tokenize(texts=["The quick", "brown", " 世界"][: random.randint(1, 3)])
            case "ids":
                return Detokenize(ids=[pack_ids([5, 6, 7])])
            case _:
                update = self.update(random.choice([NEW_PATH, NEW_PATH, NEW_PATH, "broken"]))
                update.abort_all_requests = random.random() < 0.2
                update.retract = random.random() < 0.2
                update.flush_cache = random.random() < 0.8
                return update
