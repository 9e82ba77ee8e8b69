"""Constrained output: what a grammar lets through is valid, bad grammars end in time, matchers can be rebuilt."""

import json
import random
import re

import jsonschema
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from quartet.http_gateway.parsers.call_formats import REQUIRED
from quartet.http_gateway.parsers.tool_calls import calls_schema, parse
from quartet.http_gateway.parsers.tool_events import Function, Tool
from quartet.runtime.errors import RequestError
from quartet.scheduler_service.grammar.ebnf import from_ebnf
from quartet.scheduler_service.grammar.matchers import (
    PARALLEL_FROM,
    Constrained,
    GrammarCompiler,
    MaskFiller,
    bitmask_words,
)
from quartet.scheduler_service.grammar.regex_size import check_regex

END, TURN, CALL = 0, 1, 2  # special tokens
PADDING = 41  # the model's vocabulary is larger than the tokenizer's


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|end|>", "<|turn|>", "<tool_call>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = '{"name": "value", "list": [1, -2.5, true, false, null], "nested": {"key": "word"}} the quick brown fox, '
    tokenizer.train_from_iterator([text, text.upper(), "café 日本"] * 3, trainer)
    tokenizer.path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(tokenizer.path / "tokenizer.json"))
    return tokenizer


@pytest.fixture(scope="module")
def vocab_size(tokenizer):
    return tokenizer.get_vocab_size() + PADDING


@pytest.fixture(scope="module")
def compiler(tokenizer, vocab_size):
    compiler = GrammarCompiler(tokenizer.path, vocab_size, [END, TURN])
    yield compiler
    compiler.close()


@pytest.fixture(scope="module")
def filler():
    return MaskFiller(threads=2)


@pytest.fixture(scope="module")
def tools(tokenizer, vocab_size, compiler, filler):
    return Tools(tokenizer, vocab_size, compiler, filler)


class Tools:
    """A model that picks any allowed token, and what the tests ask of it."""

    def __init__(self, tokenizer, vocab_size, compiler, filler):
        self.tokenizer, self.vocab_size, self.compiler, self.filler = tokenizer, vocab_size, compiler, filler
        self.closing = {tokenizer.token_to_id(c) for c in '"}]'}

    def allowed(self, matcher):
        bitmask = np.full((1, bitmask_words(self.vocab_size)), -1, dtype=np.int32)
        self.filler.fill([Constrained(matcher, 0)], bitmask)
        assert not matcher.error, matcher.error
        return set(np.flatnonzero(np.unpackbits(bitmask.view(np.uint8), bitorder="little")).tolist())

    def sample(self, grammar, rng, patience=60):
        """Output ids of a random walk; after `patience` tokens it ends as soon as it may."""
        matcher, ids = grammar.matcher(), []
        while not matcher.finished:
            allowed = self.allowed(matcher)
            assert allowed and max(allowed) < self.tokenizer.get_vocab_size()
            if matcher.accepting and (len(ids) > patience or rng.random() < 0.1):
                assert {END, TURN} <= allowed
                break
            assert len(ids) < 5000, self.tokenizer.decode(ids)
            hurry = sorted(allowed & self.closing) if len(ids) > patience or rng.random() < 0.3 else []
            token = rng.choice(hurry or sorted(allowed - {END, TURN}) or [END])
            if token == END:
                break
            assert matcher.accept(token)
            ids.append(token)
        return ids

    def text(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def takes(self, kind, source, text):
        """Whether `text` is a whole output of the grammar."""
        matcher = self.compiler.compile(kind, source).matcher()
        ids = self.tokenizer.encode(text).ids
        return all(matcher.accept(token) for token in ids) and matcher.accepting


def random_schema(rng, depth=3):
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const", "length", "range", "pattern"]
    kind = rng.choice(kinds + ["object", "array", "anyOf", "tuple"] * 2 if depth else kinds)
    match kind:
        case "enum":
            return {"enum": rng.sample(["a", 'q"uote', 1, 2.5, None, True, "é\n", ["x"]], 3)}
        case "const":
            return {"const": rng.choice(["fixed", 7, False, {"k": [1]}])}
        case "length":
            low = rng.randint(0, 4)
            return {"type": "string", "minLength": low, "maxLength": low + rng.randint(0, 9)}
        case "range":
            low = rng.randint(-50, 50)
            return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 2000)}
        case "pattern":
            return {"type": "string", "pattern": rng.choice(["^[a-z]{2,4}$", r"^\d+-\d+$", "^(on|off)$"])}
        case "object":
            names = rng.sample(["name", "a b", "é", "list", 'x"y', "z"], rng.randint(0, 4))
            schema = {"type": "object", "properties": {name: random_schema(rng, depth - 1) for name in names}}
            schema["required"] = [name for name in names if rng.random() < 0.6]
            return schema | ({} if rng.random() < 0.3 else {"additionalProperties": False})
        case "array":
            low = rng.randint(0, 2)
            return {"type": "array", "items": random_schema(rng, depth - 1), "minItems": low, "maxItems": low + 2}
        case "tuple":
            items = [random_schema(rng, depth - 1) for _ in range(rng.randint(1, 3))]
            return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}
        case "anyOf":
            return {"anyOf": [random_schema(rng, depth - 1) for _ in range(rng.randint(1, 3))]}
    return {"type": kind}


