"""Tool calls are found however the output is cut, and what is no call stays content."""

import itertools
import json
import re

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quartet.http_gateway.parsers import tool_calls
from quartet.http_gateway.parsers.call_formats import FORMATS, REQUIRED, call_id, short_call_id
from quartet.http_gateway.parsers.output_reader import OutputReader
from quartet.http_gateway.parsers.tool_calls import calls_schema, format_of
from quartet.http_gateway.parsers.tool_events import Arguments, CallStart, Content, Function, Tool, collect
from quartet.runtime.errors import RequestError
from tests.unit.http_gateway.call_texts import WAYS

NAMES = ["f", "get_weather", "Über"]
TOOLS = [Tool(function=Function(name=name)) for name in NAMES]
READ = FORMATS | {"required": REQUIRED}


def parser(name, tools=TOOLS):
    return OutputReader(calls=READ[name], known=tool_calls.names_of(tools))


def parse(name, tools, text):
    return tool_calls.parse(READ[name], tools, text)[:2]


def stream(name, pieces, tools=TOOLS):
    reading = parser(name, tools)
    events = [event for piece in pieces for event in reading.feed(piece)]
    return collect(events + reading.finish())[:2]


def cut(text, places):
    edges = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


WRITTEN = {
    "hermes": '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>\n'
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich}"}}\n</tool_call>',
    "qwen": '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
    '<tool_call>{"name": "get_weather", "arguments": {"city": "Zürich}"}}</tool_call>',
    "qwen25": '<tool_call>\n{"name": "f", "parameters": {"a": 1}}\n</tool_call>'
    '\n<tool_call>\n{"name":"get_weather","arguments":{"city": "Zürich}"}}\n</tool_call>\n',
    "llama3": '<|python_tag|>{"name": "f", "parameters": {"a": 1}}; '
    '{"name": "get_weather", "parameters": {"city": "Zürich}"}}',
    "mistral": '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}, '
    '{"name": "get_weather", "arguments": {"city": "Zürich}"}}]',
    "pythonic": '[f(a=1), get_weather(city="Zürich}")]',
    "granite": '<|tool_call|>[{"name": "f", "arguments": {"a": 1}}, '
    '{"name": "get_weather", "arguments": {"city": "Zürich}"}}]',
    "deepseekv3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n"
    '```json\n{"a": 1}\n```<｜tool▁call▁end｜>\n'
    "<｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
    '{"city": "Zürich}"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    "deepseekv31": '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜>'
    '<｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Zürich}"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    "kimi_k2": "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>"
    '{"a": 1}<|tool_call_end|><|tool_call_begin|>functions.get_weather:1<|tool_call_argument_begin|>'
    '{"city": "Zürich}"}<|tool_call_end|><|tool_calls_section_end|>',
    "required": '[{"name": "f", "parameters": {"a": 1}}, {"name": "get_weather", "parameters": {"city": "Zürich}"}}]',
}


@pytest.mark.parametrize("name", WRITTEN)
def test_every_parser_reads_its_family(name):
    content, calls = parse(name, TOOLS, WRITTEN[name])
    assert content == ""
    assert [(call.name, json.loads(call.arguments)) for call in calls] == [
        ("f", {"a": 1}),
        ("get_weather", {"city": "Zürich}"}),
    ]


@pytest.mark.parametrize("name", WRITTEN)
def test_every_single_cut_gives_the_same_events(name):
    text = WRITTEN[name]
    whole = parse(name, TOOLS, text)
    assert all(stream(name, cut(text, [at])) == whole for at in range(len(text)))
    assert stream(name, text) == whole


@pytest.mark.parametrize("name", sorted(WRITTEN.keys() - {"pythonic"}))
def test_arguments_stream_while_they_are_written(name):
    reading = parser(name)
    events = [event for character in WRITTEN[name] for event in reading.feed(character)]
    assert events[0] == CallStart(0, "f")
    assert len([event for event in events if isinstance(event, Arguments) and event.index == 1]) > 5


def test_text_before_between_and_behind_calls_is_content():
    call = WRITTEN["qwen"].partition('<tool_call>{"name": "get')[0]
    content, calls = parse("hermes", TOOLS, f"Let me see.\n{call}\nand {call}\n\nDone. ")
    assert content == "Let me see.\nand\n\nDone. "
    assert len(calls) == 2


def test_llama_calls_need_no_tag_at_the_beginning_of_the_output():
    for text in (
        ' {"name": "f", "parameters": {"x": {"y": []}}}',
        'Sure <|python_tag|>{"name": "f", "parameters": {"x": {"y": []}}}',
        '{"type": "function", "name": "f", "parameters": {"x": {"y": []}}}',
        '{"type": "function", "function": {"name": "f", "parameters": {"x": {"y": []}}}}',
    ):
        assert [json.loads(call.arguments) for call in parse("llama3", TOOLS, text)[1]] == [{"x": {"y": []}}], text


