"""Recorded and returned experts against transformers' routers: the same tokens choose the same experts, exactly."""

import random
from pathlib import Path

import numpy
import pytest
import torch
import transformers

from quartet.runtime.sampling import SamplingParams
from tests.engine import Engine
from tests.model import tiny
from tests.model.parity import prompt

NEW_TOKENS = 20
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=NEW_TOKENS, ignore_eos=True)
LAYERS = 2
# name → (family, its config, the layers that have experts)
MODELS = {
    "qwen2_moe": ("qwen2_moe", {}, (0, 1)),
    "qwen2_moe with a dense layer": ("qwen2_moe", {"mlp_only_layers": [0]}, (1,)),
    "qwen3_moe": ("qwen3_moe", {}, (0, 1)),
    "mixtral": ("mixtral", {}, (0, 1)),
    "olmoe, through transformers": ("olmoe", {}, (0, 1)),
    "gpt_oss": ("gpt_oss", {}, (0, 1)),
    "minimax_m2": ("minimax_m2", {}, (0, 1)),
    "deepseek_v3 with groups and a dense layer": ("deepseek_v3", {"num_hidden_layers": 2}, (1,)),
}


class Model:
    """A tiny mixture of experts on disk, and the choices that transformers' own code makes with it."""

    def __init__(self, directory: Path, name: str) -> None:
        family, config, self.sparse = MODELS[name]
        self.directory = tiny.build(family, directory, **config)
        self.peer = transformers.AutoModelForCausalLM.from_pretrained(
            self.directory, dtype=torch.float32, attn_implementation="eager"
        )
        self.chosen: list[torch.Tensor] = []  # by the routers, layer by layer
        for module in self.peer.modules():
            if type(module).__name__.lower().endswith("topkrouter"):
                module.register_forward_hook(lambda module, given, output: self.chosen.append(output[2]))
        self.top_k = self.peer.config.num_experts_per_tok
        self.experts = getattr(self.peer.config, "num_experts", None) or self.peer.config.num_local_experts

    def engine(self, **settings: object) -> Engine:
        return Engine(self.directory, enable_return_routed_experts=True, **settings)

    @torch.inference_mode()
    def choices(self, ids: list[int]) -> torch.Tensor:
        """(tokens, layers, top_k), sorted; -1 for dense layers."""
        self.chosen.clear()
        self.peer(torch.tensor([ids]))
        choices = torch.full((len(ids), LAYERS, self.top_k), -1)
        for layer, chosen in zip(self.sparse, self.chosen, strict=True):
            choices[:, layer] = chosen.view(len(ids), -1)
        return choices.sort().values

    def expected(self, engine: Engine, prompts: dict[str, list[int]]) -> torch.Tensor:
        """How often each expert must have been chosen by what the engine computed: (layers, experts)."""
        choices = {rid: self.choices(ids + engine.answers[rid].ids) for rid, ids in prompts.items()}
        counts = torch.zeros(LAYERS, self.experts, dtype=torch.long)
        for rid, start, end in engine.computed:
            for layer in self.sparse:
                counts[layer] += choices[rid][start:end, layer].flatten().bincount(minlength=self.experts)
        return counts


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("model"), request.param)


def record(model: Model, directory: Path, mode: str = "stat", **settings: object) -> Engine:
    """An engine that records from now on, into the directory."""
    engine = model.engine(
        expert_distribution_recorder_mode=mode, expert_distribution_recorder_dir=str(directory), **settings
    )
    assert engine.worker.expert_recorder is not None
    engine.worker.expert_recorder.start()
    return engine


def dumped(engine: Engine) -> dict:
    """What the recorder writes (these files are the test's own)."""
    assert engine.worker.expert_recorder is not None
    writing = engine.worker.expert_recorder.dump()
    while True:
        try:
            next(writing)
        except StopIteration as end:
            return torch.load(end.value, weights_only=True)


def generate(engine: Engine, *lengths: int, common: int = 0, seed: int = 1, **request: object) -> dict[str, list[int]]:
    """Serve random prompts at once, all with the same beginning; returns them by rid."""
    rng = random.Random(seed)
    start = prompt(random.Random(0), common)
    prompts = [start + prompt(rng, length) for length in lengths]
    rids = [engine.add(ids, GREEDY, **request) for ids in prompts]
    engine.run()
    return dict(zip(rids, prompts, strict=True))


