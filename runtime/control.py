"""Every control command: its HTTP path, its fields, the shape of its reply, and who answers.

A command is a tagged struct here and one handler function in the service that carries it out (as a rule
`scheduler_service/control/handlers.py`). It travels the ring like a request, so it is ordered with them. Hops in the
middle forward it; the reply is a `Reply` with the same id. The gateway builds a route for every member of `Command`
that has a path.
"""

from typing import Annotated, Any, Literal

import msgspec

from quartet.runtime.adapters import (
    ForgetAdapter,
    LoadAdapter,
    LoadAdapterFromDistributed,
    LoadAdapterFromTensors,
    UnloadAdapter,
)
from quartet.runtime.command import ControlCommand as ControlCommand
from quartet.runtime.limits import MAX_STEP_SLEEP_S
from quartet.runtime.messages import Chat
from quartet.runtime.names import Digits, FilePart, FilledName, Name
from quartet.runtime.reply_shapes import (
    NULL,
    STATUS,
    SUCCESS_AND_MESSAGE,
    TEXT,
    AsField,
    AsJson,
    AsText,
)

ONE_PAYLOAD_A_RANK = "serialized_named_tensors needs one entry for each of {} ranks, got {}."
FROM_DISK = "use /update_weights_from_disk"
REWRITTEN = "{}-rewritten"  # the version of a directory that was changed since version {} was read from it
COMMAND_LOST = (
    "The scheduler was started again while the command was under way: whether it has taken effect is not known. "
    "See /get_model_info, and send it again."
)
OTHER_VERSION = "Weight version {} was expected, {} is served."
ONLINE_FAILED = "Failed to update parameter online: {}."


class Abort(ControlCommand, tag="abort_request", kw_only=True):
    """End requests: one rid, all whose rid starts with it (`prefix`), or all. No reply is sent."""

    path = "/abort_request"
    rid: Name = ""
    abort_all: bool = False
    prefix: bool = False
    exact: bool = False  # this rid and not those made from it
    attempt: int | None = None  # the last attempt that this ends; a later one, made after a restart, goes on
    abort_message: Name = ""


class FlushCache(ControlCommand, tag="flush_cache", kw_only=True):
    """Clear the prefix cache once no request runs or waits; wait up to `timeout` seconds for that."""

    path = "/flush_cache"
    aliases = ("/reset_prefix_cache",)  # as clients of vLLM call it
    methods = ("GET", "POST")
    reply = AsText(refusal_is_text=True)
    timeout: Annotated[float, msgspec.Meta(ge=0)] = 0.0


class StartExpertDistributionRecord(ControlCommand, tag="start_expert_distribution_record", kw_only=True):
    """Clear the record of the experts' load and start recording."""

    path = "/start_expert_distribution_record"
    methods = ("GET", "POST")
    reply = TEXT


class StopExpertDistributionRecord(ControlCommand, tag="stop_expert_distribution_record", kw_only=True):
    """Stop recording; the record can still be dumped."""

    path = "/stop_expert_distribution_record"
    methods = ("GET", "POST")
    reply = TEXT


class DumpExpertDistributionRecord(ControlCommand, tag="dump_expert_distribution_record", kw_only=True):
    """Write the record to files and clear it."""

    path = "/dump_expert_distribution_record"
    methods = ("GET", "POST")
    reply = TEXT


class PauseGeneration(ControlCommand, tag="pause_generation", kw_only=True):
    """Stop at the next step: requests end (abort), go back to the queue (retract) or freeze as they are (in_place)."""

    path = "/pause_generation"
    reply = STATUS
    mode: Literal["abort", "retract", "in_place"] = "abort"

    @property
    def ends_requests(self) -> bool:
        return self.mode == "abort"


class ContinueGeneration(ControlCommand, tag="continue_generation", kw_only=True):
    """End a pause."""

    path = "/continue_generation"
    reply = STATUS
    torch_empty_cache: bool = True


class WeightChange(ControlCommand, kw_only=True):
    """The fields of all commands that change the served weights.

    By default running requests go on, with the keys and values computed so far.
    """

    all_or_none = True
    abort_all_requests: bool = False
    retract: bool = False  # running requests go back to the queue and are computed again
    flush_cache: bool = True  # free the pages of the prefix cache; if false they stay, but are never matched again
    weight_version: Name | None = None
    expected_version: Name | None = None  # 409 unless this is the version that serves
    torch_empty_cache: bool = False

    @property
    def ends_requests(self) -> bool:
        return self.abort_all_requests


