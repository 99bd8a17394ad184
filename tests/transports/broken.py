"""Transports that break one promise each, and the test of the kit that must notice: for `test_can_fail.py`.

All but a few are the memory transport with one thing changed. pytest does not collect this file by itself.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from kvpoll_fsm.errors import InvalidInput
from kvpoll_fsm.spi import Completion, Done, Failed, Fenced, LeaseId, Progress, Quiesced, Range, Region, Write
from kvpoll_fsm.testing.conformance import TransportSuite
from kvpoll_memory import MemoryTransport
from kvpoll_memory.transport import MemoryLink
from kvpoll_tcp import TcpTransport
from tests.transports.test_costly import Costly

STEP_NBYTES = 1 << 20


class Memory(MemoryTransport):
    """Moves one piece at a time, so that something is always under way."""

    def __init__(self) -> None:
        super().__init__(steps=1, step_nbytes=STEP_NBYTES)


class LateWriter(Memory):
    """Says Fenced, and lets what is under way go on for a while."""

    def __init__(self) -> None:
        super().__init__()
        self.later: list[tuple[int, bytes]] = []

    def fence(self, token: bytes) -> int:
        number = super().fence(b"none")
        self.later.append((3, token))
        return number

    def completions(self) -> list[Completion]:
        for left, token in self.later:
            if not left:
                self.revoke(token)
        self.later = [(left - 1, token) for left, token in self.later if left]
        return super().completions()


class Hasty(Memory):
    """Says Done when it begins to write."""

    def __init__(self) -> None:
        super().__init__()
        self.told: set[int] = set()

    def completions(self) -> list[Completion]:
        seen: list[Completion] = []
        for each in super().completions():
            ticket = getattr(each, "ticket", None)
            if isinstance(each, (Progress, Done)) and ticket not in self.told:
                seen.append(Done(each.ticket))
                self.told.add(each.ticket)
            elif ticket not in self.told:
                seen.append(each)
        return seen


class Repeating(Memory):
    """Ends every hundredth ticket a second time, later."""

    def __init__(self) -> None:
        super().__init__()
        self.again: list[Completion] = []

    def completions(self) -> list[Completion]:
        seen = [*self.again, *super().completions()]
        self.again = [each for each in seen if isinstance(each, Done) and each.ticket % 100 == 99]
        return seen


class Forgetful(Memory):
    """Never ends every hundredth ticket."""

    def completions(self) -> list[Completion]:
        return [each for each in super().completions() if not (isinstance(each, Done) and each.ticket % 100 == 99)]


class Trusting(Memory):
    """Does not look at tokens."""

    def start(self) -> None:
        super().start()
        self._host.refusal = lambda *_: None  # type: ignore[method-assign]


class Generous(Memory):
    """Looks at tokens, not at ranges."""

    def start(self) -> None:
        super().start()
        host = self._host

        def refusal(token: bytes, region: int, offset: int, nbytes: int) -> str | None:
            inside = region in host.regions and offset + nbytes <= len(host.regions[region])
            return None if inside and token in host._grants else "no"

        host.refusal = refusal  # type: ignore[method-assign]


class Unrevoking(Memory):
    """Forgets to revoke."""

    def revoke(self, token: bytes) -> None:
        pass


class Unfenced(Memory):
    """A fence never ends."""

    def __init__(self) -> None:
        super().__init__()
        self.faults.hold_fences()


class Counting(Memory):
    """Tokens can be guessed."""

    def __init__(self) -> None:
        super().__init__()
        self.next = itertools.count()

    def grant(self, lease: LeaseId, ranges: Sequence[Range]) -> bytes:
        token, mine = super().grant(lease, ranges), next(self.next).to_bytes(16, "big")
        self._host._grants[mine] = self._host._grants.pop(token)
        return mine


class Threading(Memory):
    """Leaves a thread behind."""

    def start(self) -> None:
        super().start()
        threading.Thread(target=time.sleep, args=(20,), daemon=True, name="left-behind").start()


class Opening(Memory):
    """Leaves file descriptors behind."""

    def start(self) -> None:
        super().start()
        os.pipe()


class Inheriting(Memory):
    """Hands its file descriptors to every program that the host starts."""

    def start(self) -> None:
        super().start()
        self.fd = os.eventfd(0, 0)

    def close(self) -> None:
        super().close()
        if hasattr(self, "fd"):
            os.close(self.fd)
            del self.fd


def spawn(program: str) -> None:
    """Start a process, and forget it."""
    os.posix_spawn(sys.executable, [sys.executable, "-c", program], os.environ)


class Spawning(Memory):
    """Leaves a process behind: one that has ended, and is not waited for."""

    def start(self) -> None:
        super().start()
        spawn("")


class FalseCancel(Memory):
    """Claims to cancel, and does not."""

    def connect(self, descriptor: bytes, regions: Sequence[bytes]) -> MemoryLink:
        link = super().connect(descriptor, regions)
        link.cancel = lambda ticket: None  # type: ignore[method-assign]
        return link


class Liar(Memory):
    """Says of cancelled tickets that nothing lands any more, and goes on with them."""

    def connect(self, descriptor: bytes, regions: Sequence[bytes]) -> MemoryLink:
        link = super().connect(descriptor, regions)
        link.cancel = lambda ticket: self.faults.fail_late(ticket)  # type: ignore[method-assign]
        return link

    def completions(self) -> list[Completion]:
        seen = super().completions()
        for number, each in enumerate(seen):
            if isinstance(each, Failed) and not each.quiescent:
                seen[number] = Failed(each.ticket, each.reason, quiescent=True)
                self.faults.land(each.ticket)
        return [each for each in seen if not isinstance(each, Quiesced)]


class SecretCancel(Memory):
    """Cancels, and does not claim to."""

    capabilities = replace(MemoryTransport.capabilities, cancellable=False)


class FalseProgress(MemoryTransport):
    """Claims to report progress, and does not."""

    capabilities = replace(MemoryTransport.capabilities, reports_progress=True)


class FewEntries(Memory):
    """Takes fewer writes at once than it claims."""

    def submitted(self, writes: Sequence[Write], token: bytes) -> Any:
        if len(writes) > 500:
            raise InvalidInput("too many")
        return super().submitted(writes, token)


class FewTickets(Memory):
    """Fails tickets beyond fewer than it claims."""

    def connect(self, descriptor: bytes, regions: Sequence[bytes]) -> MemoryLink:
        link = super().connect(descriptor, regions)
        submit = link.submit

        def checked(writes: Sequence[Write], token: bytes) -> int:
            ticket = submit(writes, token)
            if len(link._tickets) > 600:
                link._tickets.pop(ticket)
                self.report(Failed(ticket, "too many", quiescent=True))
            return ticket

        link.submit = checked  # type: ignore[method-assign]
        return link


class Rude(Memory):
    """Claims a mild fence, and takes its links down."""

    def fence(self, token: bytes) -> int:
        TALKING.faults.break_links()
        return super().fence(token)

    def connect(self, descriptor: bytes, regions: Sequence[bytes]) -> MemoryLink:
        global TALKING
        TALKING = self
        return super().connect(descriptor, regions)


TALKING: Memory


class Silent(Costly):
    """Its fence costs other tickets, and it does not say that it was that."""

    def report(self, *completions: Completion) -> None:
        super().report(*(without_saying(each) for each in completions))


def without_saying(each: Completion) -> Completion:
    return Failed(each.ticket, each.reason, each.quiescent) if isinstance(each, Failed) else each


class Numbering(Memory):
    """Numbers the tickets of each link by themselves."""

    def connect(self, descriptor: bytes, regions: Sequence[bytes]) -> MemoryLink:
        link = super().connect(descriptor, regions)
        numbers, submit = itertools.count(), link.submit

        def numbered(writes: Sequence[Write], token: bytes) -> int:
            self._tickets = numbers
            return submit(writes, token)

        link.submit = numbered  # type: ignore[method-assign]
        return link


class Spilling(Memory):
    """Writes one byte too many."""

    def copy(self, ticket: Any, host: Any, most: int | None, flips: Sequence[int]) -> str | None:
        write = ticket._left[-1][0]
        problem = super().copy(ticket, host, most, flips)
        if problem is None and ticket.is_complete:
            host.regions[write.region][write.dst_offset + write.nbytes] = 0xFF
        return problem


class Moving(Memory):
    """Gives another descriptor each time."""

    def descriptor(self) -> bytes:
        return super().descriptor() + os.urandom(2)

    def connect(self, descriptor: bytes, regions: Sequence[bytes]) -> MemoryLink:
        return super().connect(descriptor[:-2], regions)


class Hanging(Memory):
    """Waits where nothing may wait."""

    def revoke(self, token: bytes) -> None:
        threading.Event().wait()


class Unclosing(Memory):
    """Closes without ending its tickets."""

    def close(self) -> None:
        for link in self._links:
            link._tickets.clear()
        super().close()


class Careless(Memory):
    """Closes the parent's transports in a forked child, as far as others can see."""

    def start(self) -> None:
        super().start()
        self.read, self.write = os.pipe()
        os.set_blocking(self.read, False)

    def close(self) -> None:
        if hasattr(self, "write"):
            os.write(self.write, b"x")
        super().close()

    def completions(self) -> list[Completion]:
        try:
            os.read(self.read, 1)
        except (BlockingIOError, AttributeError):
            return super().completions()
        self.faults.refuse_links("closed by a child")
        return super().completions()