def check_schemas(tools, seeds):
    for seed in seeds:
        rng = random.Random(seed)
        schema = random_schema(rng)
        text = tools.text(tools.sample(tools.compiler.compile("json_schema", json.dumps(schema)), rng))
        jsonschema.validate(json.loads(text), schema)


def test_random_output_of_random_schemas_is_valid(tools):
    check_schemas(tools, range(100))


@pytest.mark.slow
def test_random_output_of_a_thousand_random_schemas_is_valid(tools):
    check_schemas(tools, range(100, 1100))


def test_any_json_object_has_few_blanks_between_its_tokens(tools):
    schema = {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "integer"}}}}
    for source, most in (('{"type": "object"}', 2), (json.dumps(schema), 32)):
        blanks = " " * most
        assert tools.takes("json_schema", source, f'{{{blanks}"a":{blanks}[1,{blanks}2]}}')
        assert not tools.takes("json_schema", source, f'{{{blanks} "a": [1]}}')
    indented = json.dumps({"a": [1, {"b": {"c": "  d  "}}]}, indent=4)
    assert tools.takes("json_schema", '{"type": "object"}', indented)
    assert not tools.takes("json_schema", '{"type": "object"}', '{\n\n"a": 1}')


def test_any_json_object_parses(tools):
    grammar = tools.compiler.compile("json_schema", '{"type": "object"}')
    for seed in range(20):
        assert isinstance(json.loads(tools.text(tools.sample(grammar, random.Random(seed)))), dict)


@pytest.mark.parametrize("pattern", ["a+b?", r"\d{3}-\d{4}", "(yes|no|maybe)", r"[^x]{2,5}x", "ab|abc|abcd", "(é|日)+"])
def test_random_output_of_a_regex_matches_it(pattern, tools):
    grammar = tools.compiler.compile("regex", pattern)
    for seed in range(15):
        assert re.fullmatch(pattern, tools.text(tools.sample(grammar, random.Random(seed), patience=8)))


def test_what_a_required_tool_choice_makes_a_model_write_is_read_back_as_calls(tools):
    parameters = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    offered = [Tool(function=Function(name=name, parameters=parameters)) for name in ("first", "second")]
    grammar = tools.compiler.compile("json_schema", calls_schema(offered))
    for seed in range(20):
        text = tools.text(tools.sample(grammar, random.Random(seed), patience=10))
        content, calls, _ = parse(REQUIRED, offered, text)
        assert content == "" and len(calls) == len(json.loads(text)) > 0
        for call in calls:
            jsonschema.validate(json.loads(call.arguments), parameters)


def walked(tools, kind, source, seed):
    """The states of a random walk through a grammar, each with the tokens that its mask allows."""
    rng = random.Random(seed)
    matcher = tools.compiler.compile(kind, source).matcher()
    while not matcher.finished and rng.random() < 0.98:
        allowed = tools.allowed(matcher)
        yield matcher, allowed
        hurry = sorted(allowed & tools.closing) if rng.random() < 0.4 else []
        assert matcher.accept(rng.choice(hurry or sorted(allowed)))


