"""LoRA adapters as the processes speak of them: what is known of each, and the commands that change them."""

from typing import Any

import msgspec

from quartet.runtime.command import ControlCommand
from quartet.runtime.names import AdapterName, Name
from quartet.runtime.reply_shapes import AsAdapters

FROM_DIRECTORY = "save the adapter to a directory, and use /load_lora_adapter"
LORA_OFF = "LoRA is not enabled. Please set `--enable-lora` to enable LoRA."
NEVER_LOADED = "Got LoRA adapter that has never been loaded: {}."
TENSORS_PATH = "__tensor__"  # the path of an adapter that came over the wire
DISTRIBUTED_PATH = "__distributed__"  # of one that a trainer has broadcast


class Adapter(msgspec.Struct, kw_only=True):
    """One adapter that requests may name. The scheduler tells all of them in `Facts.state["adapters"]`."""

    name: str
    path: str  # as given; TENSORS_PATH, DISTRIBUTED_PATH: it came over the wire
    version: str  # of its weights; another one after it was replaced
    rank: int
    pinned: bool = False
    loaded: bool = True  # false: it was evicted, and is read again when a request names it


class LoadAdapter(ControlCommand, tag="load_lora_adapter", kw_only=True):
    """Serve an adapter from a directory or a hub id. The name must be free, unless the adapter replaces its bearer."""

    path = "/load_lora_adapter"
    all_or_none = True
    reply = AsAdapters()
    lora_name: AdapterName
    lora_path: Name
    pinned: bool = False  # never evicted
    load_inplace: bool = False  # take the place of the adapter of this name; its requests go on with the new weights


class LoadAdapterFromTensors(ControlCommand, tag="load_lora_adapter_from_tensors", kw_only=True):
    """Serve an adapter whose tensors come with the request; the gateway writes them to a file."""

    path = "/load_lora_adapter_from_tensors"
    one_scheduler = FROM_DIRECTORY
    reply = AsAdapters()
    lora_name: AdapterName
    config_dict: dict[str, Any]  # what adapter_config.json says
    serialized_named_tensors: list[msgspec.Raw] = []  # base64 of safetensors bytes, one entry a rank
    serialized_tensors: str | None = None  # an older name: one such string
    payload_files: list[Name] = []  # replaces the entries inside the ring; set by the gateway only
    pinned: bool = False
    load_inplace: bool = False
    upsert: bool = False  # another name of load_inplace
    load_format: Name | None = None  # null, "direct" or "flattened_bucket"
    expected_checksums: dict[str, str] | None = None  # SHA-256 of the bytes of tensors, in hexadecimal, by their names
    added_tokens_config: dict[str, Any] | None = None  # refused unless empty


class LoadAdapterFromDistributed(ControlCommand, tag="load_lora_adapter_from_distributed", kw_only=True):
    """Serve an adapter whose tensors the trainer of a group broadcasts, in this order, while this command runs."""

    path = "/load_lora_adapter_from_distributed"
    one_scheduler = FROM_DIRECTORY
    reply = AsAdapters()
    lora_name: AdapterName
    config_dict: dict[str, Any]  # what adapter_config.json says
    names: list[Name]
    dtypes: list[Name]
    shapes: list[list[int]]
    group_name: Name = "weight_update_group"
    pinned: bool = False
    load_inplace: bool = False
    upsert: bool = False  # another name of load_inplace
    added_tokens_config: dict[str, Any] | None = None  # refused unless empty


class UnloadAdapter(ControlCommand, tag="unload_lora_adapter", kw_only=True):
    """Take no more requests for an adapter, and forget it when those that use it have ended.

    The answer comes then; at once where none can end, because generation is paused or memory is released.
    """

    path = "/unload_lora_adapter"
    reply = AsAdapters()
    lora_name: AdapterName


class ForgetAdapter(ControlCommand, tag="forget_adapter", kw_only=True):
    """The gateway's word that no unfinished request names an adapter which was unloaded. No reply is sent.

    Another version of it stays: it was loaded again meanwhile.
    """

    lora_name: str
    version: str  # as `Facts.state["unloaded_adapters"]` has it


Load = LoadAdapter | LoadAdapterFromTensors | LoadAdapterFromDistributed
AdapterCommand = Load | UnloadAdapter