class Ringing(TcpTransport):
    """Its file descriptor is always readable."""

    def start(self) -> None:
        super().start()
        self.bell = os.eventfd(1, os.EFD_CLOEXEC)

    def fileno(self) -> int | None:
        return getattr(self, "bell", None)


class Mute(Ringing):
    """Its file descriptor is never readable."""

    def start(self) -> None:
        super().start()
        os.eventfd_read(self.bell)


class Surviving(TcpTransport):
    """Starts a process that outlives its parent."""

    def start(self) -> None:
        super().start()
        if sys.argv[0].endswith("peer.py"):
            spawn("import time; time.sleep(50)")


class Registering(Memory):
    """Takes any region."""

    def register(self, region: Region) -> bytes:
        if region.number in self._host.regions or region.buffer.readonly:
            return b"kvpoll-memory:"
        return super().register(region)


class Answering(Memory):
    """Answers a fence by another's number."""

    def completions(self) -> list[Completion]:
        seen = super().completions()
        return [Fenced(0) if isinstance(each, Fenced) else each for each in seen]


class Crashing(Memory):
    """Takes the process with it when it is to grant a hundredth time."""

    def __init__(self) -> None:
        super().__init__()
        self.grants = 0

    def grant(self, lease: LeaseId, ranges: Sequence[Range]) -> bytes:
        self.grants += 1
        if self.grants == 100:
            self.end()
        return super().grant(lease, ranges)

    def end(self) -> None:
        os.abort()