class UpdateWeightsFromDisk(WeightChange, tag="update_weights_from_disk", kw_only=True):
    """Serve the weights of a directory or a hub id. The last three fields have no effect."""

    path = "/update_weights_from_disk"
    aliases = ("/update_weights",)
    reply = AsJson(("num_paused_requests",), {"num_paused_requests": 0})
    model_path: Name
    load_format: Name | None = None  # default: the server's
    keep_pause: bool = False  # be paused after the update
    manifest: dict[Name, Name] | None = None  # tensor → xxh3 of its bytes in the file
    weight_files: Name = ""  # set by the gateway: what the other schedulers have read there; other files are refused
    is_async: bool = False
    recapture_cuda_graph: bool = False
    token_step: int = 0


class UpdateWeightsFromTensor(WeightChange, tag="update_weights_from_tensor", kw_only=True):
    """Serve tensors that come with the request. They are large, so the gateway writes them to files."""

    path = "/update_weights_from_tensor"
    one_scheduler = FROM_DISK
    reply = SUCCESS_AND_MESSAGE
    serialized_named_tensors: list[msgspec.Raw] = []  # base64 of safetensors bytes, one entry a rank
    payload_files: list[Name] = []  # replaces the entries inside the ring; set by the gateway only
    load_format: Name | None = None  # null, "direct" or "flattened_bucket"
    selector: Name = "all"


class InitWeightsUpdateGroup(ControlCommand, tag="init_weights_update_group", kw_only=True):
    """Join the group of processes in which the trainer, its rank 0, will broadcast."""

    path = "/init_weights_update_group"
    one_scheduler = FROM_DISK
    master_address: Name
    master_port: int | Name
    rank_offset: int
    world_size: int
    group_name: Name = "weight_update_group"
    backend: Name = "nccl"


class DestroyWeightsUpdateGroup(ControlCommand, tag="destroy_weights_update_group", kw_only=True):
    """Leave such a group."""

    path = "/destroy_weights_update_group"
    one_scheduler = FROM_DISK
    group_name: Name = "weight_update_group"


class UpdateWeightsFromDistributed(WeightChange, tag="update_weights_from_distributed", kw_only=True):
    """Serve tensors that the trainer broadcasts while this command runs."""

    path = "/update_weights_from_distributed"
    one_scheduler = FROM_DISK
    reply = SUCCESS_AND_MESSAGE
    names: list[Name]
    dtypes: list[Name]
    shapes: list[list[int]]
    group_name: Name = "weight_update_group"
    load_format: Name | None = None  # null, or "flattened_bucket": all in one broadcast of bytes
    selector: Name = "all"


class BeginWeightUpdate(ControlCommand, tag="begin_weight_update", kw_only=True):
    """Open an update session: tensors are collected, and `end_weight_update` applies them together."""

    path = "/begin_weight_update"
    one_scheduler = FROM_DISK
    selector: Name = "all"


class EndWeightUpdate(WeightChange, tag="end_weight_update", kw_only=True):
    """Apply the tensors collected since `begin_weight_update`."""

    path = "/end_weight_update"
    one_scheduler = FROM_DISK
    reply = SUCCESS_AND_MESSAGE


class UpdateWeightVersion(ControlCommand, tag="update_weight_version", kw_only=True):
    """Set the version label of the served weights."""

    path = "/update_weight_version"
    reply = AsJson(("new_version", "num_aborted_requests"))
    new_version: FilledName
    abort_all_requests: bool = True  # clients rely on this default

    @property
    def ends_requests(self) -> bool:
        return self.abort_all_requests


class GetWeightsByName(ControlCommand, tag="get_weights_by_name", kw_only=True):
    """The first rows of a tensor."""

    path = "/get_weights_by_name"
    methods = ("GET", "POST")
    reply = AsField("rows")
    name: Name
    truncate_size: int = 100


class CheckWeights(ControlCommand, tag="weights_checker", kw_only=True):
    """Hash the weights, snapshot them, compare them with the snapshot, or overwrite them with random values."""

    path = "/weights_checker"
    methods = ("GET", "POST")
    reply = AsJson(("ranks", "per_engine_checksum"), {"ranks": [], "per_engine_checksum": None})
    action: Literal["checksum", "snapshot", "reset_tensors", "compare"] = "checksum"
    allow_quant_error: bool = False  # no effect: nothing is quantized
    skip_tensor_list: list[Name] | None = None
    selector: Name = "all"


class ReleaseMemory(ControlCommand, tag="release_memory_occupation", kw_only=True):
    """Release memory until it is resumed; no tags means all."""

    path = "/release_memory_occupation"
    all_or_none = True
    methods = ("GET", "POST")
    reply = NULL
    tags: list[Name] | None = None


