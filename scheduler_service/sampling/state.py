"""What the sampler keeps of an admitted request: its settings, and the tokens that penalties count."""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field

from quartet.runtime.sampling import SamplingParams
from quartet.scheduler_service.core.request import Sequence
from quartet.scheduler_service.sampling.rows import DrawSettings, Feature


@dataclass(slots=True)
class Row:
    """The sampler's state of one admitted request."""

    params: SamplingParams
    settings: DrawSettings
    prompt_len: int
    end_ids: list[int]  # ids that would end the request
    bias_ids: "array[int]"
    biases: "array[float]"
    counted: "array[int]" = field(default_factory=lambda: array("q"))  # distinct output tokens
    counts: "array[int]" = field(default_factory=lambda: array("q"))  # how often each occurred
    places: dict[int, int] = field(default_factory=dict)  # token → index into the two arrays

    @property
    def features(self) -> int:
        """Feature values, or-ed."""
        return self.settings.features

    def add(self, token: int) -> None:
        """Note an output token."""
        if self.features & Feature.PENALTY:
            self.count((token,))

    def count(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            place = self.places.setdefault(token, len(self.counted))
            if place == len(self.counted):
                self.counted.append(token)
                self.counts.append(0)
            self.counts[place] += 1


def make_row(sequence: Sequence, eos_ids: list[int]) -> Row:
    """The state is a function of the request and its tokens, so it can be rebuilt after a retraction."""
    params = sequence.request.params
    bias = params.logit_bias or {}
    row = Row(
        params=params,
        settings=settings_of(params, sequence.request.seed),
        prompt_len=sequence.prompt_len,
        end_ids=sorted({*eos_ids, *(params.stop_token_ids or ())}),
        bias_ids=array("q", map(int, bias)),
        biases=array("f", bias.values()),
    )
    if row.features & Feature.PENALTY:
        row.count(sequence.ids[sequence.prompt_len :])
    return row


def settings_of(params: SamplingParams, seed: int) -> DrawSettings:
    """What a request's draws depend on; of `seed` the lowest 64 bits count."""
    features = features_of(params)
    return DrawSettings(
        features,
        params.temperature if features & Feature.DRAW else 0.0,
        params.top_k if features & Feature.TOP_K else 0,
        params.top_p if features & Feature.TOP_P else 1.0,
        params.min_p if features & Feature.MIN_P else 0.0,
        signed(seed),
    )


def features_of(params: SamplingParams) -> int:
    """The features that these parameters use."""
    penalised = params.frequency_penalty or params.presence_penalty or params.repetition_penalty != 1.0
    used = {
        Feature.DRAW: not params.greedy,
        Feature.TOP_K: not params.greedy and params.top_k > 0,
        Feature.TOP_P: not params.greedy and params.top_p < 1.0,
        Feature.MIN_P: not params.greedy and params.min_p > 0.0,
        Feature.PENALTY: bool(penalised),
        Feature.MIN_LENGTH: params.min_new_tokens > 0,
        Feature.BIAS: bool(params.logit_bias),
    }
    return sum(feature for feature, is_used in used.items() if is_used)


def signed(seed: int) -> int:
    """The lowest 64 bits as an int64."""
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)
