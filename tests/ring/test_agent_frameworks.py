"""Agent frameworks, unchanged, against real servers. They come with the extras `agents` and
`agents-more`; what is missing is skipped.

The embedded model calls no tool by itself: its first turn is made to call one, its second turn may say what it wants.
A real model (tests/real_models.py) calls the tool because it was asked, and its answer must have what the tool said.
"""

import json
from collections.abc import Callable
from typing import Annotated, Any

import pytest
from pydantic import BaseModel, Field

from tests import real_models
from tests.real_models import QWEN
from tests.servers import Server

pytestmark = pytest.mark.slow

WAIT_S = 120
KEY = "k"
DEGREES = 37
INSTRUCTIONS = "You are a helpful assistant."
QUESTION = "What is the weather in Oslo? Use the weather tool."
City = Annotated[str, Field(max_length=12)]  # the embedded model ends no text by itself
CITY = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 12}}, "required": ["city"]}
APIS = ("chat", "responses", "anthropic")


@pytest.fixture(scope="module")
def server(launch_for_module: Callable[..., Server]) -> Server:
    return launch_for_module("--tool-call-parser", "hermes")


@pytest.fixture(scope="module")
def real_server(launch_for_module: Callable[..., Server]) -> Server:
    return launch_for_module("--model-path", str(real_models.or_skip(QWEN)), "--max-total-tokens", "8192")


class Weather:
    """The tool, and the cities that it was asked for."""

    def __init__(self) -> None:
        self.cities: list[str] = []

    def __call__(self, city: str) -> str:
        self.cities.append(city)
        return f"It is {DEGREES} degrees."


class Capital(BaseModel):
    big: bool


# OpenAI Agents SDK


def agents_answer(server: Server, api: str, weather: Weather, choice: str | None) -> str:
    """The final output of an agent of the OpenAI Agents SDK that has the tool."""
    agents = pytest.importorskip("agents", reason="openai-agents is not installed")
    import openai

    client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=WAIT_S)
    model = {"chat": agents.OpenAIChatCompletionsModel, "responses": agents.OpenAIResponsesModel}[api]

    @agents.function_tool(name_override="weather")
    def tool(city: City) -> str:
        """Tells the weather of a city."""
        return weather(city)

    agent = agents.Agent(
        name="a",
        instructions=INSTRUCTIONS,
        model=model(model="m", openai_client=client),
        model_settings=agents.ModelSettings(
            temperature=0, tool_choice=choice, max_tokens=400, parallel_tool_calls=False
        ),
        tools=[tool],
    )
    config = agents.RunConfig(tracing_disabled=True)
    output: str = agents.Runner.run_sync(agent, QUESTION, run_config=config, max_turns=4).final_output
    return output


@pytest.mark.parametrize("api", ["chat", "responses"])
def test_an_agent_of_the_openai_agents_sdk_calls_its_tool(server: Server, api: str) -> None:
    weather = Weather()
    assert agents_answer(server, api, weather, "required")
    assert len(weather.cities) >= 1


@pytest.mark.real_models
@pytest.mark.parametrize("api", ["chat", "responses"])
def test_a_real_model_in_the_openai_agents_sdk_uses_the_result(real_server: Server, api: str) -> None:
    weather = Weather()
    assert str(DEGREES) in agents_answer(real_server, api, weather, "required")
    assert weather.cities[0] == "Oslo"


# pydantic-ai


def pydantic_model(server: Server, api: str) -> Any:
    """The server as a model of pydantic-ai."""
    pytest.importorskip("pydantic_ai", reason="pydantic-ai is not installed")
    from pydantic_ai.models.anthropic import AnthropicModel
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.anthropic import AnthropicProvider
    from pydantic_ai.providers.openai import OpenAIProvider

    if api == "anthropic":
        return AnthropicModel("m", provider=AnthropicProvider(base_url=server.url, api_key=KEY))
    kinds: dict[str, Any] = {"chat": OpenAIChatModel, "responses": OpenAIResponsesModel}
    return kinds[api]("m", provider=OpenAIProvider(base_url=f"{server.url}/v1", api_key=KEY))


def pydantic_answer(server: Server, api: str, weather: Weather) -> str:
    """The output of an agent of pydantic-ai whose first turn must call the tool."""
    model = pydantic_model(server, api)
    import pydantic_ai

    def settings(context: Any) -> Any:
        found: dict[str, Any] = {"temperature": 0, "max_tokens": 400, "parallel_tool_calls": False}
        return found if weather.cities else {**found, "tool_choice": ["weather"]}

    agent = pydantic_ai.Agent(model, model_settings=settings)

    @agent.tool_plain(name="weather")
    def tool(city: City) -> str:
        """Tells the weather of a city."""
        return weather(city)

    output: str = agent.run_sync(QUESTION).output
    return output


@pytest.mark.parametrize("api", APIS)
def test_an_agent_of_pydantic_ai_calls_its_tool(server: Server, api: str) -> None:
    weather = Weather()
    assert isinstance(pydantic_answer(server, api, weather), str)
    assert len(weather.cities) == 1


