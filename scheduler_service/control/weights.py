"""Commands that change, name or compare the served weights.

They run one after the other, in the order of arrival. What takes long runs in the background; the swap itself happens
within one resumption of the handler, so between two steps.
"""

import logging
from collections.abc import Callable, Generator
from functools import partial
from typing import TYPE_CHECKING, Any

from quartet.runtime.control import (
    ONLINE_FAILED,
    OTHER_VERSION,
    BeginWeightUpdate,
    CheckWeights,
    ControlCommand,
    EndWeightUpdate,
    GetWeightsByName,
    UpdateWeightsFromDisk,
    UpdateWeightsFromDistributed,
    UpdateWeightsFromTensor,
    UpdateWeightVersion,
    WeightChange,
)
from quartet.runtime.errors import CommandRefused
from quartet.runtime.messages import Reply
from quartet.scheduler_service.control.agreement import agreed
from quartet.scheduler_service.control.context import Context, Handler, Resumable, abort_all
from quartet.scheduler_service.host.background import run_in_background

if TYPE_CHECKING:  # these load torch; the objects come with the scheduler
    from quartet.scheduler_service.weights.update import Collect, Staged, Updates

log = logging.getLogger(__name__)

CheckResult = Generator[None, bool | None, dict[str, Any]]
Change = Callable[[Context, "Updates", Any], Resumable]

FIXED = "The weights of this server cannot be changed."
UPDATED_FROM_DISK = "Succeeded to update model weights."
UPDATED_FROM_TENSOR = "Success"
UPDATED_ONLINE = "Succeeded to update parameter online."
SERVED_SELECTORS = ("all", "target")
SESSION_OPEN = "A weight update has begun and not ended: call end_weight_update first."
RELEASED = "The memory of the weights is released: call resume_memory_occupation first."
OTHER_FILES = "The files of {} were rewritten since the other schedulers read them. Nothing was changed."
GIVEN_UP = "The weight update was given up, nothing was changed: {}"
NO_SESSION = "end_weight_update without begin_weight_update."


def updates_of(context: Context) -> "Updates":
    if context.updates is None:
        raise CommandRefused(FIXED)
    return context.updates


def exclusive(change: Change) -> Handler:
    """The handler that runs `change` after all earlier commands of this kind have finished."""

    def handle(context: Context, command: ControlCommand) -> Resumable:
        updates = updates_of(context)
        updates.commands.append(command)
        while updates.commands[0] is not command:
            yield
        try:
            if context.saver is not None and context.saver.holds_weights:
                raise CommandRefused(RELEASED)
            return (yield from change(context, updates, command))
        except CommandRefused as refusal:
            log.error("%s", refusal.message)
            raise
        finally:
            updates.commands.popleft()

    return handle


# from disk


def from_disk(context: Context, updates: "Updates", command: UpdateWeightsFromDisk) -> Resumable:
    """Stage and check the weights in the background, then swap."""
    load_format = command.load_format or updates.config.load_format
    log.info("Start update_weights. Load format=%s", load_format)
    refuse_unless_expected(context, command)
    refuse_in_session(updates)
    log.info("Update engine weights online from disk begin. avail mem=%.2f GB", updates.available_gb())
    staged = yield from run_in_background(partial(updates.from_disk, command.model_path, load_format, command.manifest))
    paused_requests = yield from swap(context, updates, staged, command)
    body = {"num_paused_requests": paused_requests, "model_path": command.model_path}
    return [succeeded(context, command, UPDATED_FROM_DISK, body)]


def swap(
    context: Context, updates: "Updates", staged: "Staged", command: WeightChange
) -> Generator[None, bool | None, int]:
    """Put staged values in place, between two steps. Returns how many requests were paused meanwhile."""
    try:
        refuse_unless_expected(context, command)
        read = "" if staged.source is None else staged.source.weight_files
        refuse_other_files(command, read)
        of_all = yield from agreed(context, command, read)
    except CommandRefused:
        updates.drop_staged()
        raise
    planner = context.planner
    if command.abort_all_requests:
        context.emit(abort_all(context))
    if command.retract:
        planner.retract_all()
        context.forget_released()
    paused_requests = len(planner.live) if planner.paused or command.retract else 0
    version = of_all or command.weight_version or context.worker.weight_version
    old = updates.swap(staged, version)
    context.worker.weight_version = version
    if getattr(command, "keep_pause", False):
        planner.paused = True
    context.pause_without_memory()
    log.info("Update weights end.")
    planner.forget_prefixes(free=command.flush_cache)
    if command.flush_cache:
        log.info("Cache flushed successfully!")
    yield from run_in_background(partial(updates.after_swap, old))
    if command.torch_empty_cache:
        updates.empty_cache()
    return paused_requests


