"""jina-embeddings-v3: each text of a batch has the adapter of its own task, as transformers and peft have it."""

import random

import pytest
import torch

from quartet.runtime.errors import StartupError
from tests.model import embedders, jina
from tests.model.embedders import Embedder, cosine, floats, texts

LEAST_COSINE = 0.99999
CHOICES = ("", *jina.TASKS)
LIMITS = {"max_total_tokens": 20000, "max_prefill_tokens": 20000, "chunked_prefill_size": 20000}


def embed(embedder: Embedder, given, tasks) -> list[torch.Tensor]:
    """One vector for each text, of all in one batch."""
    rids = [embedder.add(ids, task_adapter=task) for ids, task in zip(given, tasks, strict=True)]
    embedder.run()
    return [torch.tensor(floats(embedder.updates[rid].vector)) for rid in rids]


def mixed(count: int) -> tuple[list[list[int]], list[str]]:
    """Texts of many lengths, and a task or none for each."""
    chance = random.Random(11)
    return texts(*(chance.randint(1, 60) for _ in range(count))), [chance.choice(CHOICES) for _ in range(count)]


def test_200_texts_of_all_tasks_in_one_batch_are_as_each_tasks_merged_weights_have_them(tmp_path):
    models = jina.makers(tmp_path)
    given, tasks = mixed(200)
    embedder = Embedder(tmp_path, max_running_requests=256, **LIMITS)
    ours = embed(embedder, given, tasks)
    assert len(embedder.steps) == 1 and set(tasks) == set(CHOICES)
    theirs = [jina.vector(embedders.hidden_states(models[task], ids)) for ids, task in zip(given, tasks, strict=True)]
    assert min(map(cosine, ours, theirs)) >= LEAST_COSINE
    base = [jina.vector(embedders.hidden_states(models[""], ids)) for ids in given]
    others = [cosine(*pair) for *pair, task in zip(ours, base, tasks, strict=True) if task]
    assert max(others) < 0.99, "adapters must count"


def test_200_texts_of_all_tasks_in_one_batch_are_as_peft_has_them(tmp_path):
    peer = jina.Folders(tmp_path)
    given, tasks = mixed(200)
    embedder = Embedder(tmp_path, max_running_requests=256, **LIMITS)
    ours = embed(embedder, given, tasks)
    theirs = [jina.vector(peer.hidden_states(task, ids)) for ids, task in zip(given, tasks, strict=True)]
    assert min(map(cosine, ours, theirs)) >= LEAST_COSINE


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_tasks_are_computed_in_other_dtypes_too(dtype, tmp_path):
    models = jina.makers(tmp_path)
    given, tasks = mixed(12)
    ours = embed(Embedder(tmp_path, dtype=dtype), given, tasks)
    theirs = [jina.vector(embedders.hidden_states(models[task], ids)) for ids, task in zip(given, tasks, strict=True)]
    assert min(map(cosine, ours, theirs)) >= 0.999


def test_new_weights_bring_new_adapters(tmp_path):
    jina.makers(tmp_path)
    [ids] = texts(20)
    embedder = Embedder(tmp_path)
    weights = embedder.worker.model.weights
    [before] = embed(embedder, [ids], ["separation"])
    staged = weights.staging()
    for buffer in weights.buffers:
        staged.copy_buffer(weights, buffer)
    names = [name for name in weights.names() if name.endswith("lora_B")]
    for name in names:
        staged.view(name).zero_()
    weights.take_over(staged, names, weights.pack(staged, names))
    [after], [base] = (embed(embedder, [ids], [task]) for task in ("separation", ""))
    assert not torch.allclose(before, after, atol=1e-3) and torch.allclose(after, base, atol=1e-6)


def test_tasks_are_those_whose_folders_are_there(tmp_path):
    jina.Folders(tmp_path, jina.TASKS[:2])
    embedding = Embedder(tmp_path).info.embedding
    assert embedding.tasks == {"retrieval.query": "retrieval_query", "retrieval.passage": "retrieval_passage"}
    assert embedding.prompts == jina.INSTRUCTIONS


def test_tasks_without_adapters_in_the_checkpoint_are_refused(tmp_path):
    embedders.build("JinaEmbeddingsV3Model", tmp_path)
    embedders.change_config(tmp_path, **jina.MAKERS, **jina.SETTINGS)
    with pytest.raises(StartupError, match=r"names tasks with adapters .* the checkpoint has none"):
        Embedder(tmp_path)


def test_adapters_of_different_scales_are_refused(tmp_path):
    jina.Folders(tmp_path, jina.TASKS[:1], alpha_pattern={"q_proj": 3})
    with pytest.raises(StartupError, match="differ in rank or scale"):
        Embedder(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lora_adaptations": ["../x"]}, "must name at most 64 different tasks"),
        ({"lora_adaptations": ["a", "a"]}, "must name at most 64 different tasks"),
        ({"default_task": "b"}, "default_task is b, and the adapters here are retrieval.query"),
        ({"task_instructions": {"separation": 1}}, "task_instructions"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused_by_name(change, words, tmp_path):
    embedders.build("JinaEmbeddingsV3Model", tmp_path)
    embedders.change_config(tmp_path, **{**jina.MAKERS, **jina.SETTINGS, **change})
    with pytest.raises(StartupError, match=words):
        Embedder(tmp_path)
