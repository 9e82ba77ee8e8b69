"""What two ranks do besides computing: the same bits in any batch, quantized weights, adapters, memory given back."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from quartet.kernels.cpu.native.quantized import INT8, rounded
from quartet.runtime.errors import StartupError
from quartet.runtime.memory_tags import WEIGHTS
from quartet.runtime.messages import LogprobOptions
from quartet.runtime.model_files import model_info
from quartet.runtime.sampling import SamplingParams
from quartet.scheduler_service.execution.rank_memory import LeadingSaver
from quartet.scheduler_service.execution.rank_updates import LeadingUpdates
from quartet.scheduler_service.execution.ranks import LeadingSteps
from quartet.scheduler_service.host.parallel import Parallel
from quartet.scheduler_service.model.registry import check_ranks
from tests.adapters import merge, write_adapter
from tests.configs import resolved
from tests.engine import ALL_LOGPROBS, Answer, Engine, floats
from tests.model import tiny
from tests.ranks import load, logits, logits_of, run_ranks, serving

peft = pytest.importorskip("peft", reason="peft is not installed (pip install peft)")

TWO = Parallel(0, 2)
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=6, ignore_eos=True)
BEGINNING = [(7 * i) % 290 + 4 for i in range(24)]
PROMPTS = [BEGINNING[:3], *([*BEGINNING, 9, 8, i] for i in range(4, 10)), [7, 8, 9, 10] * 8]
IN_CHUNKS = {"chunked_prefill_size": 11}
DTYPES = ["float32", "bfloat16"]
SIZES = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 128}  # a rank's columns are whole groups of 32
CHOICES = ["int8", "int4"]
DENSE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DENSE_FAMILY, EXPERTS_FAMILY = "qwen2", "qwen3_moe"
NAMES = ["", "a0", "a1"]


# What the ranks compute


def features(parallel: Parallel, models: Path) -> dict[str, Any]:
    """All of it; rank 0 has the answers."""
    return {
        "bits": {dtype: bits(parallel, models / "llama", dtype) for dtype in DTYPES},
        "quantized": {choice: quantized(parallel, models / "wide", choice) for choice in CHOICES},
        "adapters": {family: adapted(parallel, models / family) for family in (DENSE_FAMILY, EXPERTS_FAMILY)},
        "memory": memory(parallel, models / "llama"),
    }


def bits(parallel: Parallel, model: Path, dtype: str) -> tuple[list[Any], list[Any]]:
    """Each prompt alone; all at once, in chunks, with what the prefix cache has."""
    made: list[list[Any]] = [[], []]
    settings = {"dtype": dtype, "enable_deterministic_inference": True}
    with serving(parallel, model, disable_radix_cache=True, **settings) as engine:
        for prompt in PROMPTS if engine else ():
            assert engine is not None
            made[0] += engine.generate([prompt], GREEDY, seed=3, logprobs=ALL_LOGPROBS)
    with serving(parallel, model, **IN_CHUNKS, **settings) as engine:
        if engine is not None:
            made[1] = engine.generate(PROMPTS, GREEDY, seed=3, logprobs=ALL_LOGPROBS)
    alone, together = [[bits_of(answer) for answer in answers] for answers in made]
    return alone, together


def bits_of(answer: Answer) -> tuple[Any, ...]:
    assert answer.logprobs and answer.input_logprobs
    return answer.ids, answer.logprobs.values, answer.input_logprobs.values


def quantized(parallel: Parallel, model: Path, choice: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The logits of a prompt, and this rank's parts of the tensors that are quantized."""
    weights = load(parallel, model, "bfloat16", quantization=choice).weights
    parts = {name: weights.view(name) for name in weights.names() if weights.quantized_of(name) is not None}
    return logits(parallel, model, "bfloat16", BEGINNING, quantization=choice), parts


