"""Embedding, reward and reranking models give what transformers gives, in fp32, whatever shares their batch."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from quartet.runtime.errors import RequestError, StartupError
from quartet.runtime.sampling import SamplingParams
from quartet.scheduler_service.weights.checkpoint import Checkpoint
from quartet.scheduler_service.weights.load import read_weights
from tests.model import embedders
from tests.model.embedders import DECODERS, ENCODERS, Embedder, cosine, hidden_states, scores, texts

LENGTHS = (5, 40, 17, 17, 90, 1, 5, 33)  # mixed, some alike; 40 and 90 exceed the windows
LEAST_COSINE = 0.99999
MOST_ERROR = 1e-4  # of a score


def assert_same_vector(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert cosine(ours, theirs) >= LEAST_COSINE
    assert torch.allclose(ours, theirs, atol=2e-5), (ours - theirs).abs().max()


@pytest.mark.parametrize("family", ENCODERS)
def test_an_encoder_gives_its_first_state_normalised(family, tmp_path):
    peer = embedders.build(f"{family}Model", tmp_path)
    given = texts(*LENGTHS)
    for ids, ours in zip(given, Embedder(tmp_path).embed(given), strict=True):
        assert_same_vector(ours, F.normalize(hidden_states(peer, ids)[0], dim=0))


@pytest.mark.parametrize("family", DECODERS)
def test_a_decoder_gives_its_last_state_normalised(family, tmp_path):
    peer = embedders.build(f"{family}Model", tmp_path)
    given = texts(*LENGTHS)
    for ids, ours in zip(given, Embedder(tmp_path, chunked_prefill_size=16).embed(given), strict=True):
        assert_same_vector(ours, F.normalize(hidden_states(peer, ids)[-1], dim=0))


def test_a_generating_architecture_embeds_when_told_to(tmp_path):
    peer = embedders.build("Qwen2ForCausalLM", tmp_path)
    [ids] = texts(20)
    [ours] = Embedder(tmp_path, is_embedding=True).embed([ids])
    assert_same_vector(ours, F.normalize(hidden_states(peer.model, ids)[-1], dim=0))


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Mistral", "Qwen3"])
def test_a_reward_model_gives_its_raw_score(family, tmp_path):
    peer = embedders.build(f"{family}ForSequenceClassification", tmp_path, num_labels=1)
    embedder = Embedder(tmp_path)
    given = texts(*LENGTHS)
    for ids, ours in zip(given, embedder.embed(given), strict=True):
        assert ours.shape == (1,) and abs(float(ours - scores(peer, ids))) <= MOST_ERROR
    assert not any(update.scalar for update in embedder.updates.values())


def test_a_reward_model_may_have_a_head_of_two_layers(tmp_path):
    peer = embedders.build("Qwen2Model", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["Qwen2ForRewardModel"]}))
    head = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
    wrapped = torch.nn.ModuleDict({"model": peer, "score": head})
    save(wrapped, tmp_path)
    given = texts(*LENGTHS)
    for ids, ours in zip(given, Embedder(tmp_path).embed(given), strict=True):
        with torch.inference_mode():
            theirs = head(hidden_states(peer, ids)[-1])
        assert abs(float(ours - theirs)) <= MOST_ERROR


def save(model: torch.nn.Module, directory) -> None:
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, directory / "model.safetensors")


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize("labels", [1, 3])
def test_a_cross_encoder_gives_its_logits(family, labels, tmp_path):
    peer = embedders.build(f"{family}ForSequenceClassification", tmp_path, num_labels=labels)
    embedder = Embedder(tmp_path)
    given = texts(*LENGTHS)
    for ids, ours in zip(given, embedder.embed(given), strict=True):
        assert ours.shape == (labels,) and (ours - scores(peer, ids)).abs().max() <= MOST_ERROR
    assert {update.scalar for update in embedder.updates.values()} == {labels == 1}


def test_token_types_tell_the_texts_of_a_pair_apart(tmp_path):
    peer = embedders.build("BertForSequenceClassification", tmp_path, num_labels=1)
    embedder = Embedder(tmp_path)
    pairs = [(ids, [0] * 4 + [1] * (len(ids) - 4)) for ids in texts(9, 30, 9)]
    rids = [embedder.add(ids, types) for ids, types in pairs] + [embedder.add(pairs[0][0])]
    embedder.run()
    ours = [embedders.floats(embedder.updates[rid].vector)[0] for rid in rids]
    for (ids, types), score in zip(pairs, ours, strict=False):
        assert abs(score - float(scores(peer, ids, types))) <= MOST_ERROR
    assert abs(ours[0] - ours[3]) > MOST_ERROR, "types must count"


def test_scores_pass_the_activation_that_the_config_names(tmp_path):
    name = "torch.nn.modules.activation.Sigmoid"
    settings = {"sbert_ce_default_activation_function": name, "num_labels": 1}
    peer = embedders.build("XLMRobertaForSequenceClassification", tmp_path, **settings)
    [ids] = texts(12)
    [ours] = Embedder(tmp_path).embed([ids])
    assert abs(float(ours - scores(peer, ids).sigmoid())) <= MOST_ERROR


def test_an_activation_outside_of_torch_is_refused(tmp_path):
    embedders.build("BertForSequenceClassification", tmp_path, sbert_ce_default_activation_function="os.system")
    with pytest.raises(StartupError, match=r"activation os\.system"):
        Embedder(tmp_path)


def test_an_activation_of_the_layers_that_we_lack_is_refused(tmp_path):
    embedders.build("BertModel", tmp_path, hidden_act="mish")
    with pytest.raises(StartupError, match="activation mish"):
        Embedder(tmp_path)


def test_local_attention_sees_half_a_window_on_either_side(tmp_path):
    """With and without a mask: texts up to half a window need none."""
    peer = embedders.build("ModernBertModel", tmp_path, local_attention=8)
    given = texts(4, 5, 6, 9, 64)
    for ids, ours in zip(given, Embedder(tmp_path).embed(given), strict=True):
        assert_same_vector(ours, F.normalize(hidden_states(peer, ids)[0], dim=0))


def test_a_decoder_that_looks_both_ways_computes_prompts_whole(tmp_path):
    """`is_causal: false`, as gte-Qwen2 has it."""
    peer = embedders.build("Qwen2Model", tmp_path, is_causal=False)
    embedder = Embedder(tmp_path, chunked_prefill_size=8)
    given = texts(30, 12)
    for ids, ours in zip(given, embedder.embed(given), strict=True):
        batch = torch.tensor([ids])
        mask = torch.zeros(1, 1, len(ids), len(ids))
        with torch.inference_mode():
            state = peer(batch, attention_mask={"full_attention": mask}).last_hidden_state[0, -1]
        assert_same_vector(ours, F.normalize(state, dim=0))
    assert not embedder.planner.config.reuse_prefixes


def test_a_text_has_the_same_bits_alone_and_in_a_crowd(tmp_path):
    embedders.build("BertModel", tmp_path)
    embedder = Embedder(tmp_path)
    given = texts(*LENGTHS)
    for ids, crowd in zip(given, embedder.embed(given), strict=True):
        [alone] = embedder.embed([ids])
        assert cosine(alone, crowd) >= LEAST_COSINE and torch.allclose(alone, crowd, atol=1e-6)


def test_items_of_one_request_find_each_others_prefix(tmp_path):
    """As the seed document shows: two conversations of 69 tokens that share 62, after one token was cached before."""
    embedders.build("LlamaForSequenceClassification", tmp_path, num_labels=1)
    embedder = Embedder(tmp_path)
    shared, first, second, warm_up = texts(62, 7, 7, 6)
    embedder.embed([shared[:1] + warm_up])
    embedder.steps.clear()
    embedder.embed([shared + first, shared + second])
    assert embedder.steps == [(68, 1), (7, 62)]


def test_the_longest_text_fits_and_one_token_more_does_not(tmp_path):
    """RoBERTa's positions begin behind its padding id: two of the table's rows are lost."""
    peer = embedders.build("RobertaModel", tmp_path)
    embedder = Embedder(tmp_path)
    [ids] = texts(198)
    [ours] = embedder.embed([ids])
    assert_same_vector(ours, F.normalize(hidden_states(peer, ids)[0], dim=0))
    with pytest.raises(RequestError, match="198 tokens"):
        embedder.add([*ids, 5])


def test_old_names_of_norms_are_read(tmp_path):
    peer = embedders.build("BertModel", tmp_path)
    renamed = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in peer.state_dict().items()
    }
    save_file({f"bert.{name}": tensor for name, tensor in renamed.items()}, tmp_path / "model.safetensors")
    [ids] = texts(10)
    [ours] = Embedder(tmp_path).embed([ids])
    assert_same_vector(ours, F.normalize(hidden_states(peer, ids)[0], dim=0))


def test_a_generating_request_ends_alone_at_an_embedding_model(tmp_path):
    embedders.build("Qwen2Model", tmp_path)
    embedder = Embedder(tmp_path)
    one, two = texts(6, 7)
    wrong = embedder.add(one, task="generate", params=SamplingParams(max_new_tokens=4))
    right = embedder.add(two)
    embedder.run()
    assert embedder.updates[wrong].finish.status == 400
    assert embedder.updates[right].vector


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["Bert", "DebertaV2", "EuroBert", "ModernBert", "MPNet", "Qwen2"])
def test_half_precision_points_the_same_way(family, dtype, tmp_path):
    peer = embedders.build(f"{family}Model", tmp_path)
    given = texts(*LENGTHS)
    place = -1 if family == "Qwen2" else 0
    for ids, ours in zip(given, Embedder(tmp_path, dtype=dtype).embed(given), strict=True):
        assert cosine(ours, hidden_states(peer, ids)[place]) >= 0.995


@pytest.mark.parametrize("architecture", ["RobertaForSequenceClassification", "LlamaForSequenceClassification"])
def test_new_weights_are_served_from_the_next_step_on(architecture, tmp_path):
    """Every table, norm, matrix and packed copy follows, the head's too."""
    embedders.build(architecture, tmp_path / "old", num_labels=2)
    peer = embedders.build(architecture, tmp_path / "new", seed=1, num_labels=2)
    embedder = Embedder(tmp_path / "old", disable_radix_cache=True)
    [ids] = texts(20)
    [before] = embedder.embed([ids])
    weights = embedder.worker.model.weights
    checkpoint = Checkpoint.open(tmp_path / "new")
    staged = weights.staging()
    read_weights(checkpoint, staged, checkpoint.files)
    weights.take_over(staged, list(weights.names()), weights.pack(staged))
    [after] = embedder.embed([ids])
    assert (after - scores(peer, ids)).abs().max() <= MOST_ERROR < (after - before).abs().max()


def test_an_architecture_that_embeds_but_is_not_served_says_so(tmp_path):
    embedders.build("Qwen2Model", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["T5EncoderModel"]}))
    with pytest.raises(StartupError, match="cannot be served for embedding: architecture T5EncoderModel"):
        Embedder(tmp_path)


def test_what_an_encoder_has_no_use_for_is_known_by_name(tmp_path):
    """The tensors of a pooler are no fault of a checkpoint, unless the head needs them."""
    embedders.build("BertModel", tmp_path / "plain")
    layout = Embedder(tmp_path / "plain").worker.model.weights.layout
    assert {"pooler.dense.weight", "pooler.dense.bias"} <= layout.ignored
    embedders.build("BertForSequenceClassification", tmp_path / "scored")
    layout = Embedder(tmp_path / "scored").worker.model.weights.layout
    assert not layout.ignored & layout.places.keys() and "bert.pooler.dense.weight" in layout.places
