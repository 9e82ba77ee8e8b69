"""The worker with a model made by hand: its next token is the last one plus one, its hidden state the token itself."""

from array import array
from pathlib import Path

import pytest
import torch

from quartet.http_gateway.generation.logprobs import supports
from quartet.runtime.messages import LogprobOptions, Request
from quartet.runtime.model_files.model_info import ModelInfo
from quartet.runtime.sampling import SamplingParams
from quartet.scheduler_service.core.plan import NAN_HAPPENED, Plan, Result, Slice
from quartet.scheduler_service.core.request import Sequence
from quartet.scheduler_service.execution.worker import Worker
from quartet.scheduler_service.model.batch import AttentionSpec, Batch
from quartet.scheduler_service.sampling import choose
from quartet.scheduler_service.sampling.rows import Draws, SamplingRows
from quartet.scheduler_service.weights.parameters import Layout, Weights
from tests.configs import resolved
from tests.engine import Engine, floats
from tests.model import tiny

VOCAB = 50
BROKEN = 13  # behind this token the logits are not numbers


class Counter:
    """Predicts the successor of every token."""

    attention = [AttentionSpec(layer=0, heads=2, kv_heads=1, head_dim=4, scale=0.5)]
    dtype = torch.float32
    weights = Weights(Layout(), torch.float32, torch.device("cpu"))
    hidden_size = 2
    vocab_size = VOCAB

    def forward(self, batch: Batch) -> torch.Tensor:
        q = torch.ones(len(batch.input_ids), 2, 4)
        k = torch.ones(len(batch.input_ids), 1, 4)
        assert batch.attend(self.attention[0], q, k, k).shape == q.shape
        return torch.stack((batch.input_ids, batch.positions), 1).float()

    def logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        logits = torch.zeros(len(hidden), VOCAB) if out is None else out.zero_()
        logits[torch.arange(len(hidden)), (hidden[:, 0].long() + 1) % VOCAB] = 9.0
        logits[hidden[:, 0] == BROKEN] = torch.nan
        return logits

    def sample(
        self, logits: torch.Tensor, rows: SamplingRows, allowed: torch.Tensor | None = None, keep_logits: bool = False
    ) -> Draws:
        return choose.sample(logits, rows, allowed, keep_logits)


@pytest.fixture
def worker() -> Worker:
    config = resolved(device="cpu", page_size=4, max_total_tokens=400, weight_version="v7")
    info = ModelInfo(
        path="",
        architecture="",
        model_type="",
        vocab_size=VOCAB,
        hidden_size=2,
        context_length=64,
        eos_ids=[1],
        config={},
    )
    return Worker(config, info, load=lambda *_: Counter())


def sequence(ids: list[int], first_page: int = 1, **request: object) -> Sequence:
    made = Request(rid="r", params=SamplingParams(temperature=0.0), **request)
    return Sequence(made, array("i", ids), len(ids), pages=list(range(first_page, first_page + 8)))


def step(worker: Worker, *slices: Slice) -> list[Result]:
    return worker.collect(worker.launch(Plan(list(slices))))


def test_parameters_that_overflow_the_logits_end_their_own_request_only(worker):
    params = SamplingParams(repetition_penalty=1e-300, top_p=0.5)
    request = Request(rid="r", params=params, logprobs=LogprobOptions(top=2))
    wild = Sequence(request, array("i", [4, 11, 10]), 1, pages=[9])
    tame = sequence([20])
    broken, fine = step(worker, Slice(wild, 0, 3, True), Slice(tame, 0, 1, True))
    assert broken.error == NAN_HAPPENED and broken.tokens is None
    assert fine.tokens == [21] and not fine.error


def test_facts_tell_what_fits(worker):
    facts = worker.facts()
    assert (facts.max_total_num_tokens, facts.max_req_input_len, facts.context_length) == (400, 63, 64)
    assert facts.memory_usage["token_capacity"] == 400
    assert (worker.page_count, worker.page_size, worker.weight_version) == (100, 4, "v7")


def test_results_are_in_the_order_of_slices_and_only_samplers_have_tokens(worker):
    results = step(
        worker,
        Slice(sequence([4, 5], 1), 1, 2, True),
        Slice(sequence([6, 7, 8], 9), 0, 2, False),
        Slice(sequence([9, 10], 17), 0, 2, True),
    )
    assert [result.tokens for result in results] == [[6], None, [11]]


def test_logits_that_are_no_numbers_end_one_request_and_no_other(worker):
    results = step(worker, Slice(sequence([BROKEN]), 0, 1, True), Slice(sequence([20], 9), 0, 1, True))
    assert (results[0].error, results[0].tokens) == (NAN_HAPPENED, None)
    assert (results[1].error, results[1].tokens) == ("", [21])


def test_a_step_launched_before_the_last_one_is_committed_goes_on_from_its_token(worker):
    ahead = sequence([4, 5])
    step(worker, Slice(ahead, 0, 2, True))
    assert step(worker, Slice(ahead, 2, 3, True))[0].tokens == [7]
    assert len(ahead.ids) == 2


