"""Ranks that have a part of the weights each give transformers' numbers, on small random models read from disk."""

from pathlib import Path

import pytest
import torch

from quartet.runtime.errors import StartupError
from quartet.runtime.model_files import model_info
from quartet.scheduler_service.host.parallel import Parallel
from quartet.scheduler_service.model.registry import decoder_spec, load_model
from quartet.scheduler_service.model.shards import shard_layout
from tests.configs import resolved
from tests.model import tiny
from tests.model.dense import DenseRunner
from tests.model.test_families import expected_logits
from tests.model.test_families import prompt as ids_of
from tests.ranks import run_ranks

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "qwen2_moe", "qwen3_moe", "mixtral"]
TOLERANCE = 1e-3


def logits_of(parallel: Parallel, directory: Path) -> dict[str, torch.Tensor]:
    """By family, the logits of a prompt in two chunks."""
    return {family: feed(parallel, directory / family) for family in FAMILIES}


def feed(parallel: Parallel, directory: Path) -> torch.Tensor:
    config = resolved(model_path=str(directory), device="cpu")
    runner = DenseRunner(load_model(config, model_info.load(config), torch.device("cpu"), parallel))
    ids = ids_of()
    return torch.cat([runner.feed([ids[:30]]), runner.feed([ids[30:]])])


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_ranks_of_every_family_give_the_logits_of_transformers(ranks: int, tmp_path: Path) -> None:
    for family in FAMILIES:
        tiny.build(family, tmp_path / family)
    found = run_ranks(ranks, tmp_path, logits_of, tmp_path)
    for family in FAMILIES:
        expected = expected_logits(family, ids_of())
        for rank in found:
            assert (rank[family] - expected).abs().max() <= TOLERANCE, family
            assert torch.equal(rank[family].argmax(1), expected.argmax(1)), family


def refusal(family: str, ranks: int, directory: Path, **overrides: object) -> str:
    path = tiny.build(family, directory, **overrides)
    spec = decoder_spec(model_info.load(resolved(model_path=str(path))))
    with pytest.raises(StartupError) as refused:
        shard_layout(spec, Parallel(0, ranks))
    return str(refused.value)


def test_sizes_that_cannot_be_divided_are_refused_by_name(tmp_path: Path) -> None:
    assert "--tp-size 3: 2 heads of keys and values" in refusal("llama", 3, tmp_path / "a")
    assert "--tp-size 8: 4 attention heads" in refusal("llama", 8, tmp_path / "b")
    assert "--tp-size 4: 98 columns" in refusal("llama", 4, tmp_path / "c", intermediate_size=98)
    assert "fused projections" in refusal("phi3", 2, tmp_path / "d")


def test_the_parts_of_all_ranks_make_up_each_tensor(tmp_path: Path) -> None:
    spec = decoder_spec(model_info.load(resolved(model_path=str(tiny.build("qwen2_moe", tmp_path)))))
    parts = [shard_layout(spec, Parallel(rank, 2)).cuts for rank in range(2)]
    for name, cut in parts[0].items():
        values = torch.arange(torch.Size(cut.whole).numel()).view(cut.whole)
        both = torch.cat([part[name].of(values) for part in parts], cut.dimension)
        assert torch.equal(both, values), name
