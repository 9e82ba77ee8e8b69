"""Finds the family of an architecture, and makes a model that is ready to run."""

import logging
from dataclasses import replace
from pathlib import Path

import torch

from quartet.kernels.cpu.native import library as native
from quartet.runtime.config import ResolvedConfig
from quartet.runtime.errors import StartupError
from quartet.runtime.model_files.embedding import family_name
from quartet.runtime.model_files.model_info import ModelInfo
from quartet.runtime.model_files.towers import language_model
from quartet.runtime.shorten import reason
from quartet.scheduler_service.host.device import available_gb
from quartet.scheduler_service.host.parallel import ALONE, Parallel
from quartet.scheduler_service.model.activations import ACTIVATIONS
from quartet.scheduler_service.model.backend import Backend
from quartet.scheduler_service.model.batch import ServedModel
from quartet.scheduler_service.model.cpu_backend import CpuBackend
from quartet.scheduler_service.model.decoder import Decoder
from quartet.scheduler_service.model.deterministic import NOT_NATIVE, is_asked_for
from quartet.scheduler_service.model.dtype import resolve_dtype
from quartet.scheduler_service.model.embedders import (
    embedder_spec,
    load_decoder_embedder,
    load_encoder,
    tensor_names,
)
from quartet.scheduler_service.model.families import (
    cohere,
    deepseek,
    ernie,
    exaone,
    gemma,
    gemma3n,
    gemma4,
    glm,
    gpt_oss,
    granite,
    kimi,
    lfm2,
    llama,
    llama4,
    mamba,
    minimax,
    mistral,
    mixtral,
    nemotron,
    olmo,
    phi3,
    qwen,
    qwen_hybrid,
    seed_oss,
    smollm,
)
from quartet.scheduler_service.model.layout import embeddings_name
from quartet.scheduler_service.model.shards import REFUSED, check_groups, check_stored, shard_layout, shard_spec
from quartet.scheduler_service.model.spec import DecoderSpec, NotNative
from quartet.scheduler_service.model.torch_backend import TorchBackend
from quartet.scheduler_service.model.towers import inside
from quartet.scheduler_service.weights import ties
from quartet.scheduler_service.weights.formats import checkpoint_of, format_of
from quartet.scheduler_service.weights.load import check_format, is_dummy, load_weights
from quartet.scheduler_service.weights.own_parts import own_parts
from quartet.scheduler_service.weights.parameters import Layout, Schemes, Weights
from quartet.scheduler_service.weights.quantized.methods import settings_of
from quartet.scheduler_service.weights.storage import CHOICES, can_quantize, schemes_in, schemes_of

log = logging.getLogger(__name__)

ONE_MACHINE = "--nnodes {}: a GGUF file is served by the processes of one machine; leave it out, or serve safetensors"
NOT_LATENT = "--enable-deterministic-inference is not there for the latent attention of {}; leave it out"

FAMILIES: dict[str, llama.Family] = {
    "BambaForCausalLM": mamba.bamba,
    "Cohere2ForCausalLM": cohere.cohere2,
    "DeepseekV2ForCausalLM": deepseek.v2,
    "DeepseekV3ForCausalLM": deepseek.v3,
    "Ernie4_5ForCausalLM": ernie.ernie4_5,
    "Exaone4ForCausalLM": exaone.exaone4,
    "FalconH1ForCausalLM": mamba.falcon_h1,
    "GemmaForCausalLM": gemma.gemma1,
    "Gemma2ForCausalLM": gemma.gemma2,
    "Gemma3ForCausalLM": gemma.gemma3,
    "Gemma3nForCausalLM": gemma3n.gemma3n,
    "Gemma4ForCausalLM": gemma4.gemma4,
    "Gemma4UnifiedForCausalLM": gemma4.unified,
    "Glm4ForCausalLM": glm.glm4,
    "Glm4MoeForCausalLM": glm.glm4_moe,
    "Glm4MoeLiteForCausalLM": deepseek.v3,
    "GptOssForCausalLM": gpt_oss.decoder_spec,
    "GraniteForCausalLM": granite.decoder_spec,
    "GraniteMoeHybridForCausalLM": granite.hybrid,
    "KimiLinearForCausalLM": kimi.linear,
    "Lfm2ForCausalLM": lfm2.decoder_spec,
    "Llama4ForCausalLM": llama4.llama4,
    "LlamaForCausalLM": llama.decoder_spec,
    "MiniMaxM2ForCausalLM": minimax.m2,
    "Ministral3ForCausalLM": mistral.ministral3,
    "MinistralForCausalLM": mistral.ministral,
    "MistralForCausalLM": mistral.decoder_spec,
    "MixtralForCausalLM": mixtral.decoder_spec,
    "NemotronHForCausalLM": nemotron.nemotron_h,
    "Olmo2ForCausalLM": olmo.olmo2,
    "Olmo3ForCausalLM": olmo.olmo3,
    "OlmoHybridForCausalLM": olmo.hybrid,
    "Phi3ForCausalLM": phi3.decoder_spec,
    "Qwen2ForCausalLM": qwen.qwen2,
    "Qwen2MoeForCausalLM": qwen.qwen2_moe,
    "Qwen3ForCausalLM": qwen.qwen3,
    "Qwen3NextForCausalLM": qwen_hybrid.qwen3_next,
    "Qwen3_5ForCausalLM": qwen_hybrid.qwen3_5,
    "Qwen3_5MoeForCausalLM": qwen_hybrid.qwen3_5_moe,
    "Qwen3MoeForCausalLM": qwen.qwen3_moe,
    "SeedOssForCausalLM": seed_oss.decoder_spec,
    "SmolLM3ForCausalLM": smollm.decoder_spec,
}


