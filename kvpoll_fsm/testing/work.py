"""The work that endpoints of a `World` ask for: reaching ports, writing, fencing, comparing, copying."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import structs

from kvpoll_fsm import inputs
from kvpoll_fsm.commands import CopyOut, Fence, HeldPart, Preflight, StartPart, Target, Verify
from kvpoll_fsm.errors import FailureCode
from kvpoll_fsm.session import RoomKey
from kvpoll_fsm.testing import invariants
from kvpoll_fsm.testing.hosts import Host, Job, LateWrite, token_of

if TYPE_CHECKING:
    from kvpoll_fsm.testing.world import World

__all__ = ["answer", "loosen", "progress"]

CHECKSUM = bytes(16)
"""Stands for the checksum of the right bytes, whatever they are."""
DIFFER = (FailureCode.ChecksumMismatch, "the bytes differ")


def answer(
    world: World, host: Host, job: Job, *, ok: bool, loose: bool, reads: bool = True, collateral: bool = False
) -> inputs.Input | None:
    """Do a job, well or badly.

    Args:
        world: Where it is done.
        host: Who was asked for it.
        job: What was asked for.
        ok: It succeeds. A fence that does not is one that would cost other rooms: it stays unanswered, as long
            as it is not forced.
        loose: A write that fails may land later.
        reads: It reads its source until then.
        collateral: It fails through no fault of the transport.

    Returns:
        What the room is to be told, if anything.
    """
    command, key = job.command, job.key
    if isinstance(command, Preflight):
        return inputs.Preflighted(command.rank, command.conn, command.transport, ok, "" if ok else "refused")
    if isinstance(command, StartPart) and job.target is not None:
        written = _write(world, host, job, job.target, ok, loose)
        how = {"source_free": written.quiescent or not reads, "collateral": collateral and not written.ok}
        return structs.replace(written, **how)
    if isinstance(command, Fence) and command.transport:
        return host.fence_one(key, command, world.new_token())
    if isinstance(command, Fence):
        host.end_tokens(key, command.part, fence=ok or command.force)
        return inputs.Fenced(command.part) if ok or command.force else None
    if isinstance(command, Verify):
        return inputs.Verified(command.held.part, _problem(world, host, key, command.held, ok))
    if isinstance(command, CopyOut):
        return _copy_out(world, host, key, command, ok)
    raise AssertionError(f"nothing answers {command!r}")


def progress(world: World, host: Host, job: Job, tokens: int) -> bool:
    """The first tokens of a write arrive; returns whether they did."""
    peer = destination(world, host, job)
    if peer is None or job.target is None:
        return False
    return peer.store(token_of(job.target), host.source(job.key, job.command)[:tokens])


def destination(world: World, host: Host, job: Job) -> Host | None:
    """The host a write goes to, if it still runs."""
    return world.host_of(world.peers.get((host.incarnation, job.target.conn))) if job.target else None


def loosen(world: World, host: Host, job: Job) -> bool:
    """A write ends unknown, if it is a write, and to somebody we have met."""
    dest = world.peers.get((host.incarnation, job.target.conn)) if job.target else None
    if dest is not None:
        world.on_late(LateWrite(job, host.incarnation, dest))
    return dest is not None


def _write(world: World, host: Host, job: Job, target: Target, ok: bool, loose: bool) -> inputs.PartWritten:
    shut = bool(target.shut)
    loosened = loose and not (ok or shut) and loosen(world, host, job)
    landed = ok and not shut and progress(world, host, job, job.command.tokens)
    return inputs.PartWritten(
        target.rank,
        job.command.part,
        target.transport,
        landed,
        quiescent=not loosened,
        detail="" if landed else "the write failed",
        checksum=CHECKSUM if landed and world.checksums else None,
        attempt=job.command.attempt,
        shut=shut,
    )


def _problem(world: World, host: Host, key: RoomKey, held: HeldPart, ok: bool) -> tuple[FailureCode, str] | None:
    return None if ok and host.read(held) == invariants.sent(world, host, key, held) else DIFFER


def _copy_out(world: World, host: Host, key: RoomKey, command: CopyOut, ok: bool) -> inputs.CopiedOut:
    last = command.parts[-1]
    failure = None if ok else DIFFER
    if command.checksum is not None:
        failure = _problem(world, host, key, last, ok)
    host.copy_out(key, command)
    return inputs.CopiedOut(last.part, failure)
