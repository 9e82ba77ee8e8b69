"""The output of one request so far, ready to be printed in the native form.

A cumulative stream repeats everything with each chunk. So what has arrived is kept as JSON already: a chunk then
costs one copy of those bytes, not another encoding of every id and logprob.
"""

import base64
import time
from array import array
from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import UNSET, Raw, UnsetType

from quartet.http_gateway.generation import logprobs
from quartet.runtime.messages import ABORTED_IN_QUEUE, Drafts, Finish, Logprobs, Request, Text, Tokens, unpack_ids

_encode = msgspec.json.Encoder().encode


class Fragment:
    """A JSON array or string that grows at its end."""

    __slots__ = ("_data", "_opening")

    def __init__(self, opening: bytes) -> None:
        self._opening = opening
        self._data = bytearray(opening)

    def append(self, text: str) -> None:
        self._data += _encode(text)[1:-1]

    def extend(self, items: Sequence[Any]) -> None:
        if items:
            if len(self._data) > 1:
                self._data += b","
            self._data += _encode(items)[1:-1]

    def json(self) -> Raw:
        return Raw(self._data + (b'"' if self._opening == b'"' else b"]"))

    def clear(self) -> None:
        del self._data[1:]


class VersionRun(msgspec.Struct):
    """Output tokens [start, end) were made by this version of the weights."""

    version: str
    start: int
    end: int
    adapter_version: str | UnsetType = UNSET  # likewise of the request's adapter


class Speculation(msgspec.Struct):
    """How many of a request's drafts were accepted so far. A step without drafts counts as one with none accepted."""

    verified: int = 0  # decode steps
    proposed: int = 0
    correct: int = 0
    histogram: list[int] = []  # steps by how many drafts were right

    def add(self, drafts: Drafts) -> None:
        self.verified += 1
        self.proposed += drafts.proposed
        self.correct += drafts.correct
        self.histogram += [0] * (drafts.correct + 1 - len(self.histogram))
        self.histogram[drafts.correct] += 1

    def write_to(self, meta: "MetaInfo") -> None:
        meta.spec_verify_ct = self.verified
        meta.spec_num_proposed_drafts = self.proposed
        meta.spec_num_correct_drafts = self.correct
        meta.spec_correct_drafts_histogram = self.histogram
        meta.spec_accept_rate = self.correct / self.proposed if self.proposed else 0.0
        meta.spec_accept_length = meta.completion_tokens / self.verified


class MetaInfo(msgspec.Struct, kw_only=True):
    """`meta_info` of an answer. What is UNSET was not asked for and is left out."""

    id: str
    finish_reason: dict[str, Any] | None = None
    prompt_tokens: int = 0
    weight_version: str = ""
    lora_path: str | UnsetType = UNSET  # the request's adapter
    adapter_version: str | UnsetType = UNSET  # that made the last tokens
    completion_tokens: int = 0
    cached_tokens: int = 0
    num_retractions: int = 0
    weight_versions: list[VersionRun] = []
    e2e_latency: float | UnsetType = UNSET
    input_token_logprobs: Raw | UnsetType = UNSET
    output_token_logprobs: Raw | UnsetType = UNSET
    input_top_logprobs: Raw | UnsetType = UNSET
    output_top_logprobs: Raw | UnsetType = UNSET
    input_token_ids_logprobs: Raw | UnsetType = UNSET
    output_token_ids_logprobs: Raw | UnsetType = UNSET
    output_token_entropy: Raw | UnsetType = UNSET
    output_token_sampling_mask: Raw | UnsetType = UNSET
    output_token_sampling_logprobs: Raw | UnsetType = UNSET
    routed_experts: str | UnsetType = UNSET
    hidden_states: Raw | UnsetType = UNSET
    dp_rank: int | UnsetType = UNSET
    spec_verify_ct: int | UnsetType = UNSET
    spec_accept_rate: float | UnsetType = UNSET
    spec_accept_length: float | UnsetType = UNSET
    spec_num_correct_drafts: int | UnsetType = UNSET
    spec_num_proposed_drafts: int | UnsetType = UNSET
    spec_correct_drafts_histogram: list[int] | UnsetType = UNSET


