"""What is left out of a tool's schema before it becomes a grammar."""

from quartet.http_gateway.parsers.tool_schemas import MAX_DEPTH, without_prose


def test_prose_is_left_out_wherever_a_schema_stands() -> None:
    named = {"type": "string", "title": "t", "description": "d", "$comment": "c"}
    plain = {"type": "string"}
    schema = {
        "description": "d",
        "properties": {"title": named, "b": {"items": named}, "c": {"items": [named], "anyOf": [named, True]}},
        "$defs": {"description": named},
        "additionalProperties": named,
    }
    assert without_prose(schema) == {
        "properties": {"title": plain, "b": {"items": plain}, "c": {"items": [plain], "anyOf": [plain, True]}},
        "$defs": {"description": plain},
        "additionalProperties": plain,
    }


def test_values_keep_what_is_called_like_prose() -> None:
    schema = {"const": {"title": "t"}, "enum": [{"description": "d"}], "default": {"title": "t"}, "required": ["title"]}
    assert without_prose(schema) == schema
    assert without_prose({"properties": {"a": {"title": {"no": "text"}}}}) == {
        "properties": {"a": {"title": {"no": "text"}}}
    }


def test_a_schema_that_is_nested_deeply_stays_as_it_is_further_down() -> None:
    schema = {"description": "d"}
    for _ in range(MAX_DEPTH + 2):
        schema = {"items": schema}
    assert without_prose(schema) == schema
