"""What all schedulers must serve: decided by the commands that the gateway has sent, and by nothing else.

A command is decided in the moment in which the gateway sends what makes it happen: the command itself, or the word that
a change which all have prepared is made (commands.py). What a scheduler says of itself is compared with what was
decided, and never becomes it; the leveller makes up for the difference (levelling.py). So it does not matter who has
answered, who has died meanwhile, and in which order their words come. The record of it, which is written first, tells a
gateway that is started again. Only where there is none yet, at the start of the server, the first scheduler that speaks
says what all must serve.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import msgspec

from quartet.runtime.adapters import LoadAdapter, UnloadAdapter
from quartet.runtime.control import REWRITTEN, ControlCommand, UpdateWeightsFromDisk, UpdateWeightVersion

RECORD = "decided.json"  # in the run directory
REMEMBERED = 16  # earlier versions, and changes


class Served(msgspec.Struct, frozen=True):
    """What a scheduler serves, as far as all must serve the same."""

    model_path: str = ""
    weight_version: str = ""
    adapters: frozenset[tuple[str, str, bool]] = frozenset()  # name, path, whether it is pinned

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> "Served":
        """By `Facts.state`."""
        adapters = frozenset((one["name"], one["path"], one["pinned"]) for one in state.get("adapters") or ())
        return cls(str(state.get("model_path", "")), str(state.get("weight_version", "")), adapters)

    @property
    def weights(self) -> tuple[str, str]:
        return self.model_path, self.weight_version

    def with_adapter(self, name: str, *adapter: tuple[str, str, bool]) -> "Served":
        """With this adapter as the only one of its name, or with none."""
        others = frozenset(one for one in self.adapters if one[0] != name)
        return msgspec.structs.replace(self, adapters=others | frozenset(adapter))


class Decided(msgspec.Struct, frozen=True):
    """What all schedulers must serve, and what has to be known to bring one there."""

    served: Served
    load_format: str | None = None  # of the weights
    earlier_versions: tuple[str, ...] = ()  # what the same weights were called before
    changes: tuple[str, ...] = ()  # ids of the last changes that all were told to make

    def after(self, command: ControlCommand) -> "Decided":
        """What is decided with this command."""
        decided = self._after(command)
        if command.waits_for_others:
            decided = msgspec.structs.replace(decided, changes=(*self.changes, command.id)[-REMEMBERED:])
        return decided

    def _after(self, command: ControlCommand) -> "Decided":
        served = self.served
        match command:
            case UpdateWeightsFromDisk(model_path=path, weight_version=version):
                weights = Served(path, version or served.weight_version, served.adapters)
                return Decided(weights, command.load_format)
            case UpdateWeightVersion(new_version=version) if version != served.weight_version:
                earlier = (*self.earlier_versions, served.weight_version)[-REMEMBERED:]
                served = msgspec.structs.replace(served, weight_version=version)
                return msgspec.structs.replace(self, served=served, earlier_versions=earlier)
            case LoadAdapter(lora_name=name, lora_path=path, pinned=pinned):
                return msgspec.structs.replace(self, served=served.with_adapter(name, (name, path, pinned)))
            case UnloadAdapter(lora_name=name):
                return msgspec.structs.replace(self, served=served.with_adapter(name))
        return self

    def may_be_asked(self, own: Served) -> bool:
        """Whether a scheduler that serves this may get requests. They name no adapter that it has beyond those."""
        return own.weights == self.served.weights and own.adapters >= self.served.adapters

    def is_rewritten(self, own: Served) -> bool:
        """Whether its weights are those that were written to the same directory later."""
        return own.weight_version in map(REWRITTEN.format, (self.served.weight_version, *self.earlier_versions))

    def missing(self, own: Served) -> Iterator[ControlCommand]:
        """The commands that bring a scheduler there from what it serves."""
        path, version = self.served.weights
        if own.model_path != path or own.weight_version not in (version, *self.earlier_versions):
            yield UpdateWeightsFromDisk(model_path=path, weight_version=version, load_format=self.load_format)
        elif own.weight_version != version:
            yield UpdateWeightVersion(new_version=version, abort_all_requests=False)
        for name in sorted({name for name, _, _ in own.adapters - self.served.adapters} - self.adapter_names):
            yield UnloadAdapter(lora_name=name)
        for name, adapter_path, pinned in sorted(self.served.adapters - own.adapters):
            yield LoadAdapter(lora_name=name, lora_path=adapter_path, pinned=pinned, load_inplace=True)

    @property
    def adapter_names(self) -> frozenset[str]:
        """Those that requests may name."""
        return frozenset(name for name, _, _ in self.served.adapters)

    def shown(self, state: Mapping[str, Any], *others: Mapping[str, Any]) -> dict[str, Any]:
        """`Facts.state` of one scheduler as clients may know it: of weights and adapters, only what was decided.

        An adapter that it lacks is there as long as one of the `others` has it; one that none has cannot be named.
        """
        path, version = self.served.weights
        shown = {**state, "model_path": path, "weight_version": version}
        if "adapters" in state:
            shown["adapters"] = self._shown_adapters((state, *others))
        return shown

    def _shown_adapters(self, states: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        wanted = {one[0]: one for one in self.served.adapters}
        said = [one for state in states for one in state.get("adapters") or () if one["name"] in wanted]
        said.sort(key=lambda one: (one["name"], one["path"], one["pinned"]) not in self.served.adapters)
        found: dict[str, dict[str, Any]] = {}
        for one in said:  # that which is to be replaced only where no other has its successor
            name, path, pinned = wanted[one["name"]]
            found.setdefault(name, {**one, "path": path, "pinned": pinned})
        return list(found.values())
