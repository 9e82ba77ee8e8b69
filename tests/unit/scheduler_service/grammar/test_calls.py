"""What a demanded call makes a model write, in every format, is read back by that format's parser and fits its tool."""

import json
import random

import jsonschema
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from quartet.http_gateway.parsers.call_formats import FORMATS
from quartet.http_gateway.parsers.thoughts import ANALYSIS
from quartet.http_gateway.parsers.tool_calls import demanded_calls, parse, strict_calls
from quartet.http_gateway.parsers.tool_events import Function, Tool
from quartet.runtime.errors import RequestError
from quartet.runtime.messages import Thought
from quartet.scheduler_service.grammar.calls import from_calls
from quartet.scheduler_service.grammar.matchers import Constrained, GrammarCompiler, MaskFiller, bitmask_words
from quartet.scheduler_service.grammar.source import after_thought

END = 0
SPECIAL = ["<|eos|>", "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "[CALL_ID]", "[ARGS]"]
SPECIAL += ["<tool_call>", "[TOOL_CALLS]", "<｜tool▁calls▁begin｜>", "<｜tool▁sep｜>", "<|tool_call_end|>"]
SPECIAL += [
    "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>",
    "<|tool_calls_section_begin|>",
    "<|python_tag|>",
    "｜DSML｜",
]
WRITTEN = sorted(name for name, form in FORMATS.items() if form.frame is not None)
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "unit": {"enum": ["celsius", "kelvin"]},
        "days": {"type": "integer", "minimum": 0, "maximum": 9},
        "exact": {"type": "boolean"},
        "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "area": {"$ref": "#/$defs/area"},
        "code": {"type": "string", "pattern": "^[a-z]{2}[0-9]$"},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 4}, "maxItems": 2},
    },
    "required": ["city", "days", "area", "code"],
    "$defs": {"area": {"type": "object", "properties": {"km": {"type": "number"}}, "required": ["km"]}},
}
TOOLS = [
    Tool(Function("weather", parameters=WEATHER, strict=True)),
    Tool(Function("stop")),
    Tool(Function("choose", parameters={"anyOf": [{"properties": {"a": {"type": "integer"}}, "required": ["a"]}]})),
]


class Walker:
    """A model that picks any allowed token, and after a while one that comes to an end."""

    def __init__(self, path, special):
        self.tokenizer = Tokenizer(models.BPE())
        self.tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self.tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(special_tokens=SPECIAL[:1], initial_alphabet=alphabet, show_progress=False)
        self.tokenizer.train_from_iterator([], trainer)
        if special:
            self.tokenizer.add_special_tokens(SPECIAL)
        self.tokenizer.save(str(path / "tokenizer.json"))
        self.compiler = GrammarCompiler(path, self.tokenizer.get_vocab_size(), [END])
        self.filler = MaskFiller(threads=1)
        self.text_ids = {chr(c): self.tokenizer.encode(chr(c)).ids[0] for c in range(32, 127)}
        self.text_ids["\n"] = self.tokenizer.encode("\n").ids[0]
        self.printable = set(self.text_ids.values()) | set(range(257, self.tokenizer.get_vocab_size()))

    def allowed(self, matcher):
        bitmask = np.full((1, bitmask_words(self.tokenizer.get_vocab_size())), -1, dtype=np.int32)
        self.filler.fill([Constrained(matcher, 0)], bitmask)
        assert not matcher.error, matcher.error
        found = np.flatnonzero(np.unpackbits(bitmask.view(np.uint8), bitorder="little"))
        return set(found.tolist())

    def write(self, grammar, rng, ends):
        """A random output; `ends` are what closes a value."""
        matcher, ids = self.compiler.compile(*grammar).matcher(), []
        written = [self.tokenizer.encode(end).ids for end in ends]
        while not matcher.finished:
            allowed = self.allowed(matcher)
            assert allowed and len(ids) < 4000, self.tokenizer.decode(ids)
            if matcher.accepting and (len(ids) > 300 or rng.random() < 0.3):
                break
            brackets = [self.text_ids[character] for character in ('"}]' if ends else '"}])')]
            wanted = [token for token in closing(ids, written, brackets) if token in allowed]
            usual = sorted(allowed & self.printable - {END}) if len(allowed) > 9 else sorted(allowed - {END})
            token = rng.choice(
                wanted if wanted and len(allowed) > 9 and (len(ids) > 100 or rng.random() < 0.6) else usual
            )
            assert matcher.accept(token)
            ids.append(token)
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def takes(self, grammar, text):
        matcher = self.compiler.compile(*grammar).matcher()
        return all(map(matcher.accept, self.tokenizer.encode(text).ids)) and matcher.accepting


