"""Token ids and logprob options of a request, checked against the vocabulary.

The gateway calls these functions for what a client sends, the scheduler for what the tokenizer has made of a prompt.
Ids in sampling parameters are checked in `runtime/sampling.py`.
"""

from array import array
from itertools import islice

from quartet.runtime import limits
from quartet.runtime.errors import RequestError
from quartet.runtime.messages import LogprobOptions, first_outside

SHOWN_IDS = 5  # of those that are outside the vocabulary


def check_input_ids(ids: "array[int]", vocab_size: int) -> None:
    """Raise RequestError, naming `input_ids`, for ids outside [0, vocab_size)."""
    if first_outside(ids, vocab_size) is not None:
        outside = list(islice((token for token in ids if not 0 <= token < vocab_size), SHOWN_IDS))
        raise RequestError(
            f"The input_ids {outside} contains values greater than the vocab size ({vocab_size}).", field="input_ids"
        )


def check_logprob_options(options: LogprobOptions, vocab_size: int) -> None:
    """Raise RequestError, naming the field, for what no prompt makes right. See `check_logprob_start`."""
    most = min(limits.MAX_TOP_LOGPROBS, vocab_size)
    if not 0 <= options.top <= most:
        raise RequestError(f"top_logprobs_num must be in [0, {most}], got {options.top}.", field="top_logprobs_num")
    if options.start < -1:
        raise RequestError(
            f"logprob_start_len must be -1 or at least 0, got {options.start}.", field="logprob_start_len"
        )
    ids = options.token_ids or []
    if len(ids) > limits.MAX_TOKEN_IDS_LOGPROB:
        raise RequestError(
            f"token_ids_logprob takes at most {limits.MAX_TOKEN_IDS_LOGPROB} ids.", field="token_ids_logprob"
        )
    for token in ids:
        if not 0 <= token < vocab_size:
            raise RequestError(
                f"token_ids_logprob contains out-of-vocabulary token id {token}; valid range is [0, {vocab_size}).",
                field="token_ids_logprob",
            )


def check_logprob_start(options: LogprobOptions, prompt_tokens: int) -> None:
    """Raise RequestError where logprobs would start behind the prompt, whose length the tokenizer knows."""
    if options.start > prompt_tokens:
        raise RequestError(
            f"logprob_start_len, ({options.start}) is higher than the number of input tokens ({prompt_tokens}). "
            "Please use a smaller logprob_start_len.",
            field="logprob_start_len",
        )