def test_mistral_calls_may_name_the_function_before_its_arguments():
    text = '[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]get_weather[CALL_ID]abc123XYZ[ARGS]{"b": 2}'
    whole = parse("mistral", TOOLS, text)
    assert [(call.name, call.arguments) for call in whole[1]] == [("f", '{"a": 1}'), ("get_weather", '{"b": 2}')]
    assert whole[0] == ""
    assert all(stream("mistral", cut(text, [at])) == whole for at in range(len(text)))


def test_the_id_that_a_model_writes_is_told():
    reading = OutputReader(calls=FORMATS["mistral_v11"], known=["f"])
    text = '[TOOL_CALLS]f[CALL_ID]abc123XYZ[ARGS]{"a": 1}[TOOL_CALLS]f[ARGS]{"a": 2}'
    starts = [event for event in [*reading.feed(text), *reading.finish()] if isinstance(event, CallStart)]
    assert starts == [CallStart(0, "f", "abc123XYZ"), CallStart(1, "f")]


def test_python_literals_become_json():
    text = """[f(a='it\\'s', b=[True, None, -1.5, (1, 2)], c={"k": false, "l": null}, d="x)]")]"""
    [call] = parse("pythonic", TOOLS, text)[1]
    assert json.loads(call.arguments) == {
        "a": "it's",
        "b": [True, None, -1.5, [1, 2]],
        "c": {"k": False, "l": None},
        "d": "x)]",
    }


def test_pythonic_calls_may_stand_between_tags():
    assert parse("pythonic", TOOLS, "<|python_start|>[f()]<|python_end|>") == ("", [("f", "{}")])


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ('{"arguments": {"a": 1}, "name": "f"}', '{"a": 1}'),
        ('{"name": "f", "arguments": "{\\"a\\": 1}"}', '{"a": 1}'),
        ('{"name": "f", "arguments": null}', "{}"),
        ('{"name": "f"}', "{}"),
        ('{"name": "f", "arguments": {"a": 1}, "id": 7, "more": {"x": "}"}}', '{"a": 1}'),
        ('{"name": "f", "arguments": {"a": 1}', '{"a": 1}'),
        ('{"name": "f", "arguments": {"a": "</tool_call>"}}', '{"a": "</tool_call>"}'),
        ('{"id": "1", "name": "f", "arguments": {}}', "{}"),
    ],
)
def test_calls_written_in_another_way_are_read_all_the_same(text, arguments):
    assert parse("hermes", TOOLS, f"<tool_call>{text}</tool_call>") == ("", [("f", arguments)])


NO_CALLS = {
    "hermes": [
        "<tool_call>",
        "<tool_call>\n",
        "x <tool_cal",
        "<tool_call>{}</tool_call>",
        "<tool_call>not json</tool_call>",
        '<tool_call>{"name": "stranger", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "argu',
        '<tool_call>{"name": "f", ]}</tool_call>',
        '<tool_call>{"other": 1}</tool_call> and <tool_call> again',
        "</tool_call>",
        "  \n ",
        "",
    ],
    "llama3": [
        '{"answer": 42}',
        '{"name": "John", "parameters": {}}',
        "{",
        "{ not json",
        "<|python_tag|>print(1)",
        " {",
    ],
    "mistral": [
        "[TOOL_CALLS]",
        "[TOOL_CALLS] [",
        "[TOOL_CALLS][1]",
        "[TOOL_CALLS]stranger{}",
        "[TOOL_CALLS]f",
        "[1, 2]",
    ],
    "pythonic": [
        "[1, 2]",
        "[f(",
        "[stranger()]",
        "[f(x=g())]",
        "[f(1)]",
        "[f(**{})]",
        "[f(x=__import__)]",
        "[f(x={1: 2})]",
        "[f(x=1e999)]",
        "[f(x='\\ud800')]",
        "[f(x=" + "(" * 500 + ")" * 500 + ")]",
        "[",
        " [",
        "<|python_start|>",
        "text [f()]",
    ],
    "deepseekv31": [
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>stranger<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>" + "f" * 600,
        "<｜tool▁calls▁begin｜> so",
    ],
    "required": ["[]", "[1]", "{}", '[{"name": "stranger", "parameters": {}}]'],
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in NO_CALLS.items() for text in texts])
def test_what_is_no_call_stays_content_to_the_last_character(name, text):
    assert parse(name, TOOLS, text) == (text, [])
    assert stream(name, text) == (text, [])


