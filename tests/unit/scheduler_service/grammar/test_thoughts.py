"""A schema constrains what stands behind the model's thought."""

import json

import pytest

from quartet.runtime.messages import Request, Thought
from quartet.runtime.sampling import SamplingParams
from quartet.scheduler_service.grammar.grammar_queue import output_grammar
from quartet.scheduler_service.grammar.matchers import GrammarCompiler
from tests.tokenizers_to_try import byte_level

SCHEMA = json.dumps({"enum": ["a", "b"]})
TAGS = ("<think>", "</think>")


def trained(path, special_tokens):
    """A tokenizer, saved for the compiler."""
    tokenizer = byte_level()
    tokenizer.add_special_tokens(special_tokens)
    tokenizer.save(str(path / "tokenizer.json"))
    return tokenizer


@pytest.fixture(scope="module", params=["text", "special tokens"])
def takes(request, tmp_path_factory):
    """takes(place, text, kind, grammar): whether a text is a whole output; None where it is the beginning of one."""
    tags = ("◁t▷", "◁/t▷") if request.param == "special tokens" else TAGS
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer = trained(path, list(tags) if request.param == "special tokens" else [])
    compiler = GrammarCompiler(path, tokenizer.get_vocab_size(), [0])

    def check(place, text, kind="json_schema", grammar=SCHEMA):
        params = SamplingParams(**{kind: grammar})
        asked = output_grammar(Request(rid="r", params=params, thought=thought(place, tags)), *params.grammar)
        matcher = compiler.compile(*asked).matcher()
        text = text.replace(TAGS[0], tags[0]).replace(TAGS[1], tags[1])
        if not all(map(matcher.accept, tokenizer.encode(text).ids)):
            return False
        return True if matcher.accepting else None

    yield check
    compiler.close()


def thought(place, tags=TAGS):
    return Thought(opening=tags[0], closing=tags[1], place=place)


@pytest.mark.parametrize(
    ("place", "text", "whole"),
    [
        ("inside", 'any "text" {\n</think>\n\n"a"', True),
        ("inside", '</think>"b"', True),
        ("inside", '"a"', None),  # still a thought
        ("inside", '</think>"c"', False),
        ("inside", "</think>text", False),
        ("before", '<think>so</think> "a"', True),
        ("before", '"a"', True),
        ("before", "so", False),
        ("before", "<think>so", None),
        ("past", '"a"', True),
        ("past", "<think>", False),
    ],
)
def test_a_schema_constrains_what_follows_the_thought(place, text, whole, takes):
    assert takes(place, text) is whole


def test_a_regex_constrains_the_whole_output(takes):
    assert takes("inside", "yes", "regex", "yes") is True
    assert takes("inside", "so", "regex", "yes") is False


def test_the_state_after_a_thought_is_a_function_of_the_ids(tmp_path):
    tokenizer = trained(tmp_path, [])
    compiler = GrammarCompiler(tmp_path, tokenizer.get_vocab_size(), [0])
    params = SamplingParams(json_schema=SCHEMA)
    asked = output_grammar(Request(rid="r", params=params, thought=thought("inside")), *params.grammar)
    ids = tokenizer.encode('plan</think>\n"a"').ids
    for kept in range(len(ids)):
        matcher = compiler.compile(*asked).matcher(ids[:kept])
        assert all(map(matcher.accept, ids[kept:])) and matcher.finished
    compiler.close()
