"""Gemma 3n and 4 by two ranks: embeddings for each layer, several residual streams, gates that are cut off together."""

from pathlib import Path
from typing import Any

import pytest
import torch

from quartet.kernels.cpu.native import build
from quartet.runtime.messages import LogprobOptions
from quartet.runtime.model_files import model_info
from quartet.scheduler_service.host.parallel import Parallel
from quartet.scheduler_service.model.registry import decoder_spec
from quartet.scheduler_service.model.shards import shard_layout
from quartet.scheduler_service.weights.inspection import Inspection
from tests.adapters import merge, write_adapter
from tests.configs import resolved
from tests.engine import Answer, Engine
from tests.gguf_files import Q8_0
from tests.model import parity, tiny
from tests.model.test_gguf import both
from tests.model.test_quantized_ranks import PROMPTS, exact_logits, kept
from tests.model.test_recurrent_ranks import DTYPES, GREEDY, TEXTS, bits, same, update
from tests.ranks import Served, load, logits_of, run_ranks, serve_cases, serving
from tests.tiered import OUTPUT_LOGPROBS

TABLE = "model.embed_tokens_per_layer.weight"
# directory → family, and what its config has besides
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3n": ("gemma3n", {}),
    "gemma3n with one head of keys": ("gemma3n", {"num_key_value_heads": 1}),
    "gemma4": ("gemma4", {}),
    "gemma4 whose tokens cannot be divided": ("gemma4", {"vocab_size_per_layer_input": tiny.VOCAB_SIZE + 1}),
}
CASES = {  # of the parity table
    "gemma3n": list(parity.CASES),
    "gemma3n with one head of keys": ["prefix hits"],
    "gemma4": list(parity.CASES),
    "gemma4 whose tokens cannot be divided": ["chunks of 16"],
}
FAMILIES = ["gemma3n", "gemma4"]
NAMES = ["", "a"]


def all_of_it(parallel: Parallel, models: Path) -> dict[Any, Any]:
    """Rank 0 has what came of it; of quantized weights each rank has its part."""
    found: dict[Any, Any] = {"parity": serve_cases(parallel, models, CASES, parity.FEW_TOKENS)}
    for family in FAMILIES:
        found |= {("bits", family, dtype): bits(parallel, models / family, dtype) for dtype in DTYPES}
        found["update", family] = update(parallel, models, family)
        found["adapters", family] = adapted(parallel, models, family)
        found["quantized", family] = kept(parallel, quantized(models, family))
    return found


def quantized(models: Path, family: str) -> Path:
    """The directory that describes a family's GGUF file."""
    return next((models / f"{family} in Q8_0").glob("gguf-*"))


def adapted(parallel: Parallel, models: Path, family: str) -> list[Answer]:
    """A prompt without and with an adapter, in one step."""
    with serving(parallel, models / family, enable_lora=True) as engine:
        if engine is None:
            return []
        store, directory = engine.worker.load_adapters(engine.config, str(models)), models / f"adapter of {family}"
        assert store is not None
        store.install("a", "a", str(directory), store.read(directory), pinned=False)
        engine.planner.waiting.set_adapter_versions(store.version_of)
        rids = [engine.add(TEXTS[1], GREEDY, adapter=name, logprobs=LogprobOptions(start=-1)) for name in NAMES]
        engine.run()
        return [engine.answers[rid] for rid in rids]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    for name, (family, overrides) in MODELS.items():
        tiny.build(family, directory / name, **overrides)
    for family in FAMILIES:
        tiny.build(family, directory / f"other {family}", seed=1)
        adapter = write_adapter(directory / family, directory / f"adapter of {family}")
        merge(directory / family, adapter, directory / f"merged {family}")
        both(family, directory / f"{family} in Q8_0", Q8_0, hidden_size_per_layer_input=32)
    return directory


@pytest.fixture(scope="module")
def of_both(models: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    return run_ranks(2, tmp_path_factory.mktemp("ranks"), all_of_it, models)


@pytest.fixture(scope="module")
def of_two_ranks(of_both: list[dict[Any, Any]]) -> dict[Any, Any]:
    return of_both[0]


@pytest.mark.parametrize(("name", "case"), [(name, case) for name, cases in CASES.items() for case in cases])
def test_two_ranks_agree_with_transformers(name: str, case: str, models: Path, of_two_ranks: dict[Any, Any]) -> None:
    served: Served = of_two_ranks["parity"][name, case]
    found = parity.compare(parity.Peer(models / name), *served, parity.FEW_TOKENS)
    assert found.tokens_equal and found.error <= parity.TOLERANCE, found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_deterministic_answers_have_the_same_bits_in_any_batch(
    family: str, dtype: str, of_two_ranks: dict[Any, Any]
) -> None:
    alone, together = of_two_ranks["bits", family, dtype]
    assert len(alone) == len(TEXTS) and together == alone


@pytest.mark.parametrize("family", FAMILIES)
def test_an_update_reaches_both_ranks(family: str, models: Path, of_two_ranks: dict[Any, Any]) -> None:
    answers, checksums = of_two_ranks["update", family]
    alone = Engine(models / f"other {family}")
    same(answers, alone.generate(TEXTS, GREEDY, logprobs=OUTPUT_LOGPROBS))
    inspection = Inspection(alone.worker.model.weights)
    assert TABLE in checksums and checksums == inspection.checksums(inspection.names(None))[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_of_all_layers_gives_what_a_merged_model_gives(
    family: str, models: Path, of_two_ranks: dict[Any, Any]
) -> None:
    merged = [Engine(models / name) for name in (family, f"merged {family}")]
    expected = [engine.generate([TEXTS[1]], GREEDY, logprobs=OUTPUT_LOGPROBS)[0] for engine in merged]
    assert expected[0].logprobs != expected[1].logprobs
    same(of_two_ranks["adapters", family], expected, error=1e-3)


@pytest.mark.skipif(not build.is_possible(), reason="no compiler, or another kind of machine")
@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_keep_their_parts_of_a_gguf_file_in_its_bits(
    family: str, models: Path, of_both: list[dict[Any, Any]]
) -> None:
    directory = quantized(models, family)
    whole = load(Parallel(), directory, "bfloat16")
    found = [rank["quantized", family] for rank in of_both]
    for rank, own in enumerate(found):
        cuts = load(Parallel(rank, 2), directory, "bfloat16").weights.layout.cuts
        assert TABLE in own["quantized"] and TABLE in cuts
        for name, part in own["values"].items():
            values = whole.weights.view(name)
            assert torch.equal(part, cuts[name].of(values) if name in cuts else values), name
    first, second = (own["logits"] for own in found)
    exact, alone = exact_logits(directory, whole), logits_of(whole, PROMPTS[0])
    assert torch.equal(first, second)
    assert (first - exact).abs().mean() <= 1.5 * (alone - exact).abs().mean()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rank_has_its_share_of_the_tokens_of_the_second_table(family: str, models: Path) -> None:
    spec = decoder_spec(model_info.load(resolved(model_path=str(models / family))))
    assert spec.layer_inputs is not None
    tokens, width = spec.layer_inputs.vocabulary, len(spec.layers) * spec.layer_inputs.size
    for rank in range(2):
        layout = shard_layout(spec, Parallel(rank, 2))
        assert layout.buffers["embed_by_layer"] == (tokens // 2, width)
        assert layout.cuts[TABLE].spans == ((rank * tokens // 2, tokens // 2),)
