"""What the tcp transport does beyond what every transport does."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Iterator

import pytest

from kvpoll_fsm.errors import AddressError, InvalidInput, TransportUnavailable
from kvpoll_fsm.spi import Done, LinkDown, Write
from kvpoll_fsm.testing.conformance import TransportSuite
from kvpoll_fsm.testing.conformance.sides import HUGE, MIB, Pair, Side, footprint, until
from kvpoll_tcp import TcpTransport, lane
from kvpoll_tcp.crew import Crew
from kvpoll_tcp.receiver import Listener, Reader
from kvpoll_tcp.stream import Stream
from kvpoll_tcp.wire import Ack, Entry, Head, Verdict
from tests.transports import raw


class TestTcp(TransportSuite):
    needs_fd = False
    refuses_whole = True
    is_patient = False

    def make(self) -> TcpTransport:
        return TcpTransport()


class TestTcpWithTwoStreams(TransportSuite):
    needs_fd = False
    refuses_whole = True

    def make(self) -> TcpTransport:
        return TcpTransport(streams=2)

    def spec(self) -> None:
        """The tests with other processes are run with one stream, and with TLS and two."""


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair(Side(TcpTransport(), filled=True), Side(TcpTransport()))
    yield pair
    pair.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def address(transport: TcpTransport) -> tuple[str, int]:
    descriptor = raw.read_descriptor(transport.descriptor())
    return descriptor["host"], descriptor["port"]


# Addresses


@pytest.mark.parametrize(
    ("settings", "host"),
    [
        ({"host": "::1"}, "::1"),
        ({"host": "localhost"}, None),
        ({"host": "0.0.0.0", "advertise": "127.0.0.1"}, "127.0.0.1"),
        ({"host": "::", "advertise": "::1"}, "::1"),
        ({"host": "::", "advertise": "[::1]"}, "::1"),
        ({"host": "::", "advertise": "127.0.0.1"}, "127.0.0.1"),
        ({"host": "", "advertise": "localhost"}, None),
    ],
)
def test_addresses_that_work(settings: dict[str, str], host: str | None) -> None:
    pair = Pair(Side(TcpTransport(), filled=True), Side(TcpTransport(**settings)))
    link = pair.tx.connect(pair.rx)
    pair.done(link.submit([Write(0, 0, 0, 5 * MIB)], pair.rx.grant()))
    if host is not None:
        assert raw.read_descriptor(pair.rx.transport.descriptor())["host"] == host
    pair.close()


@pytest.mark.parametrize(
    "settings",
    [
        {"host": "0.0.0.0"},
        {"host": "::"},
        {"host": ""},
        {"host": "224.0.0.1"},
        {"host": "0.0.0.0", "advertise": "0.0.0.0"},
        {"host": "0.0.0.0", "advertise": "[::]:80"},
        {"advertise": "host:port"},
        {"advertise": "host:0"},
        {"advertise": "host:65536"},
        {"advertise": "[::1"},
        {"advertise": "[::1]80"},
    ],
)
def test_addresses_nobody_could_reach_are_refused(settings: dict[str, str]) -> None:
    with pytest.raises(AddressError):
        TcpTransport(**settings)


def test_a_name_for_an_address_nobody_could_reach_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    before = footprint()
    answers = {"everywhere.example": "0.0.0.0", "here.example": "127.0.0.1"}
    ask = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda name, *a, **k: ask(answers.get(name, name), *a, **k))
    for settings in ({"host": "everywhere.example"}, {"host": "here.example", "advertise": "everywhere.example"}):
        with pytest.raises(AddressError):
            TcpTransport(**settings).start()
    assert footprint() == before


@pytest.mark.parametrize(
    "settings",
    [
        {"data_ports": (0, 10)},
        {"data_ports": (20, 10)},
        {"data_ports": (65_530, 65_536)},
        {"streams": 0},
        {"max_connections": 0},
        {"max_strangers": -1},
        {"connect_s": 0},
        {"handshake_s": -1.0},
        {"buffer_nbytes": 1},
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(InvalidInput):
        TcpTransport(**settings)


def test_ports_are_taken_from_the_range() -> None:
    port = free_port()
    first, second = TcpTransport(data_ports=(port, port)), TcpTransport(data_ports=(port, port))
    first.start()
    assert address(first) == ("127.0.0.1", port)
    with pytest.raises(TransportUnavailable, match=f"ports {port} to {port}:"):
        second.start()
    second.close()
    wider = TcpTransport(data_ports=(port, min(port + 50, 65_535)))
    wider.start()
    assert port < address(wider)[1] <= port + 50
    wider.close()
    first.close()
    again = TcpTransport(data_ports=(port, port))
    again.start()
    again.close()


@pytest.mark.parametrize(
    "settings", [{"host": "192.0.2.77"}, {"host": "nowhere.invalid"}, {"advertise": "nowhere.invalid"}]
)
def test_an_address_that_is_not_ours_is_unavailable(settings: dict[str, str]) -> None:
    before = footprint()
    with pytest.raises(TransportUnavailable):
        TcpTransport(**settings).start()
    assert footprint() == before


def test_another_port_can_be_advertised() -> None:
    transport = TcpTransport(advertise="127.0.0.1:7000")
    transport.start()
    assert address(transport) == ("127.0.0.1", 7000)
    transport.close()


def test_a_descriptor_needs_a_start() -> None:
    with pytest.raises(InvalidInput):
        TcpTransport().descriptor()


def test_other_descriptors_are_refused(pair: Pair) -> None:
    good = raw.read_descriptor(pair.rx.transport.descriptor())
    for wrong in ({"version": 2}, {"host": "name.example"}, {"port": 0}, {"secret": b"short"}, {"incarnation": 7}):
        with pytest.raises(InvalidInput):
            pair.tx.transport.connect(raw.write_descriptor({**good, **wrong}), pair.rx.regions)


def test_a_descriptor_does_not_show_its_secret(pair: Pair) -> None:
    identity = pair.rx.transport._identity  # type: ignore[attr-defined]
    assert repr(identity) == f"Descriptor({identity})"
    assert str(identity.port) in str(identity)


# Connections that end


def readers(side: Side) -> list[Reader]:
    return list(side.transport._listener._known)  # type: ignore[attr-defined]


def hold_the_readers(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Nothing lands before the event returned is set."""
    gate, land = threading.Event(), Reader._land

    def held(self: Reader, *arguments: object) -> object:
        assert gate.wait(20)
        return land(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Reader, "_land", held)
    return gate


