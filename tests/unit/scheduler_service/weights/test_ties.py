"""Heads and embeddings: the checkpoint's tensors decide whether they are one, at the start and in every update."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save, save_file

from quartet.runtime.control import UpdateWeightsFromDisk, UpdateWeightsFromTensor
from quartet.runtime.messages import LogprobOptions, Reply
from quartet.runtime.sampling import SamplingParams
from quartet.scheduler_service.weights.manifest import manifest_of
from tests import checkpoints
from tests.engine import Engine
from tests.live import Live
from tests.model import tiny

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PROMPT = [5, 6, 7]


def saved(directory: Path, *, tied: bool, head: str) -> Path:
    """A random model under a config that says `tied`; its head is its own, the embeddings again, or not there."""
    checkpoints.write_config(directory, tie_word_embeddings=False)
    tensors = checkpoints.random_tensors(directory, seed=3)
    if head == "same":
        tensors[HEAD] = tensors[EMBED].clone()
    if head == "none":
        del tensors[HEAD]
    if head == "alone":
        del tensors[EMBED]
    checkpoints.write_config(directory, tie_word_embeddings=tied)
    return checkpoints.save(directory, tensors)


def expected(directory: Path) -> torch.Tensor:
    """The last logits of the prompt with a head as the checkpoint has it, by transformers' model."""
    tensors = load_file(directory / "model.safetensors")
    tensors.setdefault(HEAD, tensors.get(EMBED))
    tensors.setdefault(EMBED, tensors[HEAD])
    settings = transformers.AutoConfig.from_pretrained(directory, tie_word_embeddings=False)
    model = transformers.LlamaForCausalLM(settings)
    model.load_state_dict(tensors)
    return model(torch.tensor([PROMPT])).logits[0, -1]


@pytest.mark.parametrize(
    ("tied", "head", "said"),
    [
        (True, "own", "has values of its own"),
        (True, "same", ""),
        (True, "none", ""),
        (True, "alone", "embed_tokens.weight: lm_head.weight is used"),
        (False, "own", ""),
        (False, "same", ""),
        (False, "none", "the model is tied"),
    ],
)
def test_logits_are_those_of_the_tensors_that_the_checkpoint_has(
    tmp_path: Path, tied: bool, head: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    directory = saved(tmp_path / "model", tied=tied, head=head)
    with caplog.at_level(logging.WARNING):
        engine = Engine(directory)
    assert said in caplog.text and bool(said) == bool(caplog.messages)
    params = SamplingParams(temperature=0.0, max_new_tokens=1)
    [answer] = engine.generate([PROMPT], params, logprobs=LogprobOptions())
    logits = expected(directory)
    assert answer.ids[0] == logits.argmax().item()
    assert answer.logprobs is not None
    [found] = torch.frombuffer(bytearray(answer.logprobs.values), dtype=torch.float32).tolist()
    assert found == pytest.approx(logits.log_softmax(-1).max().item(), abs=1e-4)


def test_transformers_too_keeps_a_head_that_differs(tmp_path: Path) -> None:
    directory = saved(tmp_path / "model", tied=True, head="own")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    assert torch.allclose(model(torch.tensor([PROMPT])).logits[0, -1], expected(directory), atol=1e-5)


def started(tmp_path: Path, **model: Any) -> Live:
    return Live(saved(tmp_path / "start", **model), tmp_path)


def updated(live: Live, directory: Path, **fields: Any) -> Reply:
    return live.call(UpdateWeightsFromDisk(model_path=str(directory), **fields))


def test_an_update_with_a_head_of_its_own_is_refused_where_the_model_has_one_tensor_for_both(tmp_path: Path) -> None:
    live = started(tmp_path, tied=True, head="none")
    reply = updated(live, saved(tmp_path / "next", tied=True, head="own"))
    assert reply.status == 400 and "lm_head.weight differs from model.embed_tokens.weight" in reply.message
    assert updated(live, saved(tmp_path / "same", tied=True, head="same")).success


@pytest.mark.parametrize("listed", [False, True])
def test_an_update_without_a_head_gives_the_head_the_embeddings(tmp_path: Path, listed: bool) -> None:
    live = started(tmp_path, tied=False, head="own")
    directory = saved(tmp_path / "next", tied=True, head="none")
    assert updated(live, directory, manifest=manifest_of(directory) if listed else None).success
    served = live.scheduler.worker.model.weights
    assert torch.equal(served.view(HEAD), load_file(directory / "model.safetensors")[EMBED])


def sent(live: Live, tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Reply:
    file = tmp_path / "payload"
    file.write_bytes(save(tensors))
    return live.call(UpdateWeightsFromTensor(payload_files=[str(file)]))


def test_a_head_over_the_wire_must_equal_the_embeddings_that_it_is_tied_to(tmp_path: Path) -> None:
    live = started(tmp_path, tied=True, head="none")
    new = torch.randn(checkpoints.VOCAB_SIZE, 64)
    reply = sent(live, tmp_path, {EMBED: new, HEAD: new + 1})
    assert reply.status == 400 and "lm_head.weight differs" in reply.message
    assert sent(live, tmp_path, {EMBED: new, HEAD: new.clone()}).success
    assert sent(live, tmp_path, {HEAD: new}).success
    assert not sent(live, tmp_path, {HEAD: new + 1}).success
    assert torch.equal(live.scheduler.worker.model.weights.view(EMBED), new)


def test_a_head_of_another_shape_over_the_wire_is_refused(tmp_path: Path) -> None:
    live = started(tmp_path, tied=True, head="none")
    assert sent(live, tmp_path, {HEAD: torch.ones(3, 2)}).status == 400


def test_a_model_of_transformers_follows_the_tensors_as_well(tmp_path: Path) -> None:
    directory = tiny.build("starcoder2", tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    del tensors[HEAD]
    save_file(tensors, directory / "model.safetensors")
    weights = Engine(directory).worker.model.weights
    assert HEAD not in weights.layout.places and weights.layout.ties[HEAD] == EMBED
