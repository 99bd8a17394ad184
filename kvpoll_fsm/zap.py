"""Whom the control port admits: ZeroMQ asks us by ZAP (RFC 27), and tells us whom it turned away by itself."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import zmq
import zmq.utils.z85
from zmq.utils.monitor import parse_monitor_message

from kvpoll_fsm.refusals import Refusals
from kvpoll_fsm.security import Keys

__all__ = ["UNTRUSTED", "Zap"]

UNTRUSTED = "untrusted key"
UNFINISHED = "left, or took too long, before the handshake was over"
WRONG_SERVER_KEY = "means another public key than ours"
WRONG_MECHANISM = "speaks without keys where keys are wanted, or the reverse"
OTHER_PROTOCOL = "does not speak ZeroMQ as it should"

_ADDRESS = "inproc://zeromq.zap.01"
_MONITOR = "inproc://kvpoll.monitor"
_REASONS: dict[int, str] = {
    int(zmq.PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC): WRONG_SERVER_KEY,
    int(zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH): WRONG_MECHANISM,
}


class Zap:
    """The doorkeeper of one ROUTER. Used by the driver's thread alone."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        router: zmq.Socket[bytes],
        keys: Keys | None,
        refusals: Refusals,
    ) -> None:
        self._router = router
        self._keys = keys
        self._refusals = refusals
        self._questions = context.socket(zmq.REP)
        self._news = context.socket(zmq.PAIR)

    def open(self) -> None:
        """Take up the post; before the ROUTER is bound, so that nobody slips in."""
        self._questions.bind(_ADDRESS)
        # Without bounds: a full queue would stop ZeroMQ's own thread, and closing would wait for it for ever.
        self._news.setsockopt(zmq.RCVHWM, 0)
        events = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
        self._router.monitor(_MONITOR, events)
        self._news.connect(_MONITOR)

    @property
    def sockets(self) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
        """What to wait on."""
        return self._questions, self._news

    def answer(self, arrived: Callable[[zmq.Socket[bytes]], Iterator[list[zmq.Frame]]]) -> None:
        """Answer the questions that have arrived, and count those who were turned away."""
        for question in arrived(self._questions):
            self._questions.send_multipart(self._decide([part.bytes for part in question]))
        for news in arrived(self._news):
            self._note([part.bytes for part in news])

    def close(self) -> None:
        """Leave the post; before the ROUTER is closed."""
        self._router.disable_monitor()
        for socket in self.sockets:
            socket.close(linger=0)

    def _decide(self, question: list[bytes]) -> list[bytes]:
        version, request = (*question, b"", b"")[:2]
        public = zmq.utils.z85.encode(question[6]) if len(question) == 7 and len(question[6]) == 32 else b""
        if self._keys is not None and self._keys.admits(public):
            return [version, request, b"200", b"OK", public, b""]
        place = question[3].decode("utf-8", "replace")[:64] if len(question) > 3 else "?"
        self._refusals.add(UNTRUSTED, f"key={public.decode() or 'none'} from={place}")
        return [version, request, b"400", b"unknown key", b"", b""]

    def _note(self, news: list[bytes]) -> None:
        event = parse_monitor_message(news)
        if event["event"] == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
            self._refusals.add(UNFINISHED, level=logging.INFO)
        elif event["event"] == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
            self._refusals.add(_REASONS.get(event["value"], OTHER_PROTOCOL))