GRAMMARS = [
    *(("json_schema", json.dumps(random_schema(random.Random(seed)))) for seed in range(40)),
    ("json_schema", '{"type": "object"}'),
    ("regex", r"(The quick brown fox [a-c]{2}; ){3}end"),
    ("regex", r"(.|\n)*"),
    ("regex", r"[^x]{2,5}x|(é|日)+"),
    ("ebnf", 'root ::= "London" | "Londonderry is " root | [a-z]{2,4} "fox"?'),
    (
        "structural_tag",
        json.dumps(
            {
                "structures": [{"begin": "<tool_call>f", "schema": {"type": "integer"}, "end": "}"}],
                "type": "structural_tag",
                "triggers": ["<tool_call>"],
            }
        ),
    ),
]


@pytest.mark.parametrize("number", range(len(GRAMMARS)))
def test_a_mask_leaves_a_token_alone_where_the_grammar_forces_it(number, tools):
    for matcher, allowed in walked(tools, *GRAMMARS[number], seed=number):
        forced = matcher.forced()
        assert not forced or allowed == {forced[0]}
        assert not matcher.failed and tools.allowed(matcher) == allowed  # asking changes nothing


def test_tokens_are_forced_one_by_one_as_the_mask_allows_them(tools):
    matcher = tools.compiler.compile("regex", "The quick brown fox [a-c]").matcher()
    ids = []
    while forced := matcher.forced():
        assert tools.allowed(matcher) == {forced[0]}
        assert matcher.accept(forced[0])
        ids.append(forced[0])
    assert len(ids) > 3 and tools.text(ids) == "The quick brown fox "[: len(tools.text(ids))]
    assert len(tools.allowed(matcher)) > 1


CITIES = """
# the answer
root ::= city | description
city ::= "London" | "Paris"
description ::= city " is " status
status ::= "the capital of " ("England"
           | "France")
"""

ARITHMETIC = r"""
root  ::= expr
expr  ::= term (ws ("+" | "-") ws term)*
term  ::= number | "(" ws expr ws ")"
number ::= [0-9]{1,3} ("." [0-9]+)?
ws    ::= [ \t\n]*
"""

JSON = r"""
root ::= object
value ::= object | array | string | "true" | "false" | "null" | number
object ::= "{" ws (pair ("," ws pair)*)? "}" ws
pair ::= string ":" ws value ws
array ::= "[" ws (value ws ("," ws value ws)*)? "]"
string ::= "\"" ([^"\\\x00-\x1f] | "\\" (["\\/bfnrt] | "u" [0-9a-fA-F]{4}))* "\""
number ::= "-"? ("0" | [1-9] [0-9]*) ("." [0-9]+)?
ws ::= [ \n]{0,4}
"""

EBNF_CASES = [
    (CITIES, ["London", "Paris is the capital of France"], ["Rome", "London is", "London London"]),
    (ARITHMETIC, ["1", "12+3", "(1 + (2 - 3.5)) - 999"], ["", "1+", "(1", "1234"]),
    (JSON, ["{}", '{"a": [1, -2.5, {"b": "x\\"\\u00e9"}], "c": null}'], ["{", '{"a"}', "[]", '{"a": 01}']),
    ('root ::= "a" root "b" | ""', ["", "ab", "aaabbb"], ["a", "abb", "ba"]),
    ("root ::= [a-z]+ \"x\" [^a-z]? 'q'", ["abxq", "xxq", "xx1q"], ["xq", "abx", "ABxq"]),
    (r'root ::= "tab\tnl\n\x41\u00e9" [\]\-^] .', ["tab\tnl\nAé]z", "tab\tnl\nAé-\n", "tab\tnl\nAé^é"], ["tab"]),
    ('root ::= word{2} word{0,1}\nword ::= "a" | "b"', ["ab", "aba"], ["a", "abab"]),
    ("root ::= kebab-name | under_score\nkebab-name ::= [0-9]\nunder_score ::= [a-c]", ["7", "b"], ["d", "77"]),
]


@pytest.mark.parametrize(("grammar", "good", "bad"), EBNF_CASES)
def test_ebnf_takes_its_language(grammar, good, bad, tools):
    assert [text for text in good if not tools.takes("ebnf", grammar, text)] == []
    assert [text for text in bad if tools.takes("ebnf", grammar, text)] == []


