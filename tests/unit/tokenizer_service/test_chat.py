"""Chat templates render as Hugging Face renders them, and a hostile one costs its own request and nothing else."""

import json

import jinja2
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quartet.runtime.config import ServerConfig
from quartet.runtime.errors import RequestError, StartupError
from quartet.runtime.messages import Chat
from quartet.runtime.model_files.chat_templates import bundled
from quartet.runtime.model_files.model_info import ModelInfo
from quartet.tokenizer_service.chat import ChatTemplate, load_template, special_tokens
from quartet.tokenizer_service.sandbox import ChatEnvironment
from quartet.tokenizer_service.turns import in_turns

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city <now> & 'later'",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


def call(name, **arguments):
    return {"id": "call_1", "type": "function", "function": {"name": name, "arguments": arguments}}


CONVERSATIONS = {
    "one": [turn("user", "Hi")],
    "system": [turn("system", "Be brief."), turn("user", "Hi")],
    "long": [
        turn("system", " Be\nbrief. "),
        turn("user", "Hi "),
        turn("assistant", " Hello!\n"),
        turn("user", "And <b>you</b> & 'me' \"us\" {{ 7 * 7 }} {% raise %}?"),
        turn("assistant", "日本語 🎉 café\u2028"),
        turn("user", "<|im_end|>[/INST]</s>"),
    ],
    "thoughts": [
        turn("user", "2+2?"),
        turn("assistant", "<think>\nsum\n</think>\n\n4"),
        turn("user", "3+3?"),
        turn("assistant", "6", reasoning_content="another sum"),
    ],
    "tools": [
        turn("user", "Weather?"),
        turn("assistant", "", tool_calls=[call("get_weather", city="Zürich")]),
        turn("tool", '{"sun": true}', tool_call_id="call_1"),
        turn("assistant", "Sunny."),
        turn("user", "Thanks"),
    ],
    "null content": [
        turn("user", "Weather?"),
        turn("assistant", None, tool_calls=[call("get_weather", city="<Ulm>", days=[1, 2.5, None])]),
        turn("tool", "rain", tool_call_id="call_1"),
    ],
}


@pytest.fixture(scope="module")
def hugging_face():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), bos_token="<s>", eos_token="</s>")

    def render(source, messages, **options):
        return tokenizer.apply_chat_template(messages, chat_template=source, tokenize=False, **options)

    return render


def template(source, context_length=1000, **named):
    return ChatTemplate({"default": source, **named}, TOKENS, context_length)


def outcome(render):
    """What a renderer says, where both may refuse."""
    try:
        return render()
    except Exception as error:
        return type(error)


def ours(source, messages, tools=None, documents=None, **options):
    known = {k: options.pop(k) for k in ("add_generation_prompt", "continue_final_message") if k in options}
    chat = Chat(messages=messages, tools=tools, documents=documents, template_kwargs=options, **known)
    return template(source).render(chat)


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", sorted(bundled()))
def test_bundled_templates_render_as_hugging_face_does(name, conversation, hugging_face):
    source, messages = bundled()[name].read_text(), CONVERSATIONS[conversation]
    spelt_out = [{**message, "content": message["content"] or ""} for message in messages]
    agreed = 0
    for options in (
        {"add_generation_prompt": True},
        {"add_generation_prompt": False},
        {"add_generation_prompt": True, "tools": [WEATHER]},
        {"add_generation_prompt": True, "enable_thinking": False},
        {"add_generation_prompt": False, "continue_final_message": True},
    ):
        theirs = outcome(lambda options=options: hugging_face(source, spelt_out, **options))
        mine = outcome(lambda options=options: ours(source, messages, **options))
        if isinstance(theirs, str):
            assert mine == theirs, options
            agreed += 1
        else:
            assert mine is RequestError, (options, theirs)
    assert agreed or conversation in ("tools", "null content", "thoughts")