class ResumeMemory(ControlCommand, tag="resume_memory_occupation", kw_only=True):
    """Allocate released memory again; no tags means all."""

    path = "/resume_memory_occupation"
    methods = ("GET", "POST")
    reply = NULL
    tags: list[Name] | None = None


class FreezeGarbage(ControlCommand, tag="freeze_gc", kw_only=True):
    """Exclude all objects that exist now from the scheduler's garbage collection."""

    path = "/freeze_gc"
    methods = ("GET", "POST")
    reply = TEXT


class SlowDown(ControlCommand, tag="slow_down", kw_only=True):
    """A test aid: sleep this long in every step; null ends it."""

    path = "/slow_down"
    methods = ("GET", "POST")
    reply = NULL
    forward_sleep_time: Annotated[float, msgspec.Meta(le=MAX_STEP_SLEEP_S)] | None = None


class StartProfile(ControlCommand, tag="start_profile", kw_only=True):
    """Record steps with torch's profiler, until /stop_profile or for `num_steps` steps."""

    path = "/start_profile"
    methods = ("GET", "POST")
    reply = TEXT
    output_dir: Name | None = None  # default: SGLANG_TORCH_PROFILER_DIR, else the directory for temporary files
    num_steps: int | Digits | None = None
    activities: list[Name] | None = None  # CPU, GPU; default: both where there is a GPU
    with_stack: bool | None = None
    record_shapes: bool | None = None
    profile_prefix: FilePart | None = None  # the file's name begins with it
    profile_id: FilePart | None = None  # stands in the file's name in place of the time
    # refused
    start_step: int | Digits | None = None
    profile_by_stage: bool | None = None
    profile_stages: list[Name] | None = None
    merge_profiles: bool | None = None


class StopProfile(ControlCommand, tag="stop_profile", kw_only=True):
    """Stop recording and write the trace."""

    path = "/stop_profile"
    methods = ("GET", "POST")
    reply = TEXT


class DecideChange(ControlCommand, tag="decide_change", kw_only=True):
    """The gateway's answer to `Prepared`: swap, or refuse with this reason. There is no reply of its own."""

    change: str  # id of the command
    reason: str = ""  # empty: swap
    weight_version: str = ""  # which all serve then, those too whose own was another one


class Probe(ControlCommand, tag="probe", kw_only=True):
    """Passes through every service once; each adds its counters under its role. The gateway takes it back."""

    read_only = True
    counters: dict[str, dict[str, Any]] = {}


class Tokenize(ControlCommand, tag="tokenize", kw_only=True):
    """Answered by the tokenizer: body {"tokens": [int32 ids as bytes]}."""

    read_only = True
    for_schedulers = False
    texts: list[str] = []
    chat: Chat | None = None
    add_special_tokens: bool = True


class Detokenize(ControlCommand, tag="detokenize", kw_only=True):
    """Answered by the detokenizer: body {"texts": [str]}."""

    read_only = True
    for_schedulers = False
    ids: list[bytes] = []
    skip_special_tokens: bool = True
    open_end: bool = False  # more will follow: leave out a last character whose bytes are not all there


Command = (
    Abort
    | FlushCache
    | DecideChange
    | StartExpertDistributionRecord
    | StopExpertDistributionRecord
    | DumpExpertDistributionRecord
    | Probe
    | Tokenize
    | Detokenize
    | PauseGeneration
    | ContinueGeneration
    | UpdateWeightsFromDisk
    | UpdateWeightsFromTensor
    | InitWeightsUpdateGroup
    | DestroyWeightsUpdateGroup
    | UpdateWeightsFromDistributed
    | BeginWeightUpdate
    | EndWeightUpdate
    | UpdateWeightVersion
    | GetWeightsByName
    | CheckWeights
    | ReleaseMemory
    | ResumeMemory
    | FreezeGarbage
    | SlowDown
    | StartProfile
    | StopProfile
    | LoadAdapter
    | LoadAdapterFromTensors
    | LoadAdapterFromDistributed
    | UnloadAdapter
    | ForgetAdapter
)

COMMANDS: tuple[type[ControlCommand], ...] = Command.__args__


def routes() -> dict[str, type[ControlCommand]]:
    """HTTP path → command, aliases included."""
    return {path: command for command in COMMANDS if command.path for path in (command.path, *command.aliases)}


def from_body(command: type[ControlCommand], body: bytes) -> ControlCommand:
    """Decode a request body (empty, `null` and `{}` mean all defaults); msgspec errors name the field."""
    return msgspec.json.decode(body if body.strip() not in (b"", b"null") else b"{}", type=command)