def closing(ids, ends, brackets):
    """The tokens that go on with one of the ends, and those that close JSON where a value is JSON."""
    sizes = [next(size for size in range(len(end) - 1, -1, -1) if ids[len(ids) - size :] == end[:size]) for end in ends]
    begun = [end[size] for end, size in zip(ends, sizes, strict=True)]
    return begun if any(sizes) else [*begun, *brackets]


@pytest.fixture(scope="module", params=[False, True], ids=["text", "special tokens"])
def walker(request, tmp_path_factory):
    walker = Walker(tmp_path_factory.mktemp("tokenizer"), request.param)
    yield walker
    walker.compiler.close()


def ends_of(form):
    if form.body == "python":
        return ['"', "'"]
    return [("\n" if form.tags.own_lines else "") + form.tags.value_end] if form.tags else []


def check(tools, calls):
    schemas = {tool.function.name: tool.function.parameters or {"maxProperties": 0} for tool in tools}
    for call in calls:
        jsonschema.validate(json.loads(call.arguments), schemas[call.name])


@pytest.mark.parametrize("name", WRITTEN)
def test_demanded_calls_are_read_back_and_fit_their_tools(name, walker):
    form = FORMATS[name]
    grammar = demanded_calls(form, TOOLS, None, parallel=True)
    counts = set()
    for seed in range(12):
        text = walker.write(grammar, random.Random(seed), ends_of(form))
        content, calls, _ = parse(form, TOOLS, text)
        assert content.strip() == "" and calls, text
        check(TOOLS, calls)
        counts.add(len(calls))
    assert max(counts) > 1 or (form.frame.alone and counts == {1}), text


@pytest.mark.parametrize("name", WRITTEN)
def test_one_call_of_the_named_tool(name, walker):
    form = FORMATS[name]
    for parallel, tool in ((True, "weather"), (False, None)):
        grammar = demanded_calls(form, TOOLS, tool, parallel=parallel)
        for seed in range(6):
            [call] = parse(form, TOOLS, walker.write(grammar, random.Random(seed), ends_of(form))).calls
            assert tool in (None, call.name)