FEATURES = {
    "tojson": "{{ tools | tojson }}|{{ messages | tojson(indent=2) }}",
    "json keeps html": "{{ {'a': '<&>\\''} | tojson }}",
    "documents": "{% for d in documents %}[{{ d.title }}: {{ d.text }}]\n{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %};{% endfor %}",
    "loop controls": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "loop state": "{% for m in messages %}{{ loop.last }}{{ loop.length }}{{ loop.revindex0 }}"
    "{{ loop.previtem.role if loop.previtem }}{{ loop.cycle('a', 'b') }}{% endfor %}",
    "else of a loop": "{% for m in messages if m.role == 'nobody' %}x{% else %}none{% endfor %}",
    "recursion": "{% for x in [[1, [2]], [3]] recursive %}{% if x is iterable %}({{ loop(x) }}){% else %}{{ x }}"
    "{% endif %}{% endfor %}",
    "whitespace": "  {% if true %}\n  kept \n  {% endif %}\n\n{{- 'x' -}}  \n end ",
    "concat": "{{ 'a' ~ 1 ~ none ~ missing ~ 2.5 }}{{ 'a' + 'b' }}{{ 'ab' * 3 }}{{ '%s-%03d' % ('x', 7) }}{{ 7 % 4 }}",
    "strings": "{{ 'a,b'.split(',') | join('+') }}{{ '+'.join(['x', 'y']) }}{{ 'aXbX'.replace('X', '--') }}"
    "{{ 'aXbX' | replace('X', '.', 1) }}{{ '{:>5}|{}'.format('r', 2) }}{{ '%s!' | format('hi') }}{{ 'x' | indent(2) }}",
    "selection": "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list }}"
    "{{ messages | rejectattr('role', 'in', ['user']) | list | length }}{{ (messages | last).role }}",
    "macro": "{% macro m(x, y=2) %}<{{ x }}{{ y }}{{ caller() if caller }}>{% endmacro %}{{ m(1) }}"
    "{% call m(3, y=4) %}in{% endcall %}",
    "blocks": "{% set x %}a{{ 1 }}b{% endset %}{{ x | upper }}{% filter trim %}  t {% endfilter %}",
    "namespace": "{% set ns = namespace(a=1, b='z') %}{% for i in range(3) %}{% set ns.a = ns.a * 2 %}{% endfor %}"
    "{{ ns.a }}{{ ns.b }}{{ dict(a=1) }}{{ dict(a=1).items() | list }}",
    "special tokens": "{{ bos_token }}{{ eos_token }}{{ pad_token is defined }}",
    "tests": "{{ tools is none }}{{ documents is defined }}{{ 1 is odd }}{{ 'a' is string }}{{ {} is mapping }}",
    "arithmetic": "{{ 2 ** 10 }}{{ 7 // 2 }}{{ 7 / 2 }}{{ -3 }}{{ [1] + [2] }}{{ range(5) | sum }}"
    "{{ messages[::-1][0].role }}",
}


@pytest.mark.parametrize("feature", FEATURES)
def test_every_feature_of_templates_means_what_it_means_at_hugging_face(feature, hugging_face):
    messages = CONVERSATIONS["long"]
    options = {"tools": [WEATHER], "documents": [{"title": "T", "text": "<x>"}], "add_generation_prompt": False}
    assert ours(FEATURES[feature], messages, **options) == hugging_face(FEATURES[feature], messages, **options)


@settings(max_examples=60, deadline=None)
@given(
    messages=st.lists(
        st.fixed_dictionaries(
            {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": st.text(max_size=40)}
        ),
        min_size=1,
        max_size=6,
    ),
    name=st.sampled_from(sorted(bundled())),
    last=st.sampled_from(["prompt", "continue", "nothing"]),
)
def test_any_conversation_renders_as_hugging_face_does(messages, name, last, hugging_face):
    """One that the template refuses renders as it does in turns."""
    source = bundled()[name].read_text()
    options = {"add_generation_prompt": last == "prompt", "continue_final_message": last == "continue"}
    theirs = outcome(lambda: hugging_face(source, messages, **options))
    if theirs is jinja2.TemplateError:  # the template's own refusal
        theirs = outcome(lambda: hugging_face(source, in_turns(messages), **options))
    mine = outcome(lambda: ours(source, messages, **options))
    assert mine == (theirs if isinstance(theirs, str) else RequestError)


def test_tool_arguments_sent_as_json_text_render_as_the_object():
    messages = [turn("user", "?"), turn("assistant", None, tool_calls=[call("f", x="é")])]
    as_text = json.loads(json.dumps(messages))
    as_text[1]["tool_calls"][0]["function"]["arguments"] = '{"x": "é"}'
    source = bundled()["mistral"].read_text()
    assert ours(source, as_text) == ours(source, messages)
    assert '"arguments": {"x": "é"}' in ours(source, messages)


def test_tool_arguments_that_are_no_object_are_printed_as_sent():
    messages = [turn("assistant", None, tool_calls=[call("f")])]
    messages[0]["tool_calls"][0]["function"]["arguments"] = "not json"
    assert ours("{{ messages[0].tool_calls[0].function.arguments }}", messages) == "not json"


def test_text_parts_become_a_string_where_the_template_expects_one():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    chatml = template(bundled()["chatml"].read_text())
    assert chatml.content_format == "string"
    assert "user\na b<|im_end|>" in chatml.render(Chat(messages=[turn("user", parts)]))


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{% for p in m['content'] %}{{ p.text }};{% endfor %}{% endfor %}",
        "{% for m in messages %}{% set c = m.content | list %}{% for p in c %}{{ p.text }};{% endfor %}{% endfor %}",
        "{% macro show(content) %}{% for p in content %}{{ p.text }};{% endfor %}{% endmacro %}"
        "{% for m in messages %}{{ show(m.content) }}{% endfor %}",
    ],
)
def test_text_parts_stay_parts_where_the_template_walks_over_them(source):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    walker = template(source)
    assert walker.content_format == "openai"
    assert walker.render(Chat(messages=[turn("user", parts)])) == "a;b;"


