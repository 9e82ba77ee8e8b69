"""One run of the whole ring in one thread, on a virtual clock, everything random drawn from one seed.

The services are the real ones, apart from their sockets (`links.py`), the model (`tests/fakes.py`), the weights (a
label, of which the tokens are a function) and the supervisor. Clients, an operator and deaths keep the ring busy for a
while; then everything must come to rest within a number of turns, and `checks.py` looks at what has become of each
request and command, and at what is left behind.

Some processes hang for a while before they die, and some say what none should (`tests/wrong_messages.py`). In some
runs a scheduler is a group of ranks (`group.py`), one of which may die or hang, in some it keeps KV beyond the pool
(`disks.py`), on disks that are slow, fail and lose blocks, in some it has LoRA adapters (`adapters.py`), in some its
memory is released (`memory.py`), in some the files of its weights are written to (`directories.py`).

Left out: HTTP; the supervisor's budget and how it finds a hang; draining; the pool of threads that compiles grammars;
updates and adapters over the wire, adapters and released memory of groups of ranks; frames above the size limit. A
process loses what it knows with its death, and nothing else fails. News are quicker than births: before a process is
started again, frames of the one before have arrived or are lost, and its peers have noticed its death.
"""

import asyncio
import itertools
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from quartet.http_gateway.ring.aborts import matches
from quartet.runtime.control import Abort, ControlCommand, Detokenize, Probe, Tokenize, UpdateWeightsFromDisk
from quartet.runtime.messages import Generate, Message, Text, Tokenized, Tokens, process_key
from quartet.runtime.sockets import encode
from tests.simulated_ring import adapters as adapting
from tests.simulated_ring import memory, services
from tests.simulated_ring.checks import check
from tests.simulated_ring.clock import Action, Agenda
from tests.simulated_ring.directories import FIRST_PATH, NEW_PATH, Directories, rewrites_of
from tests.simulated_ring.disks import snapshots_of, tier_of
from tests.simulated_ring.gateway import GatewayProcess, Watch
from tests.simulated_ring.group import ranks_of
from tests.simulated_ring.links import Inbox, Link
from tests.simulated_ring.load import Call, Clients, Operator, Order, vocabulary
from tests.simulated_ring.rest import come_to_rest
from tests.simulated_ring.scheduler import Disk, SchedulerProcess
from tests.simulated_ring.services import (
    DETOKENIZER,
    GATEWAY,
    ROLES,
    SCHEDULER,
    TOKENIZER,
    DetokenizerProcess,
    Killed,
    Process,
    TokenizerProcess,
)
from tests.simulated_ring.settings import encoder, keeps, planner_config, schedulers_of
from tests.simulated_ring.trace import line
from tests.simulated_ring.turns import Turns
from tests.wrong_messages import MESSAGES, wrong

HORIZON_S = 1.0  # of the load and the deaths
MOST_POINTS = 8  # of a process until a death that is due
COME_AGAIN_S = 0.05  # clients that find no gateway
BIRTHS_S = (0.02, 0.05, 0.2)
HANGS_S = (0.01, 0.1)  # until a process that does not move is killed
FORGERIES = [m for m in MESSAGES if isinstance(m, Generate | Tokenized | Tokens | Text | Tokenize | Detokenize | Probe)]
DYING = ROLES[:3]
ADAPTER_COMMANDS = 0.6  # the share of commands, in a run with adapters
MEMORY_COMMANDS = 0.4  # likewise, in one with memory that is released
KEEPS_PAUSE = 0.2  # the share of updates behind which generation is paused
DYING_WHERE_LEVELLED = (*[SCHEDULER] * 4, *[GATEWAY] * 2, TOKENIZER, DETOKENIZER)


