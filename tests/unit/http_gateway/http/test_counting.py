"""What a body holds is counted in its bytes, whatever is in its strings and wherever it is cut."""

import json
import random
from typing import Any

import pytest

from quartet.http_gateway.http.counting import ValueCounter


def counted(body: bytes, size: int = 1 << 16) -> int:
    return counter_of(body, size).values


def counter_of(body: bytes, size: int = 1 << 16) -> ValueCounter:
    counter = ValueCounter()
    for start in range(0, len(body), size):
        counter.feed(body[start : start + size])
    return counter


def values_of(value: Any) -> int:
    """Strings, keys, lists and objects, counted the other way."""
    if isinstance(value, dict):
        return 1 + len(value) + sum(map(values_of, value.values()))
    if isinstance(value, list):
        return 1 + sum(map(values_of, value))
    return int(isinstance(value, str))


def commas_of(value: Any) -> int:
    """Commas between members."""
    if not isinstance(value, dict | list):
        return 0
    members = list(value.values()) if isinstance(value, dict) else value
    return max(len(members) - 1, 0) + sum(map(commas_of, members))


CASES = {
    "numbers": [1, -2.5e3, True, None],
    "lists": [[1], [], [[2]]],
    "objects": {"a": {}, "b": [{"c": "d"}]},
    "what looks like JSON inside strings": {"text": '[{"a": [1, "b"]}, \\" {{ [['},
    "backslashes": ["\\", "\\\\", '\\"', '"\\', "\\n\n\t", '\\\\"'],
    "other scripts": {"名": ["世界", "\u2028", "😀"]},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", [1, 2, 3, 7, 1 << 16])
def test_strings_lists_and_objects_are_counted_wherever_the_body_is_cut(name: str, size: int) -> None:
    for ascii_only in (True, False):
        body = json.dumps(CASES[name], ensure_ascii=ascii_only).encode()
        assert counted(body, size) == values_of(CASES[name])


def test_random_bodies_are_counted_right() -> None:
    draw = random.Random(5)

    def text() -> str:
        return "".join(draw.choices('ab\\"[]{},: \n世', k=draw.randrange(8)))

    def value(depth: int) -> Any:
        match draw.randrange(4 if depth else 2):
            case 0:
                return text()
            case 1:
                return draw.randrange(1000)
            case 2:
                return [value(depth - 1) for _ in range(draw.randrange(4))]
            case _:
                return {text(): value(depth - 1) for _ in range(draw.randrange(4))}

    for _ in range(300):
        made = value(4)
        counter = counter_of(json.dumps(made).encode(), draw.randint(1, 9))
        assert (counter.values, counter.commas) == (values_of(made), commas_of(made))


def test_bytes_that_are_no_json_are_counted_too() -> None:
    assert counted(b'\\\\\\"["' * 100) > 0
    assert counted(b"\xff\xfe{[") == 2
