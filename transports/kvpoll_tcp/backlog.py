"""Tickets on their way over one connection: cut into frames, counted as they are sent and answered.

Nothing here touches a socket or a clock, and all of it belongs to one thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from kvpoll_fsm.errors import MalformedMessage
from kvpoll_fsm.spi import Completion, Done, Failed, Progress, Write
from kvpoll_tcp.wire import FRAME_NBYTES, MAX_ENTRIES, Ack, Head, Verdict

__all__ = ["Backlog", "Frame", "Job", "cut"]


Piece = tuple[int, int, int, int]
"""(region, source offset, destination offset, bytes)."""


@dataclass(slots=True)
class Frame:
    """The pieces of one frame; `nbytes` is their sum."""

    index: int
    last: bool
    nbytes: int
    pieces: Sequence[Piece]


def cut(pieces: Iterable[Piece]) -> Iterator[tuple[int, list[Piece]]]:
    """Cut into frames as large as allowed: (bytes, pieces) of each."""
    taken: list[Piece] = []
    room = FRAME_NBYTES
    for region, src, dst, nbytes in pieces:
        while nbytes:
            size = min(nbytes, room)
            taken.append((region, src, dst, size))
            src, dst, nbytes, room = src + size, dst + size, nbytes - size, room - size
            if not room or len(taken) == MAX_ENTRIES:
                yield FRAME_NBYTES - room, taken
                taken, room = [], FRAME_NBYTES
    if taken:
        yield FRAME_NBYTES - room, taken


class Job:
    """A ticket until its end.

    Attributes:
        ticket: Its number.
        nbytes: All of its bytes.
        unanswered: Frames of which a byte may have left and that have no answer yet.
    """

    __slots__ = ("_frames", "_landed", "_stopped", "_token", "nbytes", "ticket", "unanswered")

    def __init__(self, ticket: int, writes: Sequence[Write], nbytes: int, token: bytes) -> None:
        self.ticket = ticket
        self.nbytes = nbytes
        self.unanswered = 0
        self._token = token
        self._landed = 0
        self._stopped: str | None = None
        pieces = [(write.region, write.src_offset, write.dst_offset, write.nbytes) for write in writes]
        fits = nbytes <= FRAME_NBYTES and len(pieces) <= MAX_ENTRIES
        frames = [(nbytes, pieces)] if fits else list(cut(pieces))
        self._frames = deque(Frame(index, index == len(frames) - 1, *each) for index, each in enumerate(frames))

    @property
    def has_more(self) -> bool:
        """Whether a frame is left to send."""
        return bool(self._frames)

    def take_frame(self) -> tuple[Frame, bytes]:
        """The next frame and its head; counts as sent from now on."""
        frame = self._frames.popleft()
        self.unanswered += 1
        entries = [(region, nbytes, dst) for region, _, dst, nbytes in frame.pieces]
        head = Head(self.ticket, frame.index, frame.last, frame.nbytes, len(entries), self._token)
        return frame, head.pack(entries)

    def stop(self, reason: str) -> None:
        """Send no further frame. The first reason counts."""
        self._frames.clear()
        if self._stopped is None:
            self._stopped = reason

    def landed(self, nbytes: int) -> None:
        """The peer has so many more bytes in place."""
        self._landed += nbytes

    def outcome(self) -> Completion | None:
        """What there is to report now that something was answered or stopped; None if nothing is."""
        if self._landed == self.nbytes:
            return Done(self.ticket)
        if self.unanswered or self._frames:
            return None if self._stopped else Progress(self.ticket, self._landed)
        return Failed(self.ticket, self._stopped or "ended without an answer", quiescent=True)

    def broken(self, reason: str) -> Failed:
        """How it ends without the connection: what has no answer may sit in the peer's kernel, and land."""
        return Failed(self.ticket, self._stopped or reason, quiescent=not self.unanswered)


class Backlog:
    """The jobs of one connection, sent in order, and the frames sent whose answers are to come.

    Attributes:
        ended_nbytes: Bytes of all jobs that have ended. Read by other threads too.
    """

    def __init__(self) -> None:
        self.ended_nbytes = 0
        self._jobs: dict[int, Job] = {}
        self._to_send: deque[Job] = deque()
        self._sent: deque[tuple[Job, Frame]] = deque()
        self._leaving: Frame | None = None
        self._stopping: dict[int, float] = {}

    @property
    def has_frames(self) -> bool:
        """Whether a frame is left to send."""
        return bool(self._to_send)

    @property
    def stopping_since(self) -> float | None:
        """When the first job stopped that has not ended yet."""
        return next(iter(self._stopping.values()), None)

    def add(self, job: Job) -> None:
        """Queue a job."""
        self._jobs[job.ticket] = job
        self._to_send.append(job)

    def take_frame(self) -> tuple[Frame, bytes]:
        """The next frame to send, and its head. It counts as sent even if only a part of it leaves.

        `frame_left` must follow once all of it has.
        """
        job = self._to_send[0]
        frame, head = job.take_frame()
        self._leaving = frame
        if not job.has_more:
            self._to_send.popleft()
        self._sent.append((job, frame))
        return frame, head

    def frame_left(self) -> None:
        """The kernel has every byte of the frame that was taken last: its source is not read any more."""
        self._leaving = None

    def cancel(self, ticket: int, now: float) -> list[Completion]:
        """Send no further frame of a ticket; returns what there is to report."""
        job = self._jobs.get(ticket)
        if job is None:
            return []
        self._stop(job, "cancelled", now)
        return self._report(job)

    def answered(self, ack: Ack, now: float) -> list[Completion]:
        """The answer to the oldest frame sent; returns what there is to report.

        Raises:
            MalformedMessage: It is not the answer to that frame, or comes before the frame has left: believed, it
                would free a source that is still being read, and what is written there next would be sent.
        """
        if not self._sent:
            raise MalformedMessage("an answer to nothing")
        job, frame = self._sent.popleft()
        if frame is self._leaving:
            raise MalformedMessage(f"an answer to frame {frame.index} of ticket {job.ticket} before it was sent")
        if (ack.ticket, ack.index) != (job.ticket, frame.index):
            raise MalformedMessage(f"an answer to frame {ack.index} of ticket {ack.ticket} out of its turn")
        job.unanswered -= 1
        if ack.verdict == Verdict.landed:
            job.landed(frame.nbytes)
        else:
            self._stop(job, ack.verdict.reason, now)
        return self._report(job)

    def abandon(self, reason: str) -> list[Completion]:
        """The connection is gone: every job ends."""
        ends: list[Completion] = [job.broken(reason) for job in self._jobs.values()]
        for job in list(self._jobs.values()):
            self._forget(job)
        self._to_send.clear()
        self._sent.clear()
        self._leaving = None
        return ends

    def _stop(self, job: Job, reason: str, now: float) -> None:
        if job.has_more:
            self._to_send.remove(job)
        job.stop(reason)
        self._stopping.setdefault(job.ticket, now)

    def _report(self, job: Job) -> list[Completion]:
        outcome = job.outcome()
        if outcome is None:
            return []
        if not isinstance(outcome, Progress):
            self._forget(job)
        return [outcome]

    def _forget(self, job: Job) -> None:
        del self._jobs[job.ticket]
        self._stopping.pop(job.ticket, None)
        self.ended_nbytes += job.nbytes
