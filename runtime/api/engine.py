"""`quartet.Engine`: a model in processes of its own, without a port, called from Python.

The methods have SGLang's and vLLM's names where they mean the same, and answer with the server's own JSON as Python
values. All may be called from any thread; the async ones from any event loop.
"""

import base64
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, Unpack, cast, overload

from quartet.runtime.api import calls
from quartet.runtime.api.calls import Call, ChatFields, GenerateFields
from quartet.runtime.api.server import START_TIMEOUT_S, STOP_TIMEOUT_S, Server, check_names
from quartet.runtime.api.server_flags import ServerFlags
from quartet.runtime.api.transport import Transport

CONVERSATIONS_AT_ONCE = 256
Answer = dict[str, Any]
Params = Mapping[str, Any]
Messages = Sequence[Mapping[str, Any]]
Ids = Sequence[int] | Sequence[Sequence[int]]
OF_PORTS = {"host", "port", "uds", "disable_tcp", "cors_allow_origins", "allowed_hosts", "ready_file"}
OF_PORTS |= {"api_key", "api_key_file", "admin_api_key", "admin_api_key_file"}
OF_PORTS |= {"ssl_certfile", "ssl_keyfile", "ssl_keyfile_password", "ssl_ca_certs", "ssl_cert_reqs"}


