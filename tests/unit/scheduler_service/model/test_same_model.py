"""An update whose config.json describes another model is refused, however its tensors fit; other spellings are not."""

import json
from pathlib import Path
from typing import Any

import pytest

from quartet.runtime import limits
from quartet.runtime.control import GetWeightsByName, UpdateWeightsFromDisk, UpdateWeightsFromDistributed
from quartet.runtime.errors import CommandRefused
from quartet.scheduler_service.weights.inspection import Inspection
from quartet.scheduler_service.weights.update import Updates
from tests import checkpoints
from tests.live import Live


@pytest.fixture
def live(tmp_path: Path) -> Live:
    return Live(checkpoints.random_model(tmp_path / "served", seed=1), tmp_path)


def update(live: Live, tmp_path: Path, **changes: Any) -> Any:
    """The reply to an update with the same tensors under a changed config; a value of None takes the field away."""
    directory = checkpoints.random_model(tmp_path / "new", seed=2)
    config = checkpoints.CONFIG | changes
    (directory / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return live.call(UpdateWeightsFromDisk(model_path=str(directory)))


OTHER_MODELS: list[tuple[dict[str, Any], str]] = [
    ({"rope_theta": 500000.0}, "rope_theta is 500000.0, the model that serves has 10000.0"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling is {"),
    ({"rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-05, the model that serves has 1e-06"),
    ({"hidden_act": "gelu"}, "hidden_act is gelu, the model that serves has silu"),
    ({"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}, "num_attention_heads is 8"),
    ({"num_hidden_layers": 1}, "num_hidden_layers is 1, the model that serves has 2"),
    ({"vocab_size": 300}, "vocab_size is 300, the model that serves has 320"),
    ({"architectures": ["Qwen2ForCausalLM"]}, "architectures is Qwen2ForCausalLM, the model that serves has Llama"),
    ({"num_hidden_layers": -5}, "num_hidden_layers is -5; it must be an integer from 1"),
    ({"rope_theta": "x" * 100_000}, "rope_theta is 'xxx"),
]


@pytest.mark.parametrize(("changes", "said"), OTHER_MODELS, ids=[said[:30] for _, said in OTHER_MODELS])
def test_another_model_is_refused_by_the_field_that_differs(
    live: Live, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    before = live.worker.model.weights.checksum("lm_head.weight")
    reply = update(live, tmp_path, **changes)
    assert reply.status == 400 and said in reply.message and len(reply.message) < 700
    assert live.worker.model.weights.checksum("lm_head.weight") == before


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"head_dim": 16},
        {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        {"rope_scaling": {"type": "default"}},
        {"torch_dtype": "bfloat16", "eos_token_id": [1, 2], "use_cache": False, "transformers_version": "9.9"},
        {"tie_word_embeddings": True},
        {"max_position_embeddings": 256},
        {"attention_bias": False, "mlp_bias": False, "rope_scaling": None, "hidden_act": None},
    ],
)
def test_the_same_model_in_other_words_is_taken(live: Live, tmp_path: Path, changes: dict[str, Any]) -> None:
    reply = update(live, tmp_path, **changes)
    assert reply.success, reply.message


def test_a_directory_without_a_config_is_taken(live: Live, tmp_path: Path) -> None:
    directory = checkpoints.random_model(tmp_path / "new", seed=2)
    (directory / "config.json").unlink()
    assert live.call(UpdateWeightsFromDisk(model_path=str(directory))).success


def test_more_rows_than_an_answer_can_bear_are_refused(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_SHOWN_WEIGHTS", 640)
    rows = live.call(GetWeightsByName(name="lm_head.weight", truncate_size=10)).body["rows"]
    assert (len(rows), len(rows[0])) == (10, 64)
    reply = live.call(GetWeightsByName(name="lm_head.weight", truncate_size=1 << 40))
    assert reply.status == 400 and "at most 10 rows of 64" in reply.message


def test_names_to_skip_are_looked_up_once_each(live: Live) -> None:
    class Counted(str):
        compared = 0

        def __eq__(self, other: object) -> bool:
            Counted.compared += 1
            return super().__eq__(other)

        __hash__ = str.__hash__

    names = Inspection(live.worker.model.weights).names([Counted(f"x{number}") for number in range(10_000)])
    assert len(names) == len(live.worker.model.weights.names()) and Counted.compared < 100


def test_a_broadcast_of_more_tensors_than_there_are_is_refused_before_it_is_looked_at(live: Live) -> None:
    updates: Updates = live.updates
    updates.groups["g"] = object()  # type: ignore[assignment]
    many = ["lm_head.weight"] * 200_000
    command = UpdateWeightsFromDistributed(names=many, dtypes=["float32"], shapes=[[1]], group_name="g")
    with pytest.raises(CommandRefused, match="there are 200000 names, the model has "):
        updates.broadcast(command)


def test_names_in_refusals_are_short(live: Live) -> None:
    updates: Updates = live.updates
    updates.groups["g"] = object()  # type: ignore[assignment]
    for names, dtypes, shapes in (
        (["n" * 100_000], ["float32"], [[1]]),
        (["lm_head.weight"], ["d" * 100_000], [[320, 64]]),
        (["lm_head.weight"], ["float32"], [[1] * 100_000]),
    ):
        command = UpdateWeightsFromDistributed(names=names, dtypes=dtypes, shapes=shapes, group_name="g")
        with pytest.raises(CommandRefused) as refusal:
            updates.broadcast(command)
        assert len(refusal.value.message) < 500