def refuse_unless_expected(context: Context, command: WeightChange) -> None:
    """Refuse with status 409 if the client expects another weight version than the served one."""
    served = context.worker.weight_version
    if command.expected_version not in (None, served):
        raise CommandRefused(OTHER_VERSION.format(command.expected_version, served), 409)


def refuse_other_files(command: WeightChange, read: str) -> None:
    """Refuse if the other schedulers have read other files from the same place."""
    if isinstance(command, UpdateWeightsFromDisk) and command.weight_files not in ("", read):
        raise CommandRefused(OTHER_FILES.format(command.model_path))


def refuse_in_session(updates: "Updates") -> None:
    if updates.session is not None:
        raise CommandRefused(SESSION_OPEN)


def succeeded(context: Context, command: WeightChange, message: str, body: dict[str, Any] | None = None) -> Reply:
    """The reply to a successful change, with the new state for the gateway."""
    if command.weight_version is not None:
        message += f" Weight version updated to {command.weight_version}."
    state = {
        "weight_version": context.worker.weight_version,
        "paused": context.planner.paused,
        **context.memory_state(),
    }
    return Reply(id=command.id, message=message, body={**state, **(body or {})})


# tensor by tensor


def begin_session(context: Context, updates: "Updates", command: BeginWeightUpdate) -> Resumable:
    """Open an update session. The served weights stay as they are."""
    refuse_selector(command.selector)
    refuse_in_session(updates)
    updates.open_session()
    return [Reply(id=command.id, message="Success")]
    yield


def end_session(context: Context, updates: "Updates", command: EndWeightUpdate) -> Resumable:
    """Apply the tensors that the session has collected, unless one of them was refused."""
    session = updates.session
    if session is None:
        raise CommandRefused(NO_SESSION)
    try:
        if session.broken:
            raise CommandRefused(GIVEN_UP.format(session.broken))
        command.weight_version = command.weight_version or session.version
        if session.names or session.aliases:
            yield from apply_session(context, updates, command)
    finally:
        updates.close_session()
    return [succeeded(context, command, "Success")]


def apply_session(context: Context, updates: "Updates", command: WeightChange) -> Generator[None, bool | None, None]:
    staged = yield from run_in_background(updates.finish_session)
    yield from swap(context, updates, staged, command)


def collect_tensors(
    context: Context, updates: "Updates", command: WeightChange, collect: "Collect"
) -> Generator[None, bool | None, None]:
    """Add tensors to the session; without an open session, apply them at once."""
    refuse_unless_expected(context, command)
    implicit = updates.session is None
    if implicit:
        updates.open_session(implicit=True)
    try:
        yield from run_in_background(collect)
        if implicit:
            yield from apply_session(context, updates, command)
        elif updates.session is not None and command.weight_version is not None:
            updates.session.version = command.weight_version
    finally:
        if implicit:
            updates.close_session()


def from_tensor(context: Context, updates: "Updates", command: UpdateWeightsFromTensor) -> Resumable:
    """Tensors from the files into which the gateway has put them."""
    refuse_selector(command.selector)
    if updates.session is not None and updates.session.broken:  # unlike here, every rank must take part in a broadcast
        raise CommandRefused(GIVEN_UP.format(updates.session.broken))
    collect = updates.payload(command.payload_files, command.load_format)
    yield from collect_tensors(context, updates, command, collect)
    return [succeeded(context, command, UPDATED_FROM_TENSOR)]


