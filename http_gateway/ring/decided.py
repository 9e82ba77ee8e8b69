"""What all schedulers must serve, and whether they rest: decided by the gateway's commands, and by nothing else.

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
from quartet.runtime.control import (
    REWRITTEN,
    ContinueGeneration,
    ControlCommand,
    PauseGeneration,
    ReleaseMemory,
    ResumeMemory,
    UpdateWeightsFromDisk,
    UpdateWeightVersion,
)
from quartet.runtime.memory_tags import NEEDED, TAGS, WEIGHTS

RECORD = "decided.json"  # in the run directory
REMEMBERED = 16  # earlier versions, and changes


class Served(msgspec.Struct, frozen=True):
    """What a scheduler serves, as far as all must serve the same."""

    model_path: str = ""
    weight_version: str = ""
    adapters: frozenset[tuple[str, str, bool]] = frozenset()  # name, path, whether it is pinned
    weight_files: str = ""  # names what was read at that path; "": nothing was
    paused: bool = False
    released: frozenset[str] = frozenset()  # tags of memory without which nothing is computed

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> "Served":
        """By `Facts.state`."""
        return cls(
            str(state.get("model_path", "")),
            str(state.get("weight_version", "")),
            frozenset((one["name"], one["path"], one["pinned"]) for one in state.get("adapters") or ()),
            str(state.get("weight_files", "")),
            bool(state.get("paused")),
            frozenset(state.get("lacks") or ()),
        )

    @property
    def weights(self) -> tuple[str, str, str]:
        return self.model_path, self.weight_version, self.weight_files

    @property
    def rest(self) -> tuple[bool, frozenset[str]]:
        """Why nothing is computed."""
        return self.paused, self.released

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

    def after(self, command: ControlCommand, weight_files: str = "") -> "Decided":
        """What is decided with this command. `weight_files`: those of the weights that it is about."""
        decided = self._after(command, weight_files)
        if command.waits_for_others:
            decided = msgspec.structs.replace(decided, changes=(*self.changes, command.id)[-REMEMBERED:])
        return decided

    def _after(self, command: ControlCommand, files: str) -> "Decided":
        served = self.served
        match command:
            case UpdateWeightsFromDisk(model_path=path, weight_version=version):
                served = self._with(weight_version=version or served.weight_version, model_path=path).served
                paused = served.paused or command.keep_pause
                return Decided(msgspec.structs.replace(served, weight_files=files, paused=paused), command.load_format)
            case UpdateWeightVersion(new_version=version):
                named = self._with(weight_version=version, weight_files=files or served.weight_files)
                if named == self:
                    return self
                earlier = (*self.earlier_versions, served.weight_version)[-REMEMBERED:]
                return msgspec.structs.replace(named, earlier_versions=earlier)
            case LoadAdapter(lora_name=name, lora_path=path, pinned=pinned):
                return msgspec.structs.replace(self, served=served.with_adapter(name, (name, path, pinned)))
            case UnloadAdapter(lora_name=name):
                return msgspec.structs.replace(self, served=served.with_adapter(name))
            case PauseGeneration():
                return self._with(paused=True)
            case ContinueGeneration():
                return self._with(paused=False)
            case ReleaseMemory(tags=tags):
                return self._with(released=served.released | needed(tags))
            case ResumeMemory(tags=tags):
                return self._with(released=served.released - needed(tags))
        return self

    def _with(self, **served: Any) -> "Decided":
        return msgspec.structs.replace(self, served=msgspec.structs.replace(self.served, **served))

    def may_be_asked(self, own: Served) -> bool:
        """Whether a scheduler that serves this may get requests. They name no adapter that it has beyond those."""
        same = own.weights == self.served.weights and own.rest == self.served.rest
        return same and own.adapters >= self.served.adapters

    def is_rewritten(self, own: Served) -> bool:
        """Whether its weights are others that were written to the same directory, or are found at the same path."""
        return self._knows(own) and own.weight_files != self.served.weight_files

    def is_newer(self, own: Served) -> bool:
        """Whether they were written there since it has recorded what it reads: those of the others are gone."""
        return self.is_rewritten(own) and own.weight_version.endswith(REWRITTEN.format(""))

    def _knows(self, own: Served) -> bool:
        """Whether its weights have the path and a name of those that all must serve."""
        names = (self.served.weight_version, *self.earlier_versions)
        named = own.weight_version in (*names, *map(REWRITTEN.format, names))
        return named and own.model_path == self.served.model_path

    def missing(self, own: Served) -> Iterator[ControlCommand]:
        """The commands that bring a scheduler there from what it serves; generation goes on behind all others."""
        wanted = self.served
        if wanted.paused and not own.paused:
            yield PauseGeneration(mode="retract")
        if taken := own.released - wanted.released:
            yield ResumeMemory(tags=sorted(taken))
        yield from self._missing_weights(own)
        for name in sorted({name for name, _, _ in own.adapters - wanted.adapters} - self.adapter_names):
            yield UnloadAdapter(lora_name=name)
        for name, adapter_path, pinned in sorted(wanted.adapters - own.adapters):
            yield LoadAdapter(lora_name=name, lora_path=adapter_path, pinned=pinned, load_inplace=True)
        if given := wanted.released - own.released:
            yield ReleaseMemory(tags=sorted(given))
        if own.paused and not wanted.paused:
            yield ContinueGeneration()

    def _missing_weights(self, own: Served) -> Iterator[ControlCommand]:
        """Where other weights were written to the directory, or there is no memory for them: none."""
        path, version, files = self.served.weights
        if self._knows(own) and own.weight_files == files:
            if own.weight_version != version:
                yield UpdateWeightVersion(new_version=version, abort_all_requests=False)
        elif not (self.is_newer(own) or WEIGHTS in own.released & self.served.released):
            yield UpdateWeightsFromDisk(
                model_path=path, weight_version=version, load_format=self.load_format, weight_files=files
            )

    @property
    def adapter_names(self) -> frozenset[str]:
        """Those that requests may name."""
        return frozenset(name for name, _, _ in self.served.adapters)

    def shown(self, state: Mapping[str, Any], *others: Mapping[str, Any]) -> dict[str, Any]:
        """`Facts.state` of one scheduler as clients may know it: of what all must serve, only what was decided.

        An adapter that it lacks is there as long as one of the `others` has it; one that none has cannot be named.
        Memory that none of them has, though all should, is lacking.
        """
        served = self.served
        shown = {**state, "model_path": served.model_path, "weight_version": served.weight_version}
        if "paused" in state:
            unwritten = bool(state.get("asleep")) and not state.get("lacks")  # weights that were released
            no_one_has = frozenset[str].intersection(*(Served.of(one).released for one in (state, *others)))
            lacks = [tag for tag in NEEDED if tag in served.released | no_one_has]
            shown |= {"paused": served.paused, "lacks": lacks, "asleep": bool(lacks) or unwritten}
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


def needed(tags: Iterable[str] | None) -> frozenset[str]:
    """Which of these tags (None: of all) nothing is computed without; none where one is refused as unknown."""
    named = frozenset(tags or TAGS)
    return named.intersection(NEEDED) if named <= frozenset(TAGS) else frozenset()
