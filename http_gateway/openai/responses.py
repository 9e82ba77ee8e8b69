"""POST /v1/responses: OpenAI's newer API, for text."""

from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from quartet.http_gateway.generation.run_group import collect_group, stream_group
from quartet.http_gateway.http import errors
from quartet.http_gateway.http.sse import EventStream
from quartet.http_gateway.native.generate import check_servable
from quartet.http_gateway.openai.background_responses import begin
from quartet.http_gateway.openai.item_references import with_items
from quartet.http_gateway.openai.response_call import ResponseCall, ResponseStream
from quartet.http_gateway.openai.response_history import earlier_items
from quartet.http_gateway.openai.response_types import ResponsesBody
from quartet.http_gateway.routes import bodies
from quartet.http_gateway.routes.endpoint import Endpoint, convert_body, require_json
from quartet.http_gateway.routes.gateway import Gateway


async def responses(gateway: Gateway, http: HTTPRequest) -> Response | EventStream:
    """The next turn of a conversation, in the shapes of OpenAI's Responses API."""
    require_json(http)
    body = await bodies.read_json_body(http, ResponsesBody)
    check_servable(gateway, http)
    body = await with_items(gateway, http, body)
    earlier = await earlier_items(gateway, http, body.previous_response_id)
    call = await convert_body(http, ResponseCall, gateway, body, earlier)
    if body.background:
        return await begin(gateway, http, call)
    if body.stream:
        stream = ResponseStream(call)
        return stream_group(
            gateway.ring, http, call.chat.job, stream.events, stream.last_events, stream.form, at_end=call.end
        )
    await collect_group(gateway.ring, http, call.chat.job, call.chat.take)
    call.take_whole()
    await call.end()
    return errors.json_response(call.response(call.status()), headers=call.headers)


SHAPE = errors.with_client_names(
    errors.openai,
    {
        "max_new_tokens": "max_output_tokens",
        "max_completion_tokens": "max_output_tokens",
        "messages": "input",
        "call_grammar": "tools",
        "min_new_tokens": "min_tokens",
        "response_format": "text.format",
        "text": "input",
        "prompt": "input",
    },
)
ENDPOINTS = [Endpoint("/v1/responses", responses, ("POST",), shape=SHAPE, body=ResponsesBody)]