def test_a_bad_call_behind_a_good_one_is_content():
    good, bad = '{"name": "f", "arguments": {"a": 1}}', '{"name": "stranger", "arguments": {}}'
    for name, text, left in (
        ("mistral", f"[TOOL_CALLS][{good}, {bad}]", f", {bad}]"),
        ("llama3", f"{good}; {bad}", f"; {bad}"),
        ("hermes", f"<tool_call>{good}</tool_call><tool_call>{bad}</tool_call>", f"<tool_call>{bad}</tool_call>"),
        ("pythonic", "[f(a=1), stranger()]", ", stranger()]"),
    ):
        assert parse(name, TOOLS, text) == (left, [("f", '{"a": 1}')])


def test_an_output_cut_inside_the_arguments_keeps_what_was_written():
    assert parse("hermes", TOOLS, '<tool_call>{"name": "f", "arguments": {"a": "lo') == ("", [("f", '{"a": "lo')])


def test_content_is_not_held_back_without_need():
    reading = parser("hermes")
    assert reading.feed("Hello <b") == [Content("Hello <b")]
    assert reading.feed(" <tool") == []
    assert reading.feed("box>") == [Content(" <toolbox>")]


PIECES = st.sampled_from(
    [
        *WRITTEN.values(),
        *(text for texts in NO_CALLS.values() for text in texts),
        "<tool_call>",
        "</tool_call>",
        "<|python_tag|>",
        "[TOOL_CALLS]",
        "[ARGS]",
        '{"name": "f", "arguments": {',
        '"a": "\\"}{"',
        "}}",
        "]",
        "; ",
        ", ",
        "\n",
        " ",
        "f(",
        ")",
        "日本🎉",
        "\\",
        '"',
    ]
)


@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from([*sorted(READ)]),
    text=st.lists(PIECES | st.text(max_size=8), max_size=8).map("".join),
    places=st.lists(st.integers(0, 10_000), max_size=30),
)
def test_no_cut_changes_what_an_output_means(name, text, places):
    whole = parse(name, TOOLS, text)
    assert stream(name, cut(text, places)) == whole
    if not whole[1]:
        assert whole[0] == text