@pytest.mark.real_models
@pytest.mark.parametrize("api", APIS)
def test_a_real_model_in_pydantic_ai_uses_the_result(real_server: Server, api: str) -> None:
    weather = Weather()
    assert str(DEGREES) in pydantic_answer(real_server, api, weather)
    assert weather.cities[0] == "Oslo"


@pytest.mark.parametrize("api", APIS)
def test_the_output_of_pydantic_ai_is_an_object(server: Server, api: str) -> None:
    model = pydantic_model(server, api)
    import pydantic_ai

    settings: Any = {"temperature": 0, "max_tokens": 400}
    agent = pydantic_ai.Agent(model, output_type=Capital, model_settings=settings)
    assert isinstance(agent.run_sync(QUESTION).output, Capital)


# LangGraph


def langgraph_answer(server: Server, weather: Weather, *, responses: bool) -> str:
    """The last message of a graph: a turn of the model, the tool, and the model again until it calls no more."""
    pytest.importorskip("langgraph", reason="langgraph is not installed")
    pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI
    from langgraph.graph import START, MessagesState, StateGraph
    from langgraph.prebuilt import ToolNode, tools_condition

    @tool("weather")
    def weather_tool(city: City) -> str:
        """Tells the weather of a city."""
        return weather(city)

    chat: Any = ChatOpenAI(
        model="m",
        base_url=f"{server.url}/v1",
        api_key=KEY,
        temperature=0,
        max_tokens=200,
        max_retries=0,
        use_responses_api=responses,
    )

    def turn(state: Any) -> dict[str, Any]:
        bound = chat.bind_tools([weather_tool], **({} if weather.cities else {"tool_choice": "weather"}))
        return {"messages": [bound.invoke(state["messages"])]}

    graph = StateGraph(MessagesState)
    graph.add_node("model", turn)
    graph.add_node("tools", ToolNode([weather_tool]))
    graph.add_edge(START, "model")
    graph.add_conditional_edges("model", tools_condition)
    graph.add_edge("tools", "model")
    state = graph.compile().invoke(
        {"messages": [("system", INSTRUCTIONS), ("user", QUESTION)]}, {"recursion_limit": 12}
    )
    text: str = state["messages"][-1].text
    return text


@pytest.mark.parametrize("responses", [False, True])
def test_a_graph_of_langgraph_calls_its_tool(server: Server, responses: bool) -> None:
    weather = Weather()
    assert isinstance(langgraph_answer(server, weather, responses=responses), str)
    assert len(weather.cities) == 1


@pytest.mark.real_models
@pytest.mark.parametrize("responses", [False, True])
def test_a_real_model_in_langgraph_uses_the_result(real_server: Server, responses: bool) -> None:
    weather = Weather()
    assert str(DEGREES) in langgraph_answer(real_server, weather, responses=responses)
    assert weather.cities[0] == "Oslo"


# instructor


@pytest.mark.parametrize("mode", ["TOOLS", "JSON_SCHEMA", "RESPONSES_TOOLS", "ANTHROPIC_TOOLS"])
def test_the_output_of_instructor_is_an_object(server: Server, mode: str) -> None:
    instructor = pytest.importorskip("instructor", reason="instructor is not installed")
    import anthropic
    import openai

    if mode.startswith("ANTHROPIC"):
        plain: Any = anthropic.Anthropic(base_url=server.url, api_key=KEY, max_retries=0, timeout=WAIT_S)
        client = instructor.from_anthropic(plain, mode=instructor.Mode[mode])
    else:
        plain = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=WAIT_S)
        client = instructor.from_openai(plain, mode=instructor.Mode[mode])
    limit = {"max_output_tokens" if mode.startswith("RESPONSES") else "max_tokens": 200}
    said: Any = [{"role": "user", "content": QUESTION}]
    answer = client.create(model="m", messages=said, response_model=Capital, max_retries=0, **limit)
    assert isinstance(answer, Capital)


# LiteLLM


TOOL: Any = {"type": "function", "function": {"name": "weather", "parameters": CITY}}
NAMED: Any = {"type": "function", "function": {"name": "weather"}}


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
def test_litellm_routes_a_conversation_with_a_tool(server: Server, provider: str) -> None:
    litellm = pytest.importorskip("litellm", reason="litellm is not installed")
    base = f"{server.url}/v1" if provider == "openai" else server.url
    target: Any = {"model": f"{provider}/m", "api_base": base, "api_key": KEY, "max_tokens": 100, "num_retries": 0}
    said: list[Any] = [{"role": "user", "content": QUESTION}]
    turn = litellm.completion(**target, messages=said, tools=[TOOL], tool_choice=NAMED).choices[0].message
    [call] = turn.tool_calls
    assert call.function.name == "weather" and "city" in json.loads(call.function.arguments)
    said += [turn.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": "rain"}]
    pieces = list(litellm.completion(**target, messages=said, tools=[TOOL], stream=True))
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces)


def test_litellm_routes_responses(server: Server) -> None:
    litellm = pytest.importorskip("litellm", reason="litellm is not installed")
    answer = litellm.responses(
        model="openai/m", api_base=f"{server.url}/v1", api_key=KEY, input=QUESTION, max_output_tokens=20
    )
    assert answer.status in ("completed", "incomplete") and answer.output[0].content[0].text
