"""A peer in a process of its own, as a test sees it: a side like any other, which can be stopped and killed."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import msgspec

from kvpoll_fsm.errors import InvalidInput, TransportUnavailable
from kvpoll_fsm.spi import Capabilities, Completion, LeaseId, Link, Range, Region, Write
from kvpoll_fsm.testing.conformance import wire
from kvpoll_fsm.testing.conformance.sides import WITHIN_S, Side, until
from kvpoll_fsm.testing.conformance.spec import Spec, environment
from kvpoll_fsm.testing.conformance.system import members, states

__all__ = ["Peer", "Remote"]


class Remote:
    """The transport of another process, called as if it were here. Follows `kvpoll_fsm.spi.Transport`.

    Attributes:
        process: Which process; it leads a group of its own.
        is_awake: It is neither stopped nor dead: nobody else is asked for completions.
    """

    name = "remote"
    capabilities = Capabilities()

    def __init__(self, spec: Spec, within_s: float = WITHIN_S) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, "-m", f"{__package__}.peer", str(theirs.fileno()), *spec.words]
            self.process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=environment(),
                start_new_session=True,
            )
        ours.settimeout(within_s)
        self.is_awake = True
        self._pipe = ours
        self._within_s = within_s
        self._last: list[Completion] = []

    def start(self) -> None:
        """Start it."""
        self.call("start")

    def descriptor(self) -> bytes:
        """How to connect to it."""
        return bytes(self.call("descriptor"))

    def register(self, region: Region) -> bytes:
        """Memory that both processes see."""
        return bytes(self.call("register", region.number, len(region.buffer), fd=region.fd))

    def grant(self, lease: LeaseId, ranges: Sequence[Range]) -> bytes:
        """A token."""
        return bytes(self.call("grant", lease, list(ranges)))

    def revoke(self, token: bytes) -> None:
        """Revoke it."""
        self.call("revoke", token)

    def fence(self, token: bytes) -> int:
        """Fence it."""
        return int(self.call("fence", token))

    def connect(self, descriptor: bytes, regions: Sequence[bytes]) -> Link:
        """A link from the other process to any."""
        return RemoteLink(int(self.call("connect", descriptor, list(regions))), self)

    def completions(self) -> list[Completion]:
        """What has happened there; nothing is asked of a process that is stopped or dead."""
        if not self.is_awake:
            last, self._last = self._last, []
            return last
        return wire.news_from(self.call("completions"))

    def fileno(self) -> None:
        """There is none: it is asked at an interval."""
        return None

    def close(self) -> None:
        """Close it and end the process. May be called twice."""
        try:
            if self.is_awake:
                self._last += wire.news_from(self.call("close"))
        finally:
            self.is_awake = False
            self._pipe.close()
            self._end()

    def call(self, method: str, *arguments: Any, link: int | None = None, fd: int | None = None) -> Any:
        """Call a method there.

        Raises:
            InvalidInput: As there.
            TransportUnavailable: As there.
        """
        try:
            wire.send(self._pipe, wire.Call(method, list(arguments), link), fd)
            data, _ = wire.receive(self._pipe)
        except TimeoutError:
            raise AssertionError(f"the peer's process did not answer to {method} in time") from None
        except OSError as error:
            raise AssertionError(f"the peer's process has ended before it answered to {method}: {error}") from None
        assert data, f"the peer's process ended while it was to {method}: exit status {self.process.wait()}"
        answer = msgspec.msgpack.decode(data, type=wire.Answer)
        if InvalidInput.__name__ in answer.raised:
            raise InvalidInput(answer.text)
        if TransportUnavailable.__name__ in answer.raised:
            raise TransportUnavailable(self.name, answer.text)
        assert not answer.raised, f"{method} raised in the peer's process: {answer.text}"
        return answer.value

    def abandon(self) -> int:
        """Let the process end without closing the transport; returns its exit status."""
        wire.send(self._pipe, wire.Call("abandon"))
        self.is_awake = False
        return self.process.wait(self._within_s)

    def signal(self, number: int) -> None:
        """Send a signal to the process and to those it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def _end(self) -> None:
        """Wait for the end of the process, and make sure of it."""
        ended = self.process.returncode is not None  # killed by a test
        try:
            status = self.process.wait(self._within_s)
            assert ended or status == 0, f"the peer's process ended with exit status {status}"
        except subprocess.TimeoutExpired:
            raise AssertionError("the peer's process does not end") from None
        finally:
            if members(self.process.pid):
                self.signal(signal.SIGKILL)
            self.process.wait()


class RemoteLink:
    """A link of another process. Follows `kvpoll_fsm.spi.Link`."""

    def __init__(self, number: int, owner: Remote) -> None:
        self._number = number
        self._owner = owner

    @property
    def number(self) -> int:
        """As in the other process."""
        return self._number

    def submit(self, writes: Sequence[Write], token: bytes) -> int:
        """Write from there."""
        return int(self._owner.call("submit", list(writes), token, link=self._number))

    def cancel(self, ticket: int) -> None:
        """Cancel there."""
        self._owner.call("cancel", ticket, link=self._number)

    def close(self) -> None:
        """Close there."""
        self._owner.call("close", link=self._number)


class Peer(Side):
    """A side in a process of its own, whose memory this process sees too, whatever becomes of the other."""

    def __init__(self, spec: Spec, filled: bool = False, *, within_s: float = WITHIN_S) -> None:
        self.remote = Remote(spec, max(within_s, WITHIN_S))
        super().__init__(self.remote, filled=filled, within_s=within_s)

    def stop(self) -> None:
        """SIGSTOP for the process and those it has started; none of them runs any more on return."""
        self.remote.is_awake = False
        self.remote.signal(signal.SIGSTOP)
        group = self.remote.process.pid
        until(lambda: set(states(group)) <= set("TZX"), "the process to stop", self.within_s)

    def go(self) -> None:
        """SIGCONT."""
        self.remote.signal(signal.SIGCONT)
        self.remote.is_awake = True

    def kill(self) -> None:
        """SIGKILL for the process alone: those it has started must end by themselves, which is waited for."""
        self.remote.is_awake = False
        self.remote.process.kill()
        self.remote.process.wait()
        until(lambda: not self.group(), "the end of the processes it had started", self.within_s)

    def group(self) -> set[int]:
        """The process and those it has started, as far as they live."""
        return members(self.remote.process.pid)

    def close(self) -> None:
        """As any side; the process ends with it."""
        if self.remote.process.returncode is None:
            self.go()
        super().close()