def adapted(parallel: Parallel, model: Path) -> list[Answer]:
    """A prompt with no adapter, with each of two, with all in one step; and with one that took the place of another."""
    answers: list[Answer] = []
    with serving(parallel, model, enable_lora=True, max_loaded_loras=2, max_loras_per_batch=2) as engine:
        if engine is None:
            return answers
        store = engine.worker.load_adapters(engine.config, str(model))
        assert store is not None
        for name in NAMES[1:]:
            directory = model.parent / f"{model.name}.{name}"
            store.install(name, name, str(directory), store.read(directory), pinned=False)
        for names in [*([name] for name in NAMES), NAMES * 2]:
            answers += asked(engine, names, store.version_of)
        store.evict("a0")
        store.bring_back(store.known["a0"], store.read_known(store.known["a0"]))
        store.install("a1", "a1", str(directory), store.read(directory), pinned=False)
        answers += asked(engine, NAMES, store.version_of)
    return answers


def asked(engine: Engine, names: list[str], versions: dict[str, str]) -> list[Answer]:
    engine.planner.waiting.set_adapter_versions(versions)
    rids = [engine.add(BEGINNING, GREEDY, adapter=name, logprobs=LogprobOptions()) for name in names]
    engine.run()
    return [engine.answers[rid] for rid in rids]


def memory(parallel: Parallel, model: Path) -> list[list[int]]:
    """Tokens before memory is given back, and after it was taken again, in three ways."""
    found = []
    with serving(parallel, model) as engine:
        if engine is None:
            return found
        steps = engine.worker.steps
        assert isinstance(steps, LeadingSteps)
        updates = LeadingUpdates(
            engine.worker.model.weights, engine.config, str(model), lambda _: None, steps.followers
        )

        def generate() -> None:
            engine.planner.forget_prefixes()
            found.append(engine.generate([BEGINNING], GREEDY)[0].ids)

        generate()
        with_backup = LeadingSaver(updates, engine.worker.cache, True, steps.followers)
        with_backup.release(None)
        with_backup.resume(None)
        generate()
        saver = LeadingSaver(updates, engine.worker.cache, False, steps.followers)
        saver.release(None)
        saver.resume(None)
        updates.swap(updates.from_disk(str(model), "auto", None), "2")
        generate()
        saver.release(None)
        updates.swap(updates.reread(), "2")  # as one that sleeps wakes
        updates.drop_second()
        saver.released.discard(WEIGHTS)
        saver.resume(["kv_cache"])
        generate()
    return found


# The same of one process, and of others


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models")
    tiny.build("llama", place / "llama")
    tiny.build("llama", place / "wide", **SIZES)
    base = tiny.build(DENSE_FAMILY, place / DENSE_FAMILY)
    for number, name in enumerate(NAMES[1:], 1):
        model = transformers.AutoModelForCausalLM.from_pretrained(base)
        torch.manual_seed(number)
        settings = peft.LoraConfig(r=3 * number, lora_alpha=8, target_modules=DENSE, init_lora_weights=False)
        peft.get_peft_model(model, settings).save_pretrained(str(place / f"{DENSE_FAMILY}.{name}"))
    base = tiny.build(EXPERTS_FAMILY, place / EXPERTS_FAMILY)
    for number, name in enumerate(NAMES[1:], 1):
        adapter = write_adapter(base, place / f"{EXPERTS_FAMILY}.{name}", rank=3 * number, seed=number)
        merge(base, adapter, place / f"{EXPERTS_FAMILY}.{name}.merged")
    return place


