"""How well documents fit a query: the score of a cross-encoder, or how sure a generating model is to answer "yes"."""

from collections.abc import Sequence
from typing import NamedTuple

from starlette.requests import Request as HTTPRequest

from quartet.http_gateway.embedding.embeddings import probabilities, sigmoid
from quartet.http_gateway.embedding.encode import NOT_A_CROSS_ENCODER, embed, embed_request, numbers
from quartet.http_gateway.embedding.score import first_tokens, label_logprobs, shares
from quartet.http_gateway.generation.intake import Job, Rules, check_bytes, fan_out
from quartet.http_gateway.generation.truncation import Truncating, Truncation, read_truncation
from quartet.http_gateway.routes.gateway import Gateway
from quartet.http_gateway.routes.tasks import check_embeds
from quartet.http_gateway.routes.token_questions import tokens_of
from quartet.runtime.control import Tokenize
from quartet.runtime.errors import RequestError
from quartet.runtime.messages import Chat, Generate, LogprobOptions, Request, Text, pack_ids
from quartet.runtime.model_files.reranker import AnswerRanking
from quartet.runtime.sampling import SamplingParams

LABELS = ["yes", "no"]  # answers of a generating reranker
NO_INSTRUCT = "instruct is not supported: this is no instructed reranker."
NO_TRUNCATION = "{} is not supported: the question behind the document would be cut off."
ONE_TOKEN = "This model's tokenizer has no single token for {!r}, so it cannot rank by its answer."
INSTRUCT = "Given a web search query, retrieve relevant passages that answer the query"
BGE_LABELS = ["Yes"]
BGE_PROMPT = (
    "Given a query A and a passage B, determine whether the passage contains an answer to the query by providing a "
    "prediction of either 'Yes' or 'No'."
)
# as Qwen's model card writes it
PROMPT = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    "<Instruct>: {instruct}\n<Query>: {query}\n<Document>: {document}<|im_end|>\n"
    "<|im_start|>assistant\n<think>\n\n</think>\n\n"
)


class Fitness(NamedTuple):
    """Of one document."""

    text: Text  # the message with the model's answer
    score: float  # as the model gives it
    share: float  # between 0 and 1


class Ranking(Truncating, kw_only=True):
    """The fields of a body that say how to compare."""

    query: str
    instruct: str | None = None


async def fitness(gateway: Gateway, http: HTTPRequest, body: Ranking, documents: Sequence[str]) -> list[Fitness]:
    """In the order of the documents. Raises RequestError where the model does not rank."""
    if (ranking := gateway.answer_ranking) is not None:
        return await (by_logit if ranking.by_logit else by_answer)(gateway, ranking, http, body, documents)
    embedding = check_embeds(gateway)
    if not embedding.cross_encoder or embedding.labels != 1:
        raise RequestError(NOT_A_CROSS_ENCODER)
    if body.instruct is not None:
        raise RequestError(NO_INSTRUCT, field="instruct")
    found = []
    for text in await embed(gateway, http, pairs(body, documents, gateway.rules)):
        [score] = numbers(text)
        [share] = probabilities([score], embedding)
        found.append(Fitness(text, score, share))
    return found


def pairs(body: Ranking, documents: Sequence[str], rules: Rules) -> Job:
    """A pair for each document."""
    request = embed_request(rules, truncation=read_truncation(body, "right"))
    prompts = [Generate(request=request, text=body.query, text_pair=document) for document in documents]
    return fan_out(prompts, [None] * len(prompts), rules)