class Answer(msgspec.Struct, kw_only=True):
    """One answer object of /generate, or one chunk of its stream."""

    text: Raw | UnsetType = UNSET
    output_ids: Raw
    prompt_token_ids: Raw | UnsetType = UNSET
    meta_info: MetaInfo
    index: int | UnsetType = UNSET


def finish_reason(finish: Finish) -> dict[str, Any]:
    """The contract's object for why a request ended."""
    match finish.reason:
        case "stop":
            return {"type": "stop", "matched": finish.matched}
        case "length":
            return {"type": "length", "length": finish.length}
        case _:
            return {"type": "abort", "message": finish.message, "status_code": None, "err_type": None}


def logprob_keys(request: Request) -> list[str]:
    """The suffixes of the logprob arrays that the request asks for."""
    options = request.logprobs
    if options is None or not options.returned:
        return []
    requested = {"token_logprobs": True, "top_logprobs": options.top > 0, "token_ids_logprobs": bool(options.token_ids)}
    return [name for name, asked in requested.items() if asked]


def distribution_keys(request: Request) -> list[str]:
    """The arrays that describe the distributions that output tokens were drawn from."""
    options = request.logprobs
    if options is None:
        return []
    masks = ["output_token_sampling_mask", "output_token_sampling_logprobs"] if options.support else []
    return masks + (["output_token_entropy"] if options.entropy else [])


