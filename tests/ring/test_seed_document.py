"""The seed document, cell by cell: its five servers, its calls with `requests`, its assertions and its log lines.

The models are small ones of the same architectures under the same names, given as relative paths; the document's own
assertions stand here word for word.
"""

import contextlib
import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.servers import Server, launched

pytestmark = pytest.mark.slow

HIDDEN = ("--max-running-requests", "128", "--max-total-tokens", "20480")  # flags that the notebook's launcher adds
STAMP = r"^\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] "
READY = STAMP + r"The server is fired up and ready to roll!$"
FLUSHED = STAMP + r"Cache flushed successfully!$"
READING = STAMP + r"Using model weights format \['\*\.safetensors'\]$"
UPDATING = (
    STAMP + r"Start update_weights\. Load format=auto$",
    STAMP + r"Update engine weights online from disk begin\. avail mem=[\d.]+ GB$",
)


def loading(architecture: str) -> tuple[str, ...]:
    """The lines of a model that is loaded."""
    return (
        STAMP + r"Load weight begin\. avail mem=[\d.]+ GB$",
        READING,
        STAMP
        + rf"Load weight end\. type={architecture}, dtype=torch\.\w+, avail mem=[\d.]+ GB, mem usage=[\d.]+ GB\.$",
    )


def memory(context: int) -> tuple[str, ...]:
    """The lines of a KV pool that is made."""
    return (
        STAMP + r"KV Cache is allocated\. #tokens: 20480, K size: [\d.]+ GB, V size: [\d.]+ GB$",
        STAMP + r"max_total_num_tokens=20480, chunked_prefill_size=-?\d+, max_prefill_tokens=16384, "
        rf"max_running_requests=128, context_len={context}, available_\w+_mem=[\d.]+ GB$",
    )


def prefill(new: int, cached: int = 0) -> str:
    """The line of a prefill of one request."""
    return (
        STAMP + rf"Prefill batch\. #new-seq: 1, #new-token: {new}, #cached-token: {cached}, "
        r"token usage: 0\.\d\d, #running-req: 0, #queue-req: \d+, $"
    )


def decode(tokens: int) -> str:
    """The line of every fortieth decode step of a lone request."""
    return (
        STAMP + rf"Decode batch\. #running-req: 1, #token: {tokens}, token usage: 0\.\d\d, cuda graph: False, "
        r"gen throughput \(token/s\): \d+\.\d\d, #queue-req: 0, $"
    )


def answered(call: str, status: str = "200 OK") -> str:
    """An access line."""
    return STAMP + rf'INFO:     127\.0\.0\.1:\d+ - "{re.escape(call)} HTTP/1\.1" {status}$'


class Cell:
    """One cell of the document: what its call makes the server log."""

    def __init__(self, server: Server, start: int | None = None) -> None:
        self.server = server
        self.start = len(server.log) if start is None else start

    def url(self, path: str) -> str:
        return f"http://localhost:{self.server.port}{path}"

    def logs(self, *patterns: str) -> list[re.Match[str]]:
        """The lines that match, each behind the one before."""
        found: list[re.Match[str]] = []
        for pattern in patterns:
            found.append(self.server.wait_for_match(pattern, found[-1].end() if found else self.start))
        return found

    def never_logs(self, text: str) -> None:
        assert text not in self.server.log[self.start :]


@pytest.fixture(scope="module", autouse=True)
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The directory with all models; tests and servers run in it."""
    from tests.ring import seed_models  # transformers takes seconds to import

    directory = tmp_path_factory.mktemp("seed")
    seed_models.build(directory)
    with contextlib.chdir(directory):
        yield directory


@pytest.fixture(scope="module")
def dumps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where recordings are written."""
    return tmp_path_factory.mktemp("dumps")


@pytest.fixture(scope="class")
def server(request: pytest.FixtureRequest, models: Path, dumps: Path) -> Iterator[Server]:
    """The server of a section, with its flags."""
    environment = {"HF_HUB_OFFLINE": "1", "SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR": str(dumps)}
    flags = (*request.cls.FLAGS.split(), *HIDDEN)
    with launched(*flags, environment=environment, directory=models) as server:
        yield server


