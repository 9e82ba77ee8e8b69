"""Metadata of any kind becomes a config whose values are in their ranges, or one line that says why not."""

import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quartet.runtime.model_files import gguf_config, gguf_tokenizer, model_ranges
from quartet.runtime.model_files.gguf import TYPES, GgufError, Header, LongArray, Tensor
from quartet.runtime.model_files.gguf_metadata import ARCHITECTURES, shortest

FILE = Path("model.gguf")
EMBEDDINGS = Tensor(FILE, TYPES[0], (8, 16), 0, 512)
ALL_TENSORS = (gguf_config.EMBEDDINGS, "per_layer_token_embd.weight", "blk.0.laurel_l.weight")
KEYS = (
    *gguf_config.FIELDS,
    *("attention.value_length", "rope.dimension_count", "expert_count", "attention.sliding_window_pattern"),
    *("rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scale_linear"),
    *("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_attn_factor", "rope.freq_base_swa"),
    *("attention.shared_kv_layers", "attention.key_length_swa", "embedding_length_per_layer_input"),
    *("activation_sparsity_scale", "altup.num_inputs", "altup.active_idx"),
)
TOKENIZER_KEYS = ("model", "pre", "tokens", "token_type", "scores", "merges", "bos_token_id", "add_bos_token")
NUMBERS = st.integers(-(1 << 63), 1 << 64) | st.floats(width=32) | st.sampled_from([0, 1, 2, 64, 1.0, float("nan")])
VALUES = NUMBERS | st.booleans() | st.text(max_size=5) | st.lists(NUMBERS | st.booleans(), max_size=3)
SOUND = {
    "block_count": 2,
    "context_length": 64,
    "embedding_length": 16,
    "feed_forward_length": 16,
    "attention.head_count": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 2.0,
}


def header(architecture: str, keys: dict[str, Any], tokenizer: dict[str, Any] | None = None) -> Header:
    metadata = {f"{architecture}.{key}": value for key, value in keys.items()}
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in (tokenizer or {}).items()}
    return Header(FILE, {"general.architecture": architecture, **metadata}, dict.fromkeys(ALL_TENSORS, EMBEDDINGS))


@settings(max_examples=600, deadline=None)
@given(
    architecture=st.sampled_from(sorted(ARCHITECTURES)),
    changes=st.dictionaries(st.sampled_from(KEYS), VALUES | st.just(LongArray(9)), max_size=4),
)
def test_any_metadata_gives_values_in_their_ranges_or_is_refused(architecture, changes):
    try:
        config = gguf_config.config_of(header(architecture, {**SOUND, **changes}))
    except GgufError as error:
        assert str(error).startswith(str(FILE)) and "\n" not in str(error)
        return
    assert model_ranges.checked(config) == config


@settings(max_examples=600, deadline=None)
@given(
    model=st.sampled_from(["gpt2", "llama"]),
    changes=st.dictionaries(
        st.sampled_from(TOKENIZER_KEYS), VALUES | st.lists(st.sampled_from(["a", "b", "ab", "a b", ""])), max_size=4
    ),
)
def test_any_vocabulary_gives_a_tokenizer_or_is_refused(model, changes):
    sound = {"model": model, "pre": "gpt-2", "tokens": ["a", "b", "ab"], "token_type": [1, 1, 3]}
    found = header("llama", SOUND, {**sound, "scores": [0.0, -1.0, -2.0], "merges": ["a b"], **changes})
    try:
        gguf_tokenizer.tokenizer_of(found)
        gguf_tokenizer.settings_of(found)
    except GgufError as error:
        assert str(error).startswith(str(FILE)) and "\n" not in str(error)


@pytest.mark.parametrize("value", [1e-6, 1e-5, 10000.0, 0.1, 1000000.0, 3.25, 1.1902380714238083])
def test_a_number_is_the_shortest_that_rounds_to_the_float32_of_the_file(value):
    stored = struct.unpack("<f", struct.pack("<f", value))[0]
    assert struct.pack("<f", shortest(stored)) == struct.pack("<f", value)
    assert len(repr(shortest(stored))) <= max(len(repr(value)), 12)
