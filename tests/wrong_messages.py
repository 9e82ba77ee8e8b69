"""Messages that are typed correctly and hold what no service would ever send.

`wrong(random)` takes a message of any kind, as it is when all is well, and puts another value of the same type into
some of its fields. It passes the wire's own decoder, so nothing is tried that could not arrive.
"""

from array import array
from functools import cache
from random import Random
from typing import Any, get_args

import msgspec

from quartet.runtime import control
from quartet.runtime.messages import (
    Chat,
    Drafts,
    Facts,
    Finish,
    Generate,
    LogprobOptions,
    Logprobs,
    Message,
    Prepared,
    Reply,
    Request,
    Restarted,
    RingMessage,
    Text,
    Tokenized,
    Tokens,
    pack_ids,
)
from quartet.runtime.sampling import SamplingParams
from quartet.runtime.sockets import decode, encode

RID = "the wrong one"
BYTES = [b"", b"abc", b"\xff" * 4, b"\xff\xff\xff\x7f", bytes(4), bytes(7), bytes(4000), pack_ids([3, 4])]
INTEGERS = [0, 1, -1, 2, 4, 63, 400, 10**6, 10**9, 2**31, 2**62, -(2**63)]
NUMBERS = [0.0, -1.0, float("nan"), float("inf"), 1e300, 0.5]
TEXTS = ["", "x", "(", "[a-", "\0", "\n\x1b[31m", "é" * 300, "gateway", "a{1000}{1000}", "{}", "../../etc/passwd"]
FINISH = Finish(reason="stop", matched=4)
LOGPROBS = Logprobs(
    ids=pack_ids([3]),
    values=array("f", [-1]).tobytes(),
    top_ids=pack_ids([3, 4]),
    top_values=array("f", [-1, -2]).tobytes(),
    asked_values=array("f", [-3]).tobytes(),
    texts=["a"],
)
PARAMS = SamplingParams(
    max_new_tokens=5,
    stop=["e"],
    stop_regex=["[a-z]{9}"],
    stop_token_ids=[7],
    json_schema=None,
    logit_bias={"3": 1.0},
)
REQUEST = Request(
    rid=RID,
    params=PARAMS,
    logprobs=LogprobOptions(start=0, top=2, token_ids=[5], text=True),
    resume_ids=pack_ids([3]),
)
CHAT = Chat(messages=[{"role": "user", "content": "hi"}])
TOKENS = Tokens(
    rid=RID,
    request=REQUEST,
    prompt_tail=pack_ids([3]),
    ids=pack_ids([3]),
    logprobs=LOGPROBS,
    input_logprobs=LOGPROBS,
    prompt_tokens=2,
    drafts=Drafts(proposed=1, correct=0),
)
FIELDS: dict[str, dict[str, Any]] = {  # of commands that have fields without a default
    "UpdateWeightsFromDisk": {"model_path": "model"},
    "InitWeightsUpdateGroup": {"master_address": "a", "master_port": 1, "rank_offset": 1, "world_size": 2},
    "UpdateWeightsFromDistributed": {"names": ["w"], "dtypes": ["float32"], "shapes": [[2]]},
    "DecideChange": {"change": "c"},
    "UpdateWeightVersion": {"new_version": "v2"},
    "GetWeightsByName": {"name": "w"},
    "LoadAdapter": {"lora_name": "a", "lora_path": "adapter"},
    "LoadAdapterFromTensors": {"lora_name": "a", "config_dict": {"r": 8}},
    "LoadAdapterFromDistributed": {
        "lora_name": "a",
        "config_dict": {"r": 8},
        "names": ["w"],
        "dtypes": ["float32"],
        "shapes": [[2]],
    },
    "UnloadAdapter": {"lora_name": "a"},
    "ForgetAdapter": {"lora_name": "a", "version": "1"},
    "Tokenize": {"texts": ["a"], "chat": CHAT},
    "Detokenize": {"ids": [pack_ids([3])]},
}
MESSAGES: list[Message] = [
    Generate(request=REQUEST, text="hi there"),
    Generate(request=REQUEST, input_ids=pack_ids([3, 4])),
    Generate(request=REQUEST, chat=CHAT),
    Tokenized(request=REQUEST, prompt_ids=pack_ids([3, 4])),
    TOKENS,
    msgspec.structs.replace(TOKENS, finish=FINISH),
    Tokens(rid=RID, ids=pack_ids([3]), finish=FINISH),
    Tokens(rid=RID, vector=bytes(8), finish=FINISH),
    Text(text="a", tokens=msgspec.structs.replace(TOKENS, request=None, prompt_tail=b"")),
    Text(text="a", tokens=Tokens(rid=RID, ids=pack_ids([3]), finish=FINISH)),
    Reply(id="r", body={"weight_version": "v2", "paused": False, "asleep": False, "lacks": []}),
    Prepared(id="c"),
    Facts(
        max_total_num_tokens=9,
        max_req_input_len=8,
        context_length=9,
        vocab_size=400,
        state={"paused": False, "model_path": "m"},
    ),
    Restarted(role="tokenizer"),
    *(
        command(id="c", **FIELDS.get(command.__name__, {}))
        for command in control.COMMANDS
        if command is not control.Abort
    ),
    control.Abort(rid=RID, attempt=3),
]
assert {type(message) for message in MESSAGES} == {*RingMessage.__args__, *control.COMMANDS}


def wrong(random: Random, message: Message) -> Message | None:
    """The message with other values in one to three places; None where it could not be decoded."""
    tree = msgspec.to_builtins(message, builtin_types=(bytes,))
    places = list(leaves(tree))
    if not places:
        return None
    for _ in range(random.randint(1, 3)):
        holder, key = random.choice(places)
        holder[key] = other(random, holder[key])
    try:
        made = msgspec.convert(tree, type(message), builtin_types=(bytes,))
        (arrived,) = decode(encode([made]))
    except (ValueError, OverflowError, msgspec.ValidationError):
        return None
    return arrived


def leaves(tree: Any) -> Any:
    """(dictionary or list, key) of each value in a tree, the lists and dictionaries themselves included."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in list(pairs):
        if key == "type":
            continue
        yield tree, key
        if isinstance(value, dict | list):
            yield from leaves(value)


def other(random: Random, value: Any) -> Any:
    """Another value of the same type; now and then none, or one of another."""
    if random.random() < 0.1:
        return random.choice([None, [], {}, *BYTES, *INTEGERS, *TEXTS])
    match value:
        case bytes():
            return random.choice([*BYTES, value[:-1], value * 2, random.randbytes(len(value))])
        case bool():
            return not value
        case int():
            return random.choice(INTEGERS)
        case float():
            return random.choice(NUMBERS)
        case str():
            return random.choice(TEXTS)
        case list():
            return random.choice([[], value * 2, value * 100])
        case _:
            return random.choice([None, {}])


@cache
def wrong_messages(seed: int, count: int) -> list[Message]:
    """So many wrong messages of all kinds, the same ones for a seed."""
    random, found = Random(seed), list[Message]()
    while len(found) < count:
        message = wrong(random, MESSAGES[len(found) % len(MESSAGES)])
        if message is not None and type(message) in get_args(RingMessage | control.Command):
            found.append(message)
    return found