def from_distributed(context: Context, updates: "Updates", command: UpdateWeightsFromDistributed) -> Resumable:
    """Tensors that the trainer broadcasts."""
    refuse_selector(command.selector)
    collect = updates.broadcast(command)
    try:
        yield from collect_tensors(context, updates, command, collect)
    except CommandRefused as refusal:
        if refusal.status != 400:
            raise
        reason = refusal.message.removeprefix("Failed to update weights: ").split("\n")[0].rstrip(".")
        raise CommandRefused(ONLINE_FAILED.format(reason) + " Nothing was changed.") from refusal
    return [succeeded(context, command, UPDATED_ONLINE)]


def refuse_selector(selector: str) -> None:
    if selector not in SERVED_SELECTORS:
        raise CommandRefused(f"selector {selector} is not supported: this server has no such model.")


# names and values


def rename_version(context: Context, command: UpdateWeightVersion) -> Resumable:
    """Set the version label, then abort all requests if asked. The label survives a restart."""
    context.worker.weight_version = command.new_version
    aborted = abort_all(context) if command.abort_all_requests else []
    context.emit(aborted)
    log.info("Weight version updated to %s; %d requests aborted.", command.new_version, len(aborted))
    if context.updates is not None:
        context.updates.relabel(command.new_version)
        yield from run_in_background(context.updates.write_record)
    body = {
        "new_version": command.new_version,
        "weight_version": command.new_version,
        "num_aborted_requests": len(aborted),
    }
    return [Reply(id=command.id, message=f"Weight version updated to {command.new_version}", body=body)]


def read_rows(context: Context, updates: "Updates", command: GetWeightsByName) -> Resumable:
    """The first rows of a tensor, read in the background. Exclusive, so that no update changes it meanwhile."""
    rows = yield from run_in_background(partial(updates.inspection.rows, command.name, max(0, command.truncate_size)))
    if rows is None:
        raise CommandRefused("Get parameter by name failed")
    return [Reply(id=command.id, body={"rows": rows})]


def check_weights(context: Context, updates: "Updates", command: CheckWeights) -> Resumable:
    """Run one of the four actions on all tensors except those to skip."""
    refuse_selector(command.selector)
    names = updates.inspection.names(command.skip_tensor_list)
    result: dict[str, Any] = yield from CHECK_ACTIONS[command.action](context, updates, names)
    digest = result.pop("digest", None)
    ranks = [{"rank": rank, **result} for rank in range(updates.live.layout.parallel.size)]
    return [Reply(id=command.id, body={"ranks": ranks, "per_engine_checksum": digest})]


def checksum(context: Context, updates: "Updates", names: list[str]) -> CheckResult:
    checksums, digest = yield from run_in_background(partial(updates.inspection.checksums, names))
    return {"checksums": checksums, "digest": digest}


def snapshot(context: Context, updates: "Updates", names: list[str]) -> CheckResult:
    yield from run_in_background(partial(updates.inspection.take_snapshot, names))
    return {"tensors": len(names)}


def compare(context: Context, updates: "Updates", names: list[str]) -> CheckResult:
    differing = yield from run_in_background(partial(updates.inspection.differing, names))
    if differing is None:
        raise CommandRefused("There is no snapshot to compare with: call the action snapshot first.")
    if differing:
        raise CommandRefused(f"The weights differ from the snapshot in {len(differing)}: {', '.join(differing[:8])}.")
    return {"tensors": len(names)}


def reset(context: Context, updates: "Updates", names: list[str]) -> CheckResult:
    """Overwrite tensors with random values, so that a tensor that a later update leaves out is noticed."""
    refuse_in_session(updates)
    staged = yield from run_in_background(partial(updates.randomized, names))
    yield from swap(context, updates, staged, WeightChange())
    return {"tensors": len(names)}


CHECK_ACTIONS: dict[str, Callable[[Context, "Updates", list[str]], CheckResult]] = {
    "checksum": checksum,
    "snapshot": snapshot,
    "compare": compare,
    "reset_tensors": reset,
}

HANDLERS: dict[type[ControlCommand], Handler] = {
    UpdateWeightsFromDisk: exclusive(from_disk),
    UpdateWeightsFromTensor: exclusive(from_tensor),
    UpdateWeightsFromDistributed: exclusive(from_distributed),
    BeginWeightUpdate: exclusive(begin_session),
    EndWeightUpdate: exclusive(end_session),
    UpdateWeightVersion: rename_version,
    GetWeightsByName: exclusive(read_rows),
    CheckWeights: exclusive(check_weights),
}
