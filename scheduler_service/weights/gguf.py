"""The tensors of GGUF files as a checkpoint: under the names, in the shapes and in the order of the original model.

Blocks are expanded while they are read, chunk by chunk, so a load takes no more memory than the weights themselves.
What the conversion to GGUF has changed is undone on the way: the order of rows in Llama's queries and keys, the one
that was added to Gemma's norms, and the experts of a layer that were put into one tensor.
"""

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from quartet.kernels.cpu.native.quantized import QuantizedRows
from quartet.runtime.errors import StartupError
from quartet.runtime.model_files.gguf import Header, Tensor, read_header
from quartet.runtime.model_files.gguf_config import LONG_FACTORS, SHORT_FACTORS
from quartet.runtime.model_files.gguf_metadata import ROPE_DIVISORS, Metadata
from quartet.runtime.shorten import short
from quartet.scheduler_service.weights.block_numbers import FORMATS, numbers_of
from quartet.scheduler_service.weights.blocks import EXPAND
from quartet.scheduler_service.weights.checkpoint import (
    DTYPES,
    Checkpoint,
    CheckpointError,
    Encoding,
    StoredTensor,
    check_count,
)
from quartet.scheduler_service.weights.parameters import Weights

log = logging.getLogger(__name__)

Names = Mapping[str, str]