@pytest.fixture
def cell(server: Server) -> Cell:
    return Cell(server)


def wait_for_server(cell: Cell) -> None:
    """As the document's helper asks: with a key, though the server has none."""
    assert requests.get(cell.url("/v1/models"), headers={"Authorization": "Bearer None"}).status_code == 200


def starts(server: Server, architecture: str, context: int, warmup: str, new_tokens: int) -> None:
    """What the first cell of every server shows."""
    cell = Cell(server, start=0)
    wait_for_server(cell)
    cell.logs(*loading(architecture), *memory(context), prefill(new_tokens), READY)
    cell.logs(answered(f"POST {warmup}"))


class TestGeneration:
    FLAGS = "--model-path qwen/qwen2.5-0.5b-instruct --host 0.0.0.0 --cuda-graph-max-bs 4"

    def test_cell_1_launch_a_server(self, server: Server) -> None:
        starts(server, "Qwen2ForCausalLM", 32768, "/generate", 6)

    def test_cell_2_generate(self, cell: Cell) -> None:
        data = {"text": "What is the capital of France?"}
        response = requests.post(cell.url("/generate"), json=data).json()
        assert isinstance(response["text"], str)
        assert len(response["output_ids"]) == response["meta_info"]["completion_tokens"] == 128
        assert response["meta_info"]["prompt_tokens"] == 7
        assert response["meta_info"]["finish_reason"] == {"type": "length", "length": 128}
        cell.logs(prefill(7), decode(40), decode(80), decode(120))
        cell.logs(answered("POST /generate"))

    def test_cell_3_get_model_info(self, cell: Cell) -> None:
        response_json = requests.get(cell.url("/get_model_info")).json()
        assert response_json["model_path"] == "qwen/qwen2.5-0.5b-instruct"
        assert response_json["is_generation"] is True
        assert response_json["tokenizer_path"] == "qwen/qwen2.5-0.5b-instruct"
        assert response_json["preferred_sampling_params"] is None
        assert response_json.keys() == {
            "model_path",
            "is_generation",
            "tokenizer_path",
            "preferred_sampling_params",
            "weight_version",
        }
        assert response_json["weight_version"] == "default"
        cell.logs(answered("GET /get_model_info"))

    def test_cell_4_get_server_info(self, cell: Cell) -> None:
        response = requests.get(cell.url("/get_server_info")).json()
        assert response["model_path"] == "qwen/qwen2.5-0.5b-instruct"
        assert response["max_total_num_tokens"] == 20480
        assert response["max_running_requests"] == 128
        assert response["internal_states"][0]["memory_usage"]["token_capacity"] == 20480
        cell.logs(answered("GET /get_server_info"))

    def test_cell_5_health_generate(self, cell: Cell) -> None:
        response = requests.get(cell.url("/health_generate"))
        assert (response.status_code, response.text) == (200, "")
        cell.logs(prefill(1))
        cell.logs(answered("GET /health_generate"))

    def test_cell_6_health(self, cell: Cell) -> None:
        assert requests.get(cell.url("/health")).status_code == 200
        cell.logs(answered("GET /health"))

    def test_cell_7_flush_cache(self, cell: Cell) -> None:
        response = requests.post(cell.url("/flush_cache"))
        assert response.text.startswith("Cache flushed.\nPlease check backend logs for more details.")
        cell.logs(FLUSHED)
        cell.logs(answered("POST /flush_cache"))

    def test_cell_8_update_weights_from_disk(self, cell: Cell) -> None:
        data = {"model_path": "qwen/qwen2.5-0.5b-instruct"}
        response = requests.post(cell.url("/update_weights_from_disk"), json=data)
        assert response.json()["success"] is True
        assert response.json()["message"] == "Succeeded to update model weights."
        assert response.json()["num_paused_requests"] == 0
        cell.logs(*UPDATING, READING, STAMP + r"Update weights end\.$", FLUSHED)
        cell.logs(answered("POST /update_weights_from_disk"))

    def test_cell_9_update_weights_from_a_wrong_name(self, cell: Cell) -> None:
        data = {"model_path": "qwen/qwen2.5-0.5b-instruct-wrong"}
        response_json = requests.post(cell.url("/update_weights_from_disk"), json=data).json()
        assert response_json["success"] is False
        assert response_json["message"] == (
            "Failed to get weights iterator: qwen/qwen2.5-0.5b-instruct-wrong (repository not found)."
        )
        cell.logs(*UPDATING, STAMP + re.escape(response_json["message"]) + "$")
        cell.logs(answered("POST /update_weights_from_disk", "400 Bad Request"))
        cell.never_logs("Update weights end.")

    def test_cell_10_terminate_process(self, server: Server) -> None:
        terminate(server)


