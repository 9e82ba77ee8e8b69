"""Templates that insist on ids of nine characters get them."""

import pytest

from quartet.runtime.messages import Chat
from quartet.tokenizer_service.call_ids import insists, short
from quartet.tokenizer_service.chat import ChatTemplate

MISTRAL = """
{%- for message in messages %}
  {%- for call in message.tool_calls or [] %}
    {%- if call.id is not defined or call.id|length != 9 %}{{- raise_exception("length 9!") }}{%- endif %}
    {{- "[TOOL_CALLS]" + call.function.name + call.id }}
  {%- endfor %}
  {%- if message.role == "tool" %}
    {%- if message.tool_call_id|length != 9 %}{{- raise_exception("length 9!") }}{%- endif %}
    {{- "[TOOL_RESULTS]" + message.tool_call_id }}
  {%- endif %}
{%- endfor %}"""


def render(call, result, template=MISTRAL):
    called = [{"id": call, "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    messages = [
        {"role": "assistant", "content": "", "tool_calls": called},
        {"role": "tool", "tool_call_id": result, "content": "1"},
    ]
    return ChatTemplate({"default": template}, {}, 1 << 16).render(Chat(messages=messages))


def test_an_id_of_another_kind_is_made_to_fit_and_the_same_for_call_and_result():
    made = short("call_0123456789abcdef01234567")
    assert len(made) == 9 and made.isalnum() and made != short("call_other")
    assert render("call_0123456789abcdef01234567", "call_0123456789abcdef01234567") == (
        f"[TOOL_CALLS]f{made}[TOOL_RESULTS]{made}"
    )


def test_an_id_that_fits_stays():
    assert render("abcDEF123", "abcDEF123") == "[TOOL_CALLS]fabcDEF123[TOOL_RESULTS]abcDEF123"


def test_other_templates_get_the_ids_that_the_client_sent():
    assert render("call_1", "call_1", "{{ messages[1].tool_call_id }}") == "call_1"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% if message['tool_call_id'] | length != 9 %}", True),
        ("{% if tool_call['id']|length!=9 %}", True),
        ("{% if messages|length != 9 %}", False),
    ],
)
def test_what_a_template_insists_on_is_seen_in_its_source(source, expected):
    assert insists(source) is expected


@pytest.mark.parametrize("sent", ["null", "", "{}"])
def test_a_call_without_arguments_has_none_however_they_were_sent(sent):
    called = [{"id": "c", "type": "function", "function": {"name": "f", "arguments": sent}}]
    template = ChatTemplate({"default": "{{ messages[0].tool_calls[0].function.arguments | tojson }}"}, {}, 1 << 16)
    assert template.render(Chat(messages=[{"role": "assistant", "content": "", "tool_calls": called}])) == "{}"


def test_a_template_that_joins_arguments_to_text_sees_none_too():
    called = [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "null"}}]
    template = ChatTemplate({"default": "{{ 'call ' + messages[0].tool_calls[0].function.arguments }}"}, {}, 1 << 16)
    assert template.render(Chat(messages=[{"role": "assistant", "content": "", "tool_calls": called}])) == "call {}"


KIMI = """
{%- for message in messages %}
  {%- for tool_call in message.tool_calls or [] %}
    {%- set formatted_id = tool_call['id'] -%}
    <|tool_call_begin|>{{ formatted_id }}<|tool_call_argument_begin|>{{ tool_call.function.arguments }}
  {%- endfor %}
  {%- if message.role == "tool" %}## Return of {{ message.tool_call_id }}{% endif %}
{%- endfor %}"""


def kimi(*ids, result):
    calls = [
        {"id": id, "type": "function", "function": {"name": f"f{n}", "arguments": "{}"}} for n, id in enumerate(ids)
    ]
    messages = [{"role": "assistant", "content": "", "tool_calls": [call]} for call in calls]
    messages.append({"role": "tool", "tool_call_id": result, "content": "1"})
    return ChatTemplate({"default": KIMI}, {}, 1 << 16).render(Chat(messages=messages))


def test_a_template_that_prints_the_id_for_the_name_gets_the_name_and_the_number_of_the_call():
    calls = "<|tool_call_begin|>functions.f0:0<|tool_call_argument_begin|>{}"
    calls += "<|tool_call_begin|>functions.f1:1<|tool_call_argument_begin|>{}"
    assert kimi("call_a", "call_b", result="call_b") == f"{calls}## Return of functions.f1:1"
    assert kimi("functions.f0:0", "call_b", result="functions.f0:0") == f"{calls}## Return of functions.f0:0"
    assert kimi("call_a", "call_b", result="strange") == f"{calls}## Return of strange"