class Stuck(Crashing):
    """Hangs where no alarm wakes it."""

    def end(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
        threading.Event().wait()


class Reviving(Memory):
    """A grant to the same holder brings back the token that was fenced."""

    def __init__(self) -> None:
        super().__init__()
        self.before: dict[tuple[LeaseId, tuple[Range, ...]], list[bytes]] = {}

    def grant(self, lease: LeaseId, ranges: Sequence[Range]) -> bytes:
        token, earlier = super().grant(lease, ranges), self.before.setdefault((lease, tuple(ranges)), [])
        self._host._grants |= dict.fromkeys(earlier, self._host._grants[token])
        earlier.append(token)
        return token


class Crowded(Memory):
    """Keeps so many tokens and no more."""

    def grant(self, lease: LeaseId, ranges: Sequence[Range]) -> bytes:
        if len(self._host._grants) == 256:
            del self._host._grants[next(iter(self._host._grants))]
        return super().grant(lease, ranges)


BROKEN = {
    LateWriter: ("test_nothing_lands_after_a_fence", "landed behind the fence"),
    Hasty: ("test_done_means_in_memory", ""),
    Repeating: ("test_1000_tickets_end_exactly_once_each", "after Done"),
    Forgetful: ("test_1000_tickets_end_exactly_once_each", "not within"),
    Trusting: ("test_a_foreign_token_writes_nothing[16 bytes]", "Done"),
    Generous: ("test_what_is_not_granted_is_refused[one byte before]", "Done"),
    Unrevoking: ("test_a_revoked_token_writes_nothing", "Done"),
    Unfenced: ("test_a_fence_always_ends", "not within"),
    Counting: ("test_a_token_that_was_changed_writes_nothing", "Done"),
    Threading: ("test_close_leaves_nothing_behind[unused]", "left behind: "),
    Opening: ("test_close_leaves_nothing_behind[used]", "left behind: "),
    Inheriting: ("test_what_it_opens_is_not_inherited_and_threads_have_names", "eventfd"),
    Spawning: ("test_close_leaves_nothing_behind[busy]", "the end of its processes"),
    FalseCancel: ("test_it_cancels_if_it_claims_to", "False is True"),
    Liar: ("test_a_cancelled_ticket_ends", "landed behind"),
    SecretCancel: ("test_it_cancels_if_it_claims_to", "True is False"),
    FalseProgress: ("test_progress_is_reported_if_it_is_claimed", "False is True"),
    FewEntries: ("test_scatter_entries_are_taken", "too many"),
    FewTickets: ("test_max_outstanding_can_be_in_flight", "too many"),
    Rude: ("test_a_mild_fence_is_one", "broken"),
    Silent: ("test_nothing_lands_after_a_fence", "ended by a fence of another token"),
    Numbering: ("test_tickets_of_several_links_have_different_numbers", ""),
    Spilling: ("test_writes_what_was_asked_and_nothing_else", "0xff where 0x00 belongs"),
    Moving: ("test_a_descriptor_stays_as_it_is", ""),
    Hanging: ("test_a_revoked_token_writes_nothing", "it hangs in the call below"),
    Unclosing: ("test_close_ends_all_that_is_under_way", ""),
    Careless: ("test_a_forked_child_that_closes_it_changes_nothing", "closed by a child"),
    Ringing: ("test_fileno_falls_silent", "silence"),
    Mute: ("test_fileno_is_readable_when_there_is_something", "readable"),
    Surviving: ("test_a_receiver_killed_before", "the end of the processes it had started"),
    Registering: ("test_a_region_that_cannot_be_written_is_an_error", "DID NOT RAISE"),
    Answering: ("test_a_fence_always_ends", "twice"),
    Reviving: ("test_nothing_lands_after_a_fence", ""),
    Crowded: ("test_1000_tokens_at_once", "does not know the token"),
}
"""Each of them, the test that must fail, and a word of its message."""
SHORT = (Forgetful, Unfenced, Spawning, Ringing, Mute, Surviving)
"""Those that are waited for in vain: not for long."""


def _suite(made: type[MemoryTransport | TcpTransport]) -> type[TransportSuite]:
    settings: dict[str, Any] = {"make": lambda self: made()}
    if made in SHORT:
        settings["within_s"] = 2.0
    if made is Hanging:
        settings["test_s"] = 2.0
    return type(f"Test{made.__name__}", (TransportSuite,), settings)


for _made in BROKEN:
    globals()[f"Test{_made.__name__}"] = _suite(_made)