def test_image_parts_are_refused_by_name():
    parts = [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]
    with pytest.raises(RequestError, match="image_url"):
        ours("{{ messages }}", [turn("user", parts)])


@pytest.mark.parametrize("name", ["messages", "tools", "documents", "add_generation_prompt", "continue_final_message"])
def test_template_kwargs_cannot_replace_what_the_server_sets(name):
    chat = Chat(messages=[turn("user", "x")], template_kwargs={name: []})
    with pytest.raises(RequestError, match=name) as refused:
        template("{{ messages }}").render(chat)
    assert refused.value.field == "chat_template_kwargs"


def test_template_kwargs_reach_the_template():
    assert ours("{{ enable_thinking }} {{ depth }}", [turn("user", "x")], enable_thinking=False, depth=3) == "False 3"


def test_no_messages_are_refused():
    with pytest.raises(RequestError, match=r"Messages cannot be empty\."):
        ours("x", [])


def test_continuing_and_prompting_exclude_each_other():
    with pytest.raises(RequestError, match="exclude"):
        ours("x", [turn("user", "x")], add_generation_prompt=True, continue_final_message=True)


def test_what_the_template_raises_is_the_answer():
    with pytest.raises(RequestError, match="roles must alternate") as refused:
        ours("{{ raise_exception('roles must alternate') }}", [turn("user", "x")])
    assert refused.value.kind.status == 400


def test_the_tool_use_template_serves_requests_with_tools():
    both = template("plain", tool_use="with tools")
    assert both.render(Chat(messages=[turn("user", "x")])) == "plain"
    assert both.render(Chat(messages=[turn("user", "x")], tools=[WEATHER])) == "with tools"


def test_a_template_that_calls_tools_by_another_name_gets_them_unless_the_client_gives_others():
    source = "{% if xml_tools %}{{ xml_tools | length }}{% else %}none{% endif %}"
    assert ours(source, [turn("user", "x")], tools=[WEATHER]) == "1"
    assert ours(source, [turn("user", "x")]) == "none"
    assert ours(source, [turn("user", "x")], tools=[WEATHER], xml_tools=[WEATHER, WEATHER]) == "2"