class Simulation:
    """Draws a server, its load and its deaths from the seed, and runs them."""

    def __init__(self, seed: int, trace: Callable[[str], None] | None = None, levelling: bool = False) -> None:
        """`levelling`: two or three schedulers with adapters, which get many commands and die often."""
        self.levelling, self.random = levelling, (random := Random(seed))
        self.agenda = Agenda()
        self.deaths_are_over = False
        self.kills: Counter[str] = Counter()  # by chance, not by a poison
        self.deaths: Counter[str] = Counter()
        self.calls: list[Call] = []
        self.carried_out: list[tuple[str, int, str]] = []  # which scheduler has put which update in place
        self.schedulers = schedulers_of(seed, levelling)
        self.ranks = 1 if levelling else ranks_of(seed)
        snapshots = snapshots_of(seed) if self.ranks == 1 else None  # as `check_ranks` has it
        self.tier = tier_of(seed, snapshots is not None)
        self.adapters = adapting.adapters_of(seed, always=levelling) if self.ranks == 1 else None
        self.saves_memory = self.ranks == 1 and memory.saves_memory(seed)
        self.beside = Random(f"beside {seed}")  # for what these do
        self.directories = Directories()
        self.rewrites = rewrites_of(seed) if self.ranks == 1 and self.schedulers > 1 else 0
        self.roles = {process_key(role, rank): (role, rank) for role in ROLES for rank in range(self._count(role))}
        self.clients, self.operator = Clients(random, likes_prefixes=self.tier is not None), Operator(random)
        self.watch = Watch(self.operator, self.directories)
        self.config = planner_config(random)
        self.depth = 0 if self.config.drafts else random.choice([0, 1])
        if snapshots is not None:
            self.config, self.depth = replace(self.config, snapshots=snapshots, drafts=None), 0
        if self.adapters is not None:
            self.config = replace(self.config, max_adapters=self.adapters.most_in_batch)
        self.links = {
            ends: Link(random, keeps=keeps(*ends, self.schedulers > 1)) for ends in self._ends()
        }  # by sender and receiver
        self.processes: dict[str, Any] = {}  # by key
        self.epochs = dict.fromkeys(self.roles, 0)  # by key
        self._pids = itertools.count(1)
        self._trace, self._order, self._operates = trace, 0, False
        actors = [link.turn for link in self.links.values()] + [self._actor(key) for key in self.roles]
        self.turns = Turns(actors, self.agenda, random, self.at_rest)

    def run(self) -> None:
        """From the first process to the last check. Raises Fault, and whatever a service should not have raised."""
        with tempfile.TemporaryDirectory() as run_dir:
            self.run_dir = run_dir
            if self.adapters is not None:
                self.adapters.write_files(run_dir)
            own = [str(Path(run_dir) / str(rank)) for rank in range(self.schedulers)]
            self.disks = [Disk(run_dir, self.ranks, self.directories) for run_dir in own]
            for key in self.roles:
                self._start(key, 0)
            self.turns.shuffle()
            self.turns.run_until(lambda: self._open_gateway is not None)
            self._plan()
            self.turns.run_until(lambda: self.deaths_are_over)
            self.turns.level()
            come_to_rest(self)
            check(self)

    def _count(self, role: str) -> int:
        return self.schedulers if role == SCHEDULER else 1

    def _ends(self) -> list[tuple[str, str]]:
        """The links of the ring: who sends to whom."""
        following = dict(zip(ROLES, [*ROLES[1:], ROLES[0]], strict=True))
        pairs = itertools.product(self.roles, self.roles)
        ends = [(one, other) for one, other in pairs if following[self.roles[one][0]] == self.roles[other][0]]
        return ends + ([(TOKENIZER, DETOKENIZER)] if self.schedulers > 1 else [])

    # what is drawn

    def _plan(self) -> None:
        random = self.random
        for _ in range(random.randint(2, 14)):
            self._sometime(lambda: self._arrive(self.clients.call()))
        if random.random() < 0.2:
            poisoned = random.choice(DYING)
            for _ in range(random.randint(1, 2)):
                self._sometime(lambda: self._arrive(self.clients.call(poisoned)))
        for _ in range(random.choice([0, 0, 1, 3])):
            self._sometime(self._abort_some)
        for _ in range(random.choice([0, 1, 2, 3, 5, 8])):
            self._sometime(self._kill_some)
        for _ in range(random.randint(0, 4)):
            self._sometime(self.turns.shuffle)
        for _ in range(random.choice([0, 0, 0, 1, 4])):
            self._sometime(self._forge)
        for _ in range(10 if self.levelling else 0):
            self._sometime(lambda: self._kill(random.choice(DYING_WHERE_LEVELLED)))
        for _ in range(self.rewrites):
            path = self.beside.choice([FIRST_PATH, NEW_PATH])
            self.agenda.after(self.beside.uniform(0, HORIZON_S), partial(self.directories.rewrite, path))
        self._employ_operator(12 if self.levelling else random.choice([0, 2, 6, 12]))
        self.agenda.after(HORIZON_S, self._end_deaths)

    def _sometime(self, action: Action) -> None:
        self.agenda.after(self.random.uniform(0, HORIZON_S), action)

    # clients and the operator

    @property
    def _open_gateway(self) -> GatewayProcess | None:
        gateway = self.processes.get(GATEWAY)
        return gateway if gateway is not None and gateway.up else None

    def _arrive(self, call: Call) -> None:
        if (gateway := self._open_gateway) is None:
            self.agenda.after(COME_AGAIN_S, lambda: self._arrive(call))
            return
        if self.adapters is not None:
            adapting.name_adapters(
                call.batch, sorted(adapter.name for adapter in gateway.gateway.adapters), self.beside
            )
        self.calls.append(call)
        gateway.calls.append(call)
        gateway.loop.create_task(call.run(gateway.ring, self._next_order))

    def _abort_some(self) -> None:
        """As /abort_request: a call, a part of one, several, or all."""
        live = [call for call in self.calls if call.under_way]
        if (gateway := self._open_gateway) is None or not live:
            return
        call = self.random.choice(live)
        rid = call.batch[-1].request.rid
        commands = [
            Abort(rid=call.parent or rid),
            Abort(rid=rid),
            Abort(rid=rid[:2], prefix=True),
            Abort(abort_all=True),
        ]
        gateway.loop.call_soon(self._abort, gateway, self.random.choice(commands))

    def _abort(self, gateway: GatewayProcess, command: Abort) -> None:
        named = {entry.rid for entry in gateway.ring._pending.values() if matches(command, entry)}
        for call in gateway.calls:
            if call.under_way and named.intersection(generate.request.rid for generate in call.batch):
                call.unwanted = True
        gateway.ring.abort(command)

    def _employ_operator(self, commands: int) -> None:
        if (gateway := self._open_gateway) is None:
            self.agenda.after(COME_AGAIN_S, lambda: self._employ_operator(commands))
            return
        gateway.loop.create_task(self._operate(gateway, commands))

    async def _operate(self, gateway: GatewayProcess, commands: int) -> None:
        self._operates = True
        for _ in range(commands):
            await asyncio.sleep(self.random.uniform(0, HORIZON_S / 6))
            command = self.operator.draw()
            if isinstance(command, UpdateWeightsFromDisk) and self.levelling:
                command.keep_pause = self.beside.random() < KEEPS_PAUSE
            if self.adapters is not None and self.beside.random() < ADAPTER_COMMANDS:
                command = adapting.draw_command(self.adapters, self.beside)
            elif self.saves_memory and self.beside.random() < MEMORY_COMMANDS:
                command = memory.draw_command(self.beside)
            await self.command(gateway, command)
        self._operates = False

    async def command(self, gateway: GatewayProcess, command: ControlCommand) -> Order:
        self.watch.sends(command)
        return await self.operator.carry_out(gateway.ring, command, self._next_order)

    def _next_order(self) -> int:
        """The place of a request, a command or an answer among all others."""
        self._order += 1
        return self._order

    def _forge(self) -> None:
        """A service sends what none should, of a request that nobody has made."""
        role = self.random.choice(ROLES)
        message = wrong(self.random, self.random.choice(FORGERIES))
        links = list(self._outboxes_of(role).values())
        link = links[0] if len(links) == 1 else self.random.choice(links)
        if message is not None and link.sender_is_there:
            self.note(role, "forges", [message])
            link.send(encode([message]))

    # deaths and births

    def _kill_some(self) -> None:
        self._kill(self.random.choice([*DYING, *ROLES]))

    def _kill(self, role: str) -> None:
        """Now, or at one of its next points."""
        keys = [key for key, (own, _) in self.roles.items() if own == role]
        key = keys[0] if len(keys) == 1 else self.random.choice(keys)
        process = self.processes.get(key)
        if process is None or self.deaths_are_over:
            return
        self.kills[role] += 1
        victim = process
        if isinstance(process, SchedulerProcess) and process.group is not None:
            victim = self.beside.choice([process, *process.group.ranks])
        if self.random.random() < 0.2:
            self._die(key)
        elif self.random.random() < 0.15:
            victim.hung = True
            self.agenda.after(self.random.choice(HANGS_S), lambda: self._end(key, process))
        else:
            victim.points_left = self.random.randint(1, MOST_POINTS)

    def _end(self, key: str, process: Process) -> None:
        """The supervisor has had enough, or a rank of a scheduler has ended."""
        if self.processes.get(key) is process:
            self._die(key)

    def _die(self, key: str) -> None:
        process = self.processes.pop(key)
        self.note(key, "dies", [])
        process.end()
        self.deaths[process.role] += 1
        if isinstance(process, GatewayProcess):
            self._orphan(process)
        for link in self._outboxes_of(key).values():
            link.sender_died()
        for link in self._inboxes_of(key):
            link.receiver_died()
        if isinstance(process, SchedulerProcess) and GATEWAY in self.processes:
            self.processes[GATEWAY].hear_of_death(process.pid)
        delay = self.random.choice(BIRTHS_S)
        self.agenda.after(delay, lambda: self._start(key, process.epoch + 1))
        if self.random.random() < 0.25:
            other = self.random.choice(DYING)
            self.agenda.after(delay * self.random.uniform(0, 1.5), lambda: self._kill(other))

    def _orphan(self, gateway: GatewayProcess) -> None:
        """Its clients and the operator are cut off."""
        gateway.dead = True
        for call in gateway.calls:
            call.orphaned = call.under_way
        for order in self.operator.orders:
            order.orphaned = order.orphaned or order.under_way
        if self.levelling and self._operates and not self.deaths_are_over:
            self._employ_operator(6)
        self._operates = False
        gateway.loop.abandon()

    def _start(self, key: str, epoch: int) -> None:
        self.epochs[key] = epoch
        role, rank = self.roles[key]
        inboxes, outboxes = self._inboxes_of(key), self._outboxes_of(key)
        place = {"inbox": Inbox(inboxes), "outboxes": outboxes, "note": self.note, "newest": self.epochs.__getitem__}
        self.processes[key] = self._process(role, rank, epoch=epoch, schedulers=self.schedulers, **place)
        for link in outboxes.values():
            link.sender_is_there = True
        for link in inboxes:
            link.receiver_came()
        self.note(key, "starts", [])

    def _process(self, role: str, rank: int, **place: Any) -> Process:
        match role:
            case services.TOKENIZER:
                return TokenizerProcess(encoder(self.random), **place)
            case services.SCHEDULER:
                place |= {"rank": rank, "pid": next(self._pids)}
                disk, agenda, tier = self.disks[rank], self.agenda, self.tier
                random = self.random if tier is None and self.ranks == 1 else self.beside
                settings = (self.config, self.depth, disk, agenda, random, self.carried_out)
                place |= {"tier": tier, "adapters": self.adapters, "saves_memory": self.saves_memory}
                place |= {"on_death": self._end_group}
                return SchedulerProcess(*settings, **place)
            case services.DETOKENIZER:
                return DetokenizerProcess(vocabulary(), **place)
            case _:
                adapters = self.adapters is not None
                return GatewayProcess(self.agenda, self.watch, self._is_dead, self.run_dir, adapters, **place)

    def _end_group(self, process: SchedulerProcess) -> None:
        self._end(process.key, process)

    def _is_dead(self, pid: int) -> bool:
        living = [process for process in self.processes.values() if isinstance(process, SchedulerProcess)]
        return all(process.pid != pid for process in living)

    def _outboxes_of(self, key: str) -> dict[str, Link]:
        return {receiver: link for (sender, receiver), link in self.links.items() if sender == key}

    def _inboxes_of(self, key: str) -> list[Link]:
        return [link for (_, receiver), link in self.links.items() if receiver == key]

    def _end_deaths(self) -> None:
        """Whoever is about to die does so now."""
        self.deaths_are_over = True
        for key, process in list(self.processes.items()):
            if process.doomed:
                self._die(key)

    # time

    def _actor(self, key: str) -> Callable[[], bool]:
        def turn() -> bool:
            process = self.processes.get(key)
            if process is None or (process.hung and not isinstance(process, SchedulerProcess)):
                return False
            try:
                return process.turn()
            except Killed:
                self._die(key)
                return True

        return turn

    def at_rest(self) -> bool:
        """Nothing happens before something is due."""
        links = all(link.at_rest for link in self.links.values())
        return links and all(process.hung or process.at_rest for process in self.processes.values())

    def note(self, role: str, verb: str, messages: Sequence[Message]) -> None:
        if self._trace is not None:
            for text in [line(message) for message in messages] or [""]:
                text = text.replace(self.run_dir, "")  # another one in each run
                self._trace(f"{self.agenda.now:9.5f} {role:>11} {verb:6} {text}".rstrip())


def run(seed: int, trace: Callable[[str], None] | None = None, levelling: bool = False) -> str | None:
    """What is wrong with this seed's run, if anything is."""
    try:
        Simulation(seed, trace, levelling).run()
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {error} ({where.name}, line {where.lineno})"
    return None
