"""Ranks that have a part of the weights each give transformers' numbers, on small random models read from disk."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quartet.runtime.errors import StartupError
from quartet.runtime.model_files import model_info
from quartet.scheduler_service.host.parallel import Parallel
from quartet.scheduler_service.model.registry import check_ranks, decoder_spec
from quartet.scheduler_service.model.shards import shard_layout, shard_spec
from tests.configs import resolved
from tests.model import parity, tiny
from tests.model.test_families import expected_logits
from tests.model.test_families import prompt as ids_of
from tests.ranks import Computed, computed, logits, run_ranks

CASES = {  # of the parity table; `python -m tests.model.parity_table --tp-size 2` has all of them
    "llama": ["retraction"],
    "qwen2": ["prefix hits"],
    "qwen2_moe": ["chunks of 16"],
    "qwen3_moe": ["16 at once"],
    "gemma3": ["one request"],
    "gemma3n": ["retraction"],
    "gemma4": ["16 at once"],  # and 3n: test_gemma_ranks.py has more of both
    "gemma4_moe": ["prefix hits"],
    "gemma4_unified": ["chunks of 16"],
    "phi3": ["16 at once"],  # its checkpoints have queries, keys and values in one tensor, gates and ups in another
    "glm4": ["one request"],
    "olmo2": ["prefix hits"],  # queries and keys are normed over the heads of all ranks
    "minimax_m2": ["chunks of 16"],
    "deepseek_v2": ["16 at once"],
    "gpt_oss": ["chunks of 16"],  # biases behind sums, sinks by head, experts whose columns come first
    "deepseek_v3": ["prefix hits"],  # each rank has all of the latent vectors
}
RECURRENT = [
    "qwen3_next",
    "qwen3_5",
    "granite_hybrid",
    "nemotron_h",
    "falcon_h1",
    "bamba",
    "lfm2",
    "olmo_hybrid",
    "kimi_linear",
]
BFLOAT16 = ["llama", "qwen3_moe", "gemma3n", "gemma4", "gemma4_moe", "olmo2", "gpt_oss"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    for family in CASES:
        tiny.build(family, directory / family)
    return directory


@pytest.fixture(scope="module")
def of_two_ranks(models: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Computed]:
    return run_ranks(
        2, tmp_path_factory.mktemp("ranks"), computed, models, CASES, parity.FEW_TOKENS, BFLOAT16, ids_of()
    )


@pytest.mark.parametrize("family", CASES)
def test_two_ranks_agree_with_transformers(family: str, models: Path, of_two_ranks: list[Computed]) -> None:
    peer, (served, _) = parity.Peer(models / family), of_two_ranks[0]
    for case in CASES[family]:
        found = parity.compare(peer, *served[family, case], parity.FEW_TOKENS)
        assert found.tokens_equal and found.error <= parity.TOLERANCE, found


@pytest.mark.parametrize("family", BFLOAT16)
def test_ranks_in_bfloat16_are_as_near_as_one_process(family: str, models: Path, of_two_ranks: list[Computed]) -> None:
    expected = expected_logits(family, ids_of())
    first, second = (bfloat16[family] for _, bfloat16 in of_two_ranks)
    alone = (logits(Parallel(), models / family, "bfloat16", ids_of()) - expected).abs().mean()
    assert (first - expected).abs().mean() <= 1.5 * alone
    assert torch.equal(first, second)


def test_neighbouring_ranks_share_a_head_of_keys_where_there_are_fewer(tmp_path: Path) -> None:
    spec = decoder_spec(model_info.load(resolved(model_path=str(tiny.build("llama", tmp_path)))))
    cuts = [shard_layout(spec, Parallel(rank, 4)).cuts for rank in range(4)]
    keys = [rank["model.layers.0.self_attn.k_proj.weight"] for rank in cuts]
    assert (spec.heads, spec.kv_heads) == (4, 2)
    assert [cut.spans for cut in keys] == [((spec.head_dim * (rank // 2), spec.head_dim),) for rank in range(4)]


def test_layers_of_other_sizes_are_cut_by_their_own(tmp_path: Path) -> None:
    path = tiny.build("gemma4_unified", tmp_path, attention_k_eq_v=True, num_global_key_value_heads=1)
    spec = decoder_spec(model_info.load(resolved(model_path=str(path))))
    own = shard_spec(spec, 2)
    assert [(spec.head_dim_of(layer), spec.kv_heads_of(layer)) for layer in (0, 1)] == [(16, 2), (32, 1)]
    assert [(own.head_dim_of(layer), own.kv_heads_of(layer)) for layer in (0, 1)] == [(16, 1), (32, 1)]
    assert [layer.intermediate_size for layer in own.layers] == [None, None, None, 96, 96]
    with pytest.raises(StartupError, match="--tp-size 4: 98 columns of the feed-forward block"):
        shard_spec(replace(spec, layers=(replace(spec.layers[0], intermediate_size=98),)), 4)


def refusal(family: str, ranks: int, directory: Path, **overrides: object) -> str:
    path = tiny.build(family, directory, **overrides)
    spec = decoder_spec(model_info.load(resolved(model_path=str(path))))
    with pytest.raises(StartupError) as refused:
        shard_layout(spec, Parallel(0, ranks))
    return str(refused.value)


def test_models_without_a_native_family_are_refused_before_a_rank_starts(tmp_path: Path) -> None:
    config = resolved(model_path=str(tiny.build("mamba", tmp_path)), tp_size=2)
    with pytest.raises(StartupError) as refused:
        check_ranks(config, model_info.load(config))
    why = "there is no native family for architecture MambaForCausalLM"
    assert str(refused.value) == f"--tp-size 2: {why}, which one process computes; use --tp-size 1"


def test_sizes_that_cannot_be_divided_are_refused_by_name(tmp_path: Path) -> None:
    assert "--tp-size 3: 2 heads of keys and values" in refusal("llama", 3, tmp_path / "a")
    assert "--tp-size 8: 4 attention heads" in refusal("llama", 8, tmp_path / "b")
    assert "--tp-size 4: 98 columns" in refusal("llama", 4, tmp_path / "c", intermediate_size=98)
    assert "--tp-size 4: 2 heads of keys of linear attention" in refusal("qwen3_next", 4, tmp_path / "d")


@pytest.mark.parametrize("family", ["qwen2_moe", "phi3", "deepseek_v3", "gpt_oss", "gemma3n", "gemma4", *RECURRENT])
def test_the_parts_of_all_ranks_make_up_each_tensor(family: str, tmp_path: Path) -> None:
    spec = decoder_spec(model_info.load(resolved(model_path=str(tiny.build(family, tmp_path)))))
    parts = [shard_layout(spec, Parallel(rank, 2)).cuts for rank in range(2)]
    for name, cut in parts[0].items():
        values = torch.arange(torch.Size(cut.whole).numel()).view(cut.whole)
        both, assembled = [part[name].of(values) for part in parts], torch.zeros_like(values)
        for part, own in zip(parts, both, strict=True):
            part[name].put(own, assembled)
        assert torch.equal(assembled, values), name
        assert sum(own.numel() for own in both) == values.numel(), name
