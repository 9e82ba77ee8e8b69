"""Makes models of embedding architectures: encoders, and decoders without their language-model head."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from quartet.runtime.config import ResolvedConfig
from quartet.runtime.errors import StartupError
from quartet.runtime.model_files.embedding import Embedding, family_name
from quartet.runtime.model_files.model_info import ModelInfo
from quartet.runtime.shorten import reason
from quartet.scheduler_service.host.parallel import Parallel
from quartet.scheduler_service.model.decoder import Decoder
from quartet.scheduler_service.model.deterministic import is_asked_for
from quartet.scheduler_service.model.encoder import GATED, Encoder
from quartet.scheduler_service.model.encoder_layout import encoder_layout
from quartet.scheduler_service.model.encoder_spec import EncoderSpec, TaskSpec
from quartet.scheduler_service.model.families import encoders, encoders_relative, encoders_rotary, word_heads
from quartet.scheduler_service.model.heads import ACTIVATIONS
from quartet.scheduler_service.model.shards import shard_layout, shard_spec
from quartet.scheduler_service.model.spec import DecoderSpec, HeadLayer
from quartet.scheduler_service.model.torch_backend import TorchBackend
from quartet.scheduler_service.weights.adapter_config import ModuleSettings, read_settings
from quartet.scheduler_service.weights.formats import checkpoint_of
from quartet.scheduler_service.weights.load import is_dummy, load_weights
from quartet.scheduler_service.weights.parameters import Weights

FAMILIES: dict[str, encoders.EncoderFamily] = {
    "Bert": encoders.bert,
    "Camembert": encoders.roberta,
    "Deberta": encoders_relative.deberta1,
    "DebertaV2": encoders_relative.deberta,
    "DistilBert": encoders.distilbert,
    "Electra": encoders.electra,
    "EuroBert": encoders_rotary.eurobert,
    "Gte": encoders_rotary.gte,
    "HF_ColBERT": encoders.colbert,
    "JinaEmbeddingsV3": encoders_rotary.jina,
    "MPNet": encoders_relative.mpnet,
    "ModernBert": encoders.modernbert,
    "NomicBert": encoders_rotary.nomic,
    "Roberta": encoders.roberta,
    "XLMRoberta": encoders.roberta,
}
WORDS = "embed_tokens.weight"  # of decoders
NO_ADAPTERS = (
    "{}/config.json names tasks with adapters (lora_adaptations: {}), and the checkpoint has none; take "
    "lora_adaptations out of it to serve the weights as they are"
)


def load_encoder(config: ResolvedConfig, info: ModelInfo, dtype: torch.dtype, device: torch.device) -> Encoder:
    """Build an encoder and fill its weights. Raises StartupError."""
    spec = encoder_spec(info, tensor_names(config, info))
    weights = Weights(encoder_layout(spec), dtype, device)
    model = Encoder(spec, weights)
    load_weights(weights, config, info)
    if model.tasks is not None:
        model.tasks.attach()
    return model


def encoder_spec(info: ModelInfo, tensors: Collection[str]) -> EncoderSpec:
    """The spec of an encoder, of which `tensors` are the checkpoint's names. Raises StartupError."""
    assert info.embedding is not None
    try:
        spec = FAMILIES[family_name(info.architecture)](info.config, info.embedding.labels, tensors)
    except (KeyError, TypeError, ValueError) as error:
        raise StartupError(
            f"{info.path}/config.json does not describe a {info.architecture}: {reason(error)}"
        ) from error
    if info.embedding.dense:
        spec = replace(spec, head=dense_layers(info.embedding))
    if info.embedding.tasks:
        spec = replace(spec, tasks=task_spec(info, info.embedding.tasks, spec, tensors))
    if info.embedding.sparse:
        spec = replace(spec, word_head=word_heads.word_head(family_name(info.architecture), info.config, tensors))
    known = GATED if spec.gated else ACTIVATIONS
    layers = [*spec.head, *([spec.word_head.transform] if spec.word_head else [])]
    heads = {layer.activation for layer in layers if layer.activation}
    if unknown := sorted({spec.activation} - set(known)) + sorted(heads - set(ACTIVATIONS)):
        raise StartupError(f"{info.path}/config.json asks for the activation {unknown[0]}, which is not supported")
    return spec