F = Tool(Function("f", parameters={"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}))
STRICT = Tool(Function("f", parameters=F.function.parameters, strict=True))
CALLS = {  # of f with a="x", as the templates write them
    "hermes": '<tool_call>\n{"name": "f", "arguments": {"a": "x"}}\n</tool_call>',
    "llama3": '{"name": "f", "parameters": {"a": "x"}}',
    "mistral": '[TOOL_CALLS] [{"name": "f", "arguments": {"a": "x"}}]',
    "mistral_v11": '[TOOL_CALLS]f[CALL_ID]abc123XYZ[ARGS]{"a": "x"}',
    "mistral_v13": '[TOOL_CALLS]f[ARGS]{"a": "x"}',
    "gpt-oss": '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": "x"}',
    "json": '{"name": "f", "arguments": {"a": "x"}}',
    "deepseekv32": (
        '<｜DSML｜function_calls>\n<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="a" string="true">x'
        "</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜function_calls>"
    ),
    "pythonic": '[f(a="x")]',
    "qwen3_coder": "<tool_call>\n<function=f>\n<parameter=a>\nx\n</parameter>\n</function>\n</tool_call>",
    "glm45": "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>x</arg_value>\n</tool_call>",
    "minimax-m2": (
        '<minimax:tool_call>\n<invoke name="f">\n<parameter name="a">x</parameter>\n</invoke>\n</minimax:tool_call>'
    ),
    "granite": '<|tool_call|>[{"name": "f", "arguments": {"a": "x"}}]',
    "kimi_k2": (
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>"
        '{"a": "x"}<|tool_call_end|><|tool_calls_section_end|>'
    ),
    "deepseekv3": (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n"
        '{"a": "x"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
    ),
    "deepseekv31": (
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a": "x"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_demanded_call_looks_as_the_model_has_learned_it(name, walker):
    grammar = demanded_calls(FORMATS[name], [F], None, parallel=True)
    assert walker.takes(grammar, CALLS[name])
    for other in ("text", "", f"text {CALLS[name]}", CALLS[name].replace("f", "g", 1), CALLS[name][:-3]):
        assert not walker.takes(grammar, other), other


@pytest.mark.parametrize("name", ["hermes", "qwen3_coder"])
def test_a_line_break_behind_demanded_calls_leads_to_no_other(name, walker):
    tool = Tool(Function("f", parameters={"properties": {"a": {"type": "string"}}, "required": ["a"]}))
    grammar = demanded_calls(FORMATS[name], [tool], None, parallel=True)
    for text in (CALLS[name], f"{CALLS[name]}\n", f"{CALLS[name]}\n{CALLS[name]}"):
        assert walker.takes(grammar, text), text


@pytest.mark.parametrize("place", ["inside", "before"])
@pytest.mark.parametrize("name", sorted(CALLS.keys() - {"gpt-oss"}))
def test_a_thought_stands_before_a_demanded_call(name, place, walker):
    kind, text = demanded_calls(FORMATS[name], [F], None, parallel=True)
    grammar = kind, after_thought(text, Thought(opening="<think>", closing="</think>", place=place))
    opening = "<think>" if place == "before" else ""
    assert walker.takes(grammar, f"{opening}I call it.</think>\n\n{CALLS[name]}")
    assert not walker.takes(grammar, f"{opening}I call</think>\n\nOr not.")


@pytest.mark.parametrize("place", ["inside", "before"])
def test_a_message_of_thought_stands_before_the_message_of_a_demanded_call(place, walker):
    kind, text = demanded_calls(FORMATS["gpt-oss"], [F], None, parallel=True)
    grammar = kind, after_thought(text, Thought(opening=ANALYSIS.opening, closing=ANALYSIS.closing, place=place))
    opening, call = ANALYSIS.opening if place == "before" else "", CALLS["gpt-oss"]
    assert walker.takes(grammar, f"{opening}I call it.<|end|><|start|>assistant{call}")
    assert walker.takes(grammar, call) == (place == "before")
    for other in (f"{opening}I call it.<|end|>{call}", f"<|start|>assistant{call}", f"{call}<|start|>assistant{call}"):
        assert not walker.takes(grammar, other), other


@pytest.mark.parametrize("name", sorted(CALLS.keys() - {"pythonic", "json", "gpt-oss"}))
def test_a_call_that_a_model_begins_by_itself_fits_its_strict_tool(name, walker):
    form = FORMATS[name]
    grammar = strict_calls(form, [STRICT])
    call = CALLS[name] if CALLS[name].startswith(form.opening) else form.opening + CALLS[name]
    for text in ("no call", call, f"first {call} then\n{call}", f"{call}\n{call}"):
        assert walker.takes(grammar, text), text
    assert not walker.takes(
        grammar, f"first {call.replace('f', 'g', 1) if name not in ('deepseekv3', 'deepseekv32') else call[:-5]}"
    )
    inside = Thought(opening="<think>", closing="</think>", place="inside")
    thinking = grammar[0], after_thought(grammar[1], inside)
    assert walker.takes(thinking, f"I could</think>then {call}")


def test_without_a_strict_tool_or_a_tag_before_calls_nothing_is_constrained():
    assert strict_calls(FORMATS["hermes"], [F]) is None
    assert strict_calls(FORMATS["pythonic"], [STRICT]) is None
    assert strict_calls(FORMATS["gpt-oss"], [STRICT]) is None  # no tag is of calls alone
    assert strict_calls(FORMATS["json"], [STRICT]) is None  # a block of code may hold any JSON


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("pythonic", {"properties": {"a-b": {}}, "required": ["a-b"]}, "a-b"),
        ("qwen3_coder", {"properties": {"a": False}, "required": ["a"]}, ""),
        ("glm45", {"type": "array"}, "no object"),
        ("hermes", {"not": {"type": "object"}}, "not"),
        ("qwen3_coder", {"properties": {"a": {"type": "string", "minLength": -1}}}, "minLength must be"),
        ("glm45", {"properties": {"a": {"type": "string", "minLength": 5, "maxLength": 2}}}, "minLength is greater"),
        ("glm45", {"properties": {"a": {"enum": ["a</arg_value>"]}}}, "no value of the parameter 'a'"),
        ("qwen3_coder", {"properties": {"c>d": {"type": "integer"}}, "required": ["c>d"]}, "the parameter 'c>d'"),
        ("qwen3_coder", {"properties": {"x\ny": {}}, "required": ["x\ny"]}, r"the parameter 'x\\ny'"),
        ("qwen3_coder", {"properties": {"a": {"type": "object", "properties": {"</parameter>": {}}}}}, "the key"),
        ("qwen3_coder", {"properties": {"a": {"type": "array", "items": {"const": "</parameter>"}}}}, "every value"),
        ("qwen3_coder", {"properties": {"a": {"type": "object", "patternProperties": {"<$": {}}}}}, "the pattern '<.'"),
        ("glm45", {"properties": {"a": {"type": "object", "patternProperties": {r"\x3C": {}}}}}, "the pattern"),
        ("glm45", {"properties": {"a": {"type": "object", "patternProperties": {r"\p{Sm}": {}}}}}, "the pattern"),
        ("minimax-m2", {"anyOf": [{"properties": {"a": {"type": "string"}}}] * 40}, "more than 32"),
        ("hermes", {"properties": ["a"]}, "properties must be an object"),
        ("qwen3_coder", {"properties": "a"}, "properties must be an object"),
        ("qwen3_coder", {"properties": {"a": {"type": 5}}}, "type must be a string or a list of strings"),
        ("qwen3_coder", {"properties": {"a": {"enum": "a"}}}, "enum must be a list"),
        ("qwen3_coder", {"properties": {"a": {"enum": ["a", 1], "minimum": "0"}}}, "minimum must be a number"),
        ("qwen3_coder", {"properties": {"a": {"enum": ["a", 1], "multipleOf": 0}}}, "multipleOf must be a number"),
        ("qwen3_coder", {"required": [1]}, "required must be a list of strings"),
        ("glm45", {"additionalProperties": {"type": 5}}, "type must be a string"),
    ],
)
def test_parameters_that_cannot_be_written_are_a_400(name, parameters, message, walker):
    grammar = demanded_calls(FORMATS[name], [Tool(Function("f", parameters=parameters))], None, parallel=True)
    with pytest.raises(RequestError, match=f"Failed to compile call_grammar grammar: .*{message}"):
        walker.compiler.compile(*grammar)


JSON_VALUES = [  # schema of a parameter whose value is JSON, what it takes, what it does not
    ({"type": "array", "items": {"enum": [1, "x{}", "y"]}}, '["y",1]', '["x{}"]'),
    ({"type": "array", "items": {"type": "string", "pattern": ".+"}}, '["a<b"]', '["a{}b"]'),
    ({"type": "array", "items": {"anyOf": [{"const": "{}"}, {"type": "integer"}]}}, "[7]", '["{}"]'),
    (
        {"type": "object", "properties": {"k": {"enum": [["{}"], ["z"]]}}, "required": ["k"]},
        '{"k":["z"]}',
        '{"k":["{}"]}',
    ),
    ({"type": "object", "patternProperties": {"^x-": {"type": "integer"}}}, '{"x-a":1}', '{"x-{}":1}'),
    ({"type": "object", "patternProperties": {"": {"type": "integer"}}}, '{"a":1}', '{"{}":1}'),
    ({"type": "object", "patternProperties": {"^[ -~]+$": {"type": "integer"}}}, '{"a=b":1}', '{"{}":1}'),
    ({"type": "object", "patternProperties": {r"^\S+$": {"type": "integer"}}}, '{"a=b":1}', '{"{}":1}'),
    ({"type": "object", "patternProperties": {"^a[^b]*$": True}}, '{"a-":"c"}', '{"a{}":"c"}'),
    ({"type": "object", "patternProperties": {"^(?P<n>a.+)$": True}}, '{"ac":"c"}', '{"ac":"{}"}'),
    ({"type": "object", "additionalProperties": {"type": "integer"}}, '{"c<d":1}', '{"{}":1}'),
    (
        {
            "type": "object",
            "properties": {"k": {"type": "boolean"}, "kk": True},
            "additionalProperties": {"type": "integer"},
        },
        '{"k":true,"kkk":1,"l":2}',
        '{"k":true,"{}":1}',
    ),
    ({"type": ["object", "null"], "minProperties": 1}, '{"c":1}', '{"{}":1}'),
    ({"type": ["array", "null"]}, '["c"]', '["{}"]'),
    ({"type": "array", "prefixItems": [{"type": "integer"}], "minItems": 2}, '[1,"c"]', '[1,"{}"]'),
    ({"type": "array", "items": {"minLength": 1}}, '["c"]', '["{}"]'),
    ({"type": "array", "items": {"maxItems": 3}}, '[["c"]]', '[["{}"]]'),
    ({"type": "array", "items": {"additionalProperties": {"type": "integer"}}}, '[{"c":1}]', '[{"{}":1}]'),
]


@pytest.mark.parametrize(("schema", "taken", "refused"), JSON_VALUES)
@pytest.mark.parametrize("name", ["qwen3_coder", "minimax-m2", "glm45"])
def test_json_between_tags_never_spells_the_closing_tag(name, schema, taken, refused, walker):
    end = FORMATS[name].tags.value_end
    filled = json.loads(json.dumps(schema).replace("{}", end))
    tool = Tool(Function("f", parameters={"type": "object", "properties": {"a": filled}, "required": ["a"]}))
    grammar = demanded_calls(FORMATS[name], [tool], None, parallel=False)
    assert walker.takes(grammar, written_as(name, taken))
    assert not walker.takes(grammar, written_as(name, refused.replace("{}", end)))


def written_as(name, value):
    """A call of f whose parameter a has this text, as the format writes it."""
    parts = CALLS[name].rsplit("x", 1) if name != "minimax-m2" else CALLS[name].split("x</parameter>")
    return value.join(parts if name != "minimax-m2" else [parts[0], f"</parameter>{parts[1]}"])


COLOR = {"anyOf": [{"type": "string", "enum": ["red", "blue"]}, {"type": "null"}]}
ALTERNATIVES = [  # schema of a parameter, its texts and the values that they are, texts that it does not allow
    (COLOR, {"red": "red", "null": None}, ["r", "green", "redblue", "None", ""]),
    ({"type": "string", "anyOf": [{"const": "aa"}, {"const": "bb"}]}, {"aa": "aa", "bb": "bb"}, ["a", "aabb"]),
    ({"oneOf": [{"const": "1"}, {"const": "b"}]}, {"1": "1", "b": "b"}, ["2", "null"]),
    ({"allOf": [{"enum": ["a", "b"]}, {"enum": ["b", "c"]}], "type": "string"}, {"b": "b"}, ["a", "c"]),
    (
        {"anyOf": [{"type": "null"}, {"type": "string", "maxLength": 3}]},
        {"abc": "abc", "": "", "null": None, "12": "12"},
        ["abcd", "null "],
    ),
    (
        {"anyOf": [{"type": "string", "pattern": "^x+$"}, {"type": "string", "pattern": "^[0-9]{2}$"}]},
        {"xx": "xx", "42": "42"},
        ["x4", "4", ""],
    ),
    (
        {"anyOf": [{"type": "string", "enum": ["x", "y"]}, {"type": "integer", "minimum": 0, "maximum": 9}]},
        {"x": "x", "9": 9, "0": 0},
        ["10", "-1", "z"],
    ),
    ({"anyOf": [{"type": "string"}, {"type": "integer", "maximum": 5, "minimum": 4}]}, {"4": 4, "4x": "4x"}, ["6"]),
    (
        {"anyOf": [{"type": "string", "maxLength": 2}, {"type": "array", "items": {"type": "integer"}}]},
        {"ab": "ab", "[1, 2]": [1, 2]},
        ["abc", '["a"]', "[", "{}"],
    ),
    ({"anyOf": [{"type": "string", "enum": ["a"]}, {"type": "boolean"}]}, {"a": "a", "true": True}, ["True", "b"]),
    ({"type": "string", "enum": ["aaa", "b"], "maxLength": 1}, {"b": "b"}, ["aaa"]),
    ({"type": "string", "enum": ["aaa", "b"], "pattern": "^b$"}, {"b": "b"}, ["aaa"]),
    ({"type": "string", "minLength": 2.0, "maxLength": 3.0}, {"abc": "abc"}, ["a", "abcd"]),
]


@pytest.mark.parametrize(("schema", "values", "refused"), ALTERNATIVES)
@pytest.mark.parametrize("name", ["qwen3_coder", "glm45", "minimax-m2"])
def test_text_between_tags_is_a_value_of_one_of_the_alternatives(name, schema, values, refused, walker):
    form = FORMATS[name]
    parameters = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    tools = [Tool(Function("f", parameters=parameters))]
    grammar = demanded_calls(form, tools, None, parallel=True)
    for text, value in values.items():
        call = written_as(name, text)
        assert walker.takes(grammar, call), call
        [read] = parse(form, tools, call).calls
        assert json.loads(read.arguments) == {"a": value}
    for text in refused:
        assert not walker.takes(grammar, written_as(name, text)), text


@pytest.mark.parametrize(
    ("kinds", "values", "refused"),
    [
        (["string", "null"], {'string="true">x': "x", 'string="false">null': None}, ['string="false">3']),
        (["string"], {'string="true">null': "null"}, ['string="false">null', 'string="false">"x"']),
        (["string", "integer"], {'string="true">4': "4", 'string="false">4': 4}, ['string="false">null']),
        (["integer", "null"], {'string="false">4': 4, 'string="false">null': None}, ['string="true">x']),
    ],
)
def test_a_list_of_types_says_which_values_are_text_and_which_are_json(kinds, values, refused, walker):
    form = FORMATS["deepseekv32"]
    parameters = {"type": "object", "properties": {"a": {"type": kinds}}, "required": ["a"]}
    tools = [Tool(Function("f", parameters=parameters))]
    grammar = demanded_calls(form, tools, None, parallel=False)
    for written, value in values.items():
        call = CALLS["deepseekv32"].replace('string="true">x', written)
        assert walker.takes(grammar, call), call
        [read] = parse(form, tools, call).calls
        assert json.loads(read.arguments) == {"a": value}
    for written in refused:
        assert not walker.takes(grammar, CALLS["deepseekv32"].replace('string="true">x', written)), written


def ordinary_tools(count):
    """Tools as servers of tools declare them: a few parameters, a nested object, and much to read."""
    prose = "What it is for, when to use it, and what comes back. " * 6
    parameters = {
        "type": "object",
        "properties": {
            "path": {"type": "string", "description": prose},
            "limit": {"type": "integer", "minimum": 1, "description": prose},
            "mode": {"type": "string", "enum": ["read", "write", "append"], "description": prose},
            "tags": {"type": "array", "items": {"type": "string"}, "description": prose},
            "options": {"type": "object", "properties": {"deep": {"type": "boolean"}}, "additionalProperties": False},
        },
        "required": ["path"],
        "additionalProperties": False,
    }
    properties = parameters["properties"]
    return [
        Tool(
            Function(
                f"tool_{number}",
                parameters={**parameters, "properties": {**properties, f"own_{number}": {"type": "string"}}},
                strict=True,
            )
        )
        for number in range(count)
    ]


@pytest.mark.parametrize("name", ["hermes", "qwen3_coder", "glm45", "pythonic", "mistral"])
def test_three_hundred_ordinary_tools_are_within_the_limits(name, walker):
    form, tools = FORMATS[name], ordinary_tools(300)
    for grammar in filter(None, (demanded_calls(form, tools, None, parallel=True), strict_calls(form, tools))):
        matcher = walker.compiler.compile(*grammar).matcher()
        assert walker.allowed(matcher)


def test_what_several_parameters_may_be_is_written_once():
    one, many = (
        from_calls(demanded_calls(FORMATS["qwen3_coder"], ordinary_tools(count), None, parallel=True)[1], {})
        for count in (1, 50)
    )
    assert many.count("value0_TEXT".upper()) == one.count("value0_TEXT".upper())
    assert len(many) - len(one) < 49 * 1000
