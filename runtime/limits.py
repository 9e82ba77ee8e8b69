"""Every maximum that Quartet enforces on what comes from outside, in one place."""

MAX_IPC_MESSAGE_BYTES = 256 << 20
MAX_HIDDEN_STATE_BYTES = 64 << 20  # of one prompt
# bodies of requests: their sizes are flags (runtime/config.py); what they hold is counted before it is built
MAX_BODY_VALUES = 100_000  # strings, lists and objects; a million bytes of them cost as much as eight of text
MAX_CONTROL_BODY_VALUES = 1_000_000  # of a command: names, types and shapes of all tensors of a large model
MAX_ADAPTER_BODY_VALUES = 1 << 16  # of a command that brings an adapter: its settings
BODY_BYTES_PER_MEMBER = 8  # of lists and objects: a body may hold so many of them as its limit has times these bytes
CALL_BYTES_PER_BODY_BYTE = 4  # what all requests of a call may take on the ring, for each byte that a body may have
MAX_TOKENIZED = 1 << 20  # tokens in one answer of /tokenize
MAX_DETOKENIZED = 1 << 20  # ids of one call of /detokenize
MAX_VECTOR_NUMBERS = 16 << 20  # in the answer of one call
MAX_FILLED_TOKENS = 4096  # that a multi-vector model's queries are filled up to
MAX_DETOKENIZED_CHARS = 16 << 20  # of the text that they are
MAX_CALL_VALUES = 200_000  # ids and strings in the parameters of all requests of a call together
MAX_PARSED_BODY_BYTES = 1 << 20  # a text to look for tool calls or a thought in
MAX_HEADER_BYTES = 16 << 10
HEADER_DEADLINE_S = 10.0
MAX_LOG_CHARS = 16 << 10  # of one message
MAX_LOGGED_REQUESTS = 8  # of one call, whose ids and texts the request log shows
MAX_LOGGED_TEXT_CHARS = 2048  # of a prompt or an output
MAX_API_KEY_BYTES = 4 << 10
MAX_API_KEY_FILE_BYTES = 1 << 20
MAX_CONNECTIONS = 8192  # open at once, and no more than the process's descriptors allow
# a client's body comes at a least rate, after a while in hand; an answer is read within a time per buffer of 64 KB
BODY_GRACE_S = 10.0
LEAST_BODY_RATE = 4096  # bytes a second
READ_STALL_S = 60.0
STREAM_PING_S = 15.0  # of silence in a stream, in APIs that have pings
MAX_UNREAD_STEPS = 1 << 16  # of a request, that its client has not taken
# events of background responses, for clients that read them again: of all together; seconds after the end
MAX_EVENT_LOG_BYTES = 64 << 20
EVENT_LOG_AGE_S = 300.0
# background responses that run at once: how many, and bytes of their requests together
MAX_BACKGROUND_RUNS = 1024
MAX_BACKGROUND_BYTES = 32 << 20
MAX_BATCH_PROMPTS = 1024
MAX_COMPARED_FIELDS = 16  # of a body, unknown ones, that are compared with the known ones
MAX_N = 64
MAX_STOP_STRINGS = 32
MAX_STOP_STRING_BYTES = 256
MAX_STOP_REGEX_BYTES = 256
MAX_STOP_REGEX_MEMORY = 1 << 20
MAX_STOP_REGEX_PROGRAM = 8192  # instructions of all compiled patterns of a request; a search may try each at each place
MAX_STOP_SPAN_CHARS = 16384  # text held back for one match of a stop_regex
MAX_STOP_SEARCH = 1 << 20  # instructions times characters of one search: larger patterns span less text
MAX_STOP_TOKEN_IDS = 256
MAX_LOGIT_BIAS = 1024
MAX_TOP_LOGPROBS = 128
MAX_SUPPORT_TOKENS = 1024  # candidates that are returned for every token
MAX_TOKEN_IDS_LOGPROB = 1024
MAX_RID_CHARS = 256
# batches: bytes of a line and of an answer, lines, characters of the id that a client gives a request
MAX_BATCH_LINE_BYTES = 16 << 20
MAX_BATCH_ANSWER_BYTES = 256 << 20
MAX_BATCH_LINES = 50_000
MAX_CUSTOM_ID_CHARS = 512
MAX_UNFINISHED_BATCHES = 64
MAX_BATCHES = MAX_FILES = 10_000  # that are kept
BATCH_REQUESTS_AT_ONCE = 64  # of all batches together
MAX_KEY_CHARS = 1024
MAX_NAME_CHARS = 4096  # of a model, a user or a version of the weights, as a client names it
MAX_GRAMMAR_BYTES = 256 << 10
MAX_NEW_TOKENS = 1 << 30
MAX_STEP_SLEEP_S = 3600
MAX_SCHEDULERS = 64  # behind one gateway
MAX_DRAFTED_TOKENS = 64  # of one request in one step
MAX_LORA_RANK = 256
MAX_SHOWN_ADAPTERS = 16  # in an error
MAX_ADAPTER_LABELS = 64  # of metrics; further adapters are counted together
MAX_ADAPTERS = 1024  # that requests may name, loaded or evicted
MAX_SHOWN_WEIGHTS = 1 << 22  # numbers of one tensor in an answer
MAX_PROFILE_STEPS = 1000
# chat templates: CPU time of a render, at least and by message; what it makes is bounded by the context
TEMPLATE_CPU_S = 0.1
TEMPLATE_CPU_S_PER_MESSAGE = 0.00025
TEMPLATE_MEMORY_BYTES = 1 << 30
TEMPLATE_CHARS_PER_CONTEXT_TOKEN = 128  # the longest tokens of real vocabularies: runs of blanks
# grammars: size of a schema, states that counted repetitions unroll to, length once translated; CPU time of checking
# one in its first turn and in a second, at least and by byte of its text; what else that may take; how many are
# compiled at once, compiled ones kept
MAX_GRAMMAR_NODES = 20_000
MAX_GRAMMAR_STATES = 20_000
MAX_GRAMMAR_SOURCE_CHARS = 4 << 20
GRAMMAR_FIRST_CPU_S = 0.02
GRAMMAR_CPU_S = 0.1
GRAMMAR_CPU_S_PER_BYTE = 2e-6
GRAMMAR_MEMORY_BYTES = 1 << 30
GRAMMAR_STACK_BYTES = 1 << 20
GRAMMAR_WORKERS = 2
GRAMMAR_CACHE_ENTRIES = 256


def template_cpu_s(messages: int) -> float:
    """CPU time that the render of a conversation may take."""
    return max(TEMPLATE_CPU_S, TEMPLATE_CPU_S_PER_MESSAGE * messages)


def grammar_cpu_s(size: int) -> float:
    """CPU time that checking a grammar of so many bytes may take in its second turn."""
    return GRAMMAR_CPU_S + GRAMMAR_CPU_S_PER_BYTE * size