ARGUMENTS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**12), 10**12)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
CALLS = st.lists(
    st.tuples(
        st.sampled_from(NAMES), st.dictionaries(st.from_regex("[a-z_]{1,6}", fullmatch=True), ARGUMENTS, max_size=3)
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=120, deadline=None)
@given(
    case=st.sampled_from(  # calls between tags: test_tagged_calls
        [(name, way) for name in sorted(READ) for way in WAYS[name] if READ[name].tags is None]
    ),
    calls=CALLS,
    places=st.lists(st.integers(0, 10_000), max_size=30),
)
def test_streamed_arguments_joined_are_what_the_model_meant(case, calls, places):
    name, way = case
    content, found = stream(name, cut(way(calls), places))
    assert content == ""
    assert [(call.name, json.loads(call.arguments)) for call in found] == calls


def test_a_long_call_with_its_keys_in_another_order_is_read_in_linear_time():
    text = '<tool_call>{"arguments": {"a": "' + "x" * 50_000 + '"}, "name": "f"}</tool_call>'
    assert len(stream("hermes", text)[1][0].arguments) > 50_000


def test_an_unknown_parser_is_refused_with_the_list_of_known_ones():
    with pytest.raises(RequestError, match="hermes, llama3, mistral, pythonic, qwen, qwen25"):
        format_of("nope")


def test_call_ids_look_as_clients_expect_and_differ():
    assert re.fullmatch("call_[0-9a-f]{24}", call_id())
    assert len({call_id() for _ in range(100)}) == 100


def test_a_tool_prints_without_what_was_left_out():
    assert TOOLS[0].plain() == {"type": "function", "function": {"name": "f"}}


def weather_tools():
    place = {"$defs": {"P": {"type": "string"}}, "type": "object", "properties": {"p": {"$ref": "#/$defs/P"}}}
    return [Tool(function=Function(name="f", parameters=place)), Tool(function=Function(name="g"))]


def test_the_schema_of_required_calls_admits_calls_of_the_tools_and_nothing_else():
    schema = json.loads(calls_schema(weather_tools()))
    validator = jsonschema.Draft202012Validator(schema)
    assert validator.is_valid([{"name": "f", "parameters": {"p": "x"}}, {"name": "g", "parameters": {}}])
    for bad in ([], [{"name": "h", "parameters": {}}], [{"name": "f", "parameters": {"p": 1}}], [{"name": "f"}]):
        assert not validator.is_valid(bad), bad


def test_a_named_tool_is_the_only_one_and_is_called_once():
    validator = jsonschema.Draft202012Validator(json.loads(calls_schema(weather_tools(), name="g")))
    assert validator.is_valid([{"name": "g", "parameters": {}}])
    assert not validator.is_valid([{"name": "f", "parameters": {}}])
    assert not validator.is_valid([{"name": "g", "parameters": {}}] * 2)


def test_without_parallel_calls_there_is_one():
    schema = json.loads(calls_schema(weather_tools(), parallel=False))
    assert schema["maxItems"] == 1


def test_a_tool_choice_that_cannot_be_met_is_refused():
    with pytest.raises(RequestError, match=r"Tools cannot be empty if tool choice is set to required\."):
        calls_schema([])
    with pytest.raises(RequestError, match=r"Tool 'x' not found in tools list\."):
        calls_schema(TOOLS, name="x")


def test_tools_have_definitions_of_their_own():
    def tool(name, kind):
        parameters = {
            "type": "object",
            "properties": {"x": {"$ref": "#/$defs/Item"}},
            "$defs": {"Item": {"type": kind}},
        }
        return Tool(function=Function(name=name, parameters=parameters))

    schema = json.loads(calls_schema([tool("f", "boolean"), tool("g", "null")]))
    validator = jsonschema.Draft202012Validator(schema)
    assert validator.is_valid([{"name": "f", "parameters": {"x": True}}, {"name": "g", "parameters": {"x": None}}])
    assert not validator.is_valid([{"name": "f", "parameters": {"x": None}}])


def test_a_tool_without_parameters_takes_none():
    schema = json.loads(calls_schema([TOOLS[0]]))
    assert schema["items"]["anyOf"][0]["properties"]["parameters"]["properties"] == {}


def test_two_objects_in_one_tag_are_two_calls():
    one, two = (json.dumps({"name": "f", "arguments": {"a": n}}) for n in (1, 2))
    for between in ("\n", "", ", "):
        text = f"<tool_call>\n{one}{between}{two}\n</tool_call> so"
        assert parse("hermes", TOOLS, text) == (" so", [("f", '{"a": 1}'), ("f", '{"a": 2}')])
    assert parse("hermes", TOOLS, f"<tool_call>[{one}, {two}]</tool_call>")[1] == [("f", '{"a": 1}'), ("f", '{"a": 2}')]


def test_what_is_no_call_behind_a_call_in_one_tag_is_content():
    text = '<tool_call>{"name": "f", "arguments": {}} {"x": 1}</tool_call>'
    assert parse("hermes", TOOLS, text) == (' {"x": 1}</tool_call>', [("f", "{}")])


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("U\nlm", "U\nlm"),
        ("tab\there", "tab\there"),
        ("\x00\x1f\r", "\x00\x1f\r"),
        ("C:\\dir", "C:\\dir"),
        ("it\\'s", "it's"),
        ("\\u00e9 \\u12", "é \\u12"),
        ("line\\\nbreak", "line\\\nbreak"),
    ],
)
@pytest.mark.parametrize("name", ["hermes", "llama3", "mistral", "required"])
def test_strings_that_json_does_not_allow_are_mended(name, written, meant):
    call = '{"name": "f", "parameters": {"a": "' + written + '"}}'
    text = {"hermes": f"<tool_call>{call}</tool_call>", "mistral": f"[TOOL_CALLS][{call}]", "required": f"[{call}]"}
    text = text.get(name, call)
    content, [found] = parse(name, TOOLS, text)
    assert (content, json.loads(found.arguments)) == ("", {"a": meant})
    assert stream(name, text) == (content, [found])


def test_a_python_string_may_hold_a_raw_line_break():
    [call] = parse("pythonic", TOOLS, "[f(a='U\nlm')]")[1]
    assert json.loads(call.arguments) == {"a": "U\nlm"}


def test_arguments_whose_brackets_were_forgotten_are_closed_at_the_closing_tag():
    text = '<tool_call>{"name": "f", "arguments": {"a": [1</tool_call> so'
    assert parse("hermes", TOOLS, text) == (" so", [("f", '{"a": [1]}')])


def test_the_beginning_of_a_demanded_call_is_never_content():
    text = '[{"name": "f", "parameters": {"a": 1}}, {"name": "get_weather", "parameters": {}}]'
    for end in range(len(text)):
        content, calls = parse("required", TOOLS, text[:end])
        assert content == "" and len(calls) <= 2, text[:end]


def test_ids_of_calls_are_what_templates_of_the_family_take():
    assert FORMATS["mistral"].new_id is short_call_id
    assert re.fullmatch("[a-zA-Z0-9]{9}", short_call_id())
