"""Constrained output, whole: every finished output parses and validates, whatever else happens to its request."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import requests
from tokenizers import Tokenizer

from quartet.runtime.messages import pack_ids
from quartet.runtime.sampling import SamplingParams
from tests.engine import Answer, Engine
from tests.model import tiny
from tests.servers import Server

WAIT_S = 60
AT_ONCE = 100
TALKATIVE = " \n\r\t"  # a random model would fill its output with blanks
ENDING = '"},]'

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


class Model:
    """A tiny random model and its tokenizer."""

    def __init__(self, directory: Path) -> None:
        self.directory = tiny.build("llama", directory)
        self.tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        texts = {token: self.tokenizer.decode([token]) for token in range(tiny.VOCAB_SIZE)}
        blank = {str(token): -8.0 for token, text in texts.items() if text and not text.strip(TALKATIVE)}
        ends = {str(token): 3.0 for token, text in texts.items() if text and set(text) <= set(ENDING)}
        self.bias = blank | ends

    def engine(self, **settings: Any) -> Engine:
        return Engine(self.directory, **settings)

    def params(self, schema: Any, **more: Any) -> SamplingParams:
        return SamplingParams(json_schema=json.dumps(schema), max_new_tokens=150, logit_bias=self.bias, **more)

    def text(self, answer: Answer) -> str:
        return self.tokenizer.decode(answer.ids)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def engine(model: Model) -> Iterator[Engine]:
    engine = model.engine()
    yield engine
    engine.compiler.close()


def check(model: Model, answer: Answer, schema: Any) -> bool:
    """Whether the output was finished; if it was it must be valid."""
    assert answer.finish is not None and answer.finish.reason in ("stop", "length"), answer.finish
    if answer.finish.reason == "length":
        return False
    jsonschema.Draft202012Validator(schema).validate(json.loads(model.text(answer)))
    return True


# random schemas


def random_schema(rng: random.Random, depth: int = 3) -> dict[str, Any]:
    kinds = LEAVES + (BRANCHES * 2 if depth else [])
    return rng.choice(kinds)(rng, depth - 1)


def random_string(rng: random.Random, depth: int) -> dict[str, Any]:
    return rng.choice(
        [
            {"type": "string", "maxLength": rng.randint(0, 6)},
            {"type": "string", "minLength": 2, "maxLength": 4},
            {"type": "string", "pattern": rng.choice(["^[a-f]{1,4}$", "^(yes|no)$", "^\\d{3}-\\d{2}$"])},
            {"type": "string", "format": rng.choice(["date", "time", "uuid", "ipv4"])},
        ]
    )


def random_number(rng: random.Random, depth: int) -> dict[str, Any]:
    low = rng.randint(-50, 50)
    return {"type": rng.choice(["integer", "number"]), "minimum": low, "maximum": low + rng.randint(0, 500)}


def random_choice(rng: random.Random, depth: int) -> dict[str, Any]:
    values = ["red", "café", 1, -2.5, True, None, ["x"], {"k": 0}]
    return rng.choice([{"enum": rng.sample(values, rng.randint(1, 4))}, {"const": rng.choice(values)}])


def random_plain(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"type": rng.choice(["boolean", "null"])}


def random_array(rng: random.Random, depth: int) -> dict[str, Any]:
    least = rng.randint(0, 2)
    return {
        "type": "array",
        "items": random_schema(rng, depth),
        "minItems": least,
        "maxItems": least + rng.randint(0, 2),
    }


def random_object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(["name", "size", "Ünicode", "a b", "x-y", "list"], rng.randint(0, 4))
    return {
        "type": "object",
        "properties": {name: random_schema(rng, depth) for name in names},
        "required": rng.sample(names, rng.randint(0, len(names))),
        "additionalProperties": False,
    }


def random_union(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [random_schema(rng, depth) for _ in range(rng.randint(1, 3))]}


LEAVES: list[Callable[[random.Random, int], dict[str, Any]]] = [
    random_string,
    random_number,
    random_choice,
    random_plain,
]
BRANCHES = [random_array, random_object, random_union]


def run_schemas(model: Model, engine: Engine, count: int, seed: int) -> int:
    """Constrain one request by each of `count` random schemas; how many finished, all of them valid."""
    rng = random.Random(seed)
    finished = 0
    for first in range(0, count, AT_ONCE):
        schemas = [random_schema(rng) for _ in range(min(AT_ONCE, count - first))]
        rids = [engine.add([5, 6, 7], model.params(schema), seed=rng.getrandbits(60)) for schema in schemas]
        engine.run()
        finished += sum(check(model, engine.answers[rid], schema) for rid, schema in zip(rids, schemas, strict=True))
    return finished


def test_finished_outputs_of_random_schemas_are_valid(model: Model, engine: Engine) -> None:
    assert run_schemas(model, engine, 60, seed=1) > 40


@pytest.mark.slow
def test_finished_outputs_of_a_thousand_random_schemas_are_valid(model: Model, engine: Engine) -> None:
    assert run_schemas(model, engine, 1000, seed=2) > 700


# whatever else happens to the request


def outputs(model: Model, seeds: range, engine: Engine, **params: Any) -> list[Answer]:
    rids = [engine.add([5, 6, 7, seed % 3 + 8], model.params(PERSON, **params), seed=seed) for seed in seeds]
    engine.run()
    engine.compiler.close()
    return [engine.answers[rid] for rid in rids]


def test_chunked_prefill_and_retraction_change_nothing(model: Model) -> None:
    calm = outputs(model, range(8), model.engine())
    tight = model.engine(max_total_tokens=150, chunked_prefill_size=2, page_size=2)
    tight.planner.growth.ratio = 0.0  # let in more than can stay
    pressed = outputs(model, range(8), tight)
    assert sum(answer.retractions for answer in pressed) > 0
    assert [answer.ids for answer in pressed] == [answer.ids for answer in calm]
    assert sum(check(model, answer, PERSON) for answer in pressed) >= 6


def test_a_request_that_is_resumed_goes_on_as_it_would_have(model: Model, engine: Engine) -> None:
    whole = engine.answers[engine.add([5, 6, 7], model.params(PERSON), seed=4)]
    engine.run()
    assert check(model, whole, PERSON)
    for kept in (1, len(whole.ids) // 2, len(whole.ids) - 1):
        rest = engine.answers[
            engine.add([5, 6, 7], model.params(PERSON), seed=4, resume_ids=pack_ids(whole.ids[:kept]))
        ]
        engine.run()
        assert whole.ids[:kept] + rest.ids == whole.ids


@pytest.mark.parametrize(
    "more",
    [
        {"frequency_penalty": 1.0, "presence_penalty": 0.5, "repetition_penalty": 1.5},
        {"temperature": 0.0},
        {"top_k": 3, "top_p": 0.9, "min_p": 0.01},
        {"min_new_tokens": 12},
        {"ignore_eos": True},
    ],
)
def test_other_parameters_do_not_break_the_constraint(model: Model, engine: Engine, more: dict[str, Any]) -> None:
    answers = outputs(model, range(6), engine, **more)
    assert sum(check(model, answer, PERSON) for answer in answers) > 0


def test_neighbours_of_a_constrained_request_are_left_alone(model: Model, engine: Engine) -> None:
    free = SamplingParams(max_new_tokens=20)
    alone = engine.generate([[5, 6, 7]], free, seed=9)[0]
    rid = engine.add([5, 6, 7], free, seed=9)
    engine.add([5, 6, 7], model.params(PERSON), seed=9)
    engine.run()
    assert engine.answers[rid].ids == alone.ids


# through a server


@pytest.fixture(scope="module")
def server(launch_for_module: Callable[..., Server]) -> Server:
    return launch_for_module()


def generate(server: Server, **params: Any) -> requests.Response:
    body = {"text": "What is the capital of France?", "sampling_params": {"max_new_tokens": 200, **params}}
    return requests.post(f"{server.url}/generate", json=body, timeout=WAIT_S)


def test_each_kind_of_grammar_is_followed(server: Server) -> None:
    assert generate(server, regex="(red|green){2}").json()["text"] in ("redred", "redgreen", "greenred", "greengreen")
    assert generate(server, ebnf='root ::= "Paris" | "Rome"').json()["text"] in ("Paris", "Rome")
    schema = json.dumps({"type": "object", "properties": {}, "additionalProperties": False})
    assert json.loads(generate(server, json_schema=schema).json()["text"]) == {}


def test_a_structural_tag_in_its_current_form_is_followed(server: Server) -> None:
    number = {"type": "json_schema", "json_schema": {"type": "integer", "minimum": 10, "maximum": 99}}
    form = {"type": "tag", "begin": "<n>", "content": number, "end": "</n>"}
    text = generate(server, structural_tag={"type": "structural_tag", "format": form}).json()["text"]
    assert len(text) == len("<n>12</n>") and 10 <= int(text.removeprefix("<n>").removesuffix("</n>")) <= 99


@pytest.mark.parametrize(
    ("fields", "texts"),
    [
        ({"guided_choice": ["red", "green"]}, ("red", "green")),
        ({"guided_regex": "(yes|no)!"}, ("yes!", "no!")),
        ({"guided_json": {"const": 7}}, ("7",)),
        ({"guided_grammar": 'root ::= "a" | "b"'}, ("a", "b")),
        ({"structured_outputs": {"choice": ["x y", 'q"']}}, ("x y", 'q"')),
        ({"response_format": {"type": "structural_tag", "format": {"type": "const_string", "value": "Hm"}}}, ("Hm",)),
    ],
    ids=str,
)
def test_the_names_of_other_servers_are_understood_on_chat_and_completions(
    server: Server, fields: dict[str, Any], texts: tuple[str, ...]
) -> None:
    chat = {"model": "demo", "messages": [{"role": "user", "content": "Say it."}], "max_tokens": 60, **fields}
    answer = requests.post(f"{server.url}/v1/chat/completions", json=chat, timeout=WAIT_S).json()
    assert answer["choices"][0]["message"]["content"] in texts, answer
    completion = {"model": "demo", "prompt": "Say it.", "max_tokens": 60, **fields}
    answer = requests.post(f"{server.url}/v1/completions", json=completion, timeout=WAIT_S).json()
    assert answer["choices"][0]["text"] in texts, answer


def test_what_is_not_supported_of_other_servers_is_refused_by_name(server: Server) -> None:
    both = {"guided_regex": "a", "guided_choice": ["b"]}
    for fields, name in ((both, "one thing only"), ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern")):
        body = {"model": "demo", "prompt": "Say it.", **fields}
        answer = requests.post(f"{server.url}/v1/completions", json=body, timeout=WAIT_S)
        assert answer.status_code == 400 and name in answer.text, answer.text


def test_copies_follow_the_grammar_each_on_its_own(server: Server) -> None:
    texts = [answer["text"] for answer in generate(server, regex="[a-z]{12}", n=4).json()]
    assert len(set(texts)) == 4
    assert all(len(text) == 12 and text.isalpha() for text in texts)


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"regex": "("}, "regex"),
        ({"json_schema": "{"}, "json_schema"),
        ({"json_schema": '{"type": "nothing"}'}, "json_schema"),
        ({"ebnf": "root ::= other"}, "ebnf"),
        ({"structural_tag": "{}"}, "structural_tag"),
        ({"regex": "(((((a{1000}){1000}){1000}){1000}){1000})"}, "regex"),
    ],
)
def test_a_bad_grammar_is_a_400_and_the_server_lives(server: Server, params: dict[str, str], field: str) -> None:
    answer = generate(server, **params)
    assert answer.status_code == 400, answer.text
    assert field in answer.json()["error"]["message"]
    assert generate(server, max_new_tokens=1).status_code == 200


def test_two_grammars_exclude_each_other(server: Server) -> None:
    answer = generate(server, regex="a", ebnf='root ::= "a"')
    assert "Only one of json_schema, regex, ebnf, or structural_tag can be set." in answer.text


def test_a_schema_too_large_to_compile_harms_nobody(server: Server) -> None:
    heavy = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(4000)}}
    assert generate(server, json_schema=json.dumps(heavy), max_new_tokens=2).status_code in (200, 400)
    assert requests.get(f"{server.url}/health", timeout=WAIT_S).status_code == 200