SCHEDULES = {
    "one request": ({}, (37,), 0),
    "a batch": ({}, (1, 5, 16, 33, 64), 0),
    "chunks of 16": ({"chunked_prefill_size": 16}, (3, 40, 70), 0),
    "a shared prefix": ({"chunked_prefill_size": 32}, (3, 9, 20), 50),
    "retraction": ({"max_total_tokens": 120}, (20, 24, 28, 30), 0),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_counts_are_those_of_the_routers_on_what_was_computed(model: Model, schedule: str, tmp_path: Path) -> None:
    settings, lengths, common = SCHEDULES[schedule]
    engine = record(model, tmp_path, **settings)
    prompts = generate(engine, *lengths, common=common)
    counts = dumped(engine)["logical_count"]
    assert counts.shape == (engine.steps, LAYERS, model.experts) and counts.dtype == torch.int32
    assert torch.equal(counts.sum(0).long(), model.expected(engine, prompts))
    passed = sum(len(ids) + NEW_TOKENS - 1 for ids in prompts.values())
    cached = sum(engine.answers[rid].cached_tokens for rid in prompts)
    again = sum(engine.answers[rid].retractions for rid in prompts)
    assert (cached > 0, again > 0) == (schedule == "a shared prefix", schedule == "retraction")
    if not again:
        assert counts.sum().item() == (passed - cached) * model.top_k * len(model.sparse)


@pytest.mark.parametrize("mode", ["per_pass", "per_token"])
def test_records_of_every_pass_add_up_to_the_same_counts(mode: str, tmp_path: Path) -> None:
    model = Model(tmp_path, "qwen2_moe with a dense layer")
    engine = record(model, tmp_path, mode, chunked_prefill_size=16)
    prompts = generate(engine, 5, 40)
    content = dumped(engine)
    records = content["records"]
    assert [one["forward_pass_id"] for one in records] == list(range(1, engine.steps + 1))
    total = sum(one["global_physical_count"].long() for one in records)
    assert torch.equal(total, model.expected(engine, prompts))
    assert content["last_physical_to_logical_map"].shape == (LAYERS, model.experts)
    assert ("topk_ids_of_layer" in records[0]) == (mode == "per_token")


def test_records_by_token_name_every_token_with_its_experts(tmp_path: Path) -> None:
    model = Model(tmp_path, "qwen2_moe with a dense layer")
    engine = record(model, tmp_path, "per_token", chunked_prefill_size=16)
    [(rid, ids)] = generate(engine, 40).items()
    records = dumped(engine)["records"]
    whole = ids + engine.answers[rid].ids
    positions = [position for one in records for position in one["positions"]]
    assert positions == list(range(len(whole) - 1))
    assert [token for one in records for token in one["input_ids"]] == whole[:-1]
    assert [one["extend_seq_lens"] for one in records[:4]] == [[16], [16], [8], [1]]
    assert [one["forward_mode"] for one in records[:4]] == [1, 1, 1, 2]
    chosen = torch.cat([one["topk_ids_of_layer"] for one in records], dim=1)  # (layers, tokens, top_k)
    assert torch.equal(chosen.transpose(0, 1).sort().values.long(), model.choices(whole)[:-1])


def routed(model: Model, engine: Engine, rid: str) -> torch.Tensor:
    """(tokens, layers, top_k), sorted."""
    rows = numpy.frombuffer(engine.answers[rid].routed_experts, dtype="<i4").reshape(-1, LAYERS, model.top_k)
    return torch.tensor(rows).sort().values.long()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_returned_experts_are_the_routers_choices_at_every_position_but_the_last(model: Model, schedule: str) -> None:
    settings, lengths, common = SCHEDULES[schedule]
    engine = model.engine(**settings)
    generate(engine, 4, common=common)  # leaves its prefix in the cache
    prompts = generate(engine, *lengths, common=common, seed=2, return_routed_experts=True)
    assert (sum(engine.answers[rid].retractions for rid in prompts) > 0) == (schedule == "retraction")
    for rid, ids in prompts.items():
        expected = model.choices(ids + engine.answers[rid].ids)[:-1]
        assert torch.equal(routed(model, engine, rid), expected), rid


@pytest.mark.parametrize("start", [0, 10, 30, 200])
def test_returned_experts_begin_at_the_position_that_was_asked_for(start: int, tmp_path: Path) -> None:
    model = Model(tmp_path, "qwen2_moe")
    engine = model.engine()
    [(rid, ids)] = generate(engine, 25, return_routed_experts=True, routed_experts_start_len=start).items()
    expected = model.choices(ids + engine.answers[rid].ids)[start:-1]
    assert torch.equal(routed(model, engine, rid), expected)


def test_a_prompt_alone_returns_the_experts_of_all_but_its_last_token(tmp_path: Path) -> None:
    model = Model(tmp_path, "qwen2_moe")
    engine = model.engine()
    ids = prompt(random.Random(1), 12)
    rid = engine.add(ids, SamplingParams(max_new_tokens=0), return_routed_experts=True)
    engine.run()
    assert torch.equal(routed(model, engine, rid), model.choices(ids)[:-1])


def test_who_does_not_ask_gets_no_experts(tmp_path: Path) -> None:
    engine = Model(tmp_path, "qwen2_moe").engine()
    [rid] = generate(engine, 5)
    assert engine.answers[rid].routed_experts == b""