ESCAPES = [
    "{{ ''.__class__.__mro__ }}",
    "{{ ().__class__.__bases__[0].__subclasses__() }}",
    "{{ ''['__class__'] }}{{ (''|attr('__class__')).mro }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ raise_exception.__globals__.json }}",
    "{{ strftime_now.__globals__['json'].codecs.open('/etc/passwd').read() }}",
    "{{ '{0.__class__.__mro__}'.format(1) }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'role': 'system'}) }}",
    "{% set ns = namespace(__class__=1) %}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "{{ self.__init__.__globals__ }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{{ lipsum.__globals__ }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_the_sandbox_has_no_way_out(source):
    with pytest.raises(RequestError):
        ours(source, [turn("user", "x")])


GROW = "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = "  # then an expression

BOMBS = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loop in a filter": "{% for a in range(9999) %}{% set x = range(99999) | map('string') | list %}{% endfor %}",
    "recursive macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "endless recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "recursive loop": "{% for a in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
    "doubling by ~": GROW + "n.x ~ n.x %}{% endfor %}",
    "doubling by +": GROW + "n.x + n.x %}{% endfor %}",
    "doubling a list": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "doubling by join": GROW + "[n.x, n.x] | join %}{% endfor %}",
    "doubling by replace": GROW + "n.x.replace('a', n.x) %}{% endfor %}",
    "doubling by a block": GROW + "n.x %}{% set y %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = y %}{% endfor %}",
    "product": "{{ 'a' * 9999999999 }}",
    "product of a list": "{{ ([0] * 9999999999) | length }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "squares": "{% set n = namespace(x=9) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "width of %": "{{ '%9999999999d' % 1 }}",
    "width of format": "{{ '{:>9999999999}'.format(1) }}",
    "nested width of format": "{{ '{:>{}}'.format(1, 9999999999) }}",
    "format filter": "{{ '%*d' | format(999999999, 1) }}",
    "center": "{{ 'a' | center(9999999999) }}",
    "ljust": "{{ 'a'.ljust(9999999999) }}",
    "indent": "{{ ('\\n' * 60000) | indent(9999999) }}",
    "tojson": "{{ [[[[1]]]] | tojson(indent=99999999) }}",
    "tabs": "{{ ('\\t' * 60000).expandtabs(99999) }}",
    "long output": "{% for a in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
    "join of many": "{{ ('a' * 9999).join(range(99999) | map('string')) }}",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_refused_within_the_budget(bomb):
    with pytest.raises(RequestError, match=r"the chat template (failed|made a text)") as refused:
        ours(BOMBS[bomb], [turn("user", "x")])
    assert refused.value.kind.status == 400


def test_time_is_counted_from_the_start_of_each_render():
    ticks = iter([0.0, 0.0, 0.05, 0.05, 5.0, 5.05, 5.05, 9.0])
    environment = ChatEnvironment(clock=lambda: next(ticks))
    slow = ChatTemplate({"default": "{% for m in messages %}{{ m.role | upper }}{% endfor %}"}, {}, 1000, environment)
    # one clock read to start, one per turn of the loop, one per filter, one per piece of output
    with pytest.raises(RequestError, match="more than 100 ms"):
        slow.render(Chat(messages=[turn("user", "x")] * 9))


def test_a_prompt_that_no_context_can_hold_is_refused():
    small = template("{{ messages[0].content }}", context_length=2)
    assert small.render(Chat(messages=[turn("user", "a" * 256)])) == "a" * 256
    with pytest.raises(RequestError, match=r"more than 256 characters: .* context length \(2 tokens\)") as refused:
        small.render(Chat(messages=[turn("user", "a" * 257)]))
    assert (refused.value.code, refused.value.field) == ("context_length_exceeded", "messages")


def test_more_messages_than_the_context_has_tokens_are_refused_unrendered():
    small = template("{{ raise_exception('rendered') }}", context_length=2)
    with pytest.raises(RequestError, match=r"3 messages: longer than the model's context length") as refused:
        small.render(Chat(messages=[turn("user", "a")] * 3))
    assert refused.value.code == "context_length_exceeded"


def test_a_long_conversation_gets_time_by_its_messages():
    ticks = iter([0.0, *(n * 0.0002 for n in range(2001)), 0.4, 0.45])
    environment = ChatEnvironment(clock=lambda: next(ticks))
    source = "{% for m in messages %}{% if m.role == '' %}{{ m.role }}{% endif %}{% endfor %}"
    patient = ChatTemplate({"default": source}, {}, 2000, environment)
    assert patient.render(Chat(messages=[turn("user", "x")] * 2000)) == ""


NULL_TEMPLATE = (  # DeepSeek V3's way: a turn that calls tools is one whose content is none
    "{% for m in messages %}{% if m['content'] is none %}{% for c in m['tool_calls'] %}"
    "{{ c['function']['name'] + ':' + c['function']['arguments'] }};{% endfor %}"
    "{% else %}{{ m['role'] + '=' + m['content'] }};{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("content", [{"content": None}, {}, {"content": ""}])
def test_a_turn_with_calls_and_no_content_has_an_empty_one(content):
    messages = [
        {"role": "assistant", "tool_calls": [call("f", x="é")], **content},
        {"role": "tool", "tool_call_id": "1"},
    ]
    source = "{% for m in messages %}{{ m['role'] + '=' + m['content'] }};{% endfor %}"
    assert ours(source, messages) == "assistant=;tool=;"


@pytest.mark.parametrize("content", [{"content": None}, {}, {"content": ""}])
def test_a_template_that_knows_calls_by_null_content_gets_them(content):
    asked = call("f")
    asked["function"]["arguments"] = '{"x": "é"}'
    messages = [{"role": "assistant", "tool_calls": [asked], **content}, {"role": "tool", "content": None}]
    assert ours(NULL_TEMPLATE, messages) == 'f:{"x": "é"};tool=;'


def info(path):
    return ModelInfo(
        path=str(path),
        architecture="",
        model_type="",
        vocab_size=10,
        hidden_size=4,
        context_length=128,
        eos_ids=[],
        config={},
    )


def write(path, value):
    path.parent.mkdir(exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


def loaded(path, **options):
    found = load_template(info(path), ServerConfig(**options))
    assert found is not None
    return found.render(Chat(messages=[turn("user", "x")], tools=options.get("tools")))


def test_the_template_file_wins_over_the_tokenizer_config(tmp_path):
    write(tmp_path / "tokenizer_config.json", {"chat_template": "config {{ bos_token }}", "bos_token": "<b>"})
    assert loaded(tmp_path) == "config <b>"
    write(tmp_path / "chat_template.jinja", "file {{ bos_token }}")
    assert loaded(tmp_path) == "file <b>"


def test_named_templates_come_from_both_places(tmp_path):
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    write(tmp_path / "tokenizer_config.json", {"chat_template": named})
    found = load_template(info(tmp_path), ServerConfig())
    assert found.render(Chat(messages=[turn("user", "x")], tools=[])) == "t"
    write(tmp_path / "chat_template.jinja", "D")
    write(tmp_path / "additional_chat_templates" / "tool_use.jinja", "T")
    found = load_template(info(tmp_path), ServerConfig())
    assert found.render(Chat(messages=[turn("user", "x")])) == "D"
    assert found.render(Chat(messages=[turn("user", "x")], tools=[])) == "T"


def test_the_tokenizer_path_is_where_templates_are_looked_for(tmp_path):
    write(tmp_path / "tokenizer" / "chat_template.jinja", "there")
    assert loaded(tmp_path, tokenizer_path=str(tmp_path / "tokenizer")) == "there"
    assert loaded(tmp_path, tokenizer_path="org/name", tokenizer_dir=str(tmp_path / "tokenizer")) == "there"


def test_the_chosen_template_is_a_file_or_a_bundled_name(tmp_path):
    write(tmp_path / "mine.jinja", "mine")
    assert loaded(tmp_path, chat_template=str(tmp_path / "mine.jinja")) == "mine"
    assert loaded(tmp_path, chat_template="chatml").startswith("<|im_start|>user\nx<|im_end|>")


def test_an_unknown_template_name_lists_the_known_ones(tmp_path):
    with pytest.raises(StartupError, match="chatml, gemma, llama-3, mistral, qwen3"):
        load_template(info(tmp_path), ServerConfig(chat_template="nope"))


def test_a_model_without_a_template_has_none(tmp_path):
    assert load_template(info(tmp_path), ServerConfig()) is None


@pytest.mark.parametrize("source", ["{% for %}", "{{ x", "{% endif %}", "(" * 10, "{{ " + "(" * 5000])
def test_a_broken_template_stops_the_start_with_its_cause(source, tmp_path):
    write(tmp_path / "chat_template.jinja", source)
    if source == "(" * 10:
        assert loaded(tmp_path) == source
    else:
        with pytest.raises(StartupError, match="cannot be compiled"):
            load_template(info(tmp_path), ServerConfig())


def test_special_tokens_are_strings_or_objects_and_the_later_source_wins():
    assert special_tokens({"bos_token": "<a>", "pad_token": None}, {"bos_token": {"content": "<b>"}}) == {
        "bos_token": "<b>"
    }


def test_a_chat_survives_the_wire_and_renders_the_same():
    chat = Chat(messages=CONVERSATIONS["tools"], tools=[WEATHER])
    again = msgspec.msgpack.decode(msgspec.msgpack.encode(chat), type=Chat)
    qwen = template(bundled()["qwen3"].read_text())
    assert qwen.render(again) == qwen.render(chat)