@pytest.fixture(scope="module")
def of_two_ranks(models: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(2, tmp_path_factory.mktemp("ranks"), features, models)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_answer_of_two_ranks_has_the_same_bits_alone_and_in_any_company(
    dtype: str, of_two_ranks: list[dict[str, Any]]
) -> None:
    alone, together = of_two_ranks[0]["bits"][dtype]
    assert len(alone) == len(PROMPTS) and alone == together


@pytest.mark.parametrize("choice", CHOICES)
def test_parts_are_quantized_as_the_whole_is(choice: str, models: Path, of_two_ranks: list[dict[str, Any]]) -> None:
    whole = load(Parallel(), models / "wide", "bfloat16", quantization=choice).weights
    found = [rank["quantized"][choice] for rank in of_two_ranks]
    names = {name for name in whole.names() if whole.quantized_of(name) is not None}
    assert found[0][1].keys() == names and len(names) > 10
    cuts = load(TWO, models / "wide", "bfloat16", quantization=choice).weights.layout.cuts
    plain = load(Parallel(), models / "wide", "bfloat16").weights
    served = {name: whole.view(name) for name in whole.names()}
    for name in names:
        parts, place = [parts[name] for _, parts in found], whole.quantized_of(name)
        both = torch.cat(parts, cuts[name].dimension) if parts[0].shape != whole.view(name).shape else parts[0]
        if place is not None and place.scheme.rotated and name in cuts and cuts[name].dimension == 1:
            own = [rounded(part.contiguous(), INT8) for part in plain.view(name).chunk(2, 1)]  # 64 columns: not rotated
            assert torch.equal(both, torch.cat(own, 1)), name
        else:
            assert torch.equal(both, whole.view(name)), name
        served[name] = both
    exact = exact_logits(models / "wide", served)
    alone = logits(Parallel(), models / "wide", "bfloat16", BEGINNING, quantization=choice)
    assert torch.equal(found[0][0], found[1][0])
    assert (found[0][0] - exact).abs().mean() <= 1.5 * (alone - exact).abs().mean()


def exact_logits(model: Path, values: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits of the prompt with these values of the weights, in float32."""
    served = load(Parallel(), model, "float32")
    for name in served.weights.names():
        served.weights.view(name).copy_(values[name])
    served.weights.after_update()
    return logits_of(served, BEGINNING)


def test_groups_of_quantized_numbers_are_not_cut(tmp_path: Path) -> None:
    config = resolved(model_path=str(tiny.build("llama", tmp_path)), tp_size=2, dtype="bfloat16", quantization="int8")
    with pytest.raises(StartupError) as refused:
        check_ranks(config, model_info.load(config))
    assert str(refused.value) == (
        "--quantization int8 with --tp-size 2: each rank has 48 columns of the weight down, which are not whole groups "
        "of 32; use another --tp-size, or leave one out"
    )


@pytest.mark.parametrize("family", [DENSE_FAMILY, EXPERTS_FAMILY])
def test_adapters_of_two_ranks_give_what_peft_and_merged_models_give(
    family: str, models: Path, of_two_ranks: list[dict[str, Any]]
) -> None:
    answers, asked_for = of_two_ranks[0]["adapters"][family], [*NAMES, *NAMES, *NAMES, *NAMES]
    assert len({tuple(answer.ids) for answer in answers}) > 1, "the adapters change something"
    for name, answer in zip(asked_for, answers, strict=True):
        with torch.no_grad():
            ids = torch.tensor([BEGINNING + answer.ids])
            expected = oracle(models, family, name)(ids).logits[0].float().log_softmax(-1)[len(BEGINNING) - 1 : -1]
        assert answer.ids == expected.argmax(-1).tolist(), name
        assert answer.logprobs is not None
        own = torch.tensor(floats(answer.logprobs.values))
        assert torch.allclose(own, expected.max(-1).values, atol=1e-3), name


def oracle(models: Path, family: str, name: str) -> Any:
    place = f"{family}.{name}.merged" if name and family == EXPERTS_FAMILY else family
    model = transformers.AutoModelForCausalLM.from_pretrained(models / place)
    if name and family == DENSE_FAMILY:
        model = peft.PeftModel.from_pretrained(model, str(models / f"{family}.{name}"))
    return model.eval()


def test_all_ranks_give_memory_back_and_take_it_again(of_two_ranks: list[dict[str, Any]]) -> None:
    before, *after = of_two_ranks[0]["memory"]
    assert len(set(before)) > 1 and after == [before] * 3
