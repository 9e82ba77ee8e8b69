"""The metadata of a GGUF file below its architecture, and values that are kept in small tensors."""

import math
import os
import struct
from typing import Any, NamedTuple

from quartet.runtime.model_files.files import opened
from quartet.runtime.model_files.gguf import GgufError, Header, LongArray, Tensor
from quartet.runtime.shorten import short

Config = dict[str, Any]

ROPE_DIVISORS = "rope_freqs.weight"  # by which the frequencies of the rotary embedding are divided
MAX_FACTORS = 1 << 12


class Architecture(NamedTuple):
    """A value of general.architecture that is served."""

    name: str  # as config.json has it
    model_type: str


ARCHITECTURES = {
    "llama": Architecture("LlamaForCausalLM", "llama"),
    "qwen2": Architecture("Qwen2ForCausalLM", "qwen2"),
    "qwen3": Architecture("Qwen3ForCausalLM", "qwen3"),
    "qwen2moe": Architecture("Qwen2MoeForCausalLM", "qwen2_moe"),
    "qwen3moe": Architecture("Qwen3MoeForCausalLM", "qwen3_moe"),
    "gemma2": Architecture("Gemma2ForCausalLM", "gemma2"),
    "gemma3": Architecture("Gemma3ForCausalLM", "gemma3_text"),
    "gemma3n": Architecture("Gemma3nForCausalLM", "gemma3n_text"),
    "gemma4": Architecture("Gemma4ForCausalLM", "gemma4_text"),
    "phi3": Architecture("Phi3ForCausalLM", "phi3"),
}
MIXTRAL = Architecture("MixtralForCausalLM", "mixtral")


class Metadata:
    """The keys of one architecture, and those of the tokenizer."""

    def __init__(self, header: Header) -> None:
        """Raises GgufError for an architecture that is not served."""
        self.header = header
        name = header.metadata.get("general.architecture")
        if not isinstance(name, str) or name not in ARCHITECTURES:
            raise GgufError(
                f"{header.file} holds a model of the architecture {short(name)}, which is not supported; "
                f"{', '.join(ARCHITECTURES)} are"
            )
        self.name = name
        self.experts = self.integer("expert_count") or 0
        self.architecture = MIXTRAL if name == "llama" and self.experts else ARCHITECTURES[name]

    def get(self, key: str) -> Any:
        """The value of a key below the architecture, one number where all layers have the same. Raises GgufError."""
        value = self.header.metadata.get(f"{self.name}.{key}")
        if isinstance(value, float):
            return shortest(value)
        if isinstance(value, LongArray):
            raise self.misfit(key, "a long list")
        if isinstance(value, list) and value and all(entry == value[0] for entry in value):
            return value[0]
        return value

    def integer(self, key: str) -> int | None:
        value = self.get(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise self.misfit(key, value)
        return value

    def number(self, key: str) -> float | None:
        value = self.get(key)
        if value is not None and (not isinstance(value, int | float) or isinstance(value, bool)):
            raise self.misfit(key, value)
        return value

    def by_layer(self, key: str, layers: int) -> list[int | float | bool] | None:
        """A value for each layer, which may all have one; None: there is none. Raises GgufError."""
        value = self.header.metadata.get(f"{self.name}.{key}")
        if value is None:
            return None
        values: list[Any] = value if isinstance(value, list) else [value] * layers
        if len(values) < layers or not all(isinstance(entry, int | float) for entry in values):
            raise self.misfit(key, value)
        return values[:layers]

    def misfit(self, key: str, value: Any) -> GgufError:
        return GgufError(f"{self.header.file}: {self.name}.{key} is {short(value)}, which cannot be")


def shortest(value: float) -> float:
    """The decimal number that was meant by a float32: 1e-06, not 9.999999974752427e-07."""
    if not math.isfinite(value):
        return value
    for digits in range(1, 9):
        shorter = float(f"{value:.{digits}g}")
        if as_float32(shorter) == as_float32(value):
            return shorter
    return value


def as_float32(value: float) -> bytes:
    try:
        return struct.pack("<f", value)
    except OverflowError:
        return b""


def rows_of(header: Header, name: str) -> int:
    """The first dimension of a tensor that must be there."""
    if name not in header.tensors:
        raise GgufError(f"{header.file} has no tensor {name}")
    return header.tensors[name].shape[0]


def floats(tensor: Tensor) -> list[float]:
    """The values of a small vector. Raises GgufError."""
    count = tensor.nbytes // 4
    if tensor.type.name != "F32" or len(tensor.shape) != 1 or count > MAX_FACTORS:
        raise GgufError(f"{tensor.file}: the factors of the rotary frequencies are no short list of F32 numbers")
    try:
        with opened(tensor.file) as descriptor:
            data = os.pread(descriptor, tensor.nbytes, tensor.offset)
        values = [shortest(value) for value in struct.unpack(f"<{count}f", data)]
    except (OSError, struct.error) as error:
        raise GgufError(f"cannot read {tensor.file}: {error}") from error
    if not all(math.isfinite(value) and value > 0 for value in values):
        raise GgufError(f"{tensor.file}: the factors of the rotary frequencies must be positive numbers")
    return values