def test_random_output_of_a_json_ebnf_is_json(tools):
    grammar = tools.compiler.compile("ebnf", JSON)
    for seed in range(20):
        assert isinstance(json.loads(tools.text(tools.sample(grammar, random.Random(seed)))), dict)


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ('start ::= "a"', "needs a rule named root"),
        ("root ::= other", "'other' is used by 'root'"),
        ('root ::= "a"\nroot ::= "b"', "defined twice"),
        ('root = "a"', "line 1"),
        ('root ::= "a"\n  "unclosed', "line 2"),
        ('root ::= ("a"', ""),
        ('root ::= "a")', "parenthesis"),
        ("root ::= []", "empty"),
        ("", "root"),
        ('root ::= "a"{99999999}', "unroll"),
        ('root ::= a{1000}\na ::= b{1000}\nb ::= "x"', "unroll"),
        ("root ::= root", ""),
        (r'root ::= "\UFFFFFFFF"', "no character"),
        (r"root ::= [\U00110000]", "no character"),
    ],
)
def test_a_bad_ebnf_is_a_400_that_says_why(grammar, message, compiler):
    with pytest.raises(RequestError, match="Failed to compile ebnf grammar: .*" + re.escape(message)) as refused:
        compiler.compile("ebnf", grammar)
    assert refused.value.kind.status == 400


def structural(**changes):
    parameters = {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    }
    tag = {
        "type": "structural_tag",
        "structures": [{"begin": "<function=weather>", "schema": parameters, "end": "</function>"}],
        "triggers": ["<function="],
    }
    return json.dumps(tag | changes)


def test_structural_tags_constrain_what_follows_a_trigger_and_nothing_else(tools):
    call = '<function=weather>{"city": "Ulm"}</function>'
    for text in ("no call at all", f"first {call} then {call}", call, "a < b"):
        assert tools.takes("structural_tag", structural(), text), text
    for text in ("<function=other>", '<function=weather>{"town": ', f"{call[:-3]}"):
        assert not tools.takes("structural_tag", structural(), text), text


def test_a_trigger_may_be_a_special_token(tools):
    tag = structural(
        structures=[{"begin": '<tool_call>{"name": "f", "args": ', "schema": {"type": "integer"}, "end": "}"}],
        triggers=["<tool_call>"],
    )
    assert tools.tokenizer.encode("<tool_call>").ids == [CALL]
    assert tools.takes("structural_tag", tag, 'say <tool_call>{"name": "f", "args": 12} done')
    assert not tools.takes("structural_tag", tag, 'say <tool_call>{"name": "g"')


@pytest.mark.parametrize(
    ("tag", "message"),
    [
        (structural(triggers=["<tool="]), "starts with none of the triggers"),
        (structural(structures=[]), "at least one structure"),
        (structural(format={"type": "tag"}), "format"),
        ("[]", "object"),
        ("{", ""),
    ],
)
def test_a_bad_structural_tag_is_a_400(tag, message, compiler):
    with pytest.raises(RequestError, match="Failed to compile structural_tag grammar: .*" + message):
        compiler.compile("structural_tag", tag)


def nested(depth):
    return '{"type":"object","properties":{"a":' * depth + '{"type":"null"}' + "}}" * depth


BOMBS = {
    "deep": ("json_schema", nested(5000)),
    "many nodes": ("json_schema", json.dumps({"enum": list(range(30_000))})),
    "intersections": (
        "json_schema",
        json.dumps({"allOf": [{"type": "string", "pattern": f".*{i}.*"} for i in range(60)]}),
    ),
    "optional properties": (
        "json_schema",
        json.dumps({"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(6000)}}),
    ),
    "endless reference": ("json_schema", '{"$ref": "#"}'),
    "repetition": ("regex", "a{1000000}"),
    "nested repetition": ("regex", "(((a{100}){100}){100}){100}"),
    "repetition in a pattern": ("json_schema", '{"type":"string","pattern":"^(a{1000}){1000}$"}'),
    "repetition in a property": ("json_schema", '{"type":"object","patternProperties":{"(a{1000}){1000}":{}}}'),
    "rules that double": (
        "ebnf",
        "root ::= a0\n" + "".join(f"a{i} ::= a{i + 1} a{i + 1}\n" for i in range(40)) + 'a40 ::= "x"',
    ),
}


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.usefixtures("usual_budget")
def test_a_bomb_is_a_400(bomb, compiler):
    kind, text = BOMBS[bomb]
    with pytest.raises(RequestError, match=f"Failed to compile {kind} grammar: .") as refused:
        compiler.compile(kind, text)
    assert refused.value.kind.status == 400


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("json_schema", "{"),
        ("json_schema", "3"),
        ("json_schema", '{"type": "strange"}'),
        ("json_schema", '{"type": "string", "pattern": "("}'),
        ("json_schema", '{"type": "integer", "minimum": 5, "maximum": 3}'),
        ("regex", "a("),
        ("regex", "(?=a)b"),
    ],
)
def test_a_bad_grammar_is_a_400_naming_its_kind(kind, text, compiler):
    with pytest.raises(RequestError, match=f"Failed to compile {kind} grammar: .") as refused:
        compiler.compile(kind, text)
    assert refused.value.field == kind