class Output:
    """Collects the steps of one request. `answer` prints all of it; in a stream of deltas, what is new."""

    def __init__(
        self, request: Request, received_at: float, weight_version: str, *, text: bool = True, with_rank: bool = False
    ) -> None:
        """`with_rank`: say which scheduler has computed it, the last one where there were several."""
        self.finish: Finish | None = None
        self._request = request
        self._received_at = received_at
        self._ids = Fragment(b"[")
        self._text = Fragment(b'"') if text else None
        keys = [f"{side}_{name}" for name in logprob_keys(request) for side in ("input", "output")]
        self._logprobs = {key: Fragment(b"[") for key in keys}
        self._distributions = {key: Fragment(b"[") for key in distribution_keys(request)}
        self._prompt: Raw | UnsetType = UNSET  # its ids
        self._hidden = Fragment(b"[") if request.return_hidden_states else None
        self._meta = MetaInfo(id=request.rid, weight_version=weight_version, weight_versions=[])
        self._meta.lora_path = request.adapter or UNSET
        self._with_rank = with_rank
        self._speculation: Speculation | None = None  # where the server speculates
        self._has_prompt_states = False  # hidden states of the prompt have come
        self._sent_tokens = 0  # completion tokens at the last chunk

    def add(self, text: Text) -> None:
        """Add one step of the request."""
        tokens = text.tokens
        meta = self._meta
        if self._with_rank:
            meta.dp_rank = tokens.rank
        if self._text is not None and text.text:
            self._text.append(text.text)
        if tokens.ids:
            ids = unpack_ids(tokens.ids).tolist()
            self._ids.extend(ids)
            self._count(len(ids), tokens.weight_version, tokens.adapter_version)
        if tokens.drafts is not None:
            self._speculation = self._speculation or Speculation()
            self._speculation.add(tokens.drafts)
        if tokens.prompt_tokens:
            meta.prompt_tokens = tokens.prompt_tokens
        if tokens.cached_tokens > meta.cached_tokens:
            meta.cached_tokens = tokens.cached_tokens
        if tokens.retractions > meta.num_retractions:
            meta.num_retractions = tokens.retractions
        if self._logprobs:
            self._score("input", tokens.input_logprobs)
            self._score("output", tokens.logprobs)
        if self._distributions and tokens.logprobs is not None:
            self._describe(tokens.logprobs)
        if tokens.prompt_ids:
            self._prompt = Raw(_encode(unpack_ids(tokens.prompt_ids).tolist()))
        if self._hidden is not None and tokens.hidden_states:
            self._hidden.extend(self._hidden_states(tokens))
        if tokens.finish is not None:
            self._end(tokens.finish)
            if self._request.return_routed_experts:
                meta.routed_experts = base64.b64encode(tokens.routed_experts).decode()

    def _count(self, added: int, version: str, adapter_version: str) -> None:
        meta = self._meta
        start = meta.completion_tokens
        meta.completion_tokens += added
        meta.weight_version = version = version or meta.weight_version
        meta.adapter_version = adapter = adapter_version or meta.adapter_version
        last = meta.weight_versions[-1] if meta.weight_versions else None
        if last is not None and (last.version, last.adapter_version) == (version, adapter):
            last.end += added
        else:
            meta.weight_versions.append(VersionRun(version, start, start + added, adapter))

    def _score(self, side: str, given: Logprobs | None) -> None:
        if given is None:
            return
        options = self._request.logprobs
        assert options is not None, self._request.rid
        self._logprobs[f"{side}_token_logprobs"].extend(logprobs.tokens(given))
        if options.top:
            self._logprobs[f"{side}_top_logprobs"].extend(logprobs.top(given, options.top))
        if options.token_ids:
            self._logprobs[f"{side}_token_ids_logprobs"].extend(logprobs.asked(given, options.token_ids))

    def _describe(self, given: Logprobs) -> None:
        rows: dict[str, Sequence[Any]] = {
            "output_token_entropy": logprobs.floats(given.entropies),
            "output_token_sampling_mask": logprobs.supports(given),
            "output_token_sampling_logprobs": logprobs.floats(given.support_values),
        }
        for key, fragment in self._distributions.items():
            fragment.extend(rows[key])

    def _hidden_states(self, tokens: Tokens) -> list[Any]:
        """The prompt's as one matrix, which comes first; then a vector for each output token that was read again."""
        numbers, size = array("f", tokens.hidden_states), tokens.hidden_size
        rows = [numbers[start : start + size].tolist() for start in range(0, len(numbers), size)]
        if self._has_prompt_states:
            return rows
        self._has_prompt_states = True
        return [rows[: tokens.prompt_tokens], *rows[tokens.prompt_tokens :]]

    def _end(self, finish: Finish) -> None:
        self.finish = finish
        self._meta.finish_reason = finish_reason(finish)
        self._meta.e2e_latency = time.monotonic() - self._received_at
        if finish.reason == "abort" and finish.message == ABORTED_IN_QUEUE:  # clients read this key of such an answer
            self._logprobs.setdefault("output_token_logprobs", Fragment(b"["))

    def due(self, interval: int) -> bool:
        """Whether the next chunk is due: with the first token, then with every `interval`th, and at the end."""
        sent, now = self._sent_tokens, self._meta.completion_tokens
        return self.finish is not None or -(-now // interval) > -(-sent // interval)

    def answer(self, index: int | UnsetType = UNSET) -> bytes:
        """The JSON of everything so far."""
        meta = self.meta_info()
        text = UNSET if self._text is None else self._text.json()
        self._sent_tokens = meta.completion_tokens
        return _encode(
            Answer(
                text=text,
                output_ids=self._ids.json(),
                prompt_token_ids=self._prompt,
                meta_info=meta,
                index=index,
            )
        )

    def meta_info(self) -> MetaInfo:
        """All but the text and the ids."""
        meta = self._meta
        for key, fragment in (self._logprobs | self._distributions).items():
            setattr(meta, key, fragment.json())
        if self._hidden is not None:
            meta.hidden_states = self._hidden.json()
        if self._speculation is not None:
            self._speculation.write_to(meta)
        return meta

    def drop_sent(self) -> None:
        """Drop what was sent: the next answer holds only what is new (counters stay)."""
        self._prompt = UNSET
        arrays = (*self._logprobs.values(), *self._distributions.values())
        for fragment in (self._ids, self._text, self._hidden, *arrays):
            if fragment is not None:
                fragment.clear()