async def by_answer(
    gateway: Gateway, ranking: AnswerRanking, http: HTTPRequest, body: Ranking, documents: Sequence[str]
) -> list[Fitness]:
    """The share of "yes" among the two answers."""
    for field in Truncating.__struct_fields__:
        if getattr(body, field) not in (None, False):
            raise RequestError(NO_TRUNCATION.format(field), field=field)
    check_prompts(body, documents, gateway.rules)
    ranking.labels = ranking.labels or await label_ids(gateway, LABELS)
    options = LogprobOptions(token_ids=ranking.labels)
    params = SamplingParams(max_new_tokens=1, temperature=1.0, ignore_eos=True)
    request = Request(rid="", params=params, logprobs=options)
    prompts = [question(request, body, document, ranking.own_template) for document in documents]
    texts = await first_tokens(gateway, http, fan_out(prompts, [None] * len(prompts), gateway.rules))
    sure = [shares(label_logprobs(text), among_labels=True)[0] for text in texts]
    return [Fitness(text, share, share) for text, share in zip(texts, sure, strict=True)]


async def by_logit(
    gateway: Gateway, ranking: AnswerRanking, http: HTTPRequest, body: Ranking, documents: Sequence[str]
) -> list[Fitness]:
    """The logit of "Yes" behind the query, the document and a question; a share by its sigmoid.

    The parts are tokenized one by one, as in training. Only a document is cut where a prompt is too long.
    """
    if not ranking.labels:
        [ranking.beginning] = await tokens_of(gateway, Tokenize(texts=[""]))
        ranking.labels = await label_ids(gateway, BGE_LABELS)
    parts = [f"A: {body.query}", "\n", body.instruct or BGE_PROMPT, *(f"B: {document}" for document in documents)]
    asked, gap, prompt, *given = await tokens_of(gateway, Tokenize(texts=parts, add_special_tokens=False))
    before, behind = [*ranking.beginning, *asked, *gap], [*gap, *prompt]
    request = Request(
        rid="",
        params=SamplingParams(max_new_tokens=1, temperature=1.0, ignore_eos=True),
        logprobs=LogprobOptions(token_ids=ranking.labels, raw=True),
    )
    truncation = read_truncation(body, "right") or (Truncation(0, "right") if gateway.rules.auto_truncate else None)
    if truncation is not None:
        truncation.apply(request, gateway.rules)
        room = max((request.truncate or 0) - len(before) - len(behind), 0)
        given = [ids[len(ids) - room :] if truncation.side == "left" else ids[:room] for ids in given]
        request.truncate = None
    size = (len(before) + len(behind)) * len(given) + sum(map(len, given))
    check_bytes(len(given), 4 * size, gateway.rules)
    prompts = [Generate(request=request, input_ids=pack_ids(before + ids + behind)) for ids in given]
    texts = await first_tokens(gateway, http, fan_out(prompts, [None] * len(prompts), gateway.rules))
    found = [label_logprobs(text)[0] for text in texts]
    return [Fitness(text, score, sigmoid(score)) for text, score in zip(texts, found, strict=True)]


def check_prompts(body: Ranking, documents: Sequence[str], rules: Rules) -> None:
    """Refuse prompts that are too large together, before one is made: each holds the whole query."""
    common = len(PROMPT) + len(body.query) + len(body.instruct or INSTRUCT)
    check_bytes(len(documents), common * len(documents) + sum(map(len, documents)), rules)


async def label_ids(gateway: Gateway, labels: list[str]) -> list[int]:
    """The tokens of answers."""
    found = await tokens_of(gateway, Tokenize(texts=labels, add_special_tokens=False))
    for label, ids in zip(labels, found, strict=True):
        if len(ids) != 1:
            raise RequestError(ONE_TOKEN.format(label))
    return [ids[0] for ids in found]


def question(request: Request, body: Ranking, document: str, own_template: bool) -> Generate:
    """The prompt for one document: by the template of `--chat-template`, or as the model was trained."""
    if own_template:
        messages = [{"role": "user", "content": text} for text in (body.query, document)]
        given = {} if body.instruct is None else {"instruct": body.instruct}
        return Generate(request=request, chat=Chat(messages=messages, template_kwargs=given, as_it_is=True))
    text = PROMPT.format(instruct=body.instruct or INSTRUCT, query=body.query, document=document)
    return Generate(request=request, text=text)