def task_spec(info: ModelInfo, tasks: Mapping[str, str], spec: EncoderSpec, tensors: Collection[str]) -> TaskSpec:
    """The adapters of tasks, and their folders. Raises StartupError where there are none or they differ in kind."""
    names = tuple(tasks)
    if not all(tasks.values()):
        rank, alpha = info.config.get("lora_rank", 4), info.config.get("lora_alpha", 1)
        if tensors and spec.names.weight == "weight":
            raise StartupError(NO_ADAPTERS.format(info.path, ", ".join(names)))
        return TaskSpec(tasks=names, rank=rank, scale=alpha / rank)
    folders = tuple(tasks.values())
    settings = [read_settings(Path(info.path) / folder) for folder in folders]
    kinds = {(own.r, own.lora_alpha, own.use_rslora, *own.rank_pattern, *own.alpha_pattern) for own in settings}
    if len(kinds) > 1 or settings[0].rank_pattern or settings[0].alpha_pattern:
        raise StartupError(f"{info.path}: the adapters of {', '.join(names)} differ in rank or scale")
    inside = encoders_rotary.JINA_NEW_NAMES
    scale = ModuleSettings(settings[0]).scale_of("")
    return TaskSpec(tasks=names, folders=folders, names=inside, rank=settings[0].r, scale=scale)


def load_decoder_embedder(
    spec: DecoderSpec,
    config: ResolvedConfig,
    info: ModelInfo,
    dtype: torch.dtype,
    device: torch.device,
    parallel: Parallel,
) -> Decoder:
    """The embedder that a decoder becomes, with its weights, or this rank's part of them. Raises StartupError."""
    spec = embedder_spec(spec, config, info)
    weights = Weights(shard_layout(spec, parallel), dtype, device)
    own = shard_spec(spec, parallel.size) if parallel.size > 1 else spec
    model = Decoder(own, weights, TorchBackend(spec.ropes, dtype, device, is_asked_for(config, device)))
    load_weights(weights, config, info)
    return model


def embedder_spec(spec: DecoderSpec, config: ResolvedConfig, info: ModelInfo) -> DecoderSpec:
    """The decoder of `spec` without its language-model head, and with a score head where the architecture has one."""
    assert info.embedding is not None
    return replace(
        spec,
        prefix="" if WORDS in tensor_names(config, info) else spec.prefix,
        generates=False,
        causal=info.embedding.causal,
        score_head=score_head(info, spec.hidden_size),
    )


def score_head(info: ModelInfo, hidden: int) -> tuple[HeadLayer, ...]:
    """One matrix for classifiers, two with a relu between for reward models; for vectors what the model's files say."""
    assert info.embedding is not None
    labels = info.embedding.labels
    if not labels:
        return dense_layers(info.embedding)
    if info.architecture.endswith("ForRewardModel"):
        return (
            HeadLayer(name="score.0", inputs=hidden, outputs=hidden, activation="relu"),
            HeadLayer(name="score.2", inputs=hidden, outputs=labels),
        )
    return (HeadLayer(name="score", inputs=hidden, outputs=labels, bias=False),)


def dense_layers(embedding: Embedding) -> tuple[HeadLayer, ...]:
    """The layers of a sentence-transformers model behind its pooling; their weights lie in folders of their own."""
    return tuple(
        HeadLayer(
            name=f"{layer.folder}.linear" if layer.folder else "linear",
            inputs=layer.in_features,
            outputs=layer.out_features,
            bias=layer.bias,
            activation=layer.activation,
        )
        for layer in embedding.dense
    )


def tensor_names(config: ResolvedConfig, info: ModelInfo) -> Collection[str]:
    """The names in the checkpoint, which depend on how a model was saved; none for random weights."""
    return () if is_dummy(config) else checkpoint_of(Path(info.path)).tensors
