"""The tcp transport with TLS: all that every transport must do, and what only TLS can get wrong."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvpoll_fsm import FailureCode
from kvpoll_fsm.errors import InvalidInput, TransportUnavailable
from kvpoll_fsm.spi import LinkDown, Range, Write
from kvpoll_fsm.testing.conformance import Spec, TransportSuite
from kvpoll_fsm.testing.conformance.sides import MIB, Pair, Side, until, untouched
from kvpoll_tcp import TcpTransport, contexts
from tests.helpers import failed, open_pair, pair, transfer
from tests.transports import raw
from tests.transports.certificates import Contexts, authority, client_context, server_context
from tests.transports.certificates import contexts as made_contexts
from tests.transports.certificates import spec as peer_spec
from tests.transports.raw import Raw, entry, frame

TLS = made_contexts()


class TestTcpWithTls(TransportSuite):
    needs_fd = False
    refuses_whole = True

    def make(self) -> TcpTransport:
        return TcpTransport(tls=TLS)

    def spec(self) -> None:
        """The tests with other processes are run with two streams, below."""


class TestTcpWithTlsAndTwoStreams(TransportSuite):
    needs_fd = False
    refuses_whole = True
    is_patient = False

    def make(self) -> TcpTransport:
        return TcpTransport(tls=TLS, streams=2)

    def spec(self) -> Spec:
        return peer_spec(streams=2)


def sides(tx: Contexts | None = TLS, rx: Contexts | None = TLS, **settings: Any) -> Pair:
    return Pair(Side(TcpTransport(tls=tx), filled=True), Side(TcpTransport(tls=rx, **settings)))


@pytest.fixture
def secure() -> Iterator[Pair]:
    made = sides()
    yield made
    made.close()


def refused(side: Side, reason: str) -> None:
    transport: Any = side.transport
    until(lambda: transport.refused().get(reason), f"{reason}: {transport.refused()}")


def down(made: Pair) -> str:
    """Connect in vain; returns why."""
    link = made.tx.connect(made.rx)
    made.until(lambda: made.tx.links.get(link.number) == [False], "the refusal")
    assert made.failed(link.submit([Write(0, 0, 0, 10)], made.rx.grant())).quiescent
    untouched(made.rx)
    return next(seen.reason for seen in made.tx.seen if isinstance(seen, LinkDown))


# Settings


def bare(kind: int) -> ssl.SSLContext:
    return ssl.SSLContext(kind)


def lax() -> ssl.SSLContext:
    context = bare(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


@pytest.mark.parametrize(
    ("tls", "problem"),
    [
        (True, r"give \(server context, client context\)"),
        ((TLS[0],), r"give \(server context, client context\)"),
        ([*TLS], r"give \(server context, client context\)"),
        ((TLS[0], None), r"give \(server context, client context\)"),
        ((TLS[1], TLS[0]), "the server's context comes first"),
        ((bare(ssl.PROTOCOL_TLS_SERVER), TLS[1]), "no certificate: load_cert_chain"),
    ],
)
def test_contexts_that_cannot_work_are_refused(tls: Any, problem: str) -> None:
    with pytest.raises(InvalidInput, match=problem):
        TcpTransport(tls=tls)


@pytest.mark.parametrize("where", [{"host": "192.0.2.7"}, {"advertise": "192.0.2.7"}, {"host": "node7.example"}])
def test_a_client_that_verifies_nothing_is_for_this_machine_alone(where: dict[str, str]) -> None:
    with pytest.raises(InvalidInput, match=r"verifies no certificate.*load_verify_locations"):
        TcpTransport(tls=(TLS[0], lax()), **where)
    TcpTransport(tls=TLS, **where)


def test_a_client_that_verifies_nothing_connects_to_this_machine_alone() -> None:
    made = sides(tx=(TLS[0], lax()))
    made.up(made.tx.connect(made.rx))  # what it lacks, the descriptor's fingerprint makes up for
    elsewhere = {**raw.read_descriptor(made.rx.transport.descriptor()), "host": "192.0.2.7"}
    with pytest.raises(InvalidInput, match=r"refused for 192\.0\.2\.7"):
        made.tx.transport.connect(raw.write_descriptor(elsewhere), made.rx.regions)
    made.close()


def test_the_descriptor_names_the_certificate(secure: Pair) -> None:
    said = raw.read_descriptor(secure.rx.transport.descriptor())["tls"]
    shown = ssl.PEM_cert_to_DER_cert(ssl.get_server_certificate(address(secure.rx)))
    assert said == hashlib.sha256(shown).digest() == contexts.fingerprint_of(TLS[0])
    short = raw.write_descriptor({**raw.read_descriptor(secure.rx.transport.descriptor()), "tls": said[:-1]})
    with pytest.raises(InvalidInput, match="fingerprint is cut"):
        secure.tx.transport.connect(short, secure.rx.regions)


def address(side: Side) -> tuple[str, int]:
    descriptor = raw.read_descriptor(side.transport.descriptor())
    return descriptor["host"], descriptor["port"]


# One side alone


@pytest.mark.parametrize(("tx", "rx", "why"), [(TLS, None, "has no TLS, and we have"), (None, TLS, "wants TLS")])
def test_tls_on_one_side_alone_is_refused_before_anything_is_sent(
    tx: Contexts | None, rx: Contexts | None, why: str
) -> None:
    made = sides(tx, rx)
    with pytest.raises(TransportUnavailable, match=f"{why}.*or neither"):
        made.tx.connect(made.rx)
    made.close()


def test_a_room_between_such_endpoints_fails_with_a_sentence() -> None:
    only = {"transport_options": {"tcp": {"tls": TLS}}}
    with pair("tcp", tx=only) as (tx, rx):
        sender, receiver = open_pair(tx, rx, 1)
        for handle in (sender, receiver):
            failure = failed(handle)
            assert failure.code is FailureCode.TransportUnavailable
            assert "has no TLS, and we have; give both endpoints" in failure.detail


def test_rooms_over_tls() -> None:
    with pair("tcp", transport_options={"tcp": {"tls": TLS, "streams": 2}}) as (tx, rx):
        transfer(tx, rx, 1, tokens=1000)
        transfer(rx, tx, 2, tokens=1000)
        assert tx.refused()["tcp"] == rx.refused()["tcp"] == {}


def test_a_downgraded_descriptor_gets_no_data(secure: Pair) -> None:
    """A sender without TLS that is told there is none; the port does not speak without."""
    plain = Side(TcpTransport(), filled=True)
    told = {**raw.read_descriptor(secure.rx.transport.descriptor()), "tls": b""}
    link = plain.transport.connect(raw.write_descriptor(told), secure.rx.regions)
    plain.until(lambda: plain.links.get(link.number) == [False], "the refusal")
    refused(secure.rx, "TLS failed")
    untouched(secure.rx)
    plain.close()


# Certificates


def test_a_certificate_of_another_authority_is_refused() -> None:
    made = sides(tx=(TLS[0], client_context("another")))
    assert "certificate verify failed" in down(made)
    refused(made.rx, "TLS failed")
    made.close()


def test_a_certificate_for_another_host_is_refused() -> None:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority().issue_cert("192.0.2.7").configure_cert(server)
    made = sides(rx=(server, TLS[1]))
    assert "certificate verify failed" in down(made)
    made.close()


def test_another_certificate_than_the_descriptors_is_refused() -> None:
    """Whoever has a certificate of the same authority is not thereby this receiver."""
    made, other = sides(), Side(TcpTransport(tls=(server_context(), TLS[1])))
    forged = {**raw.read_descriptor(made.rx.transport.descriptor()), "port": address(other)[1]}
    link = made.tx.transport.connect(raw.write_descriptor(forged), made.rx.regions)
    made.until(lambda: made.tx.links.get(link.number) == [False], "the refusal")
    assert "another certificate" in str(made.tx.seen[-1])
    other.close()
    made.close()


@pytest.mark.parametrize("shows", [True, False])
def test_a_receiver_may_ask_for_the_senders_certificate(shows: bool) -> None:
    server, client = server_context(), client_context()
    authority().configure_trust(server)
    server.verify_mode = ssl.CERT_REQUIRED
    if shows:
        authority().issue_cert("sender.example").configure_cert(client)
    made = sides(tx=(TLS[0], client), rx=(server, TLS[1]))
    if shows:
        made.done(made.tx.connect(made.rx).submit([Write(0, 0, 0, 10)], made.rx.grant()))
    else:
        assert down(made)
        refused(made.rx, "TLS failed")
    made.close()


def test_tls_1_2_works_too() -> None:
    server = server_context()
    server.maximum_version = ssl.TLSVersion.TLSv1_2
    made = sides(rx=(server, TLS[1]))
    made.done(made.tx.connect(made.rx).submit([Write(0, 0, 0, 3 * MIB)], made.rx.grant()))
    made.close()


# On the wire


class Wire:
    """A relay that keeps what passes."""

    def __init__(self, side: Side) -> None:
        self.heard = b""
        self._to = address(side)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self._threads = [threading.Thread(target=self._run)]
        self._threads[0].start()

    def _run(self) -> None:
        caller, _ = self._listening.accept()
        callee = socket.create_connection(self._to)
        back = threading.Thread(target=self._pass, args=(callee, caller))
        back.start()
        self._pass(caller, callee)
        back.join()
        for sock in (caller, callee, self._listening):
            sock.close()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                self.heard += data
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        for thread in self._threads:
            thread.join()


@pytest.mark.parametrize("tls", [TLS, None])
def test_nothing_readable_is_on_the_wire(tls: Contexts | None) -> None:
    made = sides(tls, tls)
    wire = Wire(made.rx)
    descriptor = raw.read_descriptor(made.rx.transport.descriptor())
    link = made.tx.transport.connect(raw.write_descriptor({**descriptor, "port": wire.port}), made.rx.regions)
    token = made.rx.grant()
    made.done(link.submit([Write(0, 0, 0, MIB)], token))
    link.close()
    wire.close()
    secrets = (token, b"KVPOLTCP", bytes(made.tx.arenas[0][:64]))
    assert [secret in wire.heard for secret in secrets] == [tls is None] * 3
    made.close()


def test_a_byte_changed_on_the_wire_ends_the_connection_and_lands_nowhere(secure: Pair) -> None:
    with Secured(secure.rx) as visitor:
        record = bytearray(visitor.sealed(frame(secure.rx.grant(), [entry(0, 100, 0)], b"x" * 100)))
        record[-20] ^= 1
        visitor.socket.sendall(record)
        visitor.is_dropped()
    untouched(secure.rx)


# Strangers


class Secured(Raw):
    """A visitor who speaks TLS by hand, so that records can be cut and spoiled."""

    def __init__(self, side: Side, shake_hands: bool = True) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = TLS[1].wrap_bio(self._incoming, self._outgoing, server_hostname="127.0.0.1")
        super().__init__(side.transport.descriptor(), shake_hands=False)
        self._handshake()
        if shake_hands:
            self.shake_hands()

    def _handshake(self) -> None:
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self.socket.sendall(self._outgoing.read())
                self._incoming.write(self.socket.recv(1 << 16))
            else:
                return self.socket.sendall(self._outgoing.read())

    def sealed(self, data: bytes) -> bytes:
        while data:
            data = data[self._tls.write(data) :]
        return self._outgoing.read()

    def send(self, data: bytes) -> None:
        self.socket.sendall(self.sealed(data))

    def read(self, nbytes: int) -> bytes:
        data = b""
        while len(data) < nbytes:
            try:
                data += self._tls.read(nbytes - len(data))
            except ssl.SSLWantReadError:
                piece = self.socket.recv(1 << 16)
                assert piece, "closed too early"
                self._incoming.write(piece)
        return data


def test_frames_by_hand_over_tls(secure: Pair) -> None:
    with Secured(secure.rx) as visitor:
        visitor.send(frame(secure.rx.grant(), [entry(0, 5, 7)], b"hello"))
        assert visitor.verdict() == 0
    assert secure.rx.arenas[0][7:12] == b"hello"


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (b"GET / HTTP/1.1\r\nHost: kvpoll.example\r\n\r\n", "TLS failed"),
        (b"\x16\x03\x01\x00\x64" + bytes(100), "TLS failed"),
        (b"\x16\x03\x01", "left, or took too long, before the handshake was over"),
        (b"", "left, or took too long, before the handshake was over"),
    ],
)
def test_who_does_not_speak_tls_is_dropped_and_counted(secure: Pair, said: bytes, reason: str) -> None:
    with Raw(secure.rx.transport.descriptor(), shake_hands=False) as visitor:
        visitor.send(said)
        visitor.finish()
        with contextlib.suppress(ConnectionError):
            while visitor.socket.recv(4096):
                pass
    refused(secure.rx, reason)
    untouched(secure.rx)


def test_tls_does_not_stand_in_for_the_secret(secure: Pair) -> None:
    with Secured(secure.rx, shake_hands=False) as visitor:
        ours = raw.hello(visitor.peer["incarnation"])
        visitor.send(ours)
        visitor.send(raw.proof(b"s" * 32, b"kvpoll-tcp sender", ours, visitor.read(raw.HELLO_NBYTES)))
        refused(secure.rx, "does not know our secret")


@pytest.mark.parametrize("trickle", [True, False])
def test_the_handshakes_share_one_deadline(trickle: bool) -> None:
    """A byte now and then, or none, does not keep a place for longer; others are served meanwhile."""
    made = sides(handshake_s=0.4)
    greeting, nothing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        TLS[1].wrap_bio(nothing, greeting, server_hostname="127.0.0.1").do_handshake()
    data = iter(greeting.read()[:-1])
    with Raw(made.rx.transport.descriptor(), shake_hands=False) as visitor:
        visitor.socket.settimeout(0.02)

        def dropped() -> bool:
            try:
                if trickle:
                    visitor.socket.send(bytes([next(data)]))
                return visitor.socket.recv(1) == b""
            except TimeoutError:
                return False
            except ConnectionError:
                return True

        made.done(made.tx.connect(made.rx).submit([Write(0, 0, 0, 1)], made.rx.grant()))
        until(dropped, "the drop")  # StopIteration: all but the last byte were waited for
    made.close()


@pytest.mark.parametrize("cut", [1, 20])
def test_a_record_that_trickles_cannot_hold_up_a_fence(secure: Pair, cut: int) -> None:
    token = secure.rx.grant(Range(0, 0, MIB))
    with Secured(secure.rx) as visitor:
        whole = frame(token, [entry(0, MIB, 0)], b"x" * MIB)
        visitor.send(whole[: 56 + 1000])
        until(lambda: secure.rx.arenas[0][999] == ord("x"), "the first bytes")
        rest = visitor.sealed(whole[56 + 1000 :])
        fence = secure.rx.transport.fence(token)
        pieces = (rest[at : at + cut] for at in range(0, len(rest), cut))

        def fenced() -> bool:
            visitor.socket.sendall(next(pieces))
            secure.pump()
            return fence in secure.rx.fenced

        until(fenced, "the fence")
        secure.rx.arenas[0][:MIB] = bytes(MIB)
        visitor.socket.sendall(b"".join(pieces))
        assert visitor.verdict() == 3
    untouched(secure.rx)


Behave = Callable[[socket.socket], None]


@pytest.mark.parametrize(
    "behave",
    [lambda sock: sock.sendall(b"KVPOLTCP" * 20), lambda sock: sock.shutdown(socket.SHUT_RDWR), lambda _: None],
)
def test_a_receiver_that_does_not_speak_tls_gets_nothing_and_holds_up_nobody(behave: Behave) -> None:
    tx = Side(TcpTransport(tls=TLS, handshake_s=0.4), filled=True)
    rx = Side(TcpTransport(tls=TLS))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        forged = {**raw.read_descriptor(rx.transport.descriptor()), "port": listening.getsockname()[1]}
        link = tx.transport.connect(raw.write_descriptor(forged), rx.regions)
        caller, _ = listening.accept()
        with caller:
            behave(caller)
            tx.until(lambda: tx.links.get(link.number) == [False], "the refusal")
    tx.close()
    rx.close()