def load_model(
    config: ResolvedConfig, info: ModelInfo, device: torch.device, parallel: Parallel = ALONE
) -> ServedModel:
    """Build the model of a directory and fill its weights. Raises StartupError with the cause in one line.

    `parallel`: of which ranks this is one; its weights are its part of them.
    """
    check_format(config.load_format, Path(info.path))
    dtype = resolve_dtype(config.dtype, info.config, device)
    if device.type == "cpu" and (dtype is torch.bfloat16 or info.embedding is None):
        # At a first start they are compiled while the weights are read. In any dtype there are kernels for draws.
        try:
            native.highest_wanted()
        except ValueError as error:
            raise StartupError(str(error)) from error
        native.start_loading()
    available = available_gb(device)
    log.info("Load weight begin. avail mem=%.2f GB", available)
    try:
        model = load_own(config, info, dtype, device, parallel)
    except NotNative as reason:
        if is_asked_for(config, device):
            raise StartupError(NOT_NATIVE.format(info.architecture)) from reason
        if info.embedding:
            raise StartupError(f"{info.path} cannot be served for embedding: {reason} is not supported") from reason
        if config.quantization in CHOICES:
            raise StartupError(
                f"--quantization {config.quantization} needs a native family, and {reason} has none; leave it out"
            ) from reason
        model = load_fallback(str(reason), config, info, dtype, device)
    if is_asked_for(config, device) and info.embedding is None:
        native.library()  # the same kernels from the first token on
    left = available_gb(device)
    log.info(
        "Load weight end. type=%s, dtype=%s, avail mem=%.2f GB, mem usage=%.2f GB.",
        info.architecture,
        dtype,
        left,
        max(0.0, available - left),  # on a CPU other processes may have given some back
    )
    return model


def check_ranks(config: ResolvedConfig, info: ModelInfo) -> None:
    """Raise StartupError for a model that cannot be computed by several ranks, before any of them is started."""
    check_embedder(config, info)
    if info.embedding is not None and info.embedding.encoder:
        raise StartupError(REFUSED.format(config.tp_size, f"{info.architecture} is an encoder"))
    try:
        spec = decoder_spec(info)
    except NotNative as reason:
        raise StartupError(REFUSED.format(config.tp_size, f"there is no native family for {reason}")) from reason
    if info.embedding is not None:
        spec = embedder_spec(spec, config, info)
    first = Parallel(0, config.tp_size)  # the parts of the others are as large
    layout, path = shard_layout(spec, first), Path(info.path)
    if config.quantization in CHOICES:
        check_groups(layout, config.quantization)
    if is_dummy(config) or not (format_of(path) == "gguf" or settings_of(path)):
        return
    if config.nnodes > 1 and format_of(path) == "gguf":
        raise StartupError(ONE_MACHINE.format(config.nnodes))
    checkpoint, device = checkpoint_of(path), torch.device(config.device)
    if info.embedding is None:
        layout = shard_layout(inside(spec, info.architecture, checkpoint.tensors), first)
    keeps = info.embedding is None and config.quantization == "auto"  # weights of embedders are expanded
    dtype = resolve_dtype(config.dtype, info.config, device)
    check_stored(layout, checkpoint, keeps and can_quantize(dtype, device) and native.is_expected())


def load_own(
    config: ResolvedConfig, info: ModelInfo, dtype: torch.dtype, device: torch.device, parallel: Parallel = ALONE
) -> ServedModel:
    """A model that runs on our own layers; raises NotNative for any other."""
    check_embedder(config, info)
    if info.embedding is None:
        spec = decoder_spec(info)
        check_chunks(spec, config)
        if spec.latent is not None and is_asked_for(config, device):
            raise StartupError(NOT_LATENT.format(info.architecture))
        return load_native(spec, config, info, dtype, device, parallel)
    if is_asked_for(config, device) and not info.embedding.causal:
        raise StartupError(NOT_NATIVE.format(info.architecture))
    if info.embedding.encoder:
        return load_encoder(config, info, dtype, device)
    spec = decoder_spec(info)
    check_chunks(spec, config)
    return load_decoder_embedder(spec, config, info, dtype, device, parallel)


