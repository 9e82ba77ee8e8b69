"""What must hold once a run has come to rest."""

from array import array
from typing import TYPE_CHECKING

from quartet.detokenizer_service.stream import Stream
from quartet.http_gateway.ring.admission import BLOCKED_REQUEST
from quartet.http_gateway.ring.quarantine import POISON_REQUEST, SUSPICIOUS_DEATHS
from quartet.http_gateway.ring.schedulers import Schedulers
from quartet.runtime.adapters import NEVER_LOADED
from quartet.runtime.control import COMMAND_LOST, UpdateWeightsFromDisk
from quartet.runtime.errors import RequestError
from quartet.runtime.messages import Generate, Reply, Request, Text, unpack_ids
from quartet.scheduler_service.control.adapter_queue import NOT_READ
from quartet.scheduler_service.core.kv_tier import KvTier
from tests.fakes import FAKE_VECTOR, FakeGrammar, fake_logprob
from tests.simulated_ring.adapters import check_adapters, check_text, is_refused, may_be_unloaded
from tests.simulated_ring.faults import hold
from tests.simulated_ring.load import VOCAB_SIZE, Call, Order, is_done, tokenizer, vocabulary
from tests.simulated_ring.scheduler import SchedulerProcess, drawn
from tests.simulated_ring.services import FIRST_VERSION, ROLES
from tests.wrong_messages import RID, TEXTS

if TYPE_CHECKING:
    from tests.simulated_ring.simulation import Simulation

PROMPT_TAIL = 8


def check(simulation: "Simulation") -> None:
    for call in simulation.calls:
        check_call(simulation, call)
    for order in simulation.operator.orders:
        check_order(simulation, order)
    check_leftovers(simulation)


# requests


def check_call(simulation: "Simulation", call: Call) -> None:
    """Each request has ended once, and as it would have without a death."""
    if call.orphaned:
        return
    hold(call.done or call.left or call.refusal, "never ended:", [g.request.rid for g in call.batch])
    if call.refusal:
        check_refusal(call, call.refusal)
        return
    for generate, texts in zip(call.batch, call.texts, strict=True):
        check_answer(simulation, call, generate, texts)


def check_refusal(call: Call, refusal: RequestError) -> None:
    known = ("Duplicate request ID", "The server is full") + ((BLOCKED_REQUEST,) if call.poison else ())
    hold(refusal.message.startswith(known), "refused:", refusal.message)


def check_answer(simulation: "Simulation", call: Call, generate: Generate, texts: list[Text]) -> None:
    rid = generate.request.rid
    ends = [i for i, text in enumerate(texts) if text.tokens.finish]
    hold(ends == [len(texts) - 1] if call.done else len(ends) < 2, rid, "ended at", ends, "of", len(texts))
    check_tokens(simulation, call, generate, texts)
    if ends:
        check_end(simulation, call, generate, texts)


def check_tokens(simulation: "Simulation", call: Call, generate: Generate, texts: list[Text]) -> None:
    """Every token is the one that weights and adapter of its labels give, and is scored; the prompt is scored once."""
    request, grammar = generate.request, grammar_of(generate)
    ids = prompt_of(generate)
    prompt_len = len(ids)
    for text in texts:
        made = unpack_ids(text.tokens.ids)
        label = text.tokens.weight_version + check_text(simulation, call, generate, text)
        for token in made:
            expected = drawn(ids, request.seed, label, VOCAB_SIZE)
            if grammar is not None:
                expected = grammar.drawn(len(ids) - prompt_len, expected)
            hold(token == expected, request.rid, "has token", token, "for", expected, "at", len(ids))
            ids.append(token)
        if request.logprobs and made:
            found = text.tokens.logprobs
            hold(found and found.ids == text.tokens.ids, request.rid, "has tokens without logprobs")
            values = array("f", map(fake_logprob, made)).tobytes()
            hold(found is not None and found.values == values, request.rid, "has wrong logprobs")
    scored = [text.tokens.input_logprobs for text in texts if text.tokens.input_logprobs]
    made_any = any(text.tokens.ids for text in texts)
    wanted = request.logprobs is not None and request.logprobs.start >= 0 and request.task == "generate"
    hold(len(scored) <= 1, request.rid, "has its prompt scored", len(scored), "times")
    if wanted and made_any:
        hold(len(scored) == 1, request.rid, "lacks its prompt's logprobs")


