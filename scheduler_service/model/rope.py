"""Rotary frequencies from config.json, in its old form (rope_theta, rope_scaling) and its new one (rope_parameters).

Two variants depend on the length of the sequence in transformers. A server shares keys between sequences, so ours
depend on the server's context length alone:

* dynamic: the base that belongs to the server's context length where that exceeds `max_position_embeddings`, else the
  config's own, for every sequence. transformers picks by each sequence's length: set `--context-length` to
  `max_position_embeddings` for the same numbers as its short sequences.
* longrope: the long factors where the context length exceeds the original one, else the short ones, for every
  sequence. transformers picks by each sequence's length: set `--context-length` to the original length for the same
  numbers as its short sequences.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

from quartet.kernels.reference import layers as plain_layers
from quartet.scheduler_service.model.spec import NotNative, RopeSpec

Parameters = dict[str, Any]
LENGTH_BOUND = ("llama3", "yarn", "longrope")  # variants that need the length of pretraining


def rope_parameters(config: dict[str, Any], layer_type: str | None = None, theta: float = 10000.0) -> Parameters:
    """The rope settings of a layer type in the new form, whatever form the config has."""
    new = config.get("rope_parameters") or {}
    if layer_type in new:
        new = new[layer_type] or {}
    scaling = config.get("rope_scaling") or {}
    found: Parameters = {
        "rope_theta": config.get("rope_theta") or theta,
        "partial_rotary_factor": config.get("partial_rotary_factor") or 1.0,
        **scaling,
        **new,
    }
    found["rope_type"] = found.get("rope_type") or found.get("type") or "default"
    if found["rope_type"] in LENGTH_BOUND:
        fallback = found.get("original_max_position_embeddings") or config["max_position_embeddings"]
        found["original_max_position_embeddings"] = config.get("original_max_position_embeddings") or fallback
    found["max_position_embeddings"] = config.get("max_position_embeddings") or 0
    return found


def rope_spec(parameters: Parameters, head_dim: int, context_length: int) -> RopeSpec:
    """Compute the frequencies. Raises NotNative for a variant that is not in the table."""
    variant = VARIANTS.get(parameters["rope_type"])
    if variant is None:
        raise NotNative(f"rope_type={parameters['rope_type']!r}")
    whole = parameters["rope_type"] == "proportional"
    rotary_dim = head_dim if whole else int(head_dim * parameters["partial_rotary_factor"])
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.int64).float() / rotary_dim
    wavelengths = parameters["rope_theta"] ** exponents  # positions per radian
    frequencies, factor = variant(wavelengths, {**parameters, "context_length": context_length})
    return RopeSpec(tuple(frequencies.tolist()), factor)


def default(wavelengths: torch.Tensor, parameters: Parameters) -> tuple[torch.Tensor, float]:
    return 1.0 / wavelengths, 1.0


def proportional(wavelengths: torch.Tensor, parameters: Parameters) -> tuple[torch.Tensor, float]:
    """Pairs of all dimensions, of which a part is turned, by the wavelengths that they have among all."""
    turned = int(parameters["partial_rotary_factor"] * 2 * len(wavelengths) // 2)
    frequencies = 1.0 / wavelengths / (parameters.get("factor") or 1.0)
    frequencies[turned:] = 0.0
    return frequencies, 1.0


def dynamic(wavelengths: torch.Tensor, parameters: Parameters) -> tuple[torch.Tensor, float]:
    """The base grows with what the context has more than the positions of pretraining (NTK)."""
    stretch = parameters["context_length"] / parameters["max_position_embeddings"]
    if stretch <= 1:
        return default(wavelengths, parameters)
    factor, pairs = parameters["factor"], len(wavelengths)
    grown = (factor * stretch - (factor - 1)) ** (
        torch.arange(pairs) / (pairs - 1)
    )  # dim / (dim - 2), of a base's power
    return 1.0 / (wavelengths * grown), 1.0


def linear(wavelengths: torch.Tensor, parameters: Parameters) -> tuple[torch.Tensor, float]:
    """Positions are squeezed by the factor."""
    return 1.0 / wavelengths / parameters["factor"], 1.0


def llama3(wavelengths: torch.Tensor, parameters: Parameters) -> tuple[torch.Tensor, float]:
    """Slow pairs are squeezed, fast ones kept, those between blended."""
    frequencies = 1.0 / wavelengths
    length, factor = parameters["original_max_position_embeddings"], parameters["factor"]
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    turns = length / (2 * math.pi / frequencies)  # within the length of pretraining
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * frequencies / factor + blend * frequencies, 1.0


def yarn(wavelengths: torch.Tensor, parameters: Parameters) -> tuple[torch.Tensor, float]:
    """As llama3, with the blend linear in the pair's index, and attention scaled by a factor of its own."""
    length, theta = parameters["original_max_position_embeddings"], parameters["rope_theta"]
    factor = parameters.get("factor") or parameters["max_position_embeddings"] / length
    pairs = len(wavelengths)

    def pair_with_turns(turns: float) -> float:
        return 2 * pairs * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first = pair_with_turns(parameters.get("beta_fast") or 32)
    last = pair_with_turns(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * pairs - 1)
    if first == last:
        last += 0.001
    squeezed = ((torch.arange(pairs, dtype=torch.float32) - first) / (last - first)).clamp(0, 1)
    frequencies = squeezed / (factor * wavelengths) + (1 - squeezed) / wavelengths
    return frequencies, yarn_attention_factor(parameters, factor)


def yarn_attention_factor(parameters: Parameters, factor: float) -> float:
    """The scale of cosines and sines that goes with a yarn factor."""

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if parameters.get("attention_factor") is not None:
        return float(parameters["attention_factor"])
    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        return scale(parameters["mscale"]) / scale(parameters["mscale_all_dim"])
    return scale(1.0)


def longrope(wavelengths: torch.Tensor, parameters: Parameters) -> tuple[torch.Tensor, float]:
    """Each pair has its own stretch, from one of two lists."""
    length = parameters["original_max_position_embeddings"]
    stretch = parameters["long_factor" if parameters["context_length"] > length else "short_factor"]
    factor = parameters.get("factor") or parameters["max_position_embeddings"] / length
    attention = parameters.get("attention_factor")
    if attention is None:
        attention = math.sqrt(1 + math.log(factor) / math.log(length)) if factor > 1 else 1.0
    return 1.0 / (torch.tensor(stretch, dtype=torch.float32) * wavelengths), attention


VARIANTS: dict[str, Callable[[torch.Tensor, Parameters], tuple[torch.Tensor, float]]] = {
    "default": default,
    "mrope": default,  # with one position for time, height and width, as text has
    "linear": linear,
    "proportional": proportional,
    "dynamic": dynamic,
    "llama3": llama3,
    "yarn": yarn,
    "longrope": longrope,
}


def position_tables(
    frequencies: torch.Tensor, factor: float, context_length: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and signed sines of every position: each (context_length, 1, rotary_dim)."""
    positions = torch.arange(context_length, device=frequencies.device)
    return plain_layers.rotation(positions, frequencies, factor, dtype)
