"""Structural tags in their current form: what each format lets through, and what is refused."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer

from quartet.runtime.errors import RequestError
from quartet.scheduler_service.grammar.matchers import GrammarCompiler
from tests.tokenizers_to_try import KINDS

NUMBER = {"type": "json_schema", "json_schema": {"type": "integer"}}
WORD = {"type": "regex", "pattern": "[a-z]{2}"}
ANY = {"type": "any_text"}


def const(value: str) -> dict[str, Any]:
    return {"type": "const_string", "value": value}


def tag(begin: str, content: dict[str, Any], end: str | list[str]) -> dict[str, Any]:
    return {"type": "tag", "begin": begin, "content": content, "end": end}


def sequence(*elements: dict[str, Any]) -> dict[str, Any]:
    return {"type": "sequence", "elements": list(elements)}


def triggered(**changes: Any) -> dict[str, Any]:
    tags = [tag("<f=one>", NUMBER, "</f>"), tag("<f=two>", WORD, ["</f>", "</g>"])]
    return {"type": "triggered_tags", "triggers": ["<f="], "tags": tags, **changes}


def separated(**changes: Any) -> dict[str, Any]:
    return {"type": "tags_with_separator", "tags": [tag("(", NUMBER, ")")], "separator": ", ", **changes}


CALLS = "a <f=one>12</f> b <f=two>xy</g> c"
THINKING = sequence(tag("<think>", ANY, "</think>"), triggered())

CASES: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    ("const", const("Hi, you"), ["Hi, you"], ["Hi", "hi, you", "Hi, you!"]),
    ("schema", NUMBER, ["12", "-3"], ["x", "1.5"]),
    ("any schema", {"type": "json_schema", "json_schema": True}, ["1", '{"a": [null]}'], ["a"]),
    ("regex", WORD, ["ab"], ["a", "abc", "A1"]),
    ("any text", ANY, ["", "a\nb <f=one>"], []),
    ("excludes", {**ANY, "excludes": ["<f", "a/b"]}, ["", "f< a b"], ["x<f", "a/b", "aa/bb"]),
    ("or", {"type": "or", "elements": [const("yes"), NUMBER, tag("[", WORD, "]")]}, ["yes", "7", "[ab]"], ["no", "["]),
    ("sequence", sequence(const("n: "), NUMBER, const(";")), ["n: 5;"], ["n: ;", "5;", "n: 5"]),
    ("text in between", sequence(ANY, const("END"), NUMBER), ["END5", "a E END7"], ["END", "a 5"]),
    ("text before a tag", sequence(ANY, tag("<a>", WORD, "</a>")), ["x <a>ab</a>", "<a>ab</a>"], ["<a>1</a>", "ab"]),
    ("tag", tag("<a>", ANY, "</a>"), ["<a></a>", "<a>x < y\n</a>"], ["<a>", "<a>x</a> y", "x"]),
    ("ends", tag("<a>", ANY, ["</a>", "!"]), ["<a>x</a>", "<a>x!"], ["<a>x"]),
    ("inner", tag("<a>", tag("<b>", WORD, "</b>"), "</a>"), ["<a><b>ab</b></a>"], ["<a><b>ab</a></b>"]),
    ("optional", sequence({"type": "optional", "content": const("a")}, const("b")), ["ab", "b"], ["a", "aab"]),
    ("star", {"type": "star", "content": const("ab")}, ["", "abab"], ["aba"]),
    ("plus", {"type": "plus", "content": NUMBER}, ["1", "12"], ["", "a"]),
    ("repeat", {"type": "repeat", "min": 1, "max": 2, "content": const("ab")}, ["ab", "abab"], ["", "ababab"]),
    ("endless", {"type": "repeat", "min": 2, "max": -1, "content": const("ab")}, ["abab", "ab" * 9], ["ab"]),
    ("triggered", triggered(), ["", "free", CALLS, "<f"], ["<f=three>", "a <f=one>x</f>", "<f=two>xy</h>"]),
    ("once", triggered(stop_after_first=True), ["a <f=one>1</f>", "free"], ["a <f=one>1</f> b"]),
    ("at least one", triggered(at_least_one=True), ["<f=one>1</f>", "<f=one>1</f> b <f=two>ab</f>"], ["", "free"]),
    ("exactly one", triggered(at_least_one=True, stop_after_first=True), ["<f=one>1</f>"], ["<f=one>1</f>b", ""]),
    ("not this", triggered(excludes=["xx"]), ["a <f=one>1</f> b"], ["xx", "a <f=one>1</f> xx"]),
    ("in a tag", tag("<a>", triggered(), "</a>"), [f"<a>{CALLS}</a>", "<a></a>"], [f"<a>{CALLS}", "<a>x</a>y"]),
    ("separated", separated(), ["", "(1)", "(1), (2), (3)"], ["(1)(2)", "(1),", "1"]),
    ("some", separated(at_least_one=True), ["(1)", "(1), (2)"], [""]),
    ("first", separated(stop_after_first=True), ["", "(1)"], ["(1), (2)"]),
    ("just one", separated(at_least_one=True, stop_after_first=True), ["(1)"], ["", "(1), (2)"]),
    ("thinking", THINKING, [f"<think>so\n</think>{CALLS}", "<think></think>"], [CALLS, "<think>"]),
    ("token", tag("<|call|>", ANY, "<|end|>"), ["<|call|>x<|end|>", "<|call|><|end|>"], ["<|call|>x", "x"]),
    ("token amid", tag("<|call|>", ANY, "\n<|end|>!"), ["<|call|>x\ny\n<|end|>!"], ["<|call|>x<|end|>!"]),
    (
        "token trigger",
        {"type": "triggered_tags", "triggers": ["<|call|>"], "tags": [tag("<|call|>f(", NUMBER, ")<|end|>")]},
        ["a", "a <|call|>f(1)<|end|> b"],
        ["a <|call|>g", "a <|call|>f(1) b"],
    ),
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    tokenizer = Tokenizer.from_str(KINDS["byte level"]().to_str())  # which others use
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in ("<|call|>", "<|end|>", "<|eos|>")])
    return tokenizer


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GrammarCompiler]:
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(directory / "tokenizer.json"))
    compiler = GrammarCompiler(directory, tokenizer.get_vocab_size(), [tokenizer.token_to_id("<|eos|>")])
    yield compiler
    compiler.close()


@pytest.fixture(scope="module")
def takes(tokenizer: Tokenizer, compiler: GrammarCompiler) -> Callable[[dict[str, Any], str], bool]:
    def whole(given: dict[str, Any], text: str) -> bool:
        matcher = compiler.compile("structural_tag", json.dumps({"type": "structural_tag", "format": given})).matcher()
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        return all(matcher.accept(token) for token in ids) and matcher.accepting

    return whole


@pytest.mark.parametrize(("given", "good", "bad"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_each_format_takes_its_texts_and_no_others(takes, given, good, bad):
    assert [text for text in good if not takes(given, text)] == []
    assert [text for text in bad if takes(given, text)] == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"type": "nothing"}, "nothing"),
        ({"type": "qwen_xml_parameter", "json_schema": {}}, "qwen_xml_parameter"),
        ({"type": "const_string"}, "value"),
        (const(""), "needs a value"),
        ({**ANY, "max_tokens": 5}, "max_tokens"),
        ({**NUMBER, "style": "qwen_xml"}, "style"),
        ({**NUMBER, "any_order": True}, "any_order"),
        ({**WORD, "pattern": "("}, ""),
        ({**WORD, "pattern": "(a{1000}){1000}"}, "unroll"),
        (sequence(), "at least one element"),
        ({"type": "or", "elements": []}, "at least one element"),
        (sequence(ANY, NUMBER), "free text must"),
        ({"type": "star", "content": ANY}, "free text must"),
        (triggered(triggers=["<g="]), "none of the triggers"),
        (triggered(tags=[]), "at least one tag"),
        (separated(tags=[]), "at least one tag"),
        ({"type": "repeat", "min": 2, "max": 1, "content": WORD}, "repeat takes"),
        ({"type": "repeat", "min": 0, "max": 99999999, "content": WORD}, "repeat takes"),
    ],
)
def test_a_bad_format_is_a_400_that_says_why(compiler, given, message):
    text = json.dumps({"type": "structural_tag", "format": given})
    with pytest.raises(RequestError, match=f"Failed to compile structural_tag grammar: .*{message}"):
        compiler.compile("structural_tag", text)


def test_a_format_nested_without_end_is_a_400(compiler):
    deep: dict[str, Any] = ANY
    for _ in range(400):
        deep = tag("<", deep, ">")
    with pytest.raises(RequestError, match="Failed to compile structural_tag"):
        compiler.compile("structural_tag", json.dumps({"format": deep}))
