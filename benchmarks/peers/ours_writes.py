"""Our transports, used as the driver uses them: submit under a token, wait until every ticket is Done.

`tcp` shares its process with the busy loop, as with isolation="thread"; `tcp apart` has a process of its own beside
it, as the process that isolation="process" starts for it has.
"""

from __future__ import annotations

import base64
import select
import threading
from typing import Any

from benchmarks.cases import Case
from benchmarks.peers.base import Peer, Side, Told
from kvpoll_fsm import registry
from kvpoll_fsm.layout import Extent
from kvpoll_fsm.spi import MAX_TICKET_NBYTES, Completion, Done, Failed, LeaseId, Link, LinkDown, LinkUp, Range, Region
from kvpoll_fsm.writings import batches

__all__ = ["PEERS", "names"]

ONE_PROCESS = "memory"
"""For tests: both ends live in one process."""
POLL_MS = 1.0


def names() -> list[str]:
    """The transports that are installed and cross processes."""
    return sorted(registry.available().keys() - {ONE_PROCESS})


def text(data: bytes) -> str:
    """Bytes for JSON."""
    return base64.b64encode(data).decode()


class _Ours(Side):
    """What both have."""

    def _start(self) -> None:
        self._transport = registry.load(self.options["transport"])()
        self._transport.start()
        self._region = self._transport.register(Region(0, self.memory.buffer, self.memory.fd))

    def _wait(self, timeout_ms: float) -> list[Completion]:
        """Wait as the driver does."""
        fileno = self._transport.fileno()
        poller = select.poll()
        if fileno is not None:
            poller.register(fileno, select.POLLIN)
        poller.poll(POLL_MS if fileno is None else timeout_ms)
        return self._transport.completions()

    def close(self) -> None:
        """End the transport."""
        self._transport.close()


class Receiver(_Ours):
    """Grants; a thread attends to the transport, as the driver would."""

    def listen(self) -> Told:
        """Start the transport."""
        self._start()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._attend, daemon=True)
        self._token = b""
        return {"descriptor": text(self._transport.descriptor()), "region": text(self._region)}

    def join(self, told: Told) -> None:
        """Begin to attend."""
        self._thread.start()

    def prepare(self, case: Case, told: Told) -> Told:
        """A token for these pieces."""
        if self._token:
            self._transport.revoke(self._token)
        ranges = [Range(0, piece.dst, piece.nbytes) for piece in case.pieces()]
        self._token = self._transport.grant(LeaseId("receiver", 1, 0, 1, 0), ranges)
        return {"token": text(self._token)}

    def close(self) -> None:
        """End the thread, then the transport."""
        self._ended.set()
        self._thread.join()
        super().close()

    def _attend(self) -> None:
        while not self._ended.is_set():
            self._wait(100)


class Sender(_Ours):
    """Writes."""

    def join(self, told: Told) -> None:
        """Start the transport and reach the receiver."""
        self._start()
        descriptor, region = (base64.b64decode(told[key]) for key in ("descriptor", "region"))
        self._link: Link = self._transport.connect(descriptor, [region])
        while not self._is_up():
            pass

    def prepare(self, case: Case, told: Told) -> Told:
        """Cut the pieces into tickets as the driver does."""
        extents = [Extent(0, piece.src, piece.dst, piece.nbytes) for piece in case.pieces()]
        self._batches = list(batches(extents, MAX_TICKET_NBYTES, self._transport.capabilities.scatter_entries))
        return {}

    def ready(self, told: Told) -> None:
        """The token."""
        self._token = base64.b64decode(told["token"])

    def transfer(self) -> None:
        """Submit all tickets and wait for their ends."""
        open_tickets = {self._link.submit(batch, self._token) for batch in self._batches}
        while open_tickets:
            for completion in self._wait(1000):
                if isinstance(completion, Failed | LinkDown):
                    raise RuntimeError(str(completion))
                if isinstance(completion, Done):
                    open_tickets.discard(completion.ticket)

    def _is_up(self) -> bool:
        for completion in self._wait(1000):
            if isinstance(completion, LinkDown):
                raise RuntimeError(completion.reason)
            if isinstance(completion, LinkUp):
                return True
        return False


def _peer(transport: str, loop: str) -> Peer:
    options: dict[str, Any] = {"transport": transport}
    where = "in the loop's process" if loop == "inside" else "in a process of its own beside the loop"
    return Peer(
        transport if loop == "inside" else f"{transport} apart",
        "ours",
        Sender,
        Receiver,
        settings=f"transport alone ({where}), default settings, tickets of at most 16 MiB",
        checksum="off (the transport alone has none)",
        loop=loop,
        options=options,
    )


PEERS = [_peer(name, loop) for name in names() for loop in ("inside", "beside")]
