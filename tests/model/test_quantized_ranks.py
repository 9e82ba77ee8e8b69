"""Two ranks serve quantized checkpoints, each with its part: the tokens of one process, its values, half its memory."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from quartet.kernels.cpu.native import build
from quartet.runtime.errors import StartupError
from quartet.runtime.model_files import model_info
from quartet.runtime.sampling import SamplingParams
from quartet.scheduler_service.execution.rank_updates import LeadingUpdates
from quartet.scheduler_service.execution.ranks import LeadingSteps
from quartet.scheduler_service.host.parallel import Parallel
from quartet.scheduler_service.model.batch import ServedModel
from quartet.scheduler_service.model.registry import check_ranks
from quartet.scheduler_service.weights.parameters import Weights
from quartet.scheduler_service.weights.update import Updates
from tests.configs import resolved
from tests.engine import Engine
from tests.model import test_gpt_oss
from tests.quantized_models import KINDS
from tests.ranks import load, logits_of, run_ranks, serving
from tests.unit.scheduler_service.weights.quantized import test_methods

SERVED = ["gptq by activation", "awq", "fp8", "packed with zero points", "int8 by row", "Q8_0", "Q4_K", "mxfp4"]
KEPT = {"awq", "packed with zero points", "int8 by row", "Q8_0", "Q4_K", "mxfp4"}  # in few bits on a CPU
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=8, ignore_eos=True)
PROMPTS = [[(7 * i) % 290 + 4 for i in range(24)], [9, 8, 7, 6, 5]]
GROUP = 32  # of GPTQ and AWQ: columns of `down` are three groups, of which each rank has one and a half

Places = dict[str, tuple[Path, Path]]


# What the ranks compute


def of_rank(parallel: Parallel, places: Places) -> dict[str, Any]:
    """By kind: tokens before and after an update, the values that are kept in bfloat16, what they take, the logits."""
    return {kind: {"tokens": tokens(parallel, *pair), **kept(parallel, pair[0])} for kind, pair in places.items()}


def tokens(parallel: Parallel, first: Path, second: Path) -> list[list[list[int]]]:
    """Of all prompts, by the weights of the first directory, and after an update by those of the second."""
    found: list[list[list[int]]] = []
    with serving(parallel, first) if parallel.size > 1 else nullcontext(Engine(first)) as engine:
        if engine is None:
            return found
        found.append(generate(engine))
        steps = engine.worker.steps
        config, run_dir, live = engine.config, str(first), engine.worker.model.weights
        if isinstance(steps, LeadingSteps):
            updates: Updates = LeadingUpdates(live, config, run_dir, lambda _: None, steps.followers)
        else:
            updates = Updates(live, config, run_dir)
        updates.swap(updates.from_disk(str(second), "auto", None), "2")
        engine.planner.forget_prefixes()
        found.append(generate(engine))
    return found


def generate(engine: Engine) -> list[list[int]]:
    return [answer.ids for answer in engine.generate(PROMPTS, GREEDY)]


def kept(parallel: Parallel, directory: Path) -> dict[str, Any]:
    model = load(parallel, directory, "bfloat16")
    weights = model.weights
    assert weights is not None
    return {
        "values": {name: weights.view(name) for name in weights.names()},
        "quantized": {name for name in weights.names() if weights.quantized_of(name) is not None},
        "nbytes": weights.nbytes(),
        "logits": logits_of(model, PROMPTS[0]),
    }


# The same of one process


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(test_methods, "GROUP", GROUP)
        return {kind: (write(kind, tmp_path_factory, 0), write(kind, tmp_path_factory, 1)) for kind in SERVED}


def write(kind: str, places: pytest.TempPathFactory, seed: int) -> Path:
    directory = places.mktemp("model")
    if kind != "mxfp4":
        return KINDS[kind](directory, seed)
    test_gpt_oss.write(directory, seed + 1)
    return directory


@pytest.fixture(scope="module")
def of_two_ranks(places: Places, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(2, tmp_path_factory.mktemp("ranks"), of_rank, places)


@pytest.mark.parametrize("kind", SERVED)
def test_two_ranks_generate_what_one_process_does_also_after_an_update(
    kind: str, places: Places, of_two_ranks: list[dict[str, Any]]
) -> None:
    before, after = of_two_ranks[0][kind]["tokens"]
    assert [before, after] == tokens(Parallel(), *places[kind])
    assert before != after


@pytest.mark.skipif(not build.is_possible(), reason="no compiler, or another kind of machine")
@pytest.mark.parametrize("kind", SERVED)
def test_each_rank_keeps_its_part_of_the_stored_numbers(
    kind: str, places: Places, of_two_ranks: list[dict[str, Any]]
) -> None:
    whole = load(Parallel(), places[kind][0], "bfloat16")
    assert whole.weights is not None
    names = {name for name in whole.weights.names() if whole.weights.quantized_of(name) is not None}
    assert (len(names) > 10) == (kind in KEPT)
    for rank, found in enumerate(of_two_ranks):
        assert found[kind]["quantized"] == names
        cuts = load(Parallel(rank, 2), places[kind][0], "bfloat16").weights.layout.cuts
        for name, part in found[kind]["values"].items():
            values = whole.weights.view(name)
            assert torch.equal(part, cuts[name].of(values) if name in cuts else values), name
        assert found[kind]["nbytes"] <= 0.56 * whole.weights.nbytes()  # norms and biases are whole, scales may be more


@pytest.mark.parametrize("kind", SERVED)
def test_ranks_in_bfloat16_are_as_near_as_one_process(
    kind: str, places: Places, of_two_ranks: list[dict[str, Any]]
) -> None:
    whole = load(Parallel(), places[kind][0], "bfloat16")
    exact = exact_logits(places[kind][0], whole)
    first, second = (found[kind]["logits"] for found in of_two_ranks)
    alone = logits_of(whole, PROMPTS[0])
    assert torch.equal(first, second)
    assert (first - exact).abs().mean() <= 1.5 * (alone - exact).abs().mean()


def exact_logits(directory: Path, values: ServedModel) -> torch.Tensor:
    """The logits of a prompt in float32, by the values that another model of the directory has."""
    served = load(Parallel(), directory, "float32", quantization="none")
    own, others = weights_of(served), weights_of(values)
    for name in own.names():
        own.view(name).copy_(others.view(name))
    own.after_update()
    return logits_of(served, PROMPTS[0])


def weights_of(model: ServedModel) -> Weights:
    assert model.weights is not None
    return model.weights


# What is refused, before a rank starts


def refusal(directory: Path, ranks: int, **settings: Any) -> str:
    config = resolved(model_path=str(directory), tp_size=ranks, device="cpu", **settings)
    with pytest.raises(StartupError) as refused:
        check_ranks(config, model_info.load(config))
    return str(refused.value)


@pytest.mark.skipif(not build.is_possible(), reason="no compiler, or another kind of machine")
def test_groups_of_stored_numbers_that_would_be_cut_are_refused_with_the_numbers(places: Places) -> None:
    assert refusal(places["awq"][0], 4, dtype="bfloat16") == (
        "--tp-size 4: each rank has 24 columns of model.layers.0.mlp.down_proj.weight, whose numbers share scales in "
        "groups of 32; as they are stored only whole groups of 16 can be kept; use another --tp-size, or "
        "--quantization none, which expands the weights"
    )
    for settings in ({"quantization": "none", "dtype": "bfloat16"}, {"dtype": "float32"}):
        config = resolved(model_path=str(places["awq"][0]), tp_size=4, device="cpu", **settings)
        check_ranks(config, model_info.load(config))


def test_gguf_files_are_served_by_one_machine(places: Places) -> None:
    said = refusal(places["Q8_0"][0], 2, nnodes=2, dist_init_addr="127.0.0.1:29500")
    assert said.startswith("--nnodes 2: a GGUF file is served by the processes of one machine")
