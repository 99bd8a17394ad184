"""All that a transport must do."""

from __future__ import annotations

from kvpoll_fsm.testing.conformance.claims import Claims
from kvpoll_fsm.testing.conformance.crowds import Crowds
from kvpoll_fsm.testing.conformance.fencing import Fencing
from kvpoll_fsm.testing.conformance.forks import Forks
from kvpoll_fsm.testing.conformance.leaks import Leaks
from kvpoll_fsm.testing.conformance.links import Links
from kvpoll_fsm.testing.conformance.processes import Processes
from kvpoll_fsm.testing.conformance.refusing import Refusing
from kvpoll_fsm.testing.conformance.writing import Writing

__all__ = ["TransportSuite"]


class TransportSuite(Leaks, Forks, Processes, Claims, Crowds, Links, Fencing, Refusing, Writing):  # last runs first
    """Subclass it, say how to make the transport, and pytest runs every test on it."""