def test_a_broken_link_recovers(pair: Pair) -> None:
    link = pair.tx.connect(pair.rx)
    pair.up(link)
    for _ in range(3):
        until(lambda: len(readers(pair.rx)) == 1, "the reader before to be forgotten")
        readers(pair.rx)[0].cut()
        pair.until(lambda: not pair.tx.links[link.number][-1], "the news")
        pair.done(link.submit([Write(0, 0, 0, MIB)], pair.rx.grant()))
    assert pair.tx.links[link.number] == [True, False, True, False, True, False, True]


def test_a_link_that_breaks_with_bytes_on_their_way_is_not_quiescent(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = hold_the_readers(monkeypatch)
    link = pair.tx.connect(pair.rx)
    tickets = [link.submit(HUGE, pair.rx.grant()) for _ in range(3)]
    pair.up(link)
    until(lambda: readers(pair.rx), "the reader")
    until(lambda: link._lanes[0]._backlog._sent, "the first frame")  # type: ignore[attr-defined]
    readers(pair.rx)[0].cut()
    gate.set()
    ends = pair.ended(*tickets)
    assert [(end.quiescent, end.source_free) for end in ends] == [(False, True), (True, True), (True, True)]  # type: ignore[union-attr]


def test_a_receiver_that_answers_before_it_has_read_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its word would free a source that is still being sent, and what is written there next would be sent to it."""
    gate, land = threading.Event(), Reader._land

    def lie(self: Reader, head: Head, entries: list[Entry]) -> Verdict:
        self._socket.sendall(Ack(head.ticket, head.index, Verdict.landed).pack())
        assert gate.wait(20)
        return land(self, head, entries)

    monkeypatch.setattr(Reader, "_land", lie)
    small = {"buffer_nbytes": 1 << 16}
    pair = Pair(Side(TcpTransport(**small), filled=True), Side(TcpTransport(**small)))
    link = pair.tx.connect(pair.rx)
    ticket = link.submit([Write(0, 0, 0, MIB)], pair.rx.grant())
    end = pair.failed(ticket)
    assert "before it was sent" in end.reason
    assert (end.quiescent, end.source_free) == (False, True)
    gate.set()
    pair.close()


def test_connecting_takes_no_longer_than_allowed() -> None:
    tx = Side(TcpTransport(connect_s=0.2))
    with socket.socket() as full:
        link = connect_to_a_full_port(tx, full)
        tx.until(lambda: tx.links.get(link) == [False], "the news")
        assert "0.2 s" in str(tx.seen[-1])
    tx.close()


def test_close_is_not_held_up_by_a_connection_in_the_making() -> None:
    before = footprint()
    tx = Side(TcpTransport(connect_s=3_600))
    with socket.socket() as full:
        connect_to_a_full_port(tx, full)
        tx.close()
    assert footprint() == before


def test_close_is_not_held_up_by_a_handshake() -> None:
    before = footprint()
    tx = Side(TcpTransport(handshake_s=3_600))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        own = raw.read_descriptor(tx.transport.descriptor())
        tx.transport.connect(raw.write_descriptor({**own, "port": silent.getsockname()[1]}), [])
        visitor, _ = silent.accept()
        visitor.recv(1)
        visitor.close()
        tx.close()
    assert footprint() == before


def connect_to_a_full_port(tx: Side, full: socket.socket) -> int:
    """Connect to a port whose queue is full, so that the kernel does not answer."""
    full.bind(("127.0.0.1", 0))
    full.listen(0)
    fillers = [socket.socket() for _ in range(3)]
    for filler in fillers:
        filler.setblocking(False)
        filler.connect_ex(full.getsockname())
    own = raw.read_descriptor(tx.transport.descriptor())
    descriptor = raw.write_descriptor({**own, "port": full.getsockname()[1]})
    link = tx.transport.connect(descriptor, []).number
    for filler in fillers:
        filler.close()
    return link


# Mistakes and shortages


def test_a_mistake_fails_the_ticket_at_hand_and_not_the_next(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    link = pair.tx.connect(pair.rx)
    pair.up(link)
    with monkeypatch.context() as patch:
        patch.setattr(lane, "advance", lambda *_: 1 // 0)
        assert "ZeroDivisionError" in pair.failed(link.submit([Write(0, 0, 0, 10)], pair.rx.grant())).reason
    pair.done(link.submit([Write(0, 0, 0, 10)], pair.rx.grant()))
    assert pair.tx.links[link.number] == [True, False, True]
    assert "is given up" in caplog.text


def test_a_mistake_of_the_receiver_fails_the_ticket_at_hand_and_not_the_next(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    link = pair.tx.connect(pair.rx)
    pair.up(link)
    token = pair.rx.grant()
    with monkeypatch.context() as patch:
        patch.setattr(Reader, "_pour", lambda *_: 1 // 0)
        assert not pair.failed(link.submit([Write(0, 0, 0, 10)], token)).quiescent
    pair.done(link.submit([Write(0, 0, 0, 10)], token))
    pair.fence(token)
    assert "given up" in caplog.text


def test_the_port_outlives_a_shortage_of_descriptors(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    shortages = iter([OSError(errno.EMFILE, "Too many open files"), RuntimeError("can't start new thread")])
    start = Crew.start

    def short(self: Crew, name: str, work: object) -> None:
        shortage = next(shortages, None) if name.startswith("read-") else None
        if shortage is not None:
            raise shortage
        start(self, name, work)  # type: ignore[arg-type]

    monkeypatch.setattr(Crew, "start", short)
    for _ in range(2):
        link = pair.tx.connect(pair.rx)
        pair.until(lambda number=link.number: pair.tx.links.get(number) == [False], "the news")  # type: ignore[misc]
    pair.up(pair.tx.connect(pair.rx))


def test_a_shortage_of_threads_takes_the_link_down(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    before = footprint()
    monkeypatch.setattr(Crew, "start", short)
    link = pair.tx.connect(pair.rx)
    pair.pump()
    assert pair.tx.seen == [LinkDown(link.number, "cannot start: can't start new thread")]
    assert pair.failed(link.submit([Write(0, 0, 0, 1)], b"t" * 16)).quiescent
    with pytest.raises(TransportUnavailable, match="can't start new thread"):
        TcpTransport().start()
    assert footprint() == before


def test_without_eventfd_it_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "eventfd")
    with pytest.raises(TransportUnavailable, match="Linux"):
        TcpTransport().start()


# Odds and ends


def test_an_idle_connection_is_waited_on_for_ever(pair: Pair) -> None:
    link = pair.tx.connect(pair.rx)
    pair.done(link.submit([Write(0, 0, 0, MIB)], pair.rx.grant()))
    timeval = readers(pair.rx)[0]._socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, 16)
    assert timeval == bytes(16)


def test_default_timeouts_of_the_program_do_not_matter(caplog: pytest.LogCaptureFixture) -> None:
    socket.setdefaulttimeout(0.001)
    try:
        pair = Pair(Side(TcpTransport(), filled=True), Side(TcpTransport()))
        link = pair.tx.connect(pair.rx)
        pair.done(link.submit(HUGE, pair.rx.grant()))
        pair.close()
    finally:
        socket.setdefaulttimeout(None)
    assert not caplog.records


@pytest.fixture
def wide(pair: Pair) -> Iterator[Pair]:
    """A writer with three streams, to the same receiver."""
    tx = Side(TcpTransport(streams=3), filled=True)
    yield Pair(tx, pair.rx)
    tx.close()


def test_streams_share_the_work(wide: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = hold_the_readers(monkeypatch)
    link = wide.tx.connect(wide.rx)
    tickets = [link.submit([Write(0, 0, 0, MIB)], wide.rx.grant()) for _ in range(12)]
    gate.set()
    wide.done(*tickets)
    assert [load.ended_nbytes for load in link._lanes] == [4 * MIB] * 3  # type: ignore[attr-defined]
    assert wide.tx.links[link.number] == [True]


def test_a_stream_that_breaks_does_not_take_the_link_down(wide: Pair) -> None:
    link = wide.tx.connect(wide.rx)
    until(lambda: all(each._stream for each in link._lanes), "all streams")  # type: ignore[attr-defined]
    readers(wide.rx)[0].cut()
    wide.until(lambda: any(each._stream is None for each in link._lanes), "the break")  # type: ignore[attr-defined]
    wide.done(*(link.submit([Write(0, 0, 0, MIB)], wide.rx.grant()) for _ in range(6)))
    assert wide.tx.links[link.number] == [True]


def test_closed_links_are_forgotten(pair: Pair) -> None:
    for _ in range(5):
        link = pair.tx.connect(pair.rx)
        pair.up(link)
        link.close()
    assert len(pair.tx.transport._links) == 1  # type: ignore[attr-defined]
    until(lambda: not any("link-" in thread.name for thread in threading.enumerate()), "the threads' end")


def test_a_ticket_that_is_sent_slowly_is_done_in_the_end(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    send = Stream.send

    def slowly(self: Stream, views: list[memoryview], flags: int = 0) -> int:
        return 0 if len(views[0]) % 2 else send(self, [views[0][: max(1, len(views[0]) // 2)]])

    monkeypatch.setattr(Stream, "send", slowly)
    link = pair.tx.connect(pair.rx)
    ticket = link.submit([Write(0, 0, 0, 1 << 10)], pair.rx.grant())
    monkeypatch.setattr(Stream, "send", lambda self, views, flags=0: send(self, [views[0][:97]], flags))
    assert pair.ended(ticket) == [Done(ticket)]
    assert pair.rx.arenas[0][: 1 << 10] == pair.tx.arenas[0][: 1 << 10]


def test_a_peer_that_reads_slowly_does_not_stand_still() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening, socket.create_connection(listening.getsockname()) as sock:
        reader, _ = listening.accept()
        with reader:
            sock.setblocking(False)
            stream = Stream(sock)
            while stream.send([memoryview(bytes(MIB))]):
                pass
            until(lambda: stream.still_since() == stream.still_since(), "the kernels to be at rest")
            before = stream.still_since()
            until(lambda: reader.recv(MIB) and stream.still_since() > before, "a move")


def test_nothing_is_accepted_once_the_listener_is_stopped(pair: Pair) -> None:
    listener: Listener = pair.rx.transport._listener  # type: ignore[attr-defined]
    listener.stop()
    link = pair.tx.connect(pair.rx)
    pair.until(lambda: pair.tx.links.get(link.number, [None])[-1] is False, "the news")