def check_embedder(config: ResolvedConfig, info: ModelInfo) -> None:
    """Raise StartupError for an embedder that is to be quantized."""
    if info.embedding is not None and config.quantization in CHOICES:
        raise StartupError(f"--quantization {config.quantization} is for models that generate; leave it out")


def check_chunks(spec: DecoderSpec, config: ResolvedConfig) -> None:
    """Raise StartupError where a chunk of attention would end within a page."""
    for size in {layer.chunk for layer in spec.layers if layer.chunk}:
        if size % config.page_size:
            raise StartupError(f"--page-size {config.page_size} does not divide the attention chunks of {size} tokens")


def decoder_spec(info: ModelInfo) -> DecoderSpec:
    """The spec of a model that the generic decoder runs; raises NotNative for any other."""
    architecture = language_model(info.architecture, info.config)
    family = FAMILIES.get(f"{family_name(info.architecture)}ForCausalLM" if info.embedding else architecture)
    if family is None:
        raise NotNative(f"architecture {info.architecture}")
    try:
        spec = family(info.config, info.context_length)
    except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise StartupError(
            f"{info.path}/config.json does not describe a {info.architecture}: {reason(error)}"
        ) from error
    if not all(isinstance(layer.moe.intermediate_size, int) for layer in spec.layers if layer.moe):
        raise NotNative(f"{info.architecture} whose layers' experts differ in size")
    if not (isinstance(spec.intermediate_size, int) and isinstance(spec.kv_heads, int)):
        raise NotNative(f"{info.architecture} whose layers differ in size")
    if spec.parallel and any(layer.moe for layer in spec.layers):
        raise NotNative(f"{info.architecture} with experts beside attention")
    if not any(layer.attends for layer in spec.layers):
        raise NotNative(f"{info.architecture} without attention")
    if spec.activation not in ACTIVATIONS:
        raise NotNative(f"{info.architecture} with the activation {spec.activation}")
    if not (spec.causal or info.embedding):
        raise NotNative(f"{info.architecture} whose attention looks ahead")
    return spec


def load_native(
    spec: DecoderSpec,
    config: ResolvedConfig,
    info: ModelInfo,
    dtype: torch.dtype,
    device: torch.device,
    parallel: Parallel = ALONE,
) -> Decoder:
    """The generic decoder of a spec, with its weights. Raises StartupError."""
    spec = inside(spec, info.architecture, tensor_names(config, info))
    if spec.generates and not is_dummy(config):
        tied = ties.is_tied(Path(info.path), spec.head, embeddings_name(spec), spec.tied)
        spec = replace(spec, tied=tied)
    layout = shard_layout(spec, parallel)
    in_file = "embed" if config.low_memory and not spec.tied else None
    weights = Weights(layout, dtype, device, schemes(config, info, layout, dtype, device), in_file)
    own = shard_spec(spec, parallel.size) if parallel.size > 1 else spec
    model = Decoder(own, weights, make_backend(spec, dtype, device, is_asked_for(config, device)))
    load_weights(weights, config, info)
    return model


def schemes(
    config: ResolvedConfig, info: ModelInfo, layout: Layout, dtype: torch.dtype, device: torch.device
) -> Schemes:
    """Which weights are quantized, and how: as before a restart. Raises StartupError."""
    if config.weight_schemes is not None:
        return schemes_in(config.weight_schemes)
    stored = None
    if config.quantization == "auto" and not is_dummy(config):
        match format_of(path := Path(info.path)):
            case "gguf":
                stored = own_parts(ties.with_tied_tensors(checkpoint_of(path), layout), layout.cuts)
            case "safetensors" if settings_of(path):
                stored = own_parts(checkpoint_of(path), layout.cuts)
    return schemes_of(config.quantization, layout, dtype, device, stored)


def make_backend(spec: DecoderSpec, dtype: torch.dtype, device: torch.device, deterministic: bool) -> Backend:
    """Our own kernels where this device has some, else torch."""
    if device.type == "cpu" and dtype is torch.bfloat16 and native.is_expected():
        return CpuBackend(spec.ropes, deterministic)
    return TorchBackend(spec.ropes, dtype, device, deterministic)


def load_fallback(
    reason: str, config: ResolvedConfig, info: ModelInfo, dtype: torch.dtype, device: torch.device
) -> ServedModel:
    """transformers' own model. Raises StartupError."""
    log.info("No native family for %s: it is loaded with transformers.", reason)
    from quartet.scheduler_service.model.transformers_model import (
        load_transformers_model,  # takes seconds, seldom needed
    )

    return load_transformers_model(config, info, dtype, device)
