"""adapter_config.json of a LoRA adapter in peft's format: what it says about ranks and scales, within bounds.

It is untrusted, and a key that would change the result and is not read here is refused by its name.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import msgspec
import re2

from quartet.runtime.errors import StartupError
from quartet.runtime.limits import MAX_LORA_RANK
from quartet.runtime.model_files.files import read_small
from quartet.runtime.shorten import short
from quartet.scheduler_service.weights.checkpoint import CheckpointError, parse_json

SETTINGS = "adapter_config.json"
MAX_SETTINGS_BYTES = 4 << 20
MAX_PATTERNS = 4096
MAX_PATTERN_CHARS = 512
MAX_PATTERN_MEMORY = 1 << 20  # of one when it is compiled
MAX_PATTERN_PROGRAM = 1 << 19  # instructions of all patterns of a key: as many as thousands of modules' names have
TOO_LARGE = f"{SETTINGS} has patterns that are too large together"

# Keys that change nothing once an adapter is trained.
INERT = {
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "task_type",
    "inference_mode",
    "peft_version",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "runtime_config",
    "qalora_group_size",
    "ensure_weight_tying",
    "monteclora_config",
}
HARMLESS_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # others change the base's weights too

Number = TypeVar("Number", int, float)
Rank = Annotated[int, msgspec.Meta(ge=1, le=MAX_LORA_RANK)]
Pattern = Annotated[str, msgspec.Meta(max_length=MAX_PATTERN_CHARS)]


class AdapterConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The keys that are read."""

    peft_type: str
    r: Rank
    lora_alpha: float = 8.0
    use_rslora: bool = False
    rank_pattern: Annotated[dict[Pattern, Rank], msgspec.Meta(max_length=MAX_PATTERNS)] = {}
    alpha_pattern: Annotated[dict[Pattern, float], msgspec.Meta(max_length=MAX_PATTERNS)] = {}
    bias: str | None = "none"
    init_lora_weights: bool | str | None = True


class ModuleSettings:
    """Rank and scale of each module. The patterns are compiled once: an adapter has thousands of modules."""

    def __init__(self, config: AdapterConfig, yield_point: Callable[[], None] = lambda: None) -> None:
        """Raises CheckpointError for a pattern that cannot be read."""
        self.largest_rank = max([config.r, *config.rank_pattern.values()])
        self._config = config
        self._ranks = Patterns(config.rank_pattern, yield_point)
        self._alphas = Patterns(config.alpha_pattern, yield_point)

    def rank_of(self, module: str) -> int:
        return self._ranks.first(module, self._config.r)

    def scale_of(self, module: str) -> float:
        """What the product of a module's factors is multiplied with."""
        rank, alpha = self.rank_of(module), self._alphas.first(module, self._config.lora_alpha)
        return alpha / (math.sqrt(rank) if self._config.use_rslora else rank)


class Patterns(Generic[Number]):
    """Values by patterns, regular expressions that are matched in linear time."""

    def __init__(self, values: Mapping[str, Number], yield_point: Callable[[], None]) -> None:
        """Raises CheckpointError for a pattern that cannot be read."""
        self._yield_point = yield_point
        self._compiled: list[tuple[str, Any, Number]] = []
        left = MAX_PATTERN_PROGRAM
        for pattern, value in values.items():
            yield_point()
            whole = pattern if pattern.startswith("^") else rf"(.*\.)?({pattern})$"
            try:
                compiled = re2.compile(whole, options())
            except re2.error as error:
                raise CheckpointError(f"{SETTINGS} has the pattern {short(pattern)!r}, which cannot be read") from error
            left -= compiled.programsize
            if left < 0:
                raise CheckpointError(TOO_LARGE)
            self._compiled.append((f".{pattern}", compiled, value))

    def first(self, module: str, default: Number) -> Number:
        """The value of the first pattern that matches the end of a module's name, as peft has it."""
        self._yield_point()
        name = f".{module}"
        for ending, compiled, value in self._compiled:
            if name.endswith(ending) or compiled.match(module):
                return value
        return default


def options() -> Any:
    """How patterns are compiled: quietly, within so much memory."""
    made = re2.Options()
    made.max_mem, made.log_errors = MAX_PATTERN_MEMORY, False
    return made


def read_settings(directory: Path) -> AdapterConfig:
    """The settings of an adapter's directory. Raises CheckpointError."""
    path = directory / SETTINGS
    try:
        return settings_of(parse_json(read_small(path, MAX_SETTINGS_BYTES)))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {short(error)}") from error
    except StartupError as error:
        raise CheckpointError(str(error)) from error


def settings_of(values: dict[str, Any]) -> AdapterConfig:
    """Raises CheckpointError naming the key that is wrong or not supported."""
    if values.get("peft_type") != "LORA":
        raise CheckpointError(f"peft_type is {short(values.get('peft_type'))}, only LORA is supported")
    try:
        config = msgspec.convert(values, AdapterConfig)
    except msgspec.ValidationError as error:
        raise CheckpointError(short(error)) from error
    known = INERT.union(AdapterConfig.__struct_fields__)
    for key, value in values.items():
        if value and key not in known:
            raise CheckpointError(f"{short(key)} is set, which is not supported")
    if config.bias not in ("none", None):
        raise CheckpointError(f"bias is {short(config.bias)}, which is not supported")
    if config.init_lora_weights not in HARMLESS_STARTS:
        raise CheckpointError(
            f"init_lora_weights is {short(config.init_lora_weights)}, which changes the base's weights too; convert "
            "the adapter with peft's path_initial_model_for_weight_conversion"
        )
    if not all(map(math.isfinite, [config.lora_alpha, *config.alpha_pattern.values()])):
        raise CheckpointError("lora_alpha and alpha_pattern must be finite numbers")
    return config
