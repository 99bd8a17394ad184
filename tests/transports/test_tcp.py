from __future__ import annotations

from kvpoll_tcp import TcpTransport

from tests.transports.suite import TransportSuite


class TestTcp(TransportSuite):
    def make(self) -> TcpTransport:
        return TcpTransport()


class TestTcpWithTwoStreams(TransportSuite):
    def make(self) -> TcpTransport:
        return TcpTransport(streams=2)
