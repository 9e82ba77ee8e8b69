"""How well documents fit a query: the score of a cross-encoder, or how sure a generating model is to answer "yes"."""

from collections.abc import Sequence
from typing import NamedTuple

from starlette.requests import Request as HTTPRequest

from quartet.http_gateway.embedding.embeddings import probabilities
from quartet.http_gateway.embedding.encode import NOT_A_CROSS_ENCODER, embed, embed_request, numbers
from quartet.http_gateway.embedding.score import first_tokens, label_logprobs, shares
from quartet.http_gateway.generation.intake import Job, Rules, check_bytes, fan_out
from quartet.http_gateway.generation.truncation import Truncating, read_truncation
from quartet.http_gateway.routes.gateway import Gateway
from quartet.http_gateway.routes.tasks import check_embeds
from quartet.http_gateway.routes.token_questions import tokens_of
from quartet.runtime.control import Tokenize
from quartet.runtime.errors import RequestError
from quartet.runtime.messages import Chat, Generate, LogprobOptions, Request, Text
from quartet.runtime.model_files.reranker import AnswerRanking
from quartet.runtime.sampling import SamplingParams

LABELS = ["yes", "no"]  # answers of a generating reranker
NO_INSTRUCT = "instruct is not supported: this is no instructed reranker."
NO_TRUNCATION = "{} is not supported: the question behind the document would be cut off."
ONE_TOKEN = "This model's tokenizer has no single token for {!r}, so it cannot rank by its answer."
INSTRUCT = "Given a web search query, retrieve relevant passages that answer the query"
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
    if gateway.answer_ranking is not None:
        return await by_answer(gateway, gateway.answer_ranking, http, body, documents)
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
    ranking.labels = ranking.labels or await label_ids(gateway)
    options = LogprobOptions(token_ids=ranking.labels)
    params = SamplingParams(max_new_tokens=1, temperature=1.0, ignore_eos=True)
    request = Request(rid="", params=params, logprobs=options)
    prompts = [question(request, body, document, ranking.own_template) for document in documents]
    texts = await first_tokens(gateway, http, fan_out(prompts, [None] * len(prompts), gateway.rules))
    sure = [shares(label_logprobs(text), among_labels=True)[0] for text in texts]
    return [Fitness(text, share, share) for text, share in zip(texts, sure, strict=True)]


def check_prompts(body: Ranking, documents: Sequence[str], rules: Rules) -> None:
    """Refuse prompts that are too large together, before one is made: each holds the whole query."""
    common = len(PROMPT) + len(body.query) + len(body.instruct or INSTRUCT)
    check_bytes(len(documents), common * len(documents) + sum(map(len, documents)), rules)


async def label_ids(gateway: Gateway) -> list[int]:
    """The tokens of both answers."""
    found = await tokens_of(gateway, Tokenize(texts=LABELS, add_special_tokens=False))
    for label, ids in zip(LABELS, found, strict=True):
        if len(ids) != 1:
            raise RequestError(ONE_TOKEN.format(label))
    return [ids[0] for ids in found]


def question(request: Request, body: Ranking, document: str, own_template: bool) -> Generate:
    """The prompt for one document: by the template of `--chat-template`, or as the model was trained."""
    if own_template:
        messages = [{"role": "user", "content": text} for text in (body.query, document)]
        given = {} if body.instruct is None else {"instruct": body.instruct}
        return Generate(request=request, chat=Chat(messages=messages, template_kwargs=given))
    text = PROMPT.format(instruct=body.instruct or INSTRUCT, query=body.query, document=document)
    return Generate(request=request, text=text)
