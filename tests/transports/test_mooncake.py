"""What every transport must do, done by Mooncake."""

from __future__ import annotations

from kvpoll_fsm.testing.conformance import TransportSuite
from kvpoll_mooncake import MooncakeTransport
from tests.transports import mooncake_raw as raw

pytestmark = raw.needs_mooncake


class TestMooncake(TransportSuite):
    def make(self) -> MooncakeTransport:
        return MooncakeTransport(connect_s=3.0)
