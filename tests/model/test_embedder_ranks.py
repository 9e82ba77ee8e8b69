"""Decoders that embed, score or rerank, by two ranks: transformers' numbers in fp32, updates; what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from quartet.runtime.errors import StartupError
from quartet.runtime.model_files import model_info
from quartet.scheduler_service.execution.rank_updates import LeadingUpdates
from quartet.scheduler_service.execution.ranks import LeadingSteps
from quartet.scheduler_service.host.parallel import Parallel
from quartet.scheduler_service.model.registry import check_ranks
from tests.configs import resolved
from tests.model import embedders
from tests.model.embedders import Embedder, cosine, hidden_states, scores, texts
from tests.model.test_encoders import LEAST_COSINE, LENGTHS, MOST_ERROR, assert_same_vector
from tests.ranks import leading, load, run_ranks

VECTORS = ["LlamaModel", "MistralModel", "Qwen2ForCausalLM", "Qwen3Model"]
SCORES = "Qwen3ForSequenceClassification"
GEMMA = "gemma/saved"
SETTINGS: dict[str, dict[str, Any]] = {
    **{name: {"chunked_prefill_size": 16} for name in (*VECTORS, SCORES)},
    "Qwen2ForCausalLM": {"is_embedding": True},
    GEMMA: {},
}
IN_BFLOAT16 = "Qwen3Model"

Vectors = list[torch.Tensor]


def all_of_it(parallel: Parallel, models: Path) -> dict[Any, Vectors]:
    """Rank 0 has what came of it."""
    found = {name: embedded(parallel, models / name, **settings) for name, settings in SETTINGS.items()}
    found["bfloat16"] = embedded(parallel, models / IN_BFLOAT16, dtype="bfloat16")
    found["updated"] = updated(parallel, models / "LlamaModel", models / "other")
    return found


def embedded(parallel: Parallel, place: Path, dtype: str = "float32", **settings: Any) -> Vectors:
    with leading(parallel, load(parallel, place, dtype, **settings), place) as make_worker:
        if make_worker is None:
            return []
        return Embedder(place, make_worker, dtype=dtype, **settings).embed(texts(*LENGTHS))


def updated(parallel: Parallel, place: Path, other: Path) -> Vectors:
    """What other weights answer after a swap."""
    with leading(parallel, load(parallel, place, "float32"), place) as make_worker:
        if make_worker is None:
            return []
        embedder = Embedder(place, make_worker)
        steps = embedder.worker.steps
        assert isinstance(steps, LeadingSteps)
        config = resolved(model_path=str(place), model_dir=str(place), tp_size=parallel.size)
        updates = LeadingUpdates(embedder.worker.model.weights, config, str(place), lambda _: None, steps.followers)
        updates.swap(updates.from_disk(str(other), "auto", None), "2")
        return embedder.embed(texts(*LENGTHS))


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The libraries' own models by the name of their folder, and the place of all folders."""
    place = tmp_path_factory.mktemp("models")
    found = {name: embedders.build(name, place / name) for name in VECTORS}
    found[SCORES] = embedders.build(SCORES, place / SCORES, num_labels=3)
    found["other"] = embedders.build("LlamaModel", place / "other", seed=1)
    return {**found, GEMMA: embedders.save_bidirectional_gemma(place / "gemma"), "place": place}


@pytest.fixture(scope="module")
def of_two_ranks(peers: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Vectors]:
    found: dict[Any, Vectors] = run_ranks(2, tmp_path_factory.mktemp("ranks"), all_of_it, peers["place"])[0]
    return found


@pytest.mark.parametrize("name", VECTORS)
def test_two_ranks_give_the_last_state_normalised(
    name: str, peers: dict[str, Any], of_two_ranks: dict[Any, Vectors]
) -> None:
    peer = getattr(peers[name], "model", peers[name])  # without a head
    for ids, ours in zip(texts(*LENGTHS), of_two_ranks[name], strict=True):
        assert_same_vector(ours, F.normalize(hidden_states(peer, ids)[-1], dim=0))


def test_two_ranks_give_the_scores_of_a_classifier(peers: dict[str, Any], of_two_ranks: dict[Any, Vectors]) -> None:
    for ids, ours in zip(texts(*LENGTHS), of_two_ranks[SCORES], strict=True):
        expected = scores(peers[SCORES], ids)
        assert ours.shape == expected.shape and float((ours - expected).abs().max()) <= MOST_ERROR


def test_two_ranks_give_the_vectors_of_attention_that_looks_ahead(
    peers: dict[str, Any], of_two_ranks: dict[Any, Vectors]
) -> None:
    alone = Embedder(peers["place"] / GEMMA).embed(texts(*LENGTHS))
    for ids, own, ours in zip(texts(*LENGTHS), alone, of_two_ranks[GEMMA], strict=True):
        features = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.int64)}
        with torch.inference_mode():
            theirs = peers[GEMMA](features)["sentence_embedding"][0]
        assert len(ours) == 48
        assert_same_vector(ours, theirs)
        assert_same_vector(ours, own)


def test_two_ranks_in_bfloat16_are_as_near_as_one_process(
    peers: dict[str, Any], of_two_ranks: dict[Any, Vectors]
) -> None:
    given = texts(*LENGTHS)
    exact = [F.normalize(hidden_states(peers[IN_BFLOAT16], ids)[-1], dim=0) for ids in given]
    alone = Embedder(peers["place"] / IN_BFLOAT16, dtype="bfloat16").embed(given)

    def error(found: Vectors) -> float:
        return float(torch.stack([(own - its).abs().mean() for own, its in zip(found, exact, strict=True)]).mean())

    assert error(of_two_ranks["bfloat16"]) <= 1.5 * error(alone)


def test_an_update_reaches_both_ranks(peers: dict[str, Any], of_two_ranks: dict[Any, Vectors]) -> None:
    for ids, ours in zip(texts(*LENGTHS), of_two_ranks["updated"], strict=True):
        expected = F.normalize(hidden_states(peers["other"], ids)[-1], dim=0)
        assert cosine(ours, expected) >= LEAST_COSINE


@pytest.mark.parametrize(
    ("architecture", "settings", "why"),
    [
        ("BertModel", {}, "--tp-size 2: BertModel is an encoder, which one process computes; use --tp-size 1"),
        ("Qwen3Model", {"quantization": "int8"}, "--quantization int8 is for models that generate; leave it out"),
        (
            "Qwen3Model",
            {"tp_size": 3},
            "--tp-size 3: 2 heads of keys and values cannot be divided among the ranks; use a --tp-size that divides "
            "them",
        ),
    ],
)
def test_embedders_that_cannot_be_divided_are_refused_before_a_rank_starts(
    architecture: str, settings: dict[str, Any], why: str, tmp_path: Path
) -> None:
    embedders.build(architecture, tmp_path)
    config = resolved(**{"model_path": str(tmp_path), "tp_size": 2, **settings})
    with pytest.raises(StartupError) as refused:
        check_ranks(config, model_info.load(config))
    assert str(refused.value) == why