def test_a_schema_is_a_400_at_whatever_depth_a_parser_gives_up(compiler):
    for depth in range(800, 1000):
        with pytest.raises(RequestError, match="Failed to compile json_schema grammar"):
            compiler.compile("json_schema", '{"not":' * depth + "{}" + "}" * depth)


def test_the_classes_of_a_regex_are_ascii(tools):
    assert tools.takes("regex", r"\d\w\s/\S", "1a /é")
    assert not tools.takes("regex", r"\d", "\u0be8")
    assert not tools.takes("regex", r"\w", "é")


@pytest.mark.usefixtures("usual_budget")
def test_after_a_bomb_the_next_grammar_compiles(tools):
    kind, text = BOMBS["intersections"]
    with pytest.raises(RequestError):
        tools.compiler.compile(kind, text + " ")
    assert tools.takes("regex", "after[0-9]", "after7")


def test_the_checker_is_started_again_when_it_has_died(tools):
    assert tools.takes("regex", "x1", "x1")
    tools.compiler._checker.end()
    assert tools.takes("regex", "x2", "x2")


def test_compiled_and_refused_grammars_are_cached(compiler):
    first = compiler.compile("regex", "kept")
    with pytest.raises(RequestError):
        compiler.compile("regex", "not kept(")
    hits, misses = compiler.hits, compiler.misses
    assert compiler.compile("regex", "kept") is first
    with pytest.raises(RequestError, match="Failed to compile"):
        compiler.compile("regex", "not kept(")
    assert (compiler.hits, compiler.misses) == (hits + 2, misses)


def test_the_cache_forgets_the_oldest(tokenizer, vocab_size):
    compiler = GrammarCompiler(tokenizer.path, vocab_size, [END], cache_entries=2)
    a = compiler.compile("regex", "a")
    compiler.compile("regex", "b")
    assert compiler.compile("regex", "a") is a
    compiler.compile("regex", "c")
    assert compiler.compile("regex", "a") is a
    misses = compiler.misses
    compiler.compile("regex", "b")
    assert compiler.misses == misses + 1
    compiler.close()


def test_a_matcher_rebuilt_from_its_tokens_allows_the_same(tools):
    grammar = tools.compiler.compile("json_schema", '{"type": "object"}')
    ids = tools.sample(grammar, random.Random(5))
    matcher = grammar.matcher()
    for done, token in enumerate(ids):
        assert tools.allowed(grammar.matcher(ids[:done])) == tools.allowed(matcher)
        matcher.accept(token)
    assert grammar.matcher(ids).finished == matcher.finished


def test_tokens_that_break_the_grammar_are_no_start_for_a_matcher(tools):
    grammar = tools.compiler.compile("regex", "abc")
    with pytest.raises(RequestError, match="do not follow the grammar"):
        grammar.matcher(tools.tokenizer.encode("xyz").ids)


def test_a_token_that_the_grammar_does_not_allow_is_refused_with_an_error(tools):
    matcher = tools.compiler.compile("regex", "abc").matcher()
    assert not matcher.accept(tools.tokenizer.encode("x").ids[0])
    assert matcher.error


