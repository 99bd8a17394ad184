"""The sender's end of tcp, with a script in place of the socket: whoever answers may be anybody, and say anything."""

from __future__ import annotations

from kvpoll_common.door import Refused
from kvpoll_common.handshake import HELLO_NBYTES
from kvpoll_fsm.errors import MalformedMessage
from kvpoll_fsm.spi import Completion, Done, Failed, Progress, Write
from kvpoll_tcp import wire
from kvpoll_tcp.backlog import Backlog, Job
from kvpoll_tcp.handshake import prove_to_receiver
from kvpoll_tcp.stream import Stream
from tests.fuzz.choices import Choices
from tests.fuzz.stream import ACK, IDENTITY, NONCE, Script, as_socket
from tests.transports import raw


def impostor(data: bytes) -> None:
    """Whoever answers at a receiver's address without its secret is found out, by a typed error."""
    choices = Choices(data)
    opening = raw.hello(IDENTITY.incarnation, NONCE)
    if choices.flag():
        opening = choices.pick((opening[: choices.below(58)], choices.blob(80), raw.hello(b"o" * 16, NONCE),
                                raw.hello(IDENTITY.incarnation, NONCE, version=2)))  # fmt: skip
    script = Script(opening, choices)
    mirror = choices.flag()
    script.answer = lambda said: (said[HELLO_NBYTES:] if mirror else choices.blob(40)) if len(said) > 60 else b""
    try:
        prove_to_receiver(as_socket(script), IDENTITY, 5.0)
    except (OSError, MalformedMessage, Refused):
        return
    raise AssertionError("taken for the receiver")


def answers(data: bytes) -> None:
    """Any answers to a sender: every ticket ends exactly once, Done only if every frame of it was said to land."""
    choices = Choices(data)
    backlog, jobs = Backlog(), posted(choices)
    for job in jobs.values():
        backlog.add(job)
    sent: list[tuple[int, int]] = []
    while backlog.has_frames and not choices.flag(6):
        frame, head = backlog.take_frame()
        taken = wire.Head.unpack(head)
        assert taken.index == frame.index
        sent.append((taken.ticket, frame.index))
    stream = Stream(as_socket(Script(said_of(sent, choices), choices)))
    landed: set[tuple[int, int]] = set()
    ends: dict[int, Completion] = {}
    reason = heard(stream, backlog, choices, landed, ends)
    note(backlog.abandon(reason), ends)
    assert reason, "an end without a reason"
    assert ends.keys() == jobs.keys()
    for ticket, end in ends.items():
        if isinstance(end, Done):
            assert landed >= {place for place in sent if place[0] == ticket}


def posted(choices: Choices) -> dict[int, Job]:
    """Some tickets, of one frame or more."""
    jobs = {}
    for ticket in range(1 + choices.below(4)):
        writes = [Write(0, 0, 0, choices.pick((1, 100, 4 << 20, 5 << 20))) for _ in range(1 + choices.below(3))]
        jobs[ticket] = Job(ticket, writes, sum(write.nbytes for write in writes), b"t" * 16)
    return jobs


def heard(
    stream: Stream,
    backlog: Backlog,
    choices: Choices,
    landed: set[tuple[int, int]],
    ends: dict[int, Completion],
) -> str:
    """Take answers until the connection ends, and say why it did."""
    while True:
        try:
            for ack in stream.answers():
                if ack.verdict == wire.Verdict.landed:
                    landed.add((ack.ticket, ack.index))
                note(backlog.answered(ack, 1.0), ends)
        except (MalformedMessage, OSError) as error:
            return str(error)
        if choices.flag(8):
            note(backlog.cancel(choices.below(5), 1.0), ends)


def said_of(sent: list[tuple[int, int]], choices: Choices) -> bytes:
    """The answers to these frames, with some of them wrong, and anything after them."""
    acks = []
    for ticket, index in sent:
        verdict = choices.below(4) if choices.flag(4) else 0
        wrong = choices.flag(8)
        acks.append(ACK.pack(0x564B, 2, verdict, index + wrong, ticket))
        if choices.flag(8):
            acks.append(
                choices.pick((acks[-1], ACK.pack(0x564B, 2, choices.below(256), index, ticket), choices.blob(20)))
            )
    return b"".join(acks)


def note(completions: list[Completion], ends: dict[int, Completion]) -> None:
    for completion in completions:
        if isinstance(completion, Progress):
            assert completion.ticket not in ends, f"{completion} after the end"
        elif isinstance(completion, (Done, Failed)):
            assert completion.ticket not in ends, f"{completion} is a second end"
            ends[completion.ticket] = completion