class Engine:
    """A model that serves this program alone. Use it as a context manager, or call `shutdown`."""

    def __init__(
        self,
        model: str = "demo",
        *,
        start_timeout_s: float = START_TIMEOUT_S,
        log_path: str | Path | None = None,
        **flags: Unpack[ServerFlags],
    ) -> None:
        """Start the engine and wait until it serves. Flags are those of `quartet serve`.

        Raises StartupError, and TypeError for a name that is no flag.
        """
        check_names("Engine", flags, ("model", "start_timeout_s", "log_path"))
        if wrong := sorted(flags.keys() & OF_PORTS):
            raise TypeError(f"an Engine listens on no port, so {wrong[0]} has no meaning; use quartet.launch")
        self._server = Server(model, flags, log_path, private=True)
        try:
            self._server.wait_ready(start_timeout_s)
        except BaseException:
            self._server.stop(0.0)
            raise
        self._transport = Transport(self._server.socket_path, self._server.explain)

    @overload
    def generate(
        self,
        prompt: str | Sequence[str] | None = None,
        sampling_params: Params | Sequence[Params | None] | None = None,
        *,
        input_ids: Ids | None = None,
        stream: Literal[False] = False,
        **fields: Unpack[GenerateFields],
    ) -> Any: ...

    @overload
    def generate(
        self,
        prompt: str | Sequence[str] | None = None,
        sampling_params: Params | Sequence[Params | None] | None = None,
        *,
        input_ids: Ids | None = None,
        stream: Literal[True],
        **fields: Unpack[GenerateFields],
    ) -> Iterator[Answer]: ...

    def generate(
        self,
        prompt: str | Sequence[str] | None = None,
        sampling_params: Params | Sequence[Params | None] | None = None,
        *,
        input_ids: Ids | None = None,
        stream: bool = False,
        **fields: Unpack[GenerateFields],
    ) -> Any:
        """Continue a prompt, or a list of prompts of any length: {"text", "output_ids", "meta_info"} of each.

        With `stream`, an iterator of such values that grow; leaving it ends the request. Raises EngineError.
        """
        call = calls.generate(prompt, sampling_params, input_ids, stream, fields)
        return self._transport.stream(call) if stream else self._run(call)

    async def async_generate(
        self,
        prompt: str | Sequence[str] | None = None,
        sampling_params: Params | Sequence[Params | None] | None = None,
        *,
        input_ids: Ids | None = None,
        stream: bool = False,
        **fields: Unpack[GenerateFields],
    ) -> Any:
        """The same in an event loop; `stream`: an async iterator. Cancelling the task ends the request."""
        call = calls.generate(prompt, sampling_params, input_ids, stream, fields)
        return self._transport.async_stream(call) if stream else await self._async_run(call)

    def chat(
        self, messages: Messages | Sequence[Messages], *, stream: bool = False, **fields: Unpack[ChatFields]
    ) -> Any:
        """The answer to a conversation, as of /v1/chat/completions, or to each of a list of conversations.

        With `stream`, which takes one conversation, an iterator of chunks. Raises EngineError.
        """
        if stream:
            return self._transport.stream(calls.chat(one(messages), True, fields))
        if not are_several(messages):
            return self._transport.run(calls.chat(one(messages), False, fields))
        each = [calls.chat(one(conversation), False, fields) for conversation in messages]
        with ThreadPoolExecutor(min(len(each), CONVERSATIONS_AT_ONCE)) as threads:
            return list(threads.map(self._transport.run, each))

    async def async_chat(self, messages: Messages, *, stream: bool = False, **fields: Unpack[ChatFields]) -> Any:
        """The answer to one conversation; `stream`: an async iterator of chunks. Cancelling ends the request."""
        call = calls.chat(one(messages), stream, fields)
        return self._transport.async_stream(call) if stream else await self._transport.async_run(call)

    def encode(
        self, prompt: Any = None, *, input_ids: Ids | None = None, dimensions: int | None = None
    ) -> Answer | list[Answer]:
        """{"embedding", "meta_info"} of a prompt, or of each of a list, by a model that embeds or scores."""
        return cast("Answer | list[Answer]", self._run(calls.encode(prompt, input_ids, dimensions)))

    async def async_encode(
        self, prompt: Any = None, *, input_ids: Ids | None = None, dimensions: int | None = None
    ) -> Answer | list[Answer]:
        return cast("Answer | list[Answer]", await self._async_run(calls.encode(prompt, input_ids, dimensions)))

    def embed(self, prompt: str | Sequence[str], *, dimensions: int | None = None) -> Any:
        """The vector of a text, or the vectors of a list of texts."""
        return self._run(calls.embed(prompt, dimensions))

    async def async_embed(self, prompt: str | Sequence[str], *, dimensions: int | None = None) -> Any:
        return await self._async_run(calls.embed(prompt, dimensions))

    def score(
        self,
        query: str | Sequence[int],
        items: str | Sequence[str] | Sequence[Sequence[int]],
        label_token_ids: Sequence[int],
        *,
        apply_softmax: bool = False,
        item_first: bool = False,
    ) -> list[list[float]]:
        """For each item, how likely each label is as the token behind query and item."""
        call = calls.score(query, items, label_token_ids, apply_softmax, item_first)
        return cast("list[list[float]]", self._transport.run(call))

    async def async_score(
        self,
        query: str | Sequence[int],
        items: str | Sequence[str] | Sequence[Sequence[int]],
        label_token_ids: Sequence[int],
        *,
        apply_softmax: bool = False,
        item_first: bool = False,
    ) -> list[list[float]]:
        """`score` in an event loop."""
        call = calls.score(query, items, label_token_ids, apply_softmax, item_first)
        return cast("list[list[float]]", await self._transport.async_run(call))

    def rerank(
        self, query: str, documents: Sequence[str], *, top_n: int | None = None, return_documents: bool = True
    ) -> list[Answer]:
        """The documents by their fitness for the query, best first, by a cross-encoder: {"score", "index", ...}."""
        return cast("list[Answer]", self._transport.run(calls.rerank(query, documents, top_n, return_documents)))

    async def async_rerank(
        self, query: str, documents: Sequence[str], *, top_n: int | None = None, return_documents: bool = True
    ) -> list[Answer]:
        call = calls.rerank(query, documents, top_n, return_documents)
        return cast("list[Answer]", await self._transport.async_run(call))

    def update_weights_from_disk(
        self,
        model_path: str,
        *,
        load_format: str | None = None,
        flush_cache: bool = True,
        abort_all_requests: bool = False,
        weight_version: str | None = None,
    ) -> Answer:
        """Serve other weights of the same model; requests that run go on. A refusal changes nothing."""
        options = calls.given(load_format=load_format, weight_version=weight_version)
        switches = {"flush_cache": flush_cache, "abort_all_requests": abort_all_requests}
        return self._command("/update_weights_from_disk", model_path=model_path, **options, **switches)

    def load_lora_adapter(
        self, lora_name: str, lora_path: str | Path, *, pinned: bool = False, load_inplace: bool = False
    ) -> Answer:
        """Load an adapter of a directory or a hub id: {"loaded_adapters": name → path}. Raises EngineError.

        `load_inplace`: it may take the place of the adapter of this name, whose requests go on with the new weights.
        """
        switches = {"pinned": pinned, "load_inplace": load_inplace}
        return self._command("/load_lora_adapter", lora_name=lora_name, lora_path=str(lora_path), **switches)

    def load_lora_adapter_from_tensors(
        self,
        lora_name: str,
        config_dict: Mapping[str, Any],
        tensors: bytes,
        *,
        pinned: bool = False,
        load_inplace: bool = False,
    ) -> Answer:
        """The same of `tensors`, as `safetensors.torch.save` writes them; `config_dict`: of adapter_config.json."""
        return self._command(
            "/load_lora_adapter_from_tensors",
            lora_name=lora_name,
            config_dict=config_dict,
            serialized_named_tensors=[base64.b64encode(tensors).decode()],
            pinned=pinned,
            load_inplace=load_inplace,
        )

    def unload_lora_adapter(self, lora_name: str) -> Answer:
        """Forget an adapter, once the requests that use it have ended."""
        return self._command("/unload_lora_adapter", lora_name=lora_name)

    def flush_cache(self, timeout_s: float = 0.0) -> str:
        """Clear the prefix cache; wait up to `timeout_s` until no request runs. Raises EngineError where one does."""
        call = Call("/flush_cache", {"timeout": timeout_s}, is_text=True)
        return cast(str, self._transport.run(call))

    def release_memory_occupation(self, tags: Sequence[str] | None = None) -> None:
        """Give memory back for a while ("weights", "kv_cache"); needs enable_memory_saver=True."""
        self._command("/release_memory_occupation", **calls.given(tags=tags))

    def resume_memory_occupation(self, tags: Sequence[str] | None = None) -> None:
        """Take the memory again."""
        self._command("/resume_memory_occupation", **calls.given(tags=tags))

    def pause_generation(self, mode: Literal["abort", "retract", "in_place"] = "abort") -> None:
        """Stop generating until `continue_generation`; `mode`: what becomes of the requests that run."""
        self._command("/pause_generation", mode=mode)

    def continue_generation(self) -> None:
        self._command("/continue_generation")

    def abort_request(self, rid: str = "", *, abort_all: bool = False) -> None:
        """End the request with this id, or all; they answer with what they have."""
        self._command("/abort_request", rid=rid, abort_all=abort_all)

    def get_server_info(self) -> Answer:
        """Settings, and what the scheduler has and does."""
        return cast(Answer, self._transport.run(Call("/get_server_info")))

    def get_model_info(self) -> Answer:
        """What serves: path and version of the weights."""
        return cast(Answer, self._transport.run(Call("/get_model_info")))

    @property
    def alive(self) -> bool:
        return self._server.alive

    @property
    def pid(self) -> int:
        return self._server.pid

    @property
    def log_path(self) -> Path:
        return self._server.log_path

    def shutdown(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """End the engine; requests that run get so many seconds. May be called again."""
        self._server.stop(timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.shutdown()

    def __repr__(self) -> str:
        return f"<quartet engine {self.pid}: {'serves' if self.alive else 'has ended'}>"

    def _command(self, path: str, **fields: Any) -> Answer:
        return cast(Answer, self._transport.run(Call(path, fields)))

    def _run(self, call: Call) -> Any:
        return joined([self._transport.run(part) for part in calls.parts(call)])

    async def _async_run(self, call: Call) -> Any:
        return joined([await self._transport.async_run(part) for part in calls.parts(call)])


def joined(answers: list[Any]) -> Any:
    """The answer to a call that was made in parts."""
    return answers[0] if len(answers) == 1 else [one for answer in answers for one in answer]


def are_several(messages: Messages | Sequence[Messages]) -> bool:
    """A list of conversations, rather than one."""
    return bool(messages) and not isinstance(messages[0], Mapping)


def one(messages: Any) -> Messages:
    """One conversation. Raises TypeError for a list of them, and for a text, which is no list of messages."""
    if isinstance(messages, str) or are_several(messages):
        raise TypeError('messages must be one conversation: [{"role": "user", "content": "..."}]')
    return cast(Messages, messages)