class TestEncode:
    FLAGS = "--model-path Alibaba-NLP/gte-Qwen2-1.5B-instruct --host 0.0.0.0 --is-embedding"

    def test_cell_11_launch_a_server(self, server: Server) -> None:
        starts(server, "Qwen2ForCausalLM", 4096, "/encode", 6)

    def test_cell_12_encode(self, cell: Cell) -> None:
        data = {"model": "Alibaba-NLP/gte-Qwen2-1.5B-instruct", "text": "Once upon a time"}
        response_json = requests.post(cell.url("/encode"), json=data).json()
        assert len(response_json["embedding"][:10]) == 10
        assert sum(x * x for x in response_json["embedding"]) == pytest.approx(1.0, abs=1e-2)
        assert response_json["meta_info"]["prompt_tokens"] == 4
        cell.logs(prefill(4))
        cell.logs(answered("POST /encode"))

    def test_cell_13_terminate_process(self, server: Server) -> None:
        terminate(server)


class TestRerank:
    FLAGS = (
        "--model-path BAAI/bge-reranker-v2-m3 --host 0.0.0.0 --disable-radix-cache --chunked-prefill-size -1 "
        "--attention-backend triton --is-embedding"
    )

    def test_cell_14_launch_a_server(self, server: Server) -> None:
        cell = Cell(server, start=0)
        wait_for_server(cell)
        cell.logs(*loading("XLMRobertaForSequenceClassification"), prefill(8), READY)
        cell.logs(answered("POST /encode"))

    def test_cell_15_rerank(self, cell: Cell) -> None:
        data = {
            "model": "BAAI/bge-reranker-v2-m3",
            "query": "what is panda?",
            "documents": [
                "hi",
                "The giant panda (Ailuropoda melanoleuca), sometimes called a panda bear or simply panda, is a bear "
                "species endemic to China.",
            ],
        }
        response_json = requests.post(cell.url("/v1/rerank"), json=data).json()
        for item in response_json:
            assert f"Score: {item['score']:.2f} - Document: '{item['document']}'"
            assert item["document"] == data["documents"][item["index"]]
        assert sorted(item["index"] for item in response_json) == [0, 1]
        assert response_json[0]["score"] >= response_json[1]["score"]
        assert sorted(item["meta_info"]["prompt_tokens"] for item in response_json) == [9, 32]
        cell.logs(answered("POST /v1/rerank"))

    def test_cell_16_terminate_process(self, server: Server) -> None:
        terminate(server)