def test_several_tokens_come_from_one_step_where_drafts_are_right(worker):
    def verified(drafts: tuple[int, ...]) -> Result:
        share = Slice(sequence([4, 5], 9, logprobs=LogprobOptions()), 1, 2 + len(drafts), True, drafts=drafts)
        plan = Plan([Slice(sequence([30, 31]), 1, 2, True), share], decodes=1, verifications=1)
        plain, drafted = worker.collect(worker.launch(plan))
        assert plain.tokens == [32]
        return drafted

    right, half, wrong = verified((6, 7, 8)), verified((6, 9, 10)), verified((9, 7, 8))
    assert (right.tokens, half.tokens, wrong.tokens) == ([6, 7, 8, 9], [6, 7], [6])
    assert [array("i", scores.ids)[0] for scores in right.logprobs] == right.tokens
    assert len(half.logprobs) == 2


def test_a_verification_ends_in_front_of_logits_that_are_no_numbers(worker):
    def verified(first: int, drafts: tuple[int, ...]) -> Result:
        share = Slice(sequence([first]), 0, 1 + len(drafts), True, drafts=drafts)
        (result,) = worker.collect(worker.launch(Plan([share], verifications=1)))
        return result

    assert verified(BROKEN - 2, (BROKEN - 1, BROKEN, BROKEN + 1)).tokens == [BROKEN - 1, BROKEN]
    assert verified(BROKEN, (BROKEN + 1,)).error == NAN_HAPPENED  # the step that it is left to


def test_prompt_logprobs_start_where_the_plan_says_and_end_with_the_prompt(worker):
    prompt = sequence([4, 5, 6, 30, 31], logprobs=LogprobOptions(start=1))
    first, second = step(worker, Slice(prompt, 0, 3, False, score_from=2)), step(worker, Slice(prompt, 3, 5, True, 4))
    assert list(array("i", first[0].input_logprobs.ids)) == [6, 30]
    sure, unlikely = floats(first[0].input_logprobs.values)
    assert sure > -0.01 and unlikely < -9
    assert list(array("i", second[0].input_logprobs.ids)) == [31]
    assert list(array("i", second[0].logprobs[0].ids)) == [32]


def test_hidden_states_cover_the_positions_of_the_slice(worker):
    (result,) = step(worker, Slice(sequence([4, 5, 6], return_hidden_states=True), 1, 3, False))
    assert floats(result.hidden_states) == [5, 1, 6, 2]


def test_state_goes_when_a_sequence_is_forgotten_or_retracted(worker):
    done, retracted = sequence([4]), sequence([5], 9)
    step(worker, Slice(done, 0, 1, True), Slice(retracted, 0, 1, True))
    worker.forget(done)
    worker.forget(done)
    other = sequence([6], 17)
    worker.launch(Plan([Slice(other, 0, 1, True)], retracted=[retracted]))
    assert list(worker.states) == [other]


def test_an_embedding_is_refused_by_a_model_that_generates(worker):
    (result,) = step(worker, Slice(sequence([4, 5], task="embed"), 0, 2, False))
    assert "no embeddings" in result.error


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build("llama", tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("settings", [{"page_size": 1}, {"page_size": 16}, {"chunked_prefill_size": 7}], ids=str)
def test_page_and_chunk_sizes_do_not_change_the_answer(llama, settings):
    prompts = [list(range(3, 3 + n)) for n in (1, 9, 40)]
    params = SamplingParams(max_new_tokens=20)
    expected = [answer.ids for answer in Engine(llama).generate(prompts, params, seed=5)]
    assert [answer.ids for answer in Engine(llama, **settings).generate(prompts, params, seed=5)] == expected


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_served_and_is_close_to_full(llama, dtype):
    prompt = [list(range(3, 43))]
    params = SamplingParams(temperature=0.0, max_new_tokens=1)
    options = LogprobOptions(start=0)
    full, half = (
        floats(Engine(llama, dtype=name).generate(prompt, params, logprobs=options)[0].input_logprobs.values)[1:]
        for name in ("float32", dtype)
    )
    assert torch.tensor(half) == pytest.approx(torch.tensor(full), abs=0.3)


def test_embeddings_of_the_prompt_answer_as_its_ids_do(llama):
    engine = Engine(llama, disable_radix_cache=True)
    ids = list(range(3, 20))
    table = engine.worker.model.embedding[torch.tensor(ids)]
    by_ids, by_embeds = engine.add(ids), engine.add([0] * len(ids), embeds=table.numpy().tobytes())
    engine.run()
    assert engine.answers[by_embeds].ids == engine.answers[by_ids].ids


@pytest.mark.parametrize("speculates", [False, True])
def test_entropy_and_support_come_with_every_token(speculates: bool, tmp_path: Path) -> None:
    settings = {"speculative_algorithm": "NGRAM"} if speculates else {}
    engine = Engine(tiny.build("qwen3", tmp_path), **settings)
    options = LogprobOptions(returned=False, entropy=True, support=True)
    params = SamplingParams(temperature=0.9, top_k=6, top_p=0.9, max_new_tokens=12)
    answer, greedy = engine.generate(
        [[3, 4, 5, 3, 4, 5, 3, 4]] * 2, [params, SamplingParams(temperature=0.0, max_new_tokens=12)], logprobs=options
    )
    for found in (answer, greedy):
        assert found.logprobs is not None
        assert len(floats(found.logprobs.entropies)) == len(floats(found.logprobs.support_values)) == 12
    rows = supports(answer.logprobs)
    assert all(token in row and len(row) <= 6 for token, row in zip(answer.ids, rows, strict=True))
    assert supports(greedy.logprobs) == [[token] for token in greedy.ids]