def test_matchers_of_one_grammar_do_not_share_their_state(tools):
    grammar = tools.compiler.compile("regex", "ab")
    one, other = grammar.matcher(), grammar.matcher()
    before = tools.allowed(other)
    assert one.accept(tools.tokenizer.encode("a").ids[0])
    assert tools.allowed(other) == before


def test_a_batch_of_masks_equals_the_masks_one_by_one(tools):
    sources = ["a+", "[0-9]{2}", "(x|y)z", "é"]
    matchers = [tools.compiler.compile("regex", text).matcher() for text in sources]
    rows = [4, 0, 2, 3]
    bitmask = np.full((6, bitmask_words(tools.vocab_size)), -1, dtype=np.int32)
    tools.filler.fill(list(map(Constrained, matchers, rows)), bitmask)
    for matcher, row in zip(matchers, rows, strict=True):
        bits = np.flatnonzero(np.unpackbits(bitmask[row].view(np.uint8), bitorder="little"))
        assert set(bits.tolist()) == tools.allowed(matcher)
    assert (bitmask[[1, 5]] == -1).all()


def test_many_rows_get_the_same_masks_one_after_the_other_and_on_several_threads(tools):
    sources, requests = ["a+", "[0-9]{2}", "(x|y)z"], PARALLEL_FROM + 5
    matchers = [tools.compiler.compile("regex", sources[i % 3]).matcher() for i in range(requests)]
    bitmasks = []
    for filler in (MaskFiller(threads=1), MaskFiller(threads=2)):
        bitmasks.append(np.zeros((requests, bitmask_words(tools.vocab_size)), dtype=np.int32))
        filler.fill([Constrained(matcher, row) for row, matcher in enumerate(matchers)], bitmasks[-1])
        assert filler.uses_threads(requests) == (len(bitmasks) == 2)
    assert bitmasks[0].any() and (bitmasks[0] == bitmasks[1]).all()


@pytest.mark.parametrize("requests", [3, PARALLEL_FROM + 3])
def test_each_draft_has_a_mask_behind_it_up_to_one_that_is_refused(requests, tools):
    grammar = tools.compiler.compile("regex", "[0-9]{3}x|q")
    one, letter = tools.tokenizer.encode("1").ids[0], tools.tokenizer.encode("q").ids[0]
    drafts = [(), (one, one), (one, letter, one)]
    constrained, rows = [], 0
    for i in range(requests):
        constrained.append(Constrained(grammar.matcher(), rows, drafts[i % 3]))
        rows += 1 + len(drafts[i % 3])
    bitmask = np.full((rows, bitmask_words(tools.vocab_size)), -1, dtype=np.int32)
    tools.filler.fill(constrained, bitmask)
    for matcher, row, its_drafts in constrained:
        followed = grammar.matcher()
        for place, draft in enumerate([*its_drafts, None]):
            expected = np.full((1, bitmask.shape[1]), -1, dtype=np.int32)
            tools.filler.fill([Constrained(followed, 0)], expected)
            assert (bitmask[row + place] == expected[0]).all()
            if draft is None or not followed.accept(draft):
                assert (bitmask[row + place + 1 : row + 1 + len(its_drafts)] == -1).all()
                break
        assert not matcher.failed and tools.allowed(matcher) == tools.allowed(grammar.matcher())


def test_a_finished_grammar_allows_only_the_end_tokens(tools):
    matcher = tools.compiler.compile("regex", "ab").matcher(tools.tokenizer.encode("ab").ids)
    assert matcher.finished and matcher.accepting
    assert tools.allowed(matcher) == {END, TURN}


def test_a_model_without_tokenizer_json_refuses_grammars(tmp_path):
    with pytest.raises(RequestError, match=r"no tokenizer\.json"):
        GrammarCompiler(tmp_path, 100, [0]).compile("regex", "a")


def test_counted_repetitions_are_added_up_through_groups_and_sets():
    check_regex(r"(a{100}|[^]{99}]{100}b\{9999999}){10}")
    with pytest.raises(ValueError, match="unroll"):
        check_regex(r"((a{100}){100}b){3}")


def test_a_long_grammar_is_translated_in_linear_time():
    rules = "".join(f"r{i} ::= r{i + 1} | [a-z]\n" for i in range(5000))
    assert from_ebnf(f'root ::= r0\n{rules}r5000 ::= "x"').count("\n") > 5000