TOP: Names = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "per_layer_token_embd.weight": "model.embed_tokens_per_layer.weight",
    "per_layer_model_proj.weight": "model.per_layer_model_projection.weight",
    "per_layer_proj_norm.weight": "model.per_layer_projection_norm.weight",
}
STACKED: Names = {  # several matrices of one kind
    "altup_proj.weight": "model.altup_projections.{}.weight",
    "altup_unembd_proj.weight": "model.altup_unembed_projections.{}.weight",
}
IN_CONFIG = (ROPE_DIVISORS, LONG_FACTORS, SHORT_FACTORS)  # tensors that are settings, read with the metadata
LAYER = re.compile(r"blk\.(\d+)\.(\w+)(?:\.(\d+))?\.(weight|bias|scale)")
COMMON: Names = {  # below a layer
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GEMMA: Names = {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
GEMMA3N: Names = {
    **GEMMA,
    "inp_gate": "per_layer_input_gate",
    "proj": "per_layer_projection",
    "post_norm": "post_per_layer_input_norm",
    "altup_correct_coef": "altup.correction_coefs",
    "altup_predict_coef": "altup.prediction_coefs",
    "altup_router": "altup.modality_router",
    "altup_router_norm": "altup.router_norm",
    "laurel_l": "laurel.linear_left",
    "laurel_r": "laurel.linear_right",
    "laurel_post_norm": "laurel.post_laurel_norm",
}
GEMMA4: Names = {
    **{part: GEMMA3N[part] for part in (*GEMMA, "inp_gate", "proj", "post_norm")},
    "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
    "post_ffw_norm_1": "post_feedforward_layernorm_1",
    "post_ffw_norm_2": "post_feedforward_layernorm_2",
    "ffn_gate_inp": "router.proj",
    "ffn_gate_up_exps": "experts.{}.gate_up_proj",
    "ffn_gate_exps": "experts.{}.gate_proj",
    "ffn_up_exps": "experts.{}.up_proj",
    "ffn_down_exps": "experts.{}.down_proj",
}
WHOLE_NAMES: Names = {  # below a layer; those in the model end otherwise
    "altup_correct_scale.weight": "altup.correct_output_scale",
    "layer_output_scale.weight": "layer_scalar",
    "ffn_gate_inp.scale": "router.scale",
    "ffn_down_exps.scale": "router.per_expert_scale",
}
QWEN_MOE: Names = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
MIXTRAL: Names = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
    "ffn_gate": "block_sparse_moe.experts.{}.w1",  # in early files each expert has tensors of its own
    "ffn_up": "block_sparse_moe.experts.{}.w3",
    "ffn_down": "block_sparse_moe.experts.{}.w2",
}
OWN: Mapping[str, Names] = {
    "Gemma2ForCausalLM": GEMMA,
    "Gemma3ForCausalLM": GEMMA,
    "Gemma3nForCausalLM": GEMMA3N,
    "Gemma4ForCausalLM": GEMMA4,
    "MixtralForCausalLM": MIXTRAL,
    "Phi3ForCausalLM": {"ffn_up": "mlp.gate_up_proj"},
    "Qwen2MoeForCausalLM": QWEN_MOE,
    "Qwen3MoeForCausalLM": QWEN_MOE,
}
SHIFTED = ("gemma2", "gemma3")  # one was added to their norms
PERMUTED = {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"}  # in files of Llama's kind


def files_of(directory: Path) -> list[Path]:
    """The GGUF files of a directory that holds one model."""
    return sorted(directory.glob("*.gguf"))


def checkpoint_of(directory: Path) -> Checkpoint:
    """All tensors of the files. Raises CheckpointError."""
    files = files_of(directory)
    try:
        headers = [read_header(file) for file in files]
        described = next((header for header in headers if "general.architecture" in header.metadata), headers[0])
        metadata = Metadata(described)
    except StartupError as error:
        raise CheckpointError(str(error)) from error
    tensors: dict[str, StoredTensor] = {}
    for header in headers:
        for name, stored in translated(header, metadata):
            if name in tensors:
                raise CheckpointError(f"tensor {short(name)} is in both {tensors[name].file} and {stored.file}")
            tensors[name] = stored
            check_count(directory, len(tensors))  # at once: one tensor of a file may hold any number of experts
    return Checkpoint(files, tensors, indexed=len(files) > 1, strict=True)


def log_expansion(checkpoint: Checkpoint, weights: Weights) -> None:
    """Log what it takes that blocks are expanded to numbers of the served format; nothing where there are none."""
    plain = (name for name in weights.layout.places if weights.quantized_of(name) is None)
    expanded = [name for name in plain if name in checkpoint.tensors and name not in checkpoint.quantized]
    encodings = [checkpoint.tensors[name].encoding for name in expanded]
    if blocks := sorted(EXPAND.keys() & {encoding.name.split()[0] for encoding in encodings if encoding}):
        stored = sum(checkpoint.tensors[name].nbytes for name in expanded)
        log.info(
            "The blocks of the GGUF file (%s) are expanded to %s: %.2f GB in the file take %.2f GB of memory.",
            ", ".join(blocks),
            str(weights.dtype).removeprefix("torch."),
            stored / 1e9,
            sum(weights.view(name).nbytes for name in expanded) / 1e9,
        )


def translated(header: Header, metadata: Metadata) -> Iterator[tuple[str, StoredTensor]]:
    """The tensors of one file by the names of the original model. Raises CheckpointError."""
    for name, tensor in header.tensors.items():
        if name in IN_CONFIG:
            continue
        match = LAYER.fullmatch(name)
        if name in STACKED:
            yield from each_matrix(tensor, STACKED[name])
            continue
        if match is None:
            yield TOP.get(name, name), finished(stored(tensor), name, metadata)
            continue
        layer, part, expert, kind = match.groups()
        own = {**COMMON, **OWN.get(metadata.architecture.name, {})}.get(part)
        if (whole := WHOLE_NAMES.get(f"{part}.{kind}")) is not None:
            yield f"model.layers.{layer}.{whole}", stored(tensor)
        elif own is None or kind == "scale":
            yield name, stored(tensor)  # the model has no use for it, which others say
        elif part.endswith("_exps"):
            matrices = each_matrix(tensor, f"model.layers.{layer}.{own}.{kind}")
            yield from halves(matrices) if part == "ffn_gate_up_exps" else matrices
        else:
            yield f"model.layers.{layer}.{own.format(expert)}.{kind}", finished(stored(tensor), part, metadata)


def stored(tensor: Tensor) -> StoredTensor:
    """A tensor with its values as they are in the file."""
    kind = tensor.type
    if kind.name in DTYPES:
        return StoredTensor(tensor.file, kind.name, tensor.shape, tensor.offset, tensor.nbytes)

    def decode(memory: torch.Tensor) -> torch.Tensor:
        return EXPAND[kind.name](memory.view(-1, kind.nbytes)).flatten()

    def numbers(memory: torch.Tensor, columns: int) -> QuantizedRows:
        return numbers_of(kind.name, memory.view(-1, kind.nbytes), columns)

    scheme = FORMATS[kind.name][0]
    encoding = Encoding(kind.name, kind.nbytes, kind.values, decode, scheme, numbers)
    return StoredTensor(tensor.file, "F32", tensor.shape, tensor.offset, tensor.nbytes, encoding=encoding)


def each_matrix(tensor: Tensor, name: str) -> Iterator[tuple[str, StoredTensor]]:
    """The parts of a tensor that holds several matrices, such as all experts of a layer, one behind the other."""
    whole = stored(tensor)
    if len(tensor.shape) != 3:
        raise CheckpointError(f"{tensor.file}: the matrices of {short(name)} have shape {list(tensor.shape)}")
    size = tensor.nbytes // tensor.shape[0]
    for number in range(tensor.shape[0]):
        offset = tensor.offset + number * size
        yield name.format(number), replace(whole, shape=tensor.shape[1:], offset=offset, nbytes=size)


def halves(matrices: Iterator[tuple[str, StoredTensor]]) -> Iterator[tuple[str, StoredTensor]]:
    """The gates and what they scale of experts that have both in one matrix, in this order."""
    for name, both in matrices:
        rows, size = both.shape[0] // 2, both.nbytes // 2
        if both.shape[0] % 2:
            raise CheckpointError(f"{both.file}: {short(name)} has shape {list(both.shape)}, which has no halves")
        for part, first in (("gate_proj", 0), ("up_proj", size)):
            own = replace(both, shape=(rows, *both.shape[1:]), offset=both.offset + first, nbytes=size)
            yield name.replace("gate_up_proj", part), own


def finished(found: StoredTensor, part: str, metadata: Metadata) -> StoredTensor:
    """With what the conversion to GGUF has changed undone. Raises CheckpointError."""
    if metadata.name == "llama" and part in PERMUTED:
        return unpermuted(found, metadata.integer(PERMUTED[part]) or metadata.integer("attention.head_count") or 0)
    if metadata.name in SHIFTED and (part.endswith("norm") or part == "output_norm.weight"):
        return minus_one(found)
    if part == "ffn_gate_inp_shexp" and len(found.shape) == 1:
        return replace(found, shape=(1, *found.shape))
    return found


def minus_one(found: StoredTensor) -> StoredTensor:
    """Gemma's norms multiply by one more than their weights, and the files hold the sum."""
    unit, values = found.unit

    def decode(memory: torch.Tensor) -> torch.Tensor:
        return found.values(memory).float() - 1

    return replace(found, dtype="F32", encoding=Encoding(f"{encoded_name(found)} minus 1", unit, values, decode))


def unpermuted(found: StoredTensor, heads: int) -> StoredTensor:
    """Llama's rotary embedding turns the first half of a head's rows with the second; ggml's turns neighbours."""
    rows = found.shape[0]
    if heads < 1 or rows % (2 * heads):
        raise CheckpointError(f"{found.file}: {heads} heads cannot share {rows} rows of queries or keys")
    per_head, bytes_per_head = rows // heads, found.nbytes // heads
    width = found.shape[1] if len(found.shape) > 1 else 1

    def decode(memory: torch.Tensor) -> torch.Tensor:
        return found.values(memory).view(-1, per_head // 2, 2, width).transpose(1, 2).flatten()

    def numbers(memory: torch.Tensor, columns: int) -> QuantizedRows:
        assert found.encoding is not None and found.encoding.numbers is not None
        ordered = found.encoding.numbers(memory, columns)
        rows = torch.arange(len(ordered.numbers)).view(-1, per_head // 2, 2).transpose(1, 2).flatten()
        return ordered.select(rows)

    scheme = None if found.encoding is None else found.encoding.scheme
    name = f"{encoded_name(found)} permuted by {per_head}"
    encoding = Encoding(name, bytes_per_head, per_head * width, decode, scheme, numbers if scheme else None)
    return replace(found, encoding=encoding)


def encoded_name(found: StoredTensor) -> str:
    return found.dtype if found.encoding is None else found.encoding.name