def grammar_of(generate: Generate) -> FakeGrammar | None:
    length = generate.request.params.regex
    return None if length is None else FakeGrammar(int(length))


def prompt_of(generate: Generate) -> "array[int]":
    if generate.text is None:
        return unpack_ids(generate.input_ids)
    return array("i", tokenizer().encode(generate.text).ids)


def check_end(simulation: "Simulation", call: Call, generate: Generate, texts: list[Text]) -> None:
    """The finish is the one that the tokens lead to, or one that somebody asked for."""
    finish = texts[-1].tokens.finish
    assert finish is not None
    request = generate.request
    whole = "".join(text.text for text in texts)
    ids = [token for text in texts for token in unpack_ids(text.tokens.ids)]
    ended_by_command = any(order.may_end(call) for order in simulation.operator.orders)
    if finish.reason == "abort":
        hold(call.unwanted or ended_by_command, request.rid, "was aborted by nobody:", finish.message)
        return
    if finish.reason == "error":
        check_error(simulation, call, request, finish.message, bool(ids))
        return
    hold(not is_poison(call, generate), request.rid, "has poisoned nobody")
    if request.task == "embed":
        vector = array("f", [float(len(prompt_of(generate)))] * FAKE_VECTOR).tobytes()
        hold([t.tokens.vector for t in texts] == [vector], request.rid, "has another vector")
        return
    tail = prompt_of(generate)[-PROMPT_TAIL:]
    stream = Stream(vocabulary(), request, tail.tobytes())
    expected = ""
    stops = request.params.stop_token_ids or []
    grammar = grammar_of(generate)
    complete = grammar.length if grammar is not None else 0
    for i, token in enumerate(ids):
        last = i == len(ids) - 1
        text, _, match = stream.feed(array("i", [token]), finish if last else None)
        expected += text
        if not last:
            hold(match is None and token not in stops, request.rid, "goes on behind a stop")
            hold(i + 1 != complete, request.rid, "goes on behind the end of its grammar")
        elif match is not None:
            hold(finish.matched == match.name, request.rid, "stops at", finish.matched, "for", match.name)
        elif token in stops:
            hold(finish.matched == token, request.rid, "stops at", finish.matched, "for", token)
        elif i + 1 == complete:
            hold(finish.reason == "stop" and finish.matched in (token, None), request.rid, "is complete:", finish)
        else:
            hold(finish.reason == "length" and len(ids) == request.params.max_new_tokens, request.rid, finish)
    hold(whole == expected, request.rid, "has the text", repr(whole), "for", repr(expected))
    hold(ids or request.params.max_new_tokens == 0, request.rid, "has ended without a token")


def is_poison(call: Call, generate: Generate) -> bool:
    return bool(call.poison) and generate is call.batch[0]


def check_error(simulation: "Simulation", call: Call, request: Request, message: str, has_output: bool) -> None:
    rid, adapter = request.rid, request.adapter
    if adapter and message == NEVER_LOADED.format(adapter):
        hold(may_be_unloaded(simulation, adapter, call), rid, "has lost an adapter that nobody has unloaded")
        hold(not has_output, rid, "has lost its adapter")
        return
    if adapter and simulation.adapters is not None and message.startswith(NOT_READ.format(adapter, "")):
        hold(simulation.adapters.fails, rid, "failed:", message)
        return
    poison = {POISON_REQUEST.format(role=role): role for role in ROLES}
    if message in poison:
        role = poison[message]
        by_chance = simulation.kills[role] and simulation.deaths[role] > SUSPICIOUS_DEATHS
        hold(call.poison == role or by_chance, rid, "is no poison request:", message)
        return
    hold(message == "The request queue is full." and simulation.config.max_queued, rid, "failed:", message)
    hold(not has_output, rid, "was admitted and then refused")


# commands