class TestClassify:
    NAME = "Skywork/Skywork-Reward-Llama-3.1-8B-v0.2"

    FLAGS = f"--model-path {NAME} --host 0.0.0.0 --is-embedding --page-size 1"

    def test_cell_17_launch_a_server(self, server: Server) -> None:
        starts(server, "LlamaForSequenceClassification", 4096, "/encode", 7)

    def test_cell_18_classify(self, cell: Cell) -> None:
        from transformers import AutoTokenizer

        prompt = "What is the range of the numeric output of a sigmoid node in a neural network?"
        response1 = "The output of a sigmoid node is bounded between -1 and 1."
        response2 = "The output of a sigmoid node is bounded between 0 and 1."
        conversations = [
            [{"role": "user", "content": prompt}, {"role": "assistant", "content": response1}],
            [{"role": "user", "content": prompt}, {"role": "assistant", "content": response2}],
        ]
        tokenizer = AutoTokenizer.from_pretrained(self.NAME)
        prompts = tokenizer.apply_chat_template(conversations, tokenize=False)
        data = {"model": self.NAME, "text": prompts}
        responses = requests.post(cell.url("/classify"), json=data).json()
        rewards = [response["embedding"][0] for response in responses]
        assert len(rewards) == 2 and rewards[0] != rewards[1]
        first, second = tokenizer(prompts).input_ids
        shared = next(i for i, (left, right) in enumerate(zip(first, second, strict=False)) if left != right)
        # the warm-up left its first token in the cache, the first conversation all that the second one repeats
        cell.logs(prefill(len(first) - 1, cached=1), prefill(len(second) - shared, cached=shared))
        cell.logs(answered("POST /classify"))

    def test_cell_19_terminate_process(self, server: Server) -> None:
        terminate(server)


class TestExpertDistribution:
    LAYERS, EXPERTS, TOP_K = 2, 60, 4
    TOKENS = 7 + 127  # the prompt, and all of the answer but its last

    FLAGS = "--model-path Qwen/Qwen1.5-MoE-A2.7B --host 0.0.0.0 --expert-distribution-recorder-mode stat"

    def test_cell_20_launch_a_server(self, server: Server) -> None:
        starts(server, "Qwen2MoeForCausalLM", 8192, "/generate", 6)

    def test_cell_21_record_the_expert_distribution(self, cell: Cell, dumps: Path) -> None:
        response = requests.post(cell.url("/start_expert_distribution_record"))
        assert (response.status_code, response.text) == (200, "Start recording the expert distribution.\n")
        data = {"text": "What is the capital of France?"}
        assert requests.post(cell.url("/generate"), json=data).json()["meta_info"]["completion_tokens"] == 128
        response = requests.post(cell.url("/stop_expert_distribution_record"))
        assert (response.status_code, response.text) == (200, "Stop recording the expert distribution.\n")
        response = requests.post(cell.url("/dump_expert_distribution_record"))
        assert (response.status_code, response.text) == (200, "Dump expert distribution record.\n")
        reset = STAMP + r"Resetting ExpertDistributionRecorder\.\.\.$"
        wrote = (
            STAMP + rf"Write expert distribution to ({re.escape(str(dumps))}/expert_distribution_recorder_[\d.]+\.pt)$"
        )
        *_, line, _ = cell.logs(reset, prefill(7), decode(40), decode(80), decode(120), wrote, reset)
        for name in ("start", "stop", "dump"):
            cell.logs(answered(f"POST /{name}_expert_distribution_record"))
        self.check(Path(line[1]))

    def check(self, dump: Path) -> None:
        """Every token has chosen its experts in every layer, and both files say the same."""
        import torch

        counts = torch.load(dump, weights_only=True)["logical_count"]  # (passes, layers, experts)
        assert counts.shape == (128, self.LAYERS, self.EXPERTS)
        assert counts.sum((0, 2)).tolist() == [self.TOKENS * self.TOP_K] * self.LAYERS
        rows: list[Any] = list(csv.reader(dump.with_suffix(".csv").open()))
        assert rows[0] == ["layer_id", "expert_id", "count"]
        assert [int(row[2]) for row in rows[1:]] == counts.sum(0).flatten().tolist()

    def test_cell_22_terminate_process(self, server: Server) -> None:
        terminate(server)


def terminate(server: Server) -> None:
    """The document kills its servers; here they also leave in order, with nothing behind."""
    children = server.children().values()
    server.signal()
    assert server.wait() == 0
    assert not any(child.is_running() for child in children)
