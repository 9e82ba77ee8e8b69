"""From a request to the sampler's state of it: its settings, and the output tokens that penalties count."""

from array import array

from quartet.runtime.sampling import SamplingParams
from quartet.scheduler_service.core.request import Sequence
from quartet.scheduler_service.core.thought_budget import thought_budget_of
from quartet.scheduler_service.sampling.adjust import ADJUSTMENTS, CERTAIN
from quartet.scheduler_service.sampling.rows import DrawSettings, Feature, Row

MOST_TEMPERATURE = 1e38  # by which all tokens are equally likely, and which float32 has
MOST_TOKENS = 2**31 - 1  # of a vocabulary


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
        biases=array("f", (min(max(-CERTAIN, value), CERTAIN) for value in bias.values())),
        counts_output=any(adjustment.counts_output and adjustment.is_used(params) for adjustment in ADJUSTMENTS),
        thought_budget=thought_budget_of(sequence.request, sequence.prompt_len),
    )
    if row.thought_budget is not None:
        row.thought_budget.follow(sequence.ids)
    if row.counts_output:
        row.count(sequence.ids[sequence.prompt_len :])
    return row


def settings_of(params: SamplingParams, seed: int) -> DrawSettings:
    """What a request's draws depend on, as numbers of the device; of `seed` the lowest 64 bits count."""
    features = features_of(params)
    return DrawSettings(
        features,
        min(params.temperature, MOST_TEMPERATURE) if features & Feature.DRAW else 0.0,
        min(params.top_k, MOST_TOKENS) if features & Feature.TOP_K else 0,
        params.top_p if features & Feature.TOP_P else 1.0,
        params.min_p if features & Feature.MIN_P else 0.0,
        signed(seed),
    )


def features_of(params: SamplingParams) -> int:
    """The features that these parameters use."""
    used = {
        Feature.DRAW: not params.greedy,
        Feature.TOP_K: not params.greedy and params.top_k > 0,
        Feature.TOP_P: not params.greedy and params.top_p < 1.0,
        Feature.MIN_P: not params.greedy and params.min_p > 0.0,
        Feature.ADJUST: any(adjustment.is_used(params) for adjustment in ADJUSTMENTS),
    }
    return sum(feature for feature, is_used in used.items() if is_used)


def signed(seed: int) -> int:
    """The lowest 64 bits as an int64."""
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)