def check_order(simulation: "Simulation", order: Order) -> None:
    """Answered, or a 503 that says why; what was refused has not been done."""
    if order.orphaned:
        return
    name = type(order.command).__name__
    hold(order.answer or order.error, name, "was never answered")
    said = order.error if order.error is not None else order.answer
    if isinstance(said, RequestError | Reply) and said.message == COMMAND_LOST:
        hold(simulation.deaths["scheduler"], name, "was lost with nobody")
        return
    hold(order.error is None, name, "failed:", repr(order.error))
    done = [(key, epoch) for key, epoch, id in simulation.carried_out if id == order.command.id]
    hold(len(set(done)) == len(done), name, "was carried out twice by one scheduler")
    if isinstance(order.command, UpdateWeightsFromDisk) and isinstance(order.answer, Reply):
        hold(order.answer.success == bool(done), name, "was carried out", len(done), "times:", order.answer.message)


# what is left


def check_leftovers(simulation: "Simulation") -> None:
    processes = simulation.processes
    hold(set(processes) == set(simulation.roles), "not all are there:", list(processes))
    ring = processes["gateway"].ring
    hold(not ring._pending, "left in the journal:", list(ring._pending))
    hold(not ring._commands._unanswered, "commands wait")
    hold(not ring._quarantine.unproven, "suspects are left")
    detokenizer = processes["detokenizer"].detokenizer
    for kept, what in ((detokenizer._streams, "streams"), (detokenizer._stopped, "stopped streams")):
        hold(not set(kept) - {RID, *TEXTS}, what, "left:", list(kept))  # no scheduler will end a forged one
    schedulers = [process for process in processes.values() if isinstance(process, SchedulerProcess)]
    for process in schedulers:
        check_scheduler(simulation, process)
    check_adapters(simulation, schedulers)
    simulation.directories.check()
    check_levelled(simulation, ring.schedulers)


def check_levelled(simulation: "Simulation", schedulers: Schedulers) -> None:
    """Every scheduler serves what was decided, and that is what commands have left whose outcome is known."""
    hold(not any(schedulers.is_behind(one.rank) for one in schedulers.all), "not level:", schedulers.decided)
    version: str | None = FIRST_VERSION
    for order in simulation.operator.orders:
        if isinstance(order.command, UpdateWeightsFromDisk) and not is_refused(order):
            version = order.command.weight_version if is_done(order) else None
    served = {one.served.weight_version for one in schedulers.all}
    hold(served == {version} or version is None, "serve", served, "and should serve", version)


def check_scheduler(simulation: "Simulation", process: SchedulerProcess) -> None:
    gateway, planner = simulation.processes["gateway"].gateway, process.scheduler.planner
    hold(planner.idle and not planner.live, "the scheduler still has", list(planner.live))
    hold(not process.scheduler.launched and not process.worker._sampled, "steps or states are left")
    hold(planner.audit() == "", planner.audit())
    planner.check_invariants()
    if process.group is not None:
        for rank in process.group.ranks:
            hold(rank.at_rest and not rank.hung, process.key, "has a rank that does not rest")
            hold(rank.updates.staged is None, process.key, "has a rank that keeps what nobody will serve")
            hold(rank.serves == process.worker.weight_version, process.key, "rank", rank.rank, "serves", rank.serves)
    if process.tier is not None:
        check_tier(process, process.tier.tier)
    hold(not planner.paused and not gateway.paused, "still paused:", planner.paused, gateway.paused)
    hold(not planner.asleep and not gateway.asleep, "still asleep:", planner.asleep, gateway.asleep)
    serves, shown = process.worker.weight_version, gateway.weight_version
    hold(serves == shown == process.disk.weight_version, process.key, "serves", serves, "shows", shown)
    hold(
        simulation.watch.weight_version in (None, serves), simulation.watch.weight_version, "was promised, not", serves
    )


def check_tier(process: SchedulerProcess, tier: KvTier) -> None:
    """Nothing is under way, and memory and files of all ranks hold what the books say."""
    tier.check()
    hold(not (tier.commands or tier.fetches or tier.pending), process.key, "has a tier that waits:", tier.counters())
    for part in process.parts:
        hold(not (part.busy or part.ready or part.brought), process.key, "has jobs or reads left")
        for shelf, there in ((tier.memory, part.memory), (tier.files, part.disk.blocks)):
            same = len(shelf) == len(there) and all(key in shelf for key in there)
            hold(same, process.key, "has", len(there), "blocks for", len(shelf))
